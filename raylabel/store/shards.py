"""Output of a work unit and its commit: shards first, then the manifest entry that makes them count.

A shard's file is `[controls/]TABLE/[layer=NN/]part-UNITID-ATTEMPT.parquet`, sorted by neuron, 64 neurons a row group,
zstd. Blobs and temporary files (read by a later step of the same stage only) lie outside the tables.
"""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from raylabel.store.files import Files
from raylabel.store.plan import Unit
from raylabel.tables import PER_UNIT, conform

NEURONS_A_GROUP = 64
ROWS_A_GROUP = 1024
TEMPORARY = "_work"
FORMATS = ("parquet", "arrow")


@dataclass
class Shard:
    """Rows of one table, of one layer where the table is per unit."""

    table: str
    rows: pa.Table
    layer: int | None = None
    controls: bool = False
    part: int | None = None
    """Number of the file where a unit writes several of the same table."""


@dataclass
class Blob:
    """A file that is not a table. `temporary` ones are deleted when the stage is complete."""

    name: str
    data: bytes
    temporary: bool = False
    part: int | None = None
    """Number of the file where a unit that was cut writes several of the same name."""


@dataclass
class Output:
    """Everything a unit produced: shards, blobs, rows for `failures`, and notes for the manifest.

    Shards and blobs may be generators: each is written before the next is made, and they may add to the notes.
    """

    shards: Iterable[Shard] = field(default_factory=list)
    blobs: Iterable[Blob] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


def temporary_name(unit: Unit, attempt: int, name: str) -> str:
    """Where a unit keeps a file for a later step of its stage."""
    return f"{TEMPORARY}/{unit.stage}/{unit.id}-{attempt}-{name}"


def folder(table: str, layer: int | None, controls: bool) -> str:
    """The folder of a table, or of one layer of it."""
    top = f"controls/{table}" if controls else table
    return top if layer is None else f"{top}/layer={layer:02d}"


def commit(
    files: Files, unit: Unit, attempt: int, output: Output, started: float, format: str = "parquet", failed: bool = False
) -> dict[str, Any]:
    """Writes all shards and blobs, then the manifest entry of the unit. Returns the entry."""
    entries = []
    for shard in output.shards:
        rows = conform(shard.rows, shard.table, shard.controls)
        part = "" if shard.part is None else f"-{shard.part:05d}"
        name = f"{folder(shard.table, shard.layer, shard.controls)}/part-{unit.id}-{attempt}{part}.{format}"
        written = files.write(name, encode(rows, shard.table, format))
        entries.append({**vars(written), "rows": rows.num_rows, "table": shard.table, "controls": shard.controls})
    for blob in output.blobs:
        part = "" if blob.part is None else f"{blob.part}."
        name = temporary_name(unit, attempt, part + blob.name) if blob.temporary else blob.name
        entries.append({**vars(files.write(name, blob.data)), "rows": 0, "temporary": blob.temporary, "name": blob.name})
    entry = {
        "unit": unit.id, "stage": unit.stage, "step": unit.step, "key": unit.key, "attempt": attempt,
        "started": started, "ended": time.time(), "host": socket.gethostname(), "files": entries,
        "failures": output.failures, "notes": output.notes, "failed": failed,
    }  # fmt: skip
    files.write(manifest_name(unit), json.dumps(entry).encode())
    return entry


def manifest_name(unit: Unit) -> str:
    """Where the manifest entry of a unit lies."""
    return f"_manifest/{unit.stage}/{unit.id}.json"


def encode(rows: pa.Table, table: str, format: str) -> bytes:
    """The bytes of a shard."""
    buffer = io.BytesIO()
    groups = _groups(rows, table)
    if format == "parquet":
        with pq.ParquetWriter(buffer, rows.schema, compression="zstd") as writer:
            for group in groups:
                writer.write_table(group, row_group_size=max(group.num_rows, 1))
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(buffer, rows.schema, options=options) as writer:
            for group in groups:
                writer.write_table(group)
    return buffer.getvalue()


def _groups(rows: pa.Table, table: str) -> list[pa.Table]:
    if table not in PER_UNIT or rows.num_rows == 0:
        return [rows.slice(at, ROWS_A_GROUP) for at in range(0, rows.num_rows, ROWS_A_GROUP)] or [rows]
    neurons = rows.column("neuron").to_numpy()
    changes = np.flatnonzero(np.diff(neurons)) + 1
    starts = np.concatenate([[0], changes])[::NEURONS_A_GROUP]
    ends = np.append(starts[1:], rows.num_rows)
    return [rows.slice(a, b - a) for a, b in zip(starts, ends, strict=True)]

"""Plain tables of recorded activations: one row a text of a unit.

Columns `layer`, `neuron` (integers), `tokens` (strings), `activations` (numbers, one a token, polarity * activation); if
there are any: `polarity` (1 or -1), `token_ids`, `document` (a string or number that names the document: texts of the
same document stay on the same side of the split), `sampling` (top, quantile, random), `site`. JSONL (.jsonl, .jsonl.gz),
Parquet, or Arrow IPC files and streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from raylabel.sources.reading import BROKEN, Schema, line_pieces, lines, parsed, valid, what
from raylabel.sources.records import Bad, Record, Text

ROWS = 256
"""Rows read at a time."""
GROUPS_BYTES = 64_000_000
NEEDED = ("layer", "neuron", "tokens", "activations")
OPTIONAL = ("polarity", "token_ids", "document", "sampling", "site")
Piece = dict[str, Any]


class Row(Schema):
    """A row of the table."""

    layer: int
    neuron: int
    tokens: list[str]
    activations: list[float]
    polarity: int | None = None
    token_ids: list[int] | None = None
    document: str | int | None = None
    sampling: str | None = None
    site: str | None = None


def pieces(file: Path, kind: str) -> list[Piece]:
    """Ranges of a file that can be read apart. Raises `BROKEN` for one that is not of its kind."""
    if kind == "jsonl":
        return line_pieces(file)
    if kind == "arrow":
        return [{}]
    meta = pq.read_metadata(file)
    found: list[Piece] = []
    size = GROUPS_BYTES
    for group in range(meta.num_row_groups):
        if size >= GROUPS_BYTES:
            found.append({"first": group, "last": group})
            size = 0
        found[-1]["last"] = group + 1
        size += meta.row_group(group).total_byte_size
    return found or [{"first": 0, "last": 0}]


def records(path: str, kind: str, piece: Piece) -> Iterator[Record | Bad]:
    """A record a row."""
    name = Path(path).name
    if kind == "jsonl":
        try:
            for number, data in lines(path, piece["first"], piece["last"], piece["line"]):
                yield _record(data, f"{name}, line {number}")
        except BROKEN as error:
            yield Bad(f"{name}: {what(error)}")
        return
    number = 0
    try:
        for batch, first in _batches(path, kind, piece):
            missing = [column for column in NEEDED if column not in batch.schema.names]
            if missing:
                yield Bad(f"{name}: no column {missing[0]}")
                return
            columns = [column for column in (*NEEDED, *OPTIONAL) if column in batch.schema.names]
            for number, row in enumerate(batch.select(columns).to_pylist(), first):
                yield _record(row, f"{name}, row {number}")
    except (*BROKEN, pa.ArrowException) as error:
        yield Bad(f"{name}, after row {number}: {what(error)}")


def _batches(path: str, kind: str, piece: Piece) -> Iterator[tuple[pa.RecordBatch, int]]:
    """(rows, number of the first)."""
    if kind == "parquet":
        # No memory map: a file that is cut short while it is read would end the process.
        with pq.ParquetFile(path) as file:
            at = sum(file.metadata.row_group(g).num_rows for g in range(piece["first"])) + 1
            for batch in file.iter_batches(ROWS, row_groups=list(range(piece["first"], piece["last"]))):
                yield batch, at
                at += batch.num_rows
        return
    at = 1
    with pa.OSFile(path) as source:
        for whole in _ipc(source):
            whole.validate(full=True)
            for first in range(0, whole.num_rows, ROWS):
                part = whole.slice(first, ROWS)
                yield part, at
                at += part.num_rows


def _ipc(source: Any) -> Iterator[pa.RecordBatch]:
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        source.seek(0)
        yield from pa.ipc.open_stream(source)


def _record(given: Any, place: str) -> Record | Bad:
    row: Row | None = None
    try:
        row = parsed(given, Row) if isinstance(given, bytes) else valid(given, Row)
        if row.polarity not in (None, 1, -1):
            raise ValueError(f"polarity: {row.polarity} is neither 1 nor -1")
    except ValueError as error:
        return Bad(f"{place}: {error}")
    document = None if row.document is None else str(row.document)
    text = Text(row.tokens, row.activations, None, row.token_ids, document, row.sampling)
    return Record(row.layer, row.neuron, [text], row.polarity or 1, row.site, place=place)

"""Exports `results` to one file: csv, jsonl, parquet or arrow."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from raylabel.errors import BadInput

FORMATS = ("csv", "jsonl", "parquet", "arrow")


def export(table: pa.Table, kind: str, path: str) -> None:
    """Writes `table` to `path`; lists become JSON text in csv. BadInput for an unknown kind or a path that cannot be."""
    if kind not in FORMATS:
        raise BadInput(f"--to {kind}: not a format; use one of {', '.join((*FORMATS, 'neuronpedia', 'card'))}")
    place = Path(path)
    if place.is_dir():
        raise BadInput(f"--out {path}: is a folder; give a file name")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow}[kind](table, place)
    except OSError as error:
        raise BadInput(f"--out {path}: cannot be written ({error.strerror})") from None


def _csv(table: pa.Table, place: Path) -> None:
    with place.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table.column_names)
        for row in table.to_pylist():
            writer.writerow([_cell(value) for value in row.values()])


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _jsonl(table: pa.Table, place: Path) -> None:
    with place.open("w", encoding="utf-8") as file:
        for row in table.to_pylist():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _parquet(table: pa.Table, place: Path) -> None:
    pq.write_table(table, place, compression="zstd")


def _arrow(table: pa.Table, place: Path) -> None:
    with pa.OSFile(str(place), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)

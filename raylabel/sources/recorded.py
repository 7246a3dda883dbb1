"""Activations that someone else recorded, in files: `exemplars.source: recorded`.

`exemplars.recorded.path` is a file or a folder of them, `format` one of

- `openai`: NeuronRecord .json files, one a neuron, with or without `dataclass_name` (`sources.openai_records`)
- `saedashboard`: batch-*.json of SAEDashboard (`sources.saedashboard`)
- `delphi`: folders of safetensors, one a hookpoint (`sources.delphi`)
- `jsonl`, `parquet`, `arrow`: plain tables, one row a text of a unit (`sources.plain`)
- `auto`: by suffix and by the keys in the file, for each file apart

A file or row that is not what it should be is a failure that names file and line, row or feature; the rest is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sources import delphi, openai_records, plain, saedashboard
from raylabel.sources.reading import BROKEN, stamp, what
from raylabel.sources.records import Bad, Record, without_model

SUFFIXES = {
    ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
FORMATS = ("auto", "openai", "saedashboard", "delphi", "jsonl", "parquet", "arrow")
FILES_A_PIECE, PIECE_BYTES = 256, 32_000_000
"""Small files are read together."""
BYTES_A_SECOND = 5_000_000
"""A careful guess at what one core reads, checks and packs."""
Piece = dict[str, Any]


def pieces(config: RunConfig) -> list[Piece]:
    """Work units: ranges of large files, small files together, splits of delphi's folders."""
    wanted = config.exemplars.recorded
    if wanted.format not in FORMATS:
        raise BadInput(f"exemplars.recorded.format: no format {wanted.format!r}; formats are {', '.join(FORMATS)}")
    if wanted.path is None:
        raise BadInput("exemplars.recorded.path is required: a file or folder of recorded activations")
    place = Path(wanted.path)
    if not place.exists():
        raise BadInput(f"exemplars.recorded.path: no such file or folder: {wanted.path}")
    found: list[Piece] = []
    for file, kind in _files(place, wanted.format):
        name = str(file.relative_to(place)) if file != place else file.name
        entry = {"format": kind, "name": name, **stamp(file)}
        try:
            ranges = plain.pieces(file, kind) if kind in ("jsonl", "parquet", "arrow") else [{}]
        except (*BROKEN, pa.ArrowException) as error:
            ranges = [{"broken": what(error)}]
        found += [{**entry, **part} for part in ranges]
    if any(piece["format"] == "delphi" for piece in found) and without_model(config):
        raise BadInput("subject.model: delphi's files hold token ids and no text; name the model whose tokens they are")
    return _together(found)


def _files(place: Path, wanted: str) -> list[tuple[Path, str]]:
    """(file, format) in path order; BadInput where there is none."""
    if place.is_file():
        files = [place]
    else:
        files = sorted(f for f in place.rglob("*") if f.is_file() and not f.name.startswith((".", "_")))
    found: list[tuple[Path, str]] = []
    caches = delphi.splits(files)
    for file in files:
        kind = "delphi" if file in caches else _kind(file)
        if kind is None and not (place.is_file() and wanted != "auto"):
            continue
        if wanted == "auto" or kind == wanted or (place.is_file() and kind != "delphi"):
            found.append((file, kind or wanted if wanted == "auto" else wanted))
    # A .json file of another kind beside the caches is their configuration.
    if caches and wanted == "auto":
        found = [(file, kind) for file, kind in found if kind == "delphi"]
    if not found:
        asked = "recorded activations" if wanted == "auto" else f"the format {wanted}"
        raise BadInput(f"exemplars.recorded.path: no file of {asked} in {place}; formats are {', '.join(FORMATS)}")
    return found


def _kind(file: Path) -> str | None:
    """The format of a file by its suffix, of a .json file by its keys; None for what is no recording."""
    for suffix, kind in SUFFIXES.items():
        if file.name.endswith(suffix):
            return kind
    if file.suffix != ".json":
        return None
    keys = saedashboard.top_keys(file, ("neuron_id", "most_positive_activation_records", "features", "feature_index"))
    if keys & {"neuron_id", "most_positive_activation_records"}:
        return "openai"
    return "saedashboard" if "features" in keys else None


def _together(found: list[Piece]) -> list[Piece]:
    """Pieces {files: [...]}: what is small together."""
    made: list[Piece] = []
    size = 0
    for entry in found:
        own = min(entry["bytes"], PIECE_BYTES)
        if not made or size + own > PIECE_BYTES or len(made[-1]["files"]) >= FILES_A_PIECE:
            made.append({"files": []})
            size = 0
        made[-1]["files"].append(entry)
        size += own
    return made


def records(config: RunConfig, piece: Piece) -> Iterator[Record | Bad]:
    """What a piece holds, file after file."""
    base = Path(config.exemplars.recorded.path or "")
    for entry in piece["files"]:
        path = str(base if base.is_file() else base / entry["name"])
        kind = entry["format"]
        if "broken" in entry:
            yield Bad(f"{entry['name']}: {entry['broken']}")
        elif kind == "openai":
            yield from openai_records.records(path)
        elif kind == "saedashboard":
            yield from saedashboard.records(path)
        elif kind == "delphi":
            yield from delphi.records(path, config.exemplars)
        else:
            yield from plain.records(path, kind, entry)


def estimate(config: RunConfig) -> dict[str, Any]:
    """Files, bytes and seconds of reading, by size alone."""
    found = [entry for piece in pieces(config) for entry in piece["files"]]
    sizes = {entry["name"]: entry["bytes"] for entry in found}
    kinds = {entry["format"] for entry in found}
    return {
        "format": ", ".join(sorted(kinds)), "files": len(sizes), "bytes": sum(sizes.values()), "requests": 0,
        "reading seconds": round(sum(sizes.values()) / BYTES_A_SECOND, 1),
    }  # fmt: skip

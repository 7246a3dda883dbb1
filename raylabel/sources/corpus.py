"""Text to scan: documents from files, folders, `datasets` and the standard library, in a fixed order.

`chunks(path, column)` cuts a corpus into pieces that can be read apart; `documents(chunk, column)` reads one. Files
come in path order, rows in file order. A .txt file is cut at form feeds and `<|endoftext|>` marks where it has any;
else a long one is cut at blank lines into documents of about 4,000 characters, so that one big file still gives
documents enough to split and to resample. Everything that is wrong is a BadInput that names the file and the row.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from raylabel.errors import BadInput

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
CHUNK_BYTES = 4_000_000
HASHED = 64_000_000
"""Files of at most this many bytes are known by their content."""
DOCUMENT_CHARACTERS = 4_000
_MARKS = re.compile(r"<\|endoftext\|>|\f")
_BLANK = re.compile(r"\n[ \t]*\n")
Chunk = dict[str, Any]


def chunks(path: str, column: str) -> list[Chunk]:
    """Pieces of the corpus at `path`, in order, as plain values; each carries what tells a changed file apart."""
    if path == "stdlib":
        import sys

        return [{"kind": "stdlib", "python": sys.version.split()[0]}]
    place = Path(path)
    if place.is_dir() and any((place / name).exists() for name in ("state.json", "dataset_dict.json")):
        return [{"kind": "datasets", "path": str(place), "state": _state(place)}]
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        if not files:
            raise BadInput(f"exemplars.corpus.path: no {' '.join(SUFFIXES)} file in {path}")
        return _file_chunks(files)
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise BadInput(f"exemplars.corpus.path: {path} is none of {' '.join(SUFFIXES)}")
        return _file_chunks([place])
    if _looks_like_path(path):
        raise BadInput(f"exemplars.corpus.path: no such file or folder: {path}")
    return [{"kind": "hub", "path": path}]


def documents(chunk: Chunk, column: str) -> Iterator[str]:
    """The texts of one piece; BadInput names the file and row of what cannot be read."""
    if chunk["kind"] == "stdlib":
        from raylabel.demo.stdlib import documents as standard_library

        # In the order of a hash: any budget of tokens takes a fair share of all modules.
        named = sorted(standard_library(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
        yield from (text for _, text in named)
    elif chunk["kind"] in ("datasets", "hub"):
        yield from _datasets(chunk, column)
    else:
        for file in chunk["files"]:
            yield from _file(Path(file["path"]), column)


def _looks_like_path(path: str) -> bool:
    return path.startswith(("/", ".", "~")) or path.endswith(SUFFIXES) or path.count("/") > 1 or "\\" in path


def _state(place: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(place.rglob("*.json")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def _file_chunks(files: list[Path]) -> list[Chunk]:
    made: list[Chunk] = []
    size = CHUNK_BYTES + 1
    for file in files:
        status = os.stat(file)
        entry = {"path": str(file), "bytes": status.st_size, "mark": _mark(file, status)}
        if size + status.st_size > CHUNK_BYTES:
            made.append({"kind": "files", "files": []})
            size = 0
        made[-1]["files"].append(entry)
        size += status.st_size
    return made


def _mark(file: Path, status: os.stat_result) -> str:
    """Tells a changed file: a hash of its content, or of a large one the time of its last change."""
    if status.st_size > HASHED:
        return str(status.st_mtime_ns)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _file(file: Path, column: str) -> Iterator[str]:
    if file.suffix == ".parquet":
        yield from _parquet(file, column)
    elif file.suffix == ".jsonl":
        for number, line in enumerate(_text(file).split("\n"), 1):
            if line.strip():
                yield _value(_json(line, f"{file}, line {number}"), column, f"{file}, line {number}")
    elif file.suffix == ".json":
        tree = _json(_text(file), str(file))
        rows = tree if isinstance(tree, list) else tree.get(column) if isinstance(tree, dict) else None
        if not isinstance(rows, list):
            raise BadInput(f"{file}: expected a JSON list of texts, or of objects with the key {column!r}")
        for number, row in enumerate(rows, 1):
            yield _value(row, column, f"{file}, row {number}")
    else:
        yield from cut_text(_text(file))


def cut_text(text: str) -> list[str]:
    """The documents of a text file's content."""
    if _MARKS.search(text):
        return [part for part in _MARKS.split(text) if part.strip()]
    made: list[str] = []
    at = 0
    for blank in _BLANK.finditer(text):
        if blank.end() - at >= DOCUMENT_CHARACTERS:
            made.append(text[at : blank.end()])
            at = blank.end()
    rest = text[at:]
    if made and len(rest) < DOCUMENT_CHARACTERS // 4:
        made[-1] += rest
    elif rest.strip():
        made.append(rest)
    return made


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise BadInput(f"{where}: not valid JSON") from None


def _value(row: Any, column: str, where: str) -> str:
    value = row.get(column) if isinstance(row, dict) else row
    if not isinstance(value, str):
        raise BadInput(f"{where}: no text under {column!r}; name the key with exemplars.corpus.column")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where}: an escape names half a character (a lone surrogate); mend the JSON") from None
    return value


def _parquet(file: Path, column: str) -> Iterator[str]:
    try:
        opened = pq.ParquetFile(file)
    except Exception as error:
        raise BadInput(f"{file}: not a parquet file ({type(error).__name__})") from None
    if column not in opened.schema_arrow.names:
        raise BadInput(f"{file}: no column {column!r}; name it with exemplars.corpus.column")
    row = 0
    batches = opened.iter_batches(columns=[column])
    while True:
        try:
            batch = next(batches, None)
            values = batch.column(0).to_pylist() if batch is not None else None
        except (OSError, ValueError) as error:
            raise BadInput(f"{file}: cannot be read after row {row} ({type(error).__name__})") from None
        if values is None:
            return
        for value in values:
            row += 1
            yield _value(value if value is not None else "", column, f"{file}, row {row}")


def _datasets(chunk: Chunk, column: str) -> Iterator[str]:
    name, saved = chunk["path"], chunk["kind"] == "datasets"
    what = "a folder saved by `datasets`;" if saved else "no file or folder; as the hub name of a dataset"
    try:
        import datasets
    except ImportError:
        raise BadInput(f"exemplars.corpus.path: {name!r} is {what} it needs `pip install raylabel[datasets]`") from None
    try:
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, streaming=True)
    except Exception as error:
        raise BadInput(f"exemplars.corpus.path: {name!r} is {what} it cannot be loaded ({type(error).__name__})") from None
    if isinstance(loaded, dict):
        loaded = loaded.get("train") or next(iter(loaded.values()))
    for number, row in enumerate(loaded, 1):
        yield _value(row, column, f"{name}, row {number}")

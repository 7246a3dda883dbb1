"""What the readers of files share: pieces of files, lines, and words for what is wrong with a row."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

PIECE_BYTES = 32_000_000
HASHED = 64_000_000
"""Files of at most this many bytes are known by their content."""
LONGEST_LINE = 256_000_000
BLOCK = 1 << 20
Model = TypeVar("Model", bound=BaseModel)


class Schema(BaseModel):
    """A row: types as they are written, other keys passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def stamp(file: Path) -> dict[str, Any]:
    """What tells a changed file apart: its size and a hash of its content, or of a large one the time of its change."""
    status = os.stat(file)
    if status.st_size > HASHED:
        return {"bytes": status.st_size, "mark": str(status.st_mtime_ns)}
    with open(file, "rb") as opened:
        return {"bytes": status.st_size, "mark": hashlib.file_digest(opened, "sha256").hexdigest()[:16]}


def line_pieces(file: Path, size: int = PIECE_BYTES) -> list[dict[str, Any]]:
    """Cuts a file of lines at line ends: {first, last} bytes and the number of the first line; a .gz file stays whole."""
    if file.suffix == ".gz":
        return [{"first": 0, "last": None, "line": 1}]
    found: list[dict[str, Any]] = []
    first = at = 0
    line = started = 1
    with open(file, "rb") as opened:
        while block := opened.read(BLOCK):
            begin = 0
            while (end := block.find(b"\n", begin)) >= 0:
                line += 1
                begin = end + 1
                if at + begin - first >= size:
                    found.append({"first": first, "last": at + begin, "line": started})
                    first, started = at + begin, line
            at += len(block)
    if at > first or not found:
        found.append({"first": first, "last": at, "line": started})
    return found


def lines(path: str, first: int = 0, last: int | None = None, line: int = 1) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a .jsonl or .jsonl.gz file's bytes [first, last), without empty lines.

    Raises OSError, EOFError or zlib.error where the file is cut short or is no gzip, ValueError for a line that is too long.
    """
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as opened:
        opened.seek(first)
        yield from lines_of(opened, None if last is None else last - first, line)


def lines_of(opened: BinaryIO | gzip.GzipFile, size: int | None = None, line: int = 1) -> Iterator[tuple[int, bytes]]:
    """The same of an open file, up to `size` bytes from where it stands."""
    at = 0
    while size is None or at < size:
        text = opened.readline(LONGEST_LINE)
        if not text:
            return
        if len(text) == LONGEST_LINE:
            raise ValueError(f"line {line} is longer than {LONGEST_LINE} bytes")
        at += len(text)
        if text.strip():
            yield line, text
        line += 1


BROKEN = (OSError, EOFError, zlib.error, ValueError)
"""What reading a file that is not what its name says may raise."""


def parsed(data: bytes, model: type[Model]) -> Model:
    """A line of JSON as a row; ValueError says in a few words what is wrong with it."""
    try:
        tree = json.loads(data)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    return valid(tree, model)


def valid(tree: Any, model: type[Model]) -> Model:
    """A tree of plain values as a row; ValueError says what is wrong with it."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the row"
        raise ValueError(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def what(error: BaseException) -> str:
    """An error in a few words."""
    return f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)

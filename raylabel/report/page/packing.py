"""Data files beside the pages: JavaScript that a `<script>` tag loads, since a page opened from disk may not fetch.

A file calls `raylabel.take(name, data)`, `data` being base64 of gzip: no foreign text stands in it as it is. What is
packed is JSON, or columns: uint32 length of a JSON header, the header, then each column at a multiple of 8 bytes,
little-endian. The header has `rows` and `columns`: [{name, type, at, bytes}], `type` one of f32, i32, u8 and text; a
text column is UTF-8 with a line a row.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"float32": "f32", "int32": "i32", "uint8": "u8"}
LEVEL = 5


def pack_columns(rows: int, columns: dict[str, np.ndarray | list[str]]) -> bytes:
    """Columns of `rows` values each: float32, int32 and uint8 arrays, or texts without line breaks."""
    described, parts, at = [], [], 0
    for name, values in columns.items():
        if isinstance(values, np.ndarray):
            kind, data = TYPES[values.dtype.name], np.ascontiguousarray(values).tobytes()
        else:
            # A lone surrogate cannot be written as UTF-8.
            kind, data = "text", "\n".join(values).encode("utf-8", "replace")
        if len(values) != rows:
            raise ValueError(f"column {name} has {len(values)} of {rows} rows")
        described.append({"name": name, "type": kind, "at": at, "bytes": len(data)})
        parts.append(data + b"\0" * (-len(data) % 8))
        at += len(parts[-1])
    header = json.dumps({"rows": rows, "columns": described}).encode()
    header += b" " * (-(len(header) + 4) % 8)
    return struct.pack("<I", len(header)) + header + b"".join(parts)


def write_packed(folder: Path, name: str, data: bytes) -> int:
    """Writes `data` to folder/NAME.js and returns the bytes of the file."""
    text = base64.b64encode(gzip.compress(data, LEVEL, mtime=0)).decode()
    place = folder / f"{name}.js"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.write_text(f'raylabel.take("{name}","{text}")\n', encoding="ascii")


def write_json(folder: Path, name: str, tree: Any) -> int:
    """The same of a JSON document; what is not a number becomes null."""
    return write_packed(folder, name, json.dumps(tree, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))


def unpack(text: str) -> bytes:
    """What `write_packed` was given, from the text of its file."""
    return gzip.decompress(base64.b64decode(text.split('","')[1].rstrip('")\n')))


def unpack_columns(data: bytes) -> dict[str, Any]:
    """What `pack_columns` was given, texts as lists."""
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    found: dict[str, Any] = {}
    for column in header["columns"]:
        raw = data[4 + length + column["at"] :][: column["bytes"]]
        if column["type"] == "text":
            found[column["name"]] = raw.decode().split("\n") if header["rows"] else []
        else:
            found[column["name"]] = np.frombuffer(raw, {v: k for k, v in TYPES.items()}[column["type"]])
    return found

"""Bytes of Arrow tables and of named arrays: how steps of a stage hand results on."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.ipc


def table_bytes(table: pa.Table) -> bytes:
    """An Arrow file, zstd."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_table(data: bytes) -> pa.Table:
    """What `table_bytes` was given."""
    return pa.ipc.open_file(pa.BufferReader(data)).read_all()


def array_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """What `array_bytes` was given; never unpickles."""
    with np.load(io.BytesIO(data), allow_pickle=False) as loaded:
        return {name: loaded[name] for name in loaded.files}


def lists(values: np.ndarray, lengths: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A list array whose rows are consecutive pieces of `values`."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind))

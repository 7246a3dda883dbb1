"""Samples as padded batches and as token strings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.store.rundir import RunDir


@dataclass(frozen=True)
class Samples:
    """A run of samples.

    Attributes:
        numbers, documents: [N] int64.
        explain: [N] bool.
        ids: flat int32 token ids; sample i has ids[offsets[i]:offsets[i + 1]], BOS included.
        ends: flat end of each token in the sample's text.
        texts: [N].
        round_trips: [N] bool.
    """

    numbers: np.ndarray
    documents: np.ndarray
    explain: np.ndarray
    ids: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray
    texts: list[str]
    round_trips: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each sample."""
        return np.diff(self.offsets)

    def padded(self, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, T] int64 padded on the right, lengths [B]) of the given rows; a row -1 is empty."""
        lengths = np.where(rows < 0, 0, self.lengths[rows])
        ids = np.full((len(rows), max(int(lengths.max()), 1)), pad_id, dtype=np.int64)
        for i, row in enumerate(rows):
            if row >= 0:
                ids[i, : lengths[i]] = self.ids[self.offsets[row] : self.offsets[row + 1]]
        return ids, lengths

    def strings(self, rows: np.ndarray, names: dict[int, str]) -> tuple[pa.Array, np.ndarray]:
        """(flat token strings, first position of each sample's strings) of the given rows.

        The strings of a sample join to its text, but for tokens without text, such as a prepended BOS, which stand as
        their name.
        """
        found: list[str] = []
        starts = np.zeros(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            starts[i] = len(found)
            a, b = self.offsets[row], self.offsets[row + 1]
            text, at = self.texts[row], 0
            for token, end in zip(self.ids[a:b].tolist(), self.ends[a:b].tolist(), strict=True):
                found.append(text[at:end] or names.get(token, ""))
                at = max(at, end)
        return pa.array(found, pa.string()), starts


def load_samples(run: RunDir, first: int | None = None, last: int | None = None, among: Any = None) -> Samples:
    """Samples [first, last), or those whose number is in `among`, or all, in the order of their numbers."""
    condition = None
    if among is not None:
        condition = pc.field("sample").isin(pa.array(np.unique(among), pa.int64()))
    elif first is not None and last is not None:
        condition = (pc.field("sample") >= first) & (pc.field("sample") < last)
    table = run.table("samples", filter=condition).sort_by("sample").combine_chunks()
    ids = _flat(table, "token_ids")
    return Samples(
        numbers=table.column("sample").to_numpy(),
        documents=table.column("document").to_numpy(),
        explain=pc.equal(table.column("split"), "explain").to_numpy(),
        ids=ids[0],
        ends=_flat(table, "ends")[0],
        offsets=ids[1],
        texts=table.column("text").to_pylist(),
        round_trips=np.array(table.column("round_trips").to_pylist(), dtype=bool),
    )


def _flat(table: pa.Table, column: str) -> tuple[np.ndarray, np.ndarray]:
    chunks = table.column(column)
    array = pa.concat_arrays(chunks.chunks) if chunks.num_chunks != 1 else chunks.chunk(0)
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return array.flatten().to_numpy(zero_copy_only=False), offsets

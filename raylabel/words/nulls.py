"""How similar random sets are: p-values for the mean pairwise cosine of words or phrases matched in size and frequency.

A null draw has, for each frequency band, one random sequence of vocabulary words (or of corpus phrases by their centre
word) with distinct stems. A unit with c_b members in band b is compared with the first c_b of each sequence: the mean
cosine of n unit vectors grows with the squared length of their sum, so cumulative sums serve units of every size. The
draws depend on the seed alone, and every unit meets the same ones, in the same order.

Draws stop for a unit after 20 that reach it (Besag & Clifford 1991): then p = 20 / draws; else, after 9,999,
p = (1 + reached) / 10,000. Both are valid: P(p <= x) <= x for a unit that is itself a draw.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from raylabel.words.background import Background

DRAWS, ENOUGH = 9_999, 20
CHUNKS = [0, 64, 256, *range(768, DRAWS, 512), DRAWS]
# Below this many stems a band is drawn by a race of all its stems, above it by rejection of stems seen before.
RACE = 160

Kind = Literal["words", "phrases"]


class _Pool:
    """The members of one band: unit vectors [n, dim], sorted by stem."""

    def __init__(self, vectors: np.ndarray, stems: np.ndarray) -> None:
        order = np.argsort(stems, kind="stable")
        self.vectors = np.ascontiguousarray(vectors[order])
        _, self.first, self.code, self.sizes = np.unique(
            stems[order], return_index=True, return_inverse=True, return_counts=True
        )

    def sequences(self, rng: np.random.Generator, length: int, draws: int) -> np.ndarray:
        """int64 [length, draws]: members with distinct stems, uniform among those whose stem is new.

        A longer call continues the sequences of a shorter one. With fewer than `length` stems they start again.
        """
        distinct = min(length, len(self.sizes))
        drawn = self._race(rng, draws) if len(self.sizes) <= RACE else self._reject(rng, distinct, draws)
        return np.resize(drawn[:distinct], (length, draws))

    def _race(self, rng: np.random.Generator, draws: int) -> np.ndarray:
        arrival = rng.standard_exponential((draws, len(self.sizes))) / self.sizes
        stems = np.argsort(arrival, axis=1).T
        within = rng.random(stems.shape)
        return self.first[stems] + (within * self.sizes[stems]).astype(np.int64)

    def _reject(self, rng: np.random.Generator, length: int, draws: int) -> np.ndarray:
        drawn = np.zeros((0, draws), np.int64)
        while True:
            drawn = np.concatenate([drawn, rng.integers(len(self.code), size=(length // 4 + 8, draws))])
            if len(drawn) < length:
                continue
            codes = self.code[drawn]
            order = np.argsort(codes, axis=0, kind="stable")
            ranked = np.take_along_axis(codes, order, axis=0)
            new = np.ones(drawn.shape, bool)
            np.put_along_axis(new, order[1:], ranked[1:] != ranked[:-1], axis=0)
            place = np.cumsum(new, axis=0)
            if place[-1].min() < length:
                continue
            out = np.empty((length, draws), np.int64)
            row, column = np.nonzero(new & (place <= length))
            out[place[row, column] - 1, column] = drawn[row, column]
            return out


class Nulls:
    """The null draws of a run: `p_values` for any units, the same whatever units are asked for together."""

    def __init__(self, background: Background, seed: int) -> None:
        self._seed = seed
        self._pools: dict[Kind, list[_Pool]] = {
            "words": _pools(
                background.joined_matrix, background.stems, np.repeat(np.arange(background.bands), np.diff(background.edges)),
                background.bands,
            ),
            "phrases": _pools(
                background.null_vectors, background.null_stems, background.null_bands, background.bands
            ),
        }  # fmt: skip
        self._sequences: dict[tuple[Kind, int, int], np.ndarray] = {}

    def p_values(self, kind: Kind, squares: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """float64 [units]: share of null draws that are at least as similar.

        `squares` float [units] are the squared lengths of the sums of each unit's vectors (of length 1), `counts` int
        [units, bands] how many of these are in each band. Units without members get 1, as do all units where there is
        nothing to draw.
        """
        p = np.ones(len(squares))
        profiles, member = np.unique(counts, axis=0, return_inverse=True)
        member = member.reshape(-1)
        running = np.asarray(counts.any(axis=1) & bool(self._pools[kind]))
        reached = np.zeros(len(p), np.int64)
        # Sets that are equal must count as reached whatever the order of their sum.
        limit = squares - 1e-5 * np.maximum(counts.sum(axis=1), 1)
        for chunk, low in enumerate(CHUNKS[:-1]):
            active = np.unique(member[running])
            if not len(active):
                break
            sums = self._sums(kind, chunk, profiles[active].max(axis=0))
            for profile in active:
                units = np.flatnonzero((member == profile) & running)
                null = _squares([sums[b][c - 1] for b, c in enumerate(profiles[profile]) if c])
                totals = reached[units, None] + np.cumsum(null[None, :] >= limit[units, None], axis=1)
                reached[units] = totals[:, -1]
                done = totals[:, -1] >= ENOUGH
                p[units[done]] = ENOUGH / (low + 1 + np.argmax(totals[done] >= ENOUGH, axis=1))
                running[units[done]] = False
        p[running] = (1 + reached[running]) / (1 + DRAWS)
        return p

    def _sums(self, kind: Kind, chunk: int, longest: np.ndarray) -> list[np.ndarray]:
        """For each band, float32 [longest, draws, dim]: sums of the first 1, 2, … members of each sequence."""
        sums = []
        for band, (pool, length) in enumerate(zip(self._pools[kind], longest.tolist(), strict=True)):
            total = pool.vectors[self._drawn(kind, band, chunk, length)]
            for i in range(1, length):
                total[i] += total[i - 1]
            sums.append(total)
        return sums

    def _drawn(self, kind: Kind, band: int, chunk: int, length: int) -> np.ndarray:
        key = kind, band, chunk
        kept = self._sequences.get(key)
        if kept is None or len(kept) < length:
            rng = np.random.default_rng([self._seed, 1 + (kind == "phrases"), band, chunk])
            draws = CHUNKS[chunk + 1] - CHUNKS[chunk]
            kept = self._pools[kind][band].sequences(rng, max(length, 20), draws).astype(np.int32)
            self._sequences[key] = kept
        return kept[:length]


@lru_cache(maxsize=2)
def nulls_of(background: Background, seed: int) -> Nulls:
    """The null draws for `background`, kept from call to call."""
    return Nulls(background, seed)


def _pools(vectors: np.ndarray, stems: np.ndarray, bands: np.ndarray, n_bands: int) -> list[_Pool]:
    """One pool a band; a band with nothing to draw draws from all. Empty if there is nothing at all."""
    present = vectors.any(axis=1)
    if not present.any():
        return []
    pools = []
    for band in range(n_bands):
        here = present & (bands == band)
        rows = here if here.any() else present
        pools.append(_Pool(vectors[rows], stems[rows]))
    return pools


def _squares(parts: list[np.ndarray]) -> np.ndarray:
    total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return np.einsum("nd,nd->n", total, total)

"""Controls that are functions of text alone: nulls, which mean nothing, and planted units, whose meaning is known.

A unit's activation at a position depends on the tokens up to it, as that of a real unit does. `TextUnits` gives it for a
batch of samples and for single windows of a variant, and both agree exactly. Each unit has the distribution of a real
unit of its layer, as the values at GRID quantiles of the pilot:

- a null takes, at every position, the quantile that a hash of the last LAST tokens names;
- a planted unit does so too, but keeps the highest TAIL of the distribution for the words it fires on. Which of these
  values a word gets is fixed by how the sample begins, so that nothing near the word changes it.

What a planted unit fires on is its `Plant`; `planting.py` chooses it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from raylabel.stages.hashing import hashed, uniform
from raylabel.words.segment import spans

LAST = 5
"""Tokens that decide a value that means nothing: fewer come again and again, and a unit that fires on them means them."""
TAIL = 0.002
"""Share of a unit's distribution that is kept for what it was planted to fire on."""
BEGINNING = 4
"""Tokens of a sample's beginning that decide how strong its words are."""
GRID = np.concatenate([np.linspace(0, 0.98, 50), 1 - np.geomspace(0.02, 1e-5, 40)[1:], [1.0]])
"""Quantiles at which a distribution is kept."""
NULL, PLANTED = TEXT_CONTROLS = ("null", "planted")


@dataclass(frozen=True)
class Plant:
    """What a unit fires on; no stage but the calibration may read it.

    Attributes:
        control, neuron: which unit.
        difficulty: what makes it hard, a key of `planting.DIFFICULTIES`; `null` for nulls.
        lists: names of the lists its words come from.
        words: casefolded, at full strength; weak: at half strength.
        cue: fires on whatever word stands behind this one.
        noise: share of positions at which it fires for no reason.
    """

    control: str
    neuron: int
    difficulty: str = NULL
    lists: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    weak: tuple[str, ...] = ()
    cue: str | None = None
    noise: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For a file; `Plant(**tree)` reads it."""
        return asdict(self)


class Read(NamedTuple):
    """A word as far as it can be read at a token: where, what, the word before it, and whether the token begins it."""

    position: int
    word: str
    before: str
    begins: bool


@dataclass(frozen=True)
class Reader:
    """Reads token ids as words. `pieces` holds the text of each id, nothing for special tokens."""

    pieces: list[str]

    def __call__(self, ids: Sequence[int]) -> list[Read]:
        """What stands at each position, casefolded; a token may hold several words, and a word several tokens."""
        parts = [self.pieces[i] for i in ids]
        ends = list(accumulate(map(len, parts)))
        text = "".join(parts)
        found, before = [], ""
        for start, end in spans(text):
            first = at = bisect_right(ends, start)
            while True:
                found.append(Read(at, text[start : min(ends[at], end)].casefold(), before, at == first))
                if ends[at] >= end:
                    break
                at += 1
            before = text[start:end].casefold()
        return found


def pieces(tokenizer: Tokenizer, special_ids: Sequence[int]) -> list[str]:
    """The text that each token id adds behind another token."""
    size = max(tokenizer.get_vocab().values()) + 1
    special = set(special_ids)
    anchor = next(i for i in range(size) if i not in special and tokenizer.decode([i], skip_special_tokens=False).isalpha())
    before = len(tokenizer.decode([anchor], skip_special_tokens=False))
    pairs = [[anchor, i] if i not in special else [anchor] for i in range(size)]
    return [text[before:] for text in tokenizer.decode_batch(pairs, skip_special_tokens=False)]


@dataclass(frozen=True, eq=False)
class TextUnits:
    """The text controls of a layer.

    Attributes:
        plants: of each unit, nulls first.
        quantiles: [n, len(GRID)], the distribution of each unit, ascending.
        salts: [n] uint64, what makes the hashes of each unit its own.
    """

    plants: list[Plant]
    quantiles: np.ndarray
    salts: np.ndarray
    _table: dict[str, list[tuple[int, float]]] = field(init=False, repr=False)
    _cues: dict[str, list[int]] = field(init=False, repr=False)
    _planted: np.ndarray = field(init=False, repr=False)
    _noise: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        table: dict[str, list[tuple[int, float]]] = {}
        cues: dict[str, list[int]] = {}
        for u, plant in enumerate(self.plants):
            for word in plant.weak:
                table.setdefault(word, []).append((u, 0.5))
            for word in plant.words:
                table.setdefault(word, []).append((u, 1.0))
            if plant.cue is not None:
                cues.setdefault(plant.cue, []).append(u)
        known = {
            "_table": table, "_cues": cues, "quantiles": self.quantiles.astype(np.float64),
            "_planted": np.array([plant.control == PLANTED for plant in self.plants], bool),
            "_noise": np.array([plant.noise for plant in self.plants]),
        }  # fmt: skip
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def batch(self, ids: np.ndarray, lengths: np.ndarray, reads: Sequence[list[Read]]) -> np.ndarray:
        """float32 [B, T, n] for ids [B, T]; what stands behind a sample's end means nothing."""
        found = np.zeros((*ids.shape, len(self.plants)), np.float32)
        everyone = np.arange(len(self.plants))
        for b, length in enumerate(lengths.tolist()):
            if length:
                found[b, :length] = self.values(ids[b, :length], reads[b], everyone, 0, length)
        return found

    def values(self, ids: np.ndarray, reads: list[Read], units: np.ndarray, first: int, last: int) -> np.ndarray:
        """float32 [last - first, m] of some units at the positions [first, last) of a text with these ids [T]."""
        near = np.arange(first, last)[:, None] - np.arange(LAST)
        context = hashed(*(np.where(near[:, k] >= 0, ids[np.maximum(near[:, k], 0)], -1) for k in range(LAST)))
        salts = self.salts[units]
        chance = uniform(hashed(context[:, None], salts))
        found = self._quantile(units, np.where(self._planted[units], chance * (1 - TAIL), chance))
        noise = self._noise[units]
        if noise.any():
            by_chance = uniform(hashed(context[:, None], salts, np.uint64(1))) < noise
            found = np.where(by_chance, self._quantile(units, 1 - TAIL * chance), found)
        for position, column, strength in self._hits(reads, units, first, last):
            beginning = (ids[i] if i < min(len(ids), position + 1) else -1 for i in range(1, 1 + BEGINNING))
            level = 1 - TAIL * uniform(hashed(*beginning, salts[column]))
            at = position - first, column
            found[at] = max(found[at], strength * self._quantile(units[[column]], level)[0])
        return found.astype(np.float32)

    def _hits(self, reads: list[Read], units: np.ndarray, first: int, last: int) -> list[tuple[int, int, float]]:
        """(position, column, strength) of what some units were planted to fire on."""
        columns = {int(u): c for c, u in enumerate(units.tolist())}
        found = []
        for read in reads:
            if first <= read.position < last:
                for u, strength in self._table.get(read.word, ()):
                    if u in columns:
                        found.append((read.position, columns[u], strength))
                if read.begins:
                    found += [(read.position, columns[u], 1.0) for u in self._cues.get(read.before, ()) if u in columns]
        return found

    def _quantile(self, units: np.ndarray, level: np.ndarray) -> np.ndarray:
        """float64 [.., m]: the values of units [m] at levels [.., m] of their distributions."""
        at = np.clip(np.searchsorted(GRID, level, side="right") - 1, 0, len(GRID) - 2)
        share = (level - GRID[at]) / (GRID[at + 1] - GRID[at])
        low, high = self.quantiles[units, at], self.quantiles[units, at + 1]
        return low + (high - low) * share

"""Chooses the text controls of a layer: which words each planted unit fires on, and whose distribution each control has.

Everything is drawn by seed, layer and unit: the same on every machine. Words are taken from lists, as far as they occur
in the corpus often enough; how hard a unit is made is its `difficulty`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from raylabel.errors import BadInput
from raylabel.stages.textual import GRID, NULL, PLANTED, Plant, TextUnits
from raylabel.words.families import stem
from raylabel.words.segment import words

DIFFICULTIES = {
    "forms": "token", "clean": "concept", "cue": "context", "few": "concept", "rare": "concept", "noise": "concept",
    "diluted": "concept", "distractor": "concept", "two lists": "concept",
}  # fmt: skip
"""What makes a planted unit hard, and the evidence that is right for it. Units take them in turn.

forms: one word with its inflections. clean: a list. cue: whatever stands behind one word. few: 3 to 5 words of a list.
rare: the rarest words of a list. noise: a list, and NOISE of what it fires on is anything. diluted: half of a list.
distractor: a list, and another one at half strength. two lists: both at full strength.
"""
NOISE = 0.2
LEAST_COUNT, LEAST_WORDS, MOST_WORDS, LEAST_TOTAL = 5, 8, 60, 60
"""A list serves with so many words, of different stems, that occur so often each and so often in all."""
FEW = (3, 5)
LEAST_RARE = 4
RARE_TOTAL = 30
CUE_COUNT = 60
"""A cue occurs at least so often, and no oftener than one word in a thousand: behind a common word, anything stands."""
STRONG = 0.75
"""Distributions are those of units whose pilot maximum is at least this share of the PERCENTILE of the layer's: units that
are too weak for `verify.normalised` would test that threshold and nothing else."""
PERCENTILE = 99

log = logging.getLogger(__name__)


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each casefolded word occurs."""
    return Counter(word.casefold() for text in texts for word in words(text))


def plant(lists: dict[str, list[str]], counts: Counter[str], n: int, seed: int, layer: int) -> list[Plant]:
    """`n` planted units of a layer, fewer kinds where the corpus has no words for some.

    Args:
        lists: words by name.
        counts: of `count_words` over the explain split.
    """
    pool = _Pool(lists, counts)
    able = [name for name in DIFFICULTIES if pool.serves(name)]
    if n and not able:
        raise BadInput(
            f"controls.planted: no list of controls.lists has {LEAST_WORDS} words that occur {LEAST_COUNT} times in the corpus; "
            "give lists of its own words, or set controls.planted: 0"
        )
    if n and len(able) < len(DIFFICULTIES):
        log.warning("scan: the corpus has no words for planted units of kind %s", ", ".join(set(DIFFICULTIES) - set(able)))
    return [pool.make(able[i % len(able)], i, rng(seed, layer, PLANTED, i)) for i in range(n)]


def nulls(n: int) -> list[Plant]:
    """`n` units that mean nothing."""
    return [Plant(NULL, i) for i in range(n)]


class _Pool:
    """The words of lists that a corpus has."""

    def __init__(self, lists: dict[str, list[str]], counts: Counter[str]) -> None:
        self.counts, self.total = counts, max(sum(counts.values()), 1)
        present = {name: _distinct(given, counts, LEAST_COUNT) for name, given in lists.items()}
        self.lists = {name: found for name, found in present.items() if self._enough(found, LEAST_TOTAL, LEAST_WORDS)}
        few = {name: [w for w in found if counts[w] * FEW[0] >= LEAST_TOTAL] for name, found in present.items()}
        self.few = {name: found for name, found in few.items() if len(found) >= FEW[1]}
        rare = {name: _rarest(found, counts) for name, found in present.items()}
        self.rare = {name: found for name, found in rare.items() if self._enough(found, RARE_TOTAL, LEAST_RARE)}
        named = sorted({word for found in present.values() for word in found})
        self.single = [w for w in named if counts[w] >= LEAST_TOTAL and any(c.isalpha() for c in w)]
        self.cues = sorted(w for w, c in counts.items() if CUE_COUNT <= c <= self.total / 1000 and w.isalpha() and len(w) > 2)
        self.forms: dict[str, list[str]] = {}
        for word in sorted(counts):
            self.forms.setdefault(stem(word), []).append(word)

    def serves(self, difficulty: str) -> bool:
        """Whether there are words for it."""
        special = {"forms": self.single, "cue": self.cues, "few": self.few, "rare": self.rare}
        if difficulty in ("distractor", "two lists"):
            return len(self.lists) > 1
        return bool(special.get(difficulty, self.lists))

    def make(self, difficulty: str, neuron: int, draw: np.random.Generator) -> Plant:
        """One unit."""
        if difficulty == "forms":
            word = self.single[draw.integers(len(self.single))]
            return Plant(PLANTED, neuron, difficulty, words=tuple(self.forms[stem(word)]))
        if difficulty == "cue":
            return Plant(PLANTED, neuron, difficulty, cue=self.cues[draw.integers(len(self.cues))])
        choice = {"few": self.few, "rare": self.rare}.get(difficulty, self.lists)
        names = sorted(choice)
        first, second = (names[i] for i in draw.permutation(len(names))[[0, -1]])
        found = choice[first]
        if difficulty == "few":
            found = [found[i] for i in draw.permutation(len(found))[: draw.integers(FEW[0], FEW[1] + 1)]]
        if difficulty == "diluted":
            found = _half(found, draw)
        found = found[:MOST_WORDS]
        given: tuple[str, ...] = (first,)
        weak: list[str] = []
        noise = 0.0
        if difficulty == "noise":
            noise = NOISE / (1 - NOISE) * sum(self.counts[w] for w in found) / self.total
        if difficulty in ("distractor", "two lists"):
            given = (first, second)
            other = [w for w in self.lists[second][:MOST_WORDS] if w not in found]
            weak, found = (other, found) if difficulty == "distractor" else ([], [*found, *other])
        return Plant(PLANTED, neuron, difficulty, given, tuple(found), tuple(weak), None, noise)

    def _enough(self, found: list[str], total: int, least: int) -> bool:
        return len(found) >= least and sum(self.counts[w] for w in found) >= total


def _distinct(given: list[str], counts: Counter[str], least: int) -> list[str]:
    """The words of a list that occur often enough, casefolded, one a stem: the most frequent one, most frequent first."""
    found: dict[str, str] = {}
    for word in sorted({w.casefold() for w in given}, key=lambda w: (-counts[w], w)):
        if counts[word] >= least:
            found.setdefault(stem(word), word)
    return list(found.values())


def _rarest(found: list[str], counts: Counter[str]) -> list[str]:
    """The rarest words, as few as reach RARE_TOTAL occurrences and LEAST_RARE words."""
    chosen: list[str] = []
    for word in reversed(found):
        if len(chosen) >= LEAST_RARE and sum(counts[w] for w in chosen) >= RARE_TOTAL:
            break
        chosen.append(word)
    return chosen


def _half(found: list[str], draw: np.random.Generator) -> list[str]:
    """Half of the words, drawn at random."""
    return [found[i] for i in draw.permutation(len(found))[: len(found) // 2]]


def text_units(plants: list[Plant], pilot: dict[str, np.ndarray], seed: int, layer: int) -> TextUnits:
    """The text controls of a layer as the pilot fixed them."""
    salts = np.array([_number(seed, layer, p.control, p.neuron) for p in plants], np.uint64)
    return TextUnits(plants, pilot[f"quantiles.{layer}"], salts)


def strong_units(highest: np.ndarray, n: int, seed: int, layer: int) -> np.ndarray:
    """[n] unit columns whose distributions text controls get, drawn from those with large pilot maxima [W]."""
    lively = np.flatnonzero(highest >= STRONG * np.percentile(highest, PERCENTILE))
    return lively[rng(seed, layer, "distributions", 0).integers(len(lively), size=n)]


def distributions(values: np.ndarray) -> np.ndarray:
    """float32 [n, len(GRID)]: the quantiles of the pilot's activations [N, n]."""
    if not len(values):
        return np.zeros((values.shape[1], len(GRID)), np.float32)
    return np.quantile(values.astype(np.float64), GRID, axis=0).T.astype(np.float32)


def rng(seed: int, layer: int, purpose: str, number: int) -> np.random.Generator:
    """A generator that depends on these four alone."""
    return np.random.default_rng(_number(seed, layer, purpose, number))


def _number(seed: int, layer: int, purpose: str, number: int) -> int:
    digest = hashlib.sha256(f"{seed}/{layer}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def to_json(plants: dict[int, list[Plant]]) -> dict[str, Any]:
    """All layers' text controls as a tree; `from_json` reads it."""
    return {str(layer): [p.to_json() for p in found] for layer, found in plants.items()}


def from_json(tree: dict[str, Any]) -> dict[int, list[Plant]]:
    """What `to_json` made."""
    return {
        int(layer): [Plant(**{**p, **{k: tuple(p[k]) for k in ("lists", "words", "weak")}}) for p in found]
        for layer, found in tree.items()
    }

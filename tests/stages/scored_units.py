"""Units that fire on the words of a list, as rows of `exemplars`, and judges that answer by rule."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import numpy as np
import torch

from raylabel.stages.score import Trial, Unit, trial
from raylabel.words.lists import load_lists

_FILLER = "the of and to in a is that it was for on are with as be at one have this from or had by word but what some we out"
FILLER = _FILLER.split(" ")
LENGTH = 40
_LONG = [(name, words) for name, words in load_lists("built-in").items() if len(words) >= 12]
LISTS = dict(_LONG[:50])
VOCABULARY = sorted({*FILLER, *(word for words in LISTS.values() for word in words)})
IDS = {word: i for i, word in enumerate(VOCABULARY)}


def auroc(truth: Any, scores: Any) -> float:
    """The share of pairs in the right order, ties counting half."""
    truth, scores = np.asarray(truth, bool), np.asarray(scores, float)
    pairs = scores[truth][:, None] - scores[~truth][None, :]
    return float(((pairs > 0) + (pairs == 0) / 2).mean())


def rates(truth: Any, answers: Any) -> float:
    """TPR + TNR - 1."""
    pairs = list(zip(truth, answers, strict=True))
    hits = [sum(1 for t, a in pairs if t == kind and a == kind) / sum(1 for t, _ in pairs if t == kind) for kind in (True, False)]
    return hits[0] + hits[1] - 1


def row(
    sampling: str, split: str, rank: int, document: int, words: list[str], values: list[float], **more: Any
) -> dict[str, Any]:  # fmt: skip
    """An exemplar whose tokens are words with a space before them."""
    at = int(np.argmax(values))
    return {
        "sampling": sampling, "split": split, "rank": rank, "sample": 1000 * document + rank, "document": document, "start": 0,
        "position": at, "activation": float(values[at]), "tokens": [f" {w}" for w in words], "mat_ties": 1,
        "token_ids": [IDS.get(w, len(IDS)) for w in words], "activations": [float(v) for v in values], **more,
    }  # fmt: skip


def rows(listed: list[str], seed: int, tops: int = 10, randoms: int = 20) -> list[dict[str, Any]]:
    """Exemplars of a unit that fires on `listed`: filler and words of all lists around a peak, documents apart by split."""
    draw = np.random.default_rng(seed)
    mine = set(listed)
    other = [w for w in VOCABULARY if w not in mine and w not in FILLER]
    found = []
    for s, split in enumerate(("explain", "score")):
        for i in range(2 * tops + randoms):
            words = [str(w) for w in draw.choice(FILLER, LENGTH)]
            for place in draw.choice(LENGTH, 8, replace=False):
                words[place] = other[draw.integers(len(other))]
            values = draw.uniform(-0.02, 0.03, LENGTH)
            sampling, rank = ("top", i) if i < tops else ("quantile", i - tops) if i < 2 * tops else ("random", i - 2 * tops)
            if sampling != "random":
                place = int(draw.integers(5, LENGTH))
                words[place] = listed[draw.integers(len(listed))]
                values[place] = draw.uniform(0.5, 1.0)
            found.append(row(sampling, split, rank, 100 * s + i, words, values.tolist(), sample=1000 * s + i))
    return found


@cache
def trials(seed: int = 0) -> dict[Unit, tuple[Trial, str]]:
    """A trial a list, with the list's name."""
    return {
        (None, i, 1): (trial((None, i, 1), rows(words, 97 * seed + i), 1.0, size=32, negatives=20, seed=seed), name)
        for i, (name, words) in enumerate(LISTS.items())
    }


class RuleJudge:
    """Says yes where the label names a list that holds the word, but for a share of errors drawn by hash."""

    def __init__(self, errors: float = 0.0, always: float | None = None) -> None:
        self.errors, self.always = errors, always
        self.labels: list[str] = []

    def encode(self, label: str) -> tuple[int, ...]:
        if label not in self.labels:
            self.labels.append(label)
        return (self.labels.index(label),) if any(c.isalnum() for c in label) else ()

    def prepare(self, examples: list[Any]) -> list[Any]:
        return examples

    def pairs(self, examples: list[Any], at: torch.Tensor, concepts: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor([self.odds(examples[i], self.labels[c[0]]) for i, c in zip(at.tolist(), concepts, strict=True)])

    def odds(self, example: Any, label: str) -> float:
        if self.always is not None:
            return self.always
        draw = int.from_bytes(hashlib.sha256(f"{example}{label}".encode()).digest()[:4], "big") / 2**32
        yes = example.word in LISTS.get(label, ())
        return (1.0 if yes != (draw < self.errors) else -1.0) * (1 + draw)

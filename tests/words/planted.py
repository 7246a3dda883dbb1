"""A small language whose meanings are known: words of five lists point the same way, all others at random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from raylabel.words.background import Background, Weighting, fit_background
from raylabel.words.segment import spans

LISTS = {
    "animals": ["dog", "cat", "horse", "rabbit", "mouse", "fox", "bear", "wolf", "sheep", "goat"],
    "colours": ["red", "blue", "green", "yellow", "pink", "brown", "grey", "orange", "violet", "scarlet"],
    "foods": ["bread", "soup", "cheese", "apple", "cake", "rice", "honey", "butter", "carrot", "pasta"],
    "clothes": ["shirt", "coat", "hat", "scarf", "glove", "boot", "sock", "jacket", "belt", "skirt"],
    "tools": ["hammer", "saw", "drill", "wrench", "spade", "axe", "chisel", "pliers", "rake", "file"],
}
LETTERS = "bcdfgklmnprtvz"
FILLERS = [f"{a}o{b}u{c}" for a in LETTERS for b in LETTERS[:6] for c in LETTERS[:5]]
WORDS = [word for words in LISTS.values() for word in words] + FILLERS
OF = {word: name for name, words in LISTS.items() for word in words}


class PlantedVectors:
    """Stands for `Vectors`: `dim` numbers a word, from its spelling; words of a list share a direction."""

    path, dim = "planted.bin", 24

    def __init__(self, strength: float = 1.5) -> None:
        self.strength = strength

    def matrix(self, items: Sequence[str]) -> np.ndarray:
        return np.stack([self._vector(word) for word in items]) if items else np.zeros((0, self.dim), np.float32)

    def _vector(self, word: str) -> np.ndarray:
        if not word.strip():
            return np.zeros(self.dim, np.float32)
        # All words lie along one direction more or less, as in real vectors: the common part.
        own = _normal(word.lower(), self.dim) + 0.3 + 2 * _normal(f"along {word.lower()}", 1) * _normal("common", self.dim)
        name = OF.get(word.lower())
        return (own + (self.strength * _normal(f"list {name}", self.dim) if name else 0)).astype(np.float32)


def _normal(key: str, dim: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(dim)


def sample(text: str, bos: bool = True) -> dict[str, Any]:
    """A row with the columns `text`, `ends` and `tokens`: one token a word with the white space before it."""
    cuts = [end for _, end in spans(text)]
    tokens = [text[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
    return {"text": text, "ends": [0] * bos + cuts, "tokens": ["<bos>"] * bos + tokens}


def samples(n: int = 400, size: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Samples of random words, the first of a shuffled vocabulary more often than the last."""
    rng = np.random.default_rng(seed)
    return [sample(" ".join(draw(rng, size)) + ".") for _ in range(n)]


def draw(rng: np.random.Generator, size: int) -> list[str]:
    """Words as often as they are in the language."""
    share = 1 / (np.random.default_rng(0).permutation(len(WORDS)) + 20.0)
    return [WORDS[i] for i in rng.choice(len(WORDS), size, p=share / share.sum())]


def background(weighting: Weighting = "sif", seed: int = 0, window: int = 5, **text: int) -> Background:
    return fit_background(samples(**text), PlantedVectors(), window, weighting, seed)

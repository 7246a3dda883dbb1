"""Families of MAT words: words that share a token id or a stem are one family.

A unit that fires on one word, one stem or one sub-word is a detector of that string however often it repeats;
similarity counts only between families. Stems are Snowball's English ones (Porter 2001); words without a letter are
their own stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import snowballstemmer

_stemmer = snowballstemmer.stemmer("english")


@lru_cache(maxsize=1 << 18)
def stem(word: str) -> str:
    """The stem of `word` without regard to case; punctuation and digits as they are."""
    folded = word.casefold().replace("’", "'")
    return _stemmer.stemWord(folded) if any(c.isalpha() for c in folded) else folded


def families(token_ids: Sequence[int], words: Sequence[str]) -> list[int]:
    """The family of each MAT, numbered from 0 by first appearance: same token id or same stem, transitively."""
    parent = list(range(len(words)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[int | str, int] = {}
    for i, (token, word) in enumerate(zip(token_ids, words, strict=True)):
        for key in (int(token), stem(word)):
            a, b = root(first.setdefault(key, i)), root(i)
            parent[max(a, b)] = min(a, b)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(words))]

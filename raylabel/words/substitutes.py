"""Words to put in place of another: its nearest FastText neighbours, and random words that are as ordinary as it is.

Candidates are corpus vocabulary words that occur three times or more, one for all casings of a word. Near is by the
cosine of the background's joined vectors, less 0.02 an octave of difference in frequency: vectors of rare words are rough,
and random words match in frequency too. A substitute has the shape class of the word it replaces (letters, digits,
punctuation, mixed), is written in its casing, and is never the word, another casing or an inflection of it (same stem), nor
a word that begins with all of it or that it begins with. What a word gets depends on the word, k and the seed alone; `among`
also asks the words beside it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from raylabel.words.background import Background
from raylabel.words.families import stem

MIN_COUNT = 3
# Shorter words begin too many others.
LEAST_ALIKE = 3
OCTAVE = 0.02
BLOCK = 256
# Enough random words of like length before longer and shorter ones are let in.
CHOICE = 12
# Neighbours of a word that are looked at where its group has a say, and words of the group that have it.
POOL, PEERS = 100, 4

_NONE = np.zeros(0, np.int64)
_APOSTROPHES = str.maketrans("", "", "'’")


def shape(word: str) -> str:
    """`letters`, `digits`, `punctuation`, `mixed`, or "" for white space."""
    bare = word.translate(_APOSTROPHES)
    if bare.isalpha():
        return "letters"
    if bare.isdigit():
        return "digits"
    if not word.strip():
        return ""
    return "mixed" if any(c.isalnum() for c in word) else "punctuation"


def recase(word: str, like: str) -> str:
    """`word` in the casing of `like` where that is lower, Title or UPPER; else as it is. One capital is Title."""
    if like.islower():
        return word.lower()
    if like[:1].isupper() and (len(like) == 1 or like[1:].islower()):
        return word[:1].upper() + word[1:].lower()
    return word.upper() if like.isupper() else word


class Substitutes:
    """Neighbours and random words for the words of one run; answers are kept."""

    def __init__(self, background: Background, seed: int) -> None:
        self._background, self._seed = background, seed
        seen: dict[str, int] = {}
        for rank, word in enumerate(background.vocabulary):
            if background.counts[rank] >= MIN_COUNT:
                seen.setdefault(word.casefold(), rank)
        ranks = np.array(list(seen.values()), np.int64)
        ranks = ranks[background.matrix[ranks].any(axis=1)]
        self._words = [background.vocabulary[rank] for rank in ranks.tolist()]
        self._vectors = background.joined_matrix[ranks]
        self._numbers: dict[str, int] = {}
        self._stems = np.array([self._numbers.setdefault(stem(w), len(self._numbers)) for w in self._words], np.int64)
        self._bands = background.band(self._words)
        self._lengths = np.array([len(word) for word in self._words], np.int64)
        shapes = np.array([shape(word) for word in self._words], object)
        self._members = {name: np.flatnonzero(shapes == name) for name in set(shapes.tolist())}
        bands = range(background.bands)
        self._groups = {(name, b): m[self._bands[m] == b] for name, m in self._members.items() for b in bands}
        self._octaves = np.log2(background.counts[ranks]).astype(np.float32)
        self._folded = {word.casefold(): i for i, word in enumerate(self._words)}
        spelled = sorted((word.casefold(), i) for i, word in enumerate(self._words))
        self._spelled, self._by_spelling = [word for word, _ in spelled], [i for _, i in spelled]
        self._near: dict[tuple[str, int], list[int]] = {}
        self._drawn: dict[tuple[str, int], list[str]] = {}

    def neighbours(self, words: Sequence[str], k: int) -> list[list[str]]:
        """At most `k` substitutes for each word, the nearest first."""
        self._search(words, k)
        return [self._written(word, self._near[word, k], k) for word in words]

    def among(self, group: Sequence[str], k: int) -> list[list[str]]:
        """At most `k` substitutes for each word of a group: of its POOL nearest neighbours those that lie towards the group.

        A word of several senses has neighbours of all of them; the other words beside it say which one is meant. Their
        direction is the mean of the PEERS of another stem that are nearest to the word, so that a group may be of two kinds.
        Words of a group that have nothing in common do not stand for each other. What a word gets depends on the whole group.
        """
        words = list(dict.fromkeys(group))
        self._search(words, POOL)
        vectors, stems = self._background.joined(words), np.array([stem(word) for word in words], object)
        likeness = np.einsum("ad,bd->ab", vectors, vectors)
        found: dict[str, list[str]] = {}
        for i, word in enumerate(words):
            others = np.flatnonzero((stems != stems[i]) & vectors.any(axis=1))
            others = others[np.argsort(-likeness[i, others], kind="stable")]
            others = others[np.sort(np.unique(stems[others], return_index=True)[1])][:PEERS]
            toward = vectors[others].sum(axis=0)
            length = float(np.linalg.norm(toward))
            query = vectors[i] + (toward / length if length > 0 else 0)
            near = np.array(self._near[word, POOL], np.int64)
            octave = np.array([self._octave(word)], np.float32)
            score = np.einsum("nd,d->n", self._vectors[near], query) - self._apart(octave, near)
            found[word] = self._written(word, near[np.lexsort((near, -score))].tolist(), k)
        return [found[word] for word in group]

    def random(self, words: Sequence[str], k: int) -> list[list[str]]:
        """At most `k` random words for each word, of its frequency band and about its length, none a neighbour."""
        self._search(words, k)
        for word in dict.fromkeys(words):
            if (word, k) not in self._drawn:
                self._drawn[word, k] = self._draw(word, k)
        return [self._drawn[word, k] for word in words]

    def _search(self, words: Sequence[str], k: int) -> None:
        asked = [word for word in dict.fromkeys(words) if (word, k) not in self._near]
        by_shape: dict[str, list[str]] = {}
        for word in asked:
            by_shape.setdefault(shape(word), []).append(word)
        for name, group in by_shape.items():
            members = self._members.get(name, _NONE)
            for low in range(0, len(group), BLOCK):
                block = group[low : low + BLOCK]
                self._near.update(zip([(word, k) for word in block], self._nearest(block, members, k), strict=True))

    def _nearest(self, words: list[str], members: np.ndarray, k: int) -> list[list[int]]:
        queries = self._background.joined(words)
        some = min(len(members), 4 * k + 28)
        if not some:
            return [[] for _ in words]
        matrix = self._vectors[members]
        octaves = np.array([[self._octave(word)] for word in words], np.float32)
        # The product only makes the shortlist; the order is by numbers that do not depend on the rest of the block.
        rough = queries @ matrix.T - self._apart(octaves, members)
        short = np.argpartition(-rough, some - 1, axis=1)[:, :some]
        exact = np.einsum("qd,qsd->qs", queries, matrix[short]) - self._apart(octaves, members[short])
        order = np.lexsort((members[short], -exact), axis=1)
        ranked = members[np.take_along_axis(short, order, axis=1)]
        found: list[list[int]] = []
        for word, query, octave, row in zip(words, queries, octaves, ranked, strict=True):
            if not query.any():
                found.append([])
                continue
            kept = self._others(word, row)
            if len(kept) < k and some < len(members):
                nearness = np.einsum("d,nd->n", query, matrix) - self._apart(octave, members)
                kept = self._others(word, members[np.lexsort((members, -nearness))])
            found.append(kept[:k].tolist())
        return found

    def _apart(self, octaves: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """What is taken off the cosines of the candidates for words of such frequency."""
        return OCTAVE * np.abs(self._octaves[candidates] - octaves)

    def _octave(self, word: str) -> float:
        """log2 of how often the word occurs in the casing that it has as a candidate, else as it is; 0 if never."""
        i = self._folded.get(word.casefold())
        if i is not None:
            return float(self._octaves[i])
        rank = self._background.index.get(word)
        return 0.0 if rank is None else float(np.log2(self._background.counts[rank]))

    def _others(self, word: str, candidates: np.ndarray) -> np.ndarray:
        """`candidates` without the word itself, its casings, its inflections (all of its stem) and words that begin alike."""
        kept = candidates[self._stems[candidates] != self._numbers.get(stem(word), -1)]
        alike = self._alike(word.casefold())
        return kept[~np.isin(kept, alike)] if len(alike) else kept

    def _alike(self, folded: str) -> np.ndarray:
        """Candidates that go on where the word ends, or that it goes on from: near by their sub-words whatever they mean."""
        if len(folded) < LEAST_ALIKE or not folded.isalpha():
            return _NONE
        first, last = bisect_left(self._spelled, folded), bisect_left(self._spelled, folded + "\U0010ffff")
        beginnings = (self._folded.get(folded[:n]) for n in range(LEAST_ALIKE, len(folded)))
        return np.array([*self._by_spelling[first:last], *(i for i in beginnings if i is not None)], np.int64)

    def _draw(self, word: str, k: int) -> list[str]:
        if not self._background.words([word]).any():
            return []
        band, name = int(self._background.band([word])[0]), shape(word)
        pool = self._free(word, self._groups.get((name, band), _NONE), k)
        if len(pool) < k:
            pool = self._free(word, self._members.get(name, _NONE), k)
            pool = _closest(pool, np.abs(self._bands[pool] - band), k)
        pool = _closest(pool, np.maximum(np.abs(self._lengths[pool] - len(word)), 1), CHOICE * k)
        digest = hashlib.blake2b(f"{self._seed}\0{word}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        order = np.random.default_rng(int.from_bytes(digest, "little")).permutation(len(pool))
        return self._written(word, pool[order].tolist(), k)

    def _free(self, word: str, candidates: np.ndarray, k: int) -> np.ndarray:
        near = np.array(self._near[word, k], np.int64)
        return self._others(word, candidates[(candidates[:, None] != near).all(axis=1)])

    def _written(self, word: str, candidates: list[int], k: int) -> list[str]:
        different = dict.fromkeys(recase(self._words[i], word) for i in candidates[:k])
        for i in candidates[k:]:
            if len(different) == k:
                break
            different[recase(self._words[i], word)] = None
        return list(different)


def _closest(pool: np.ndarray, distance: np.ndarray, least: int) -> np.ndarray:
    """The members of `pool` up to the distance within which there are `least` of them, or all."""
    return pool[distance <= np.sort(distance)[least - 1]] if len(pool) > least else pool

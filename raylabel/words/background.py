"""What a run's own text makes ordinary: fitted once from the explain samples, then the same for every unit.

Holds the vocabulary by falling count with frequency bands of doubling size; the common part of word vectors (the
count-weighted mean and first principal component; Mu & Viswanath 2018, weighted as in Yokoi et al. 2024); the SIF
phrase model (weights a/(a + p(w)), first component removed; Arora et al. 2017) fitted on uniform corpus phrases; and
null phrases at other positions, each with the band and stem of its centre word. All vectors given are float32 unit
vectors, or zero where there is nothing. Memory is flat in the size of the corpus but for the vocabulary.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

from raylabel.errors import BadInput
from raylabel.words.contexts import Contexts
from raylabel.words.families import stem
from raylabel.words.segment import mat_word, words
from raylabel.words.vectors import Vectors

FITTED, NULLS = 50_000, 20_000
FIRST_BAND = 48
SMOOTHING = 1e-3
CHUNK = 8_192

Weighting = Literal["sif", "mean"]


@dataclass(frozen=True, eq=False)
class Background:
    """The fitted state; `to_bytes` holds all of it but the word vectors themselves.

    Attributes:
        window: tokens on each side of a phrase's centre.
        weighting: `sif`, or `mean` for plain means of raw word vectors (then nothing is removed from phrases).
        vocabulary: words by falling count, then by spelling; `counts` int64 [V].
        stems: int32 [V], equal for words of one stem.
        edges: int32 [bands + 1], ranks where the bands begin and end.
        mean, component: float32 [dim], the common part of word vectors.
        phrase_component: float32 [dim].
        null_vectors: float32 [N, dim], phrases; `null_bands`, `null_stems` int32 [N], of their centre words.
        contexts: vectors of what stands beside a word, None to do without; not part of the state.
    """

    vectors: Vectors
    window: int
    weighting: Weighting
    vocabulary: list[str]
    counts: np.ndarray
    stems: np.ndarray
    edges: np.ndarray
    mean: np.ndarray
    component: np.ndarray
    phrase_component: np.ndarray
    null_vectors: np.ndarray
    null_bands: np.ndarray
    null_stems: np.ndarray
    contexts: Contexts | None = None

    @cached_property
    def index(self) -> dict[str, int]:
        """Rank of each vocabulary word."""
        return {word: rank for rank, word in enumerate(self.vocabulary)}

    @cached_property
    def matrix(self) -> np.ndarray:
        """float32 [V, dim]: unit vectors of the vocabulary."""
        return self._without_common(self._raw_vocabulary)

    @cached_property
    def joined_matrix(self) -> np.ndarray:
        """float32 [V, dim + contexts' dim]: `joined` of the vocabulary."""
        return self._with_contexts(self.vocabulary, self.matrix)

    @cached_property
    def _raw_vocabulary(self) -> np.ndarray:
        return self.vectors.matrix(self.vocabulary)

    @property
    def bands(self) -> int:
        """How many frequency bands there are."""
        return len(self.edges) - 1

    def ranks(self, items: Sequence[str]) -> np.ndarray:
        """int64 [n]: rank of each word, V for words not in the vocabulary."""
        get, unknown = self.index.get, len(self.vocabulary)
        return np.fromiter((get(word, unknown) for word in items), np.int64, len(items))

    def band(self, items: Sequence[str]) -> np.ndarray:
        """int64 [n]: frequency band of each word; unknown words are in the last, the rarest."""
        found = np.searchsorted(self.edges, self.ranks(items), side="right") - 1
        return np.minimum(found, self.bands - 1)

    def words(self, items: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]: word vectors without their common part, of length 1 (0 where a word has no vector)."""
        return self._without_common(self._raw(items))

    def joined(self, items: Sequence[str]) -> np.ndarray:
        """float32 [n, dim + contexts' dim]: unit vectors whose cosine is the mean of both kinds' where words have both kinds."""
        return self._with_contexts(items, self.words(items))

    def phrases(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]: phrase vectors of length 1 (0 where no word of a phrase has a vector)."""
        return self._without(_phrase_means(self, texts), self.phrase_component)

    def _with_contexts(self, items: Sequence[str], vectors: np.ndarray) -> np.ndarray:
        if self.contexts is None:
            return vectors
        beside = self.contexts.words(items)
        length = np.sqrt(vectors.any(axis=1).astype(np.float32) + beside.any(axis=1))[:, None]
        whole = np.concatenate([vectors, beside], axis=1)
        return np.divide(whole, length, out=np.zeros_like(whole), where=length > 0)

    def _without_common(self, raw: np.ndarray) -> np.ndarray:
        present = raw.any(axis=1)
        out = np.zeros_like(raw)
        out[present] = self._without(raw[present] - self.mean, self.component)
        return out

    @staticmethod
    def _without(vectors: np.ndarray, component: np.ndarray) -> np.ndarray:
        # einsum and not a matrix product: each row's result must not depend on the rows beside it.
        rest = vectors - np.einsum("nd,d->n", vectors, component)[:, None] * component
        length = np.sqrt(np.einsum("nd,nd->n", rest, rest))[:, None]
        return np.divide(rest, length, out=np.zeros_like(rest), where=length > 1e-9)

    def _raw(self, items: Sequence[str]) -> np.ndarray:
        ranks = self.ranks(items)
        known = ranks < len(self.vocabulary)
        out = np.empty((len(items), self.vectors.dim), np.float32)
        out[known] = self._raw_vocabulary[ranks[known]]
        out[~known] = self.vectors.matrix([items[i] for i in np.flatnonzero(~known).tolist()])
        return out

    def _weights(self, items: Sequence[str]) -> np.ndarray:
        if self.weighting == "mean":
            return np.ones(len(items), np.float32)
        share = np.append(self.counts / max(self.counts.sum(), 1), 0.0)[self.ranks(items)]
        return (SMOOTHING / (SMOOTHING + share)).astype(np.float32)

    def to_bytes(self) -> bytes:
        """Everything but the word vectors, as an .npz without pickled objects; equal for equal state."""
        file = io.BytesIO()
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("vectors", "vocabulary", "contexts")}
        text = "\n".join(self.vocabulary).encode("utf-8", "surrogatepass")
        np.savez(file, vocabulary=np.frombuffer(text, np.uint8), **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, vectors: Vectors, contexts: Contexts | None = None) -> Background:
        """The state that `to_bytes` gave, with the word vectors it was fitted on; BadInput if they cannot be those."""
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            values: dict[str, Any] = dict(stored)
        if len(values["mean"]) != vectors.dim:
            raise BadInput(f"identify.vectors: {vectors.path} is not the file that this run was fitted on")
        text = values["vocabulary"].tobytes().decode("utf-8", "surrogatepass")
        values |= {"window": int(values["window"]), "weighting": str(values["weighting"])}
        return cls(**{**values, "vectors": vectors, "vocabulary": text.split("\n"), "contexts": contexts})


def fit_background(
    samples: Iterable[Mapping[str, Any]], vectors: Vectors, window: int, weighting: Weighting, seed: int
) -> Background:
    """Fits on samples with `text` and `ends` (character end of each token, 0 for BOS), read once, in their order.

    At most 50,000 uniform token positions make the phrases of the fit, 20,000 others the null phrases; from a small
    text 5 of 7 and 2 of 7. BadInput if there is no word in the samples.
    """
    counts, cuts = _survey(samples, seed)
    if not counts:
        raise BadInput("exemplars.corpus.path: there is no word in the explain samples")
    vocabulary = sorted(counts, key=lambda word: (-counts[word], word))
    n = np.array([counts[word] for word in vocabulary], np.int64)
    numbers: dict[str, int] = {}
    stems = np.array([numbers.setdefault(stem(word), len(numbers)) for word in vocabulary], np.int32)
    raw = vectors.matrix(vocabulary)
    mean, component = _common_part(raw, n)
    empty = np.zeros((0, vectors.dim), np.float32)
    none = np.zeros(0, np.int32)
    start = Background(
        vectors, window, weighting, vocabulary, n, stems, _edges(len(vocabulary)), mean, component,
        np.zeros(vectors.dim, np.float32), empty, none, none,
    )  # fmt: skip
    split = min(NULLS, len(cuts) * NULLS // (NULLS + FITTED))
    state = {f.name: getattr(start, f.name) for f in fields(start)}
    if weighting == "sif":
        fitted = _phrase_means(start, [cut.phrase(window) for cut in cuts[split:]])
        state["phrase_component"] = _first_component(fitted)
    ready = Background(**state)
    centres = [cut.word() for cut in cuts[:split]]
    phrases = ready.phrases([cut.phrase(window) for cut in cuts[:split]])
    good = ready.words(centres).any(axis=1) & phrases.any(axis=1)
    number = np.array([numbers.setdefault(stem(word), len(numbers)) for word in centres], np.int32)
    state.update(
        null_vectors=phrases[good], null_bands=ready.band(centres)[good].astype(np.int32), null_stems=number[good]
    )
    return Background(**state)


class _Cut(NamedTuple):
    """A token of a sample: its number in the sample and the sample's own text and token ends."""

    text: str
    ends: np.ndarray
    token: int

    def phrase(self, window: int) -> str:
        first, last = max(self.token - window, 0), min(self.token + window, len(self.ends) - 1)
        return self.text[self.ends[first - 1] if first else 0 : self.ends[last]]

    def word(self) -> str:
        start = int(self.ends[self.token - 1]) if self.token else 0
        low, high = mat_word(self.text, start, int(self.ends[self.token]))
        return self.text[low:high]


def _survey(samples: Iterable[Mapping[str, Any]], seed: int) -> tuple[Counter[str], list[_Cut]]:
    """Counts of all words, and uniform token positions: those with the smallest of as many random keys, by key."""
    rng = np.random.default_rng([seed, 0])
    counts: Counter[str] = Counter()
    kept: list[tuple[float, _Cut]] = []
    wanted, limit = FITTED + NULLS, 1.0
    for sample in samples:
        text, ends = sample["text"], np.asarray(sample["ends"], np.int32)
        counts.update(words(text))
        keys = rng.random(len(ends))
        for token in np.flatnonzero((keys < limit) & (np.diff(ends, prepend=0) > 0)).tolist():
            kept.append((keys[token], _Cut(text, ends, token)))
        if len(kept) > 2 * wanted:
            kept = sorted(kept, key=lambda pair: pair[0])[:wanted]
            limit = kept[-1][0]
    kept = sorted(kept, key=lambda pair: pair[0])[:wanted]
    return counts, [cut for _, cut in kept]


def _edges(size: int) -> np.ndarray:
    """Ranks that bound the bands: 48 words, then each band twice the one before; a rest below 48 joins the last."""
    edges, width = [0], FIRST_BAND
    while edges[-1] + width < size:
        edges.append(edges[-1] + width)
        width *= 2
    if size - edges[-1] < FIRST_BAND and len(edges) > 1:
        edges.pop()
    return np.array([*edges, size], np.int32)


def _common_part(raw: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = np.where(raw.any(axis=1), counts, 0).astype(np.float64)
    share /= max(share.sum(), 1.0)
    wide = raw.astype(np.float64)
    mean = share @ wide
    component = _first_component((wide - mean) * np.sqrt(share)[:, None])
    return mean.astype(np.float32), component


def _first_component(vectors: np.ndarray) -> np.ndarray:
    """float32 [dim]: the first right singular vector of `vectors` [n, dim] as they are, not centred."""
    wide = vectors.astype(np.float64)
    first = np.linalg.eigh(wide.T @ wide)[1][:, -1]
    return (first * np.sign(first[np.argmax(np.abs(first))])).astype(np.float32)


def _phrase_means(background: Background, texts: Sequence[str]) -> np.ndarray:
    """float32 [n, dim]: weighted means of the word vectors of each text, 0 where it has no words."""
    out = np.zeros((len(texts), background.vectors.dim), np.float32)
    for low in range(0, len(texts), CHUNK):
        lists = [words(text) for text in texts[low : low + CHUNK]]
        distinct = {word: i for i, word in enumerate(dict.fromkeys(chain.from_iterable(lists)))}
        if not distinct:
            continue
        items = list(distinct)
        weighted = background._raw(items) * background._weights(items)[:, None]
        sizes = np.array([len(found) for found in lists])
        flat = np.fromiter((distinct[word] for found in lists for word in found), np.int64, int(sizes.sum()))
        filled = np.flatnonzero(sizes)
        starts = (np.cumsum(sizes) - sizes)[filled]
        out[low + filled] = np.add.reduceat(weighted[flat], starts, axis=0) / sizes[filled, None]
    return out

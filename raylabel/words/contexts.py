"""Word vectors from what stands beside a word: words that take each other's place have the same neighbours.

`fit_contexts` counts, for each place of the two before and after a word apart, which of the commonest words stands
there, takes positive pointwise mutual information with smoothed context shares (Levy, Goldberg & Dagan 2015), and keeps
the first components, weighted by the square root of their singular values. On a million words or fewer such vectors tell
words of one kind better than skip-grams do, which need more text (Sahlgren & Lenci 2016), and both together do better
than either; `tests.benchmarks --only neighbours` measures it. Casings of a word are one word.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from raylabel.words.segment import words

REACH = 2
"""Words on each side."""
DIM, POWER, SMOOTHING = 100, 0.5, 0.75
ROWS, COLUMNS, LEAST = 50_000, 1_000, 3
"""Words that get a vector at most, words that count as context, and how often a word must occur."""
MOST = 20_000_000
"""Words read; more text hardly changes what they say of words frequent enough to be measured."""
BLOCK = 1 << 20
OVERSAMPLED, ROUNDS = 28, 6


@dataclass(frozen=True, eq=False)
class Contexts:
    """What was fitted.

    Attributes:
        vocabulary: casefolded words.
        matrix: float32 [V, dim], rows of length 1, or 0 where a word has no context that counts.
    """

    vocabulary: list[str]
    matrix: np.ndarray

    @cached_property
    def index(self) -> dict[str, int]:
        """Row of each word."""
        return {word: row for row, word in enumerate(self.vocabulary)}

    def words(self, items: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]: the rows of words in any casing, 0 for unknown ones."""
        rows = np.fromiter((self.index.get(word.casefold(), -1) for word in items), np.int64, len(items))
        found = np.zeros((len(items), self.matrix.shape[1]), np.float32)
        found[rows >= 0] = self.matrix[rows[rows >= 0]]
        return found

    def to_bytes(self) -> bytes:
        """An .npz without pickled objects, in half precision."""
        file = io.BytesIO()
        text = "\n".join(self.vocabulary).encode("utf-8", "surrogatepass")
        np.savez(file, vocabulary=np.frombuffer(text, np.uint8), matrix=self.matrix.astype(np.float16))
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Contexts:
        """What `to_bytes` gave."""
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            text = stored["vocabulary"].tobytes().decode("utf-8", "surrogatepass")
            return cls(text.split("\n") if text else [], _unit(stored["matrix"].astype(np.float32)))


def fit_contexts(texts: Callable[[], Iterable[str]]) -> Contexts:
    """Fits on texts, read twice and no further than MOST words; contexts end where a text does.

    A text too small for any two words to have something in common gives no vectors.
    """
    counts = Counter(word for block in _blocks(texts()) for text in block for word in text)
    kept = sorted((w for w, n in counts.items() if n >= LEAST), key=lambda w: (-counts[w], w))[:ROWS]
    number = {word: i for i, word in enumerate(kept)}
    columns = min(COLUMNS, len(kept))
    table = sparse.csr_matrix((len(kept), 2 * REACH * columns))
    for block in _blocks(texts()):
        table = table + _beside([[number.get(word, -1) for word in text] for text in block], len(kept), columns)
    dim = min(DIM, min(table.shape) - 1)
    if dim < 1 or not table.nnz:
        return Contexts(kept, np.zeros((len(kept), 1), np.float32))
    return Contexts(kept, _unit(_components(_information(table), dim)))


def _blocks(texts: Iterable[str]) -> Iterable[list[list[str]]]:
    """The casefolded words of texts, about BLOCK words at a time."""
    block: list[list[str]] = []
    size = seen = 0
    for text in texts:
        block.append([word.casefold() for word in words(text)])
        size += len(block[-1])
        if size >= BLOCK:
            yield block
            seen, size, block = seen + size, 0, []
            if seen >= MOST:
                return
    yield block


def _beside(texts: list[list[int]], rows: int, columns: int) -> sparse.csr_matrix:
    """[rows, places * columns]: how often each context word stands at each place beside each word."""
    gap = [-1] * REACH
    flat = np.fromiter((n for text in texts for n in (*text, *gap)), np.int64)
    found = sparse.csr_matrix((rows, 2 * REACH * columns))
    for place in range(2 * REACH):
        step = place // 2 + 1
        word, other = (flat[:-step], flat[step:]) if place % 2 else (flat[step:], flat[:-step])
        good = (word >= 0) & (other >= 0) & (other < columns)
        at = (word[good], other[good] + place * columns)
        found = found + sparse.csr_matrix((np.ones(int(good.sum())), at), shape=found.shape)
    return found


def _information(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Positive pointwise mutual information of rows and columns, the columns' shares smoothed."""
    table = counts.tocoo()
    row = np.asarray(counts.sum(axis=1)).ravel()
    column = np.asarray(counts.sum(axis=0)).ravel() ** SMOOTHING
    column /= column.sum()
    value = np.log(table.data / (row[table.row] * column[table.col]))
    kept = value > 0
    return sparse.csr_matrix((value[kept], (table.row[kept], table.col[kept])), shape=table.shape)


def _components(table: sparse.csr_matrix, dim: int) -> np.ndarray:
    """float32 [rows, dim]: the first left singular vectors times their values to the POWER (Halko et al. 2011).

    Always from the same start, which ARPACK does not promise where singular values are alike.
    """
    basis = np.random.default_rng(0).normal(size=(table.shape[1], min(dim + OVERSAMPLED, *table.shape)))
    for _ in range(ROUNDS):
        basis = np.linalg.qr(table.T @ np.linalg.qr(table @ basis)[0])[0]
    left, values, _ = np.linalg.svd(table @ basis, full_matrices=False)
    return np.asarray(left[:, :dim] * values[:dim] ** POWER, np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-9)

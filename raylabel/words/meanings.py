"""Does a unit have several meanings? Its exemplars in groups, by the vectors of their words and phrases.

Families are joined from the most alike on (average linkage, cosine); the cut into 2 to 4 groups is taken where families of
one group are clearly more alike than families of different groups, on word and on phrase vectors together, and the latter hardly
more than any two words.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

MOST = 4
APART, ALIKE = 0.2, 0.04
"""How much more alike families of one group are than those of different groups, and how alike the latter are at most."""
SMALLEST = 0.15
WEIGHTS = (0.75, 0.25)
"""Of word and of phrase vectors."""


def groups(words: np.ndarray, phrases: np.ndarray, families: Sequence[int]) -> np.ndarray:
    """int64 [n]: the group of each exemplar, the largest one 0; all 0 where there is one meaning.

    Args:
        words, phrases: float32 [n, dim], unit vectors or zero.
        families: of each exemplar; those of one family stay together.
    """
    number = np.unique(np.asarray(families), return_inverse=True)[1]
    n, sizes = len(number), np.bincount(number)
    known = np.array([bool(words[number == f].any()) for f in range(len(sizes))])
    if known.sum() < 2:
        return np.zeros(n, np.int64)
    alike = _similarity(words, phrases, number)[np.ix_(known, known)]
    np.fill_diagonal(alike, 1.0)
    tree = linkage(squareform(1 - alike, checks=False), "average")
    weights = sizes[known].astype(np.float64)
    best, found = 0.0, np.zeros(int(known.sum()), np.int64)
    for k in range(2, min(MOST, int(known.sum())) + 1):
        cut = fcluster(tree, k, "maxclust") - 1
        held = np.bincount(cut, weights)
        if len(held) < k or held.min() < max(2, SMALLEST * n):
            continue
        inside, outside = _means(alike, cut, weights)
        if outside <= ALIKE and inside - outside >= APART and inside - outside > best + 0.05:
            best, found = inside - outside, cut
    order = np.argsort(-np.bincount(found, weights), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    out = np.zeros(len(sizes), np.int64)
    out[known] = rank[found]
    return out[number]


def _similarity(words: np.ndarray, phrases: np.ndarray, number: np.ndarray) -> np.ndarray:
    """float64 [families, families]: mean of the cosines of the families' mean word and mean phrase vectors."""
    total = np.zeros((number.max() + 1, number.max() + 1))
    for vectors, weight in zip((words, phrases), WEIGHTS, strict=True):
        means = np.zeros((number.max() + 1, vectors.shape[1]))
        np.add.at(means, number, vectors.astype(np.float64))
        length = np.linalg.norm(means, axis=1, keepdims=True)
        means = np.divide(means, length, out=np.zeros_like(means), where=length > 1e-9)
        total += weight * (means @ means.T)
    return np.clip(total, -1, 1)


def _means(alike: np.ndarray, cut: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Mean similarity of pairs of families in one group (1 where a group has one family), and of pairs in different ones."""
    pairs = np.outer(weights, weights)
    same = cut[:, None] == cut[None, :]
    other = ~same
    single = np.bincount(cut)[cut] == 1
    inside = same & ~np.eye(len(cut), dtype=bool)
    alone = float((weights[single] ** 2).sum())
    total = float((pairs * inside).sum()) + alone
    within = (float((pairs * inside * alike).sum()) + alone) / max(total, 1e-9)
    return within, float((pairs * other * alike).sum()) / max(float((pairs * other).sum()), 1e-9)

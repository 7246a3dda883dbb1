"""How well numbers tell active words from silent ones where words of one document go together.

AUROC: the chance that an active word's number is above a silent one's, ties half. Everything random draws documents, not
words: words of one text share what the text is about, and as single draws they would count for more than they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from raylabel.stages.intervals import LEAST_DOCUMENTS, LEVEL, RESAMPLES, stretch

FLIPS = 9_999
"""Sign vectors that are drawn where there are more; all of them otherwise."""


class Separation(NamedTuple):
    """NaN where there is nothing to say."""

    auroc: float
    low: float
    high: float
    p_value: float


def auroc(numbers: np.ndarray, labels: np.ndarray) -> float:
    """Of numbers [n] with labels bool [n] (Mann and Whitney 1947); NaN where a label does not occur."""
    yes = int(labels.sum())
    no = len(labels) - yes
    if not yes or not no:
        return float("nan")
    return float((rankdata(numbers)[labels].sum() - yes * (yes + 1) / 2) / (yes * no))


def separation(numbers: np.ndarray, labels: np.ndarray, documents: np.ndarray, seed: int) -> Separation:
    """AUROC with a 95 % interval and the p-value of AUROC <= 0.5.

    Args:
        numbers, labels, documents: [n] each; documents int, any values.

    The interval is NaN with fewer than 3 documents of a label, the p-value with fewer than 3 documents.
    """
    value = auroc(numbers, labels)
    _, number = np.unique(documents, return_inverse=True)
    if not np.isfinite(value):
        return Separation(value, *[float("nan")] * 3)
    low, high = _interval(value, numbers, labels, number, seed)
    return Separation(value, low, high, _p_value(numbers, labels, number))


def _interval(value: float, numbers: np.ndarray, labels: np.ndarray, number: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentiles of a bootstrap over documents, stretched as in `intervals`, within 0 and 1.

    A bootstrap of a perfect AUROC has no spread. Its lower end is then what so many documents of the rarer label would
    all exceed in 2.5 % of all cases, alike for the upper end of an AUROC of 0.
    """
    least = min(len(np.unique(number[labels])), len(np.unique(number[~labels])))
    if least < LEAST_DOCUMENTS:
        return float("nan"), float("nan")
    n = int(number.max()) + 1
    draws = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
    weights = np.bincount(draws.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(np.float64)
    yes, no = weights[:, number[labels]], weights[:, number[~labels]]
    above = np.sign(numbers[labels][:, None] - numbers[~labels]) / 2 + 0.5
    total = yes.sum(1) * no.sum(1)
    some = total > 0
    drawn = np.einsum("by,yn,bn->b", yes[some], above, no[some], optimize=True) / total[some]
    low, high = np.percentile(drawn, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    wider = stretch(least)
    low, high = value - wider * max(value - float(low), 0.0), value + wider * max(float(high) - value, 0.0)
    edge = ((1 - LEVEL) / 2) ** (1 / least)
    low, high = min(low, edge) if value == 1 else low, max(high, 1 - edge) if value == 0 else high
    return max(low, 0.0), min(high, 1.0)


def _p_value(numbers: np.ndarray, labels: np.ndarray, number: np.ndarray) -> float:
    """Of the rank sum, against signs turned over document by document.

    The statistic is a sum over words: centred ranks, those of active words / how many there are, those of silent ones
    likewise with a minus. Where labels say nothing of the numbers, a document's part of it is as likely to be positive as
    negative; all its words turn over together (a wild cluster bootstrap with the null imposed: Cameron, Gelbach and
    Miller 2008). There is no p-value below 1 / 2^documents.
    """
    ranks = rankdata(numbers)
    parts = (ranks - ranks.mean()) / np.where(labels, labels.sum(), -(~labels).sum())
    sums = np.bincount(number, parts)
    sums = sums[sums != 0]
    if len(sums) < LEAST_DOCUMENTS:
        return float("nan") if len(np.unique(number)) < LEAST_DOCUMENTS else 1.0
    signs, every = _signs(len(sums))
    reached = int((signs @ sums >= sums.sum() * (1 - 1e-12) - 1e-12).sum())
    return reached / len(signs) if every else (1 + reached) / (1 + len(signs))


@lru_cache(maxsize=128)
def _signs(documents: int) -> tuple[np.ndarray, bool]:
    """(float32 [signs, documents], whether that is all of them)."""
    if 2**documents <= FLIPS:
        bits = np.arange(2**documents)[:, None] >> np.arange(documents)
        return ((bits & 1) * 2 - 1).astype(np.float32), True
    drawn = np.random.default_rng(documents).integers(2, size=(FLIPS, documents), dtype=np.int8)
    return (drawn * 2 - 1).astype(np.float32), False

"""The interval of a difference of two ratios of sums, from a bootstrap over documents.

Percentiles of a bootstrap are too narrow where documents are few: its spread is (n − 1)/n of the sample's, and knows
nothing of the doubt about that spread. Both percentiles' distances from the value are therefore stretched by
t(n − 1)/z · √(n/(n − 1)): the sample's spread, and Student's quantile in place of the normal one (Hesterberg 2015
does the same with the percentiles' levels, for which three documents have too few different draws). On simulated
documents the 95 % interval of a specificity then holds the truth in about 0.94 of all cases, with 3 documents as with 20;
percentiles alone do in 0.75 with 3, 0.82 with 5, 0.88 with 10 and 0.91 with 20. The interval of a cost stays short of
its level while documents are few and skewed: 0.83 with 3, 0.85 with 5, 0.89 with 10, 0.92 with 20.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

LEAST_DOCUMENTS = 3
"""Fewer give no interval: with three documents a bootstrap has ten different draws."""
RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    value: float
    low: float
    high: float


NOWHERE = Interval(float("nan"), float("nan"), float("nan"))


def bootstrap(
    value: float, more: tuple[np.ndarray, np.ndarray], less: tuple[np.ndarray, np.ndarray], seed: int
) -> Interval:
    """`value` with the 95 % interval of Σ/Σ of `more` − Σ/Σ of `less`, documents drawn with replacement.

    The interval holds `value`.

    Args:
        value: the difference over all documents; NaN gives an empty interval.
        more, less: numerators and positive denominators by document, the same documents in both.
    """
    documents = len(more[0])
    if not np.isfinite(value) or documents < LEAST_DOCUMENTS:
        return NOWHERE
    draws = np.random.default_rng(seed).integers(documents, size=(RESAMPLES, documents))
    draws += documents * np.arange(RESAMPLES)[:, None]
    weights = np.bincount(draws.ravel(), minlength=RESAMPLES * documents).reshape(RESAMPLES, documents)
    sums = weights @ np.stack([*more, *less], axis=1)
    tails = (50 * (1 - LEVEL), 50 * (1 + LEVEL))
    low, high = np.percentile(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], tails)
    wider = stretch(documents)
    return Interval(value, value - wider * max(value - float(low), 0.0), value + wider * max(float(high) - value, 0.0))


def stretch(documents: int) -> float:
    """By how much the percentiles' distances from the value grow; 1 in the limit of many documents."""
    tail = (1 + LEVEL) / 2
    return float(stdtrit(documents - 1, tail) / ndtri(tail) * np.sqrt(documents / (documents - 1)))


def draw_seed(seed: int, layer: int, unit: tuple[str | None, int, int]) -> int:
    """The seed of the bootstraps of a unit (control, neuron, polarity): the same whatever work unit it is in."""
    digest = hashlib.sha256(f"{seed}/{layer}/{unit[1]}/{unit[2]}/{unit[0] or ''}".encode()).digest()
    return int.from_bytes(digest[:8], "big")

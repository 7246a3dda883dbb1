"""What a label's predictions are worth: raw values, the same of other units' labels, and intervals over documents.

Predictions of a test are float [labels, windows], the unit's own label first, then other units' (the shuffled ones);
NaN is unscored and takes no part, neither as right nor as wrong. Values lie in [-1, 1] and 0 is chance:

- `balanced`: TPR + TNR - 1 of predictions that are 0 or 1;
- `ranked`: 2 AUROC - 1 of scores;
- `correlated`: Pearson's r of predicted activations over all tokens of all windows (Bills et al. 2023); a constant has 0.

corrected = (value - shuffled)/(1 - shuffled), shuffled the mean of the other labels' values. Its interval is a bootstrap
over documents, stretched as in `intervals`. Where every window is answered right, no resample differs: to each class of
a resample one right and one wrong pseudo-document are therefore added in effect (Agresti and Coull 1998), so that few
documents without an error give no interval of width zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from raylabel.stages.intervals import LEAST_DOCUMENTS, LEVEL, RESAMPLES, stretch

NAN = float("nan")
ALL = 1 - 1e-9
Resampled = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Value(NamedTuple):
    """A test's outcome; NaN where there was nothing to measure."""

    value: float = NAN
    shuffled: float = NAN
    corrected: float = NAN
    low: float = NAN
    high: float = NAN
    n: int = 0
    """Windows (tokens of a correlation) that the own label was scored on."""
    n_failed: int = 0
    """Windows without an answer under the own label."""


def correct(value: np.ndarray | float, shuffled: np.ndarray | float) -> np.ndarray:
    """(value - shuffled)/(1 - shuffled); where other labels do perfectly, 0 for a label that does so too, else -1."""
    value, shuffled = np.asarray(value, np.float64), np.asarray(shuffled, np.float64)
    full = shuffled >= ALL
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (value - shuffled) / np.where(full, 1.0, 1 - shuffled)
    return np.where(full & ~np.isnan(value), np.where(value >= ALL, 0.0, -1.0), found)


def balanced(answers: np.ndarray, truth: np.ndarray, documents: np.ndarray, seed: int) -> Value:
    """TPR + TNR - 1 of answers [labels, windows] in {0, 1, NaN} against truth [windows] bool."""
    answers, truth = np.asarray(answers, np.float64), np.asarray(truth, bool)
    place, many = _places(documents)
    right = np.where(np.isnan(answers), 0.0, np.where(truth, answers, 1 - answers))
    known = (~np.isnan(answers)).astype(np.float64)
    hits = [_by_document(right * side, place, many) for side in (truth, ~truth)]
    sizes = [_by_document(known * side, place, many) for side in (truth, ~truth)]
    fewest = [int((size[0] > 0).sum()) for size in sizes]

    def resampled(weights: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        total = -np.ones((len(answers), len(weights)))
        for hit, size, few in zip(hits, sizes, fewest, strict=True):
            with np.errstate(invalid="ignore"):
                rate = (hit @ weights.T) / (size @ weights.T)
            total += _softened(rate, few, draw.binomial(2, 0.5, len(weights)) / 2)
        return total

    with np.errstate(invalid="ignore"):
        values = sum(h.sum(1) / s.sum(1) for h, s in zip(hits, sizes, strict=True)) - 1
    return _outcome(np.asarray(values), resampled, many, min(fewest), known[0], seed)


def ranked(scores: np.ndarray, truth: np.ndarray, documents: np.ndarray, seed: int) -> Value:
    """2 AUROC - 1 of scores [labels, windows], ties counting half, against truth [windows] bool."""
    scores, truth = np.asarray(scores, np.float64), np.asarray(truth, bool)
    place, many = _places(documents)
    above = np.sign(scores[:, truth][:, :, None] - scores[:, ~truth][:, None, :])
    known = ~np.isnan(above)
    above = np.where(known, above, 0.0)
    few = min(len(set(place[side & ~np.isnan(scores[0])].tolist())) for side in (truth, ~truth))

    def resampled(weights: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        ups, downs = weights[:, place[truth]], weights[:, place[~truth]]
        with np.errstate(invalid="ignore"):
            found = np.stack([
                np.einsum("rp,pn,rn->r", ups, a, downs, optimize=True)
                / np.einsum("rp,pn,rn->r", ups, k.astype(np.float64), downs, optimize=True)
                for a, k in zip(above, known, strict=True)
            ])  # fmt: skip
        return _softened(found, few, draw.binomial(2, 0.5, len(weights)) - 1.0)

    with np.errstate(invalid="ignore"):
        values = above.sum((1, 2)) / known.sum((1, 2))
    return _outcome(values, resampled, many, few, ~np.isnan(scores[0]), seed)


def correlated(predicted: np.ndarray, actual: np.ndarray, documents: np.ndarray, seed: int) -> Value:
    """Pearson's r of predicted [labels, tokens] and actual [tokens] activations; `documents` a token's each."""
    predicted, actual = np.asarray(predicted, np.float64), np.asarray(actual, np.float64)
    place, many = _places(documents)
    known = ~np.isnan(predicted)
    x, y = np.where(known, predicted, 0.0), np.where(known, actual - actual.mean(), 0.0)
    parts = [_by_document(part, place, many) for part in (known.astype(np.float64), x, y, x * x, y * y, x * y)]

    def correlation(sums: list[np.ndarray]) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = sums
        with np.errstate(invalid="ignore", divide="ignore"):
            across, along = sxx - sx * sx / n, syy - sy * sy / n
            found = (sxy - sx * sy / n) / np.sqrt(across * along)
        # What is constant tells nothing; sums of equal numbers leave a rounding error.
        flat = (across <= 1e-9 * np.maximum(sxx, 1e-30)) | (along <= 1e-9 * np.maximum(syy, 1e-30))
        found = np.where(n > 0, np.where(flat, 0.0, found), NAN)
        return found

    def resampled(weights: np.ndarray, _draw: np.random.Generator) -> np.ndarray:
        return correlation([part @ weights.T for part in parts])

    return _outcome(correlation([p.sum(1) for p in parts]), resampled, many, many, known[0], seed)


def agreement(label: np.ndarray, others: np.ndarray, concept: np.ndarray, documents: np.ndarray, seed: int) -> Value:
    """Spearman's rho of the judge's log-odds under a label and under a concept, corrected by other units' labels.

    Args:
        label, concept: [windows]. others: [labels, windows], under other units' labels.
    """
    ranks = np.stack([rankdata(row) for row in (label, *others)])
    return correlated(ranks, rankdata(concept), documents, seed)


def _outcome(
    values: np.ndarray, resampled: Resampled, documents: int, few: int, known: np.ndarray, seed: int
) -> Value:  # fmt: skip
    n, missing = int(known.sum()), int(len(known) - known.sum())
    value = float(values[0]) if n else NAN
    others = values[1:][~np.isnan(values[1:])]
    if np.isnan(value):
        return Value(n=n, n_failed=missing)
    shuffled = float(others.mean()) if len(others) else NAN
    corrected = float(correct(value, shuffled)) if len(others) else NAN
    if few < LEAST_DOCUMENTS or np.isnan(corrected):
        return Value(value, shuffled, corrected, n=n, n_failed=missing)
    draw = np.random.default_rng(seed)
    weights = draw.multinomial(documents, np.full(documents, 1 / documents), RESAMPLES).astype(np.float64)
    drawn = resampled(weights, draw)
    rest = drawn[1:][~np.isnan(values[1:])]
    there = ~np.isnan(rest)
    with np.errstate(invalid="ignore"):
        found = correct(drawn[0], np.where(there, rest, 0.0).sum(0) / there.sum(0))
    found = found[np.isfinite(found)]
    if len(found) < RESAMPLES // 2:
        return Value(value, shuffled, corrected, n=n, n_failed=missing)
    low, high = np.percentile(found, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    wider = stretch(few)
    ends = corrected - wider * max(corrected - low, 0.0), corrected + wider * max(high - corrected, 0.0)
    return Value(value, shuffled, corrected, float(ends[0]), min(float(ends[1]), 1.0), n, missing)


def _softened(rates: np.ndarray, documents: int, pseudo: np.ndarray) -> np.ndarray:
    """Rates [labels, resamples] with two pseudo-documents among `documents`, whose mean is `pseudo` [resamples]."""
    share = 2 / (documents + 2)
    return (1 - share) * rates + share * pseudo


def _places(documents: Sequence[int] | np.ndarray) -> tuple[np.ndarray, int]:
    distinct, place = np.unique(np.asarray(documents), return_inverse=True)
    return place, len(distinct)


def _by_document(values: np.ndarray, place: np.ndarray, many: int) -> np.ndarray:
    """[labels, documents]: sums of [labels, windows] over each document's windows."""
    return np.stack([np.bincount(place, row, many) for row in np.asarray(values, np.float64)])

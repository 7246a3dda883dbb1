"""Values against brute force; corrected ones are 0 for labels that say nothing; intervals hold the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from raylabel.stages.intervals import LEAST_DOCUMENTS
from raylabel.stages.score_values import agreement, balanced, correct, correlated, ranked
from tests.stages.scored_units import auroc, rates

TRUTH = np.array([True] * 12 + [False] * 18)
DOCUMENTS = np.arange(30) // 2
NO = np.zeros(30)


def noisy(seed: int, errors: float) -> np.ndarray:
    flip = np.random.default_rng(seed).random(30) < errors
    return np.where(flip, ~TRUTH, TRUTH).astype(float)


def test_values_are_those_of_other_implementations() -> None:
    answers = np.stack([noisy(0, 0.2), noisy(1, 0.5), noisy(2, 0.5), noisy(3, 0.5)])
    got = balanced(answers, TRUTH, DOCUMENTS, 0)
    expected = [rates(TRUTH, row) for row in answers]
    assert got.value == pytest.approx(expected[0]) and got.shuffled == pytest.approx(np.mean(expected[1:]))
    assert got.corrected == pytest.approx((got.value - got.shuffled) / (1 - got.shuffled))
    scores = answers + np.random.default_rng(4).normal(size=answers.shape).round(1)
    found = ranked(scores, TRUTH, DOCUMENTS, 0)
    assert found.value == pytest.approx(2 * auroc(TRUTH, scores[0]) - 1)
    assert found.shuffled == pytest.approx(np.mean([2 * auroc(TRUTH, row) - 1 for row in scores[1:]]))
    actual = scores[0] + np.random.default_rng(5).normal(size=30)
    assert correlated(scores, actual, DOCUMENTS, 0).value == pytest.approx(pearsonr(scores[0], actual).statistic)
    together = agreement(scores[0], scores[1:], actual, DOCUMENTS, 0)
    rho, others = spearmanr(scores[0], actual).statistic, [spearmanr(row, actual).statistic for row in scores[1:]]
    assert together.corrected == pytest.approx((rho - np.mean(others)) / (1 - np.mean(others)))


def test_intervals_are_by_document_and_hold_the_value() -> None:
    answers = np.stack([noisy(0, 0.2), noisy(1, 0.5), noisy(2, 0.5), noisy(3, 0.5)])
    apart = balanced(answers, TRUTH, DOCUMENTS, 0)
    assert apart.low < apart.corrected < apart.high <= 1
    # The same windows fifty times over are no more evidence.
    many = balanced(np.tile(answers, 50), np.tile(TRUTH, 50), np.tile(DOCUMENTS, 50), 0)
    assert (many.low, many.high) == (pytest.approx(apart.low), pytest.approx(apart.high))
    assert balanced(answers, TRUTH, DOCUMENTS, 0) == apart
    few = balanced(answers, TRUTH, np.where(TRUTH, 0, DOCUMENTS), 0)
    assert math.isnan(few.low) and not math.isnan(few.corrected) and LEAST_DOCUMENTS > 1


def test_answers_that_are_all_right_have_an_interval_too() -> None:
    right = np.stack([TRUTH.astype(float), NO, NO, NO])
    for got in (balanced(right, TRUTH, DOCUMENTS, 0), ranked(right + 0.0, TRUTH, DOCUMENTS, 0)):
        assert got.corrected == 1 and 0.2 < got.low < 0.9 and got.high == 1


@pytest.mark.parametrize("documents", [6, 15])
def test_intervals_hold_the_truth(documents: int) -> None:
    """Labels of known rates, a third of the documents leaning one way: 95 % intervals hold the true value in about that many."""
    draw = np.random.default_rng(documents)
    held, rounds = 0, 200
    for i in range(rounds):
        place = np.repeat(np.arange(2 * documents), 2)
        truth = place < documents
        # TPR 0.8, TNR 0.9 for the own label; 0.4 and 0.6, which is chance, for the others.
        lean = draw.normal(0, 0.05, 2 * documents)[place]
        own = np.where(truth, draw.random(len(place)) < 0.8 + lean, draw.random(len(place)) > 0.9 + lean)
        others = [np.where(truth, draw.random(len(place)) < 0.4, draw.random(len(place)) < 0.4) for _ in range(3)]
        got = balanced(np.stack([own, *others]).astype(float), truth, place, i)
        held += got.low <= 0.7 <= got.high
    assert 0.9 <= held / rounds <= 1


@pytest.mark.parametrize("answer", [0.0, 1.0])
def test_always_the_same_answer_is_worth_nothing(answer: float) -> None:
    """SAEBench's plain accuracy gives 10/14 to a label that never fires."""
    got = balanced(np.full((4, 30), answer), TRUTH, DOCUMENTS, 0)
    assert (got.value, got.shuffled, got.corrected) == (0, 0, 0)
    beside = np.stack([np.full(30, answer), noisy(1, 0.5), noisy(2, 0.5), noisy(3, 0.5)])
    assert balanced(beside, TRUTH, DOCUMENTS, 0).value == 0


def test_a_constant_simulation_correlates_with_nothing() -> None:
    """It is 0 and not NaN; the same of a unit that never moves."""
    tokens = np.random.default_rng(0).random(90)
    for answers, actual in ((np.full((4, 90), 0.1), tokens), (np.stack([tokens] * 4), np.full(90, 0.3))):
        got = correlated(answers, actual, np.arange(90) // 6, 0)
        assert (got.value, got.shuffled, got.corrected) == (0, 0, 0)


def test_what_has_no_answer_is_neither_right_nor_wrong() -> None:
    """delphi counts no failures and drops them; others count them as wrong."""
    whole = np.stack([noisy(0, 0.2), noisy(1, 0.5), noisy(2, 0.5), noisy(3, 0.5)])
    answers = whole.copy()
    answers[0, ::3] = np.nan
    got = balanced(answers, TRUTH, DOCUMENTS, 0)
    kept = ~np.isnan(answers[0])
    assert (got.n, got.n_failed) == (20, 10)
    assert got.value == pytest.approx(rates(TRUTH[kept], whole[0, kept]))
    none: Any = balanced(np.full((4, 30), np.nan), TRUTH, DOCUMENTS, 0)
    assert math.isnan(none.value) and (none.n, none.n_failed) == (0, 30)


def test_a_floor_that_leaves_nothing() -> None:
    assert correct(1.0, 1.0) == 0 and correct(0.4, 1.0) == -1 and correct(0.75, 0.5) == 0.5
    assert np.isnan(correct(float("nan"), 1.0))

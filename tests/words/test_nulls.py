from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from raylabel.words import nulls as module
from raylabel.words.background import Background
from raylabel.words.nulls import CHUNKS, DRAWS, ENOUGH, Kind, Nulls
from tests.words.planted import background


@pytest.fixture(scope="module")
def fitted() -> Background:
    return background()


def _pool(fitted: Background, kind: Kind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, stems and bands of everything that can be drawn."""
    if kind == "phrases":
        return fitted.null_vectors, fitted.null_stems, fitted.null_bands
    bands = np.searchsorted(fitted.edges, np.arange(len(fitted.vocabulary)), side="right") - 1
    return fitted.matrix, fitted.stems, bands


def _draw(rng: np.random.Generator, pool: tuple[np.ndarray, np.ndarray, np.ndarray], counts: list[int]) -> np.ndarray:
    """One null set: from each band, in order, uniform members whose stem is new in the band."""
    vectors, stems, bands = pool
    chosen: list[int] = []
    for band, count in enumerate(counts):
        seen: set[int] = set()
        members = np.flatnonzero(bands == band)
        while len(seen) < count:
            i = int(rng.choice(members))
            if int(stems[i]) not in seen:
                seen.add(int(stems[i]))
                chosen.append(i)
    return vectors[chosen]


MIXES = [[4, 0, 0, 0], [0, 0, 5, 0], [2, 2, 2, 2], [1, 3, 6, 4], [12, 3, 0, 0], [0, 0, 0, 15]]


@pytest.mark.parametrize("kind", ["words", "phrases"])
def test_p_values_of_null_sets_are_uniform(fitted: Background, kind: Kind) -> None:
    """Over many seeds, since units of one run share their draws."""
    assert fitted.bands == 4
    pool, rng = _pool(fitted, kind), np.random.default_rng(5)
    found = []
    for seed in range(40):
        counts = [MIXES[i % len(MIXES)] for i in range(30)]
        squares = [(_draw(rng, pool, c).sum(axis=0).astype(float) ** 2).sum() for c in counts]
        found.append(Nulls(fitted, seed).p_values(kind, np.array(squares), np.array(counts)))
    p = np.concatenate(found)
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    for level in (0.01, 0.05, 0.2):
        assert stats.binomtest(int((p <= level).sum()), len(p), level, "greater").pvalue > 1e-3, "not anti-conservative"


def test_p_is_the_share_of_draws_that_reach_it(fitted: Background) -> None:
    """Against all draws made one by one, with mean pairwise cosines by a loop over pairs."""
    nulls = Nulls(fitted, 0)
    counts = np.array([[2, 1, 1, 0]])
    null = []
    for chunk in range(len(CHUNKS) - 1):
        drawn = [nulls._drawn("words", band, chunk, 2) for band in range(4)]
        for draw in range(drawn[0].shape[1]):
            pools = nulls._pools["words"]
            rows = [pools[b].vectors[drawn[b][i, draw]] for b, c in enumerate(counts[0]) for i in range(c)]
            null.append(np.mean([a @ b for a, b in combinations(rows, 2)]))
        if chunk == 4:
            break
    for observed in (np.sort(null)[-5], np.sort(null)[-60], np.sort(null)[len(null) // 2] + 1e-4, 2.0):
        square = observed * 12 + 4
        reached = np.cumsum(np.array(null) >= observed - 1e-6)
        stop = int(np.argmax(reached >= ENOUGH)) + 1 if reached[-1] >= ENOUGH else None
        p = nulls.p_values("words", np.array([square]), counts)[0]
        if stop:
            assert p == ENOUGH / stop
        elif observed > 1:
            assert p == 1 / (1 + DRAWS)
        else:
            assert (1 + reached[-1]) / (1 + DRAWS) <= p < ENOUGH / len(null)


def test_sequences_have_distinct_stems_and_are_continued_by_longer_calls(fitted: Background) -> None:
    for band, pool in enumerate(Nulls(fitted, 0)._pools["phrases"]):
        short = pool.sequences(np.random.default_rng(band), 7, 30)
        long = pool.sequences(np.random.default_rng(band), 40, 30)
        assert np.array_equal(long[:7], short)
        assert all(len(set(pool.code[column].tolist())) == 40 for column in long.T)


def test_both_ways_of_drawing_are_uniform() -> None:
    pool = module._Pool(np.eye(6, dtype=np.float32), np.array([0, 0, 0, 1, 1, 2]))
    race = pool._race(np.random.default_rng(0), 20_000)
    reject = pool._reject(np.random.default_rng(0), 3, 20_000)
    first = np.array([3, 2, 1]) / 6
    for drawn in (race, reject):
        assert np.allclose(np.bincount(drawn[0], minlength=6) / 20_000, 1 / 6, atol=0.015)
        assert np.allclose(np.bincount(pool.code[drawn[0]], minlength=3) / 20_000, first, atol=0.015)
        second = np.bincount(pool.code[drawn[1]][pool.code[drawn[0]] == 2], minlength=3)
        assert np.allclose(second / second.sum(), [0.6, 0.4, 0], atol=0.03)


def test_a_unit_has_the_same_p_whatever_is_asked_with_it(fitted: Background) -> None:
    rng, pool = np.random.default_rng(1), _pool(fitted, "words")
    counts = np.array([MIXES[i % len(MIXES)] for i in range(24)])
    squares = np.array([(_draw(rng, pool, c.tolist()).sum(axis=0) ** 2).sum() * rng.uniform(0.8, 1.6) for c in counts])
    together = Nulls(fitted, 0).p_values("words", squares, counts)
    apart = [Nulls(fitted, 0).p_values("words", squares[i : i + 1], counts[i : i + 1])[0] for i in range(24)]
    assert together.tolist() == apart
    assert together.tolist() != Nulls(fitted, 1).p_values("words", squares, counts).tolist()


def test_more_members_than_stems_and_nothing_to_draw(fitted: Background) -> None:
    pool = module._Pool(np.eye(3, dtype=np.float32), np.array([0, 1, 1]))
    drawn = pool.sequences(np.random.default_rng(0), 5, 10)
    assert np.array_equal(drawn[:2], drawn[2:4])
    assert Nulls(fitted, 0).p_values("words", np.zeros(1), np.zeros((1, 4), int)).tolist() == [1.0]
    assert module._pools(np.zeros((2, 3), np.float32), np.zeros(2, int), np.zeros(2, int), 1) == []

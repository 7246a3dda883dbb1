"""The statistics as statistics: p-values of null units, the false discovery rate with meaning mixed in, and coverage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from raylabel.sections import IdentifyConfig
from raylabel.stages.identify import close, measure
from raylabel.stages.intervals import bootstrap, stretch
from raylabel.tables import from_rows
from raylabel.words.background import Background, fit_background
from raylabel.words.nulls import DRAWS, ENOUGH, Nulls
from raylabel.words.segment import mat_word
from tests.words.planted import LISTS, WORDS, PlantedVectors, _normal, background, samples

BOS, WINDOW = 0, 5
NUMBER = {word: i + 1 for i, word in enumerate([*WORDS, "."])}
SURE = 1e-3
"""A test of a true claim fails with this probability."""
Exemplar = dict[str, Any]


class Banded(PlantedVectors):
    """Words of one frequency band have something in common, as in real vectors."""

    def __init__(self, bands: dict[str, int]) -> None:
        super().__init__()
        self.bands = bands

    def _vector(self, word: str) -> np.ndarray:
        own = super()._vector(word)
        return own + _normal(f"band {self.bands[word]}", self.dim).astype(np.float32) if word in self.bands else own


@pytest.fixture(scope="module")
def fitted() -> Background:
    plain = background()
    bands = dict(zip(plain.vocabulary, plain.band(plain.vocabulary).tolist(), strict=True))
    return fit_background(samples(), Banded(bands), WINDOW, "sif", 0)


class Places:
    """All tokens of the corpus that the nulls were drawn from, by the frequency band of their word."""

    def __init__(self, fitted: Background) -> None:
        self.text = samples()
        self.of: list[list[tuple[int, int, int]]] = [[] for _ in range(fitted.bands)]
        stems = dict(zip(fitted.vocabulary, fitted.stems.tolist(), strict=True))
        for i, row in enumerate(self.text):
            starts = [0, *row["ends"][1:]]
            for token in range(1, len(row["tokens"])):
                low, high = mat_word(row["text"], starts[token - 1], starts[token])
                word = row["text"][low:high]
                if word in stems and fitted.words([word]).any():
                    self.of[int(fitted.band([word])[0])].append((i, token, stems[word]))
        self.share = np.array([len(members) for members in self.of]) / sum(map(len, self.of))

    def exemplar(self, i: int, token: int, word: str | None = None) -> Exemplar:
        """The sample around a token, which gives way to `word`."""
        tokens = list(self.text[i]["tokens"])
        tokens[token] = tokens[token] if word is None else f" {word}"
        ids = [NUMBER.get(token.strip(), BOS) for token in tokens]
        return {"position": token, "tokens": tokens, "token_ids": ids}

    def anywhere(self, rng: np.random.Generator, word: str) -> Exemplar:
        """`word` in the place of any word of the corpus."""
        members = self.of[rng.choice(len(self.of), p=self.share)]
        i, token, _ = members[rng.integers(len(members))]
        return self.exemplar(i, token, word)


def mix(rng: np.random.Generator, bands: int) -> np.ndarray:
    """How many families of each band: 4 to 20 in all, 5 at least where nothing is repeated."""
    return rng.multinomial(rng.integers(4, 21), rng.dirichlet(np.ones(bands)))


def null_words(rng: np.random.Generator, fitted: Background, places: Places) -> list[Exemplar]:
    """MAT words as the null of words draws them: uniform in the vocabulary of a band, no stem twice; any text around."""
    found: list[Exemplar] = []
    for band, count in enumerate(mix(rng, fitted.bands)):
        ranks = rng.permutation(np.arange(fitted.edges[band], fitted.edges[band + 1]))
        ranks = ranks[fitted.matrix[ranks].any(axis=1)]
        first = np.sort(np.unique(fitted.stems[ranks], return_index=True)[1])
        found += [places.anywhere(rng, fitted.vocabulary[rank]) for rank in ranks[first[:count]].tolist()]
    return found


def null_phrases(rng: np.random.Generator, places: Places) -> list[Exemplar]:
    """Phrases as the null of phrases draws them: uniform positions of the corpus by the band of their word, no stem twice."""
    found: list[Exemplar] = []
    for members, count in zip(places.of, mix(rng, len(places.of)), strict=True):
        stems: set[int] = set()
        while len(stems) < count:
            i, token, stem = members[rng.integers(len(members))]
            if stem not in stems:
                stems.add(stem)
                found.append(places.exemplar(i, token))
    return found


def repeated(rng: np.random.Generator, unit: list[Exemplar]) -> list[Exemplar]:
    """By rank, up to 20 exemplars: repeats of a family come after it, and are no evidence."""
    again = [unit[i] for i in rng.integers(len(unit), size=max(5 - len(unit), int(rng.integers(0, 21 - len(unit)))))]
    return [unit[i] for i in rng.permutation(len(unit))] + again


def exemplars(units: list[list[Exemplar]]) -> pa.Table:
    usual = {"polarity": 1, "sampling": "top", "split": "explain"}
    rows = [{"neuron": u, "rank": rank, **usual, **row} for u, unit in enumerate(units) for rank, row in enumerate(unit)]
    return from_rows(rows, "exemplars")


def exact(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sequential p-values, uniform on their own grid, spread evenly down to the next smaller one: uniform on [0, 1]."""
    draws = np.round(ENOUGH / p)
    stopped = p > ENOUGH / DRAWS
    return p - rng.random(len(p)) * np.where(stopped, ENOUGH / draws - ENOUGH / (draws + 1), 1 / (DRAWS + 1))


@pytest.fixture
def singles(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[float]]]:
    """The p-values of either test, as `identify` gets them."""
    found: dict[str, list[float]] = {"words": [], "phrases": []}
    inner = Nulls.p_values

    def noted(self: Nulls, kind: Any, squares: np.ndarray, counts: np.ndarray) -> np.ndarray:
        p = inner(self, kind, squares, counts)
        found[kind] += p.tolist()
        return p

    monkeypatch.setattr(Nulls, "p_values", noted)
    yield found


@pytest.mark.parametrize("kind", ["words", "phrases"])
def test_p_values_of_null_units_are_uniform(fitted: Background, singles: dict[str, list[float]], kind: str) -> None:
    """Each unit has a seed of its own, since units of a run share their draws; combined, they are never too small."""
    rng, places = np.random.default_rng(101), Places(fitted)
    combined = []
    for seed in range(600):
        unit = null_words(rng, fitted, places) if kind == "words" else null_phrases(rng, places)
        row = measure(exemplars([repeated(rng, unit)]), fitted, WINDOW, [BOS], 10_000 + seed).to_pylist()[0]
        assert row["n_families"] == len(unit) and row["status"] == "ok"
        combined.append(row["p_value"])
    assert len(singles[kind]) == len(combined) == 600
    assert stats.kstest(exact(np.array(singles[kind]), rng), "uniform").pvalue > SURE
    for level in (0.01, 0.05, 0.1):
        few = int((np.array(combined) <= level).sum())
        assert stats.binomtest(few, len(combined), level, "greater").pvalue > SURE, (level, few)


@pytest.fixture(scope="module")
def mixed(fitted: Background) -> list[tuple[pa.Table, np.ndarray]]:
    """Runs of 120 units that fire anywhere and 30 that mean something: `candidates` before closing, and who is null."""
    rng, places = np.random.default_rng(102), Places(fitted)
    names, runs = list(LISTS), []
    for seed in range(18):
        nulls = [null_words(rng, fitted, places) if i % 2 else null_phrases(rng, places) for i in range(120)]
        meant = []
        for i in range(30):
            words = rng.permutation(LISTS[names[i % len(names)]])[: rng.integers(5, 11)].tolist()
            meant.append([places.anywhere(rng, word) for word in words])
        units = [repeated(rng, unit) for unit in (*nulls, *meant)]
        found = measure(exemplars(units), fitted, WINDOW, [BOS], 20_000 + seed)
        runs.append((found.append_column("layer", pa.array([0] * len(units), pa.int32())), np.arange(len(units)) < 120))
    return runs


@pytest.mark.parametrize("q", [0.01, 0.05, 0.1])
def test_false_discoveries_stay_within_their_rate(mixed: list[tuple[pa.Table, np.ndarray]], q: float) -> None:
    false = found = 0
    for table, null in mixed:
        none = from_rows([], "candidates", True).append_column("layer", pa.array([], pa.int32()))
        kinds = close(table, none, IdentifyConfig(fdr=q))[0]["kind"].to_pylist()
        meaning = np.array([kind == "meaning" for kind in kinds])
        false, found = false + int((meaning & null).sum()), found + int(meaning.sum())
    assert found - false >= 0.9 * 30 * len(mixed), "a rate of few discoveries says nothing"
    assert stats.binomtest(false, found, q, "greater").pvalue > SURE, (false, found)
    assert q < 0.1 or false > 0


COVERAGE = {
    3: {"specificity": 0.94, "no specificity": 0.965, "cost": 0.83},
    5: {"specificity": 0.935, "no specificity": 0.955, "cost": 0.85},
    10: {"specificity": 0.94, "no specificity": 0.945, "cost": 0.89},
    20: {"specificity": 0.94, "no specificity": 0.935, "cost": 0.92},
}
"""How often 95 % intervals hold the truth, by documents, in 2,500 simulations each: what the method reaches and no more.

Plain percentiles reach 0.75, 0.82, 0.88 and 0.91 for a specificity, and 0.69, 0.76, 0.85 and 0.90 for a cost: what
random words keep is skewed, and a few documents seldom show its tail.
"""
TRUTH = {"specificity": 0.3, "no specificity": 0.0, "cost": 0.8}


def simulated(rng: np.random.Generator, documents: int, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Σ(a_v − b) of neighbours and of random words and Σ(a_o − b), of one to three exemplars a document.

    What random words keep is skewed: mostly next to nothing, mean 0.2. What neighbours keep is spread over [0, 1],
    mean 0.5; in units without specificity it is like random words' and goes with it.
    """
    base = rng.gamma(4, 2, documents) * rng.integers(1, 4, documents)
    one, other = rng.beta(0.3, 1.2, (2, documents))
    near = (one + other) / 2 if name == "no specificity" else rng.beta(1, 1, documents)
    return near * base, other * base, base


@pytest.mark.parametrize("documents", list(COVERAGE))
@pytest.mark.parametrize("name", list(TRUTH))
def test_intervals_hold_the_truth_as_often_as_they_are_said_to(documents: int, name: str) -> None:
    rng, trials, inside, ones = np.random.default_rng(documents), 400, 0, np.ones(documents)
    for trial in range(trials):
        near, random, base = simulated(rng, documents, name)
        more = (ones, ones) if name == "cost" else (near, base)
        value = more[0].sum() / more[1].sum() - random.sum() / base.sum()
        interval = bootstrap(value, more, (random, base), 30_000 + trial)
        inside += interval.low <= TRUTH[name] <= interval.high
    assert stats.binomtest(inside, trials, COVERAGE[documents][name]).pvalue > SURE, inside / trials


def test_the_stretch_is_students_and_ends() -> None:
    assert [stretch(n) for n in (3, 20)] == pytest.approx([4.3027 / 1.96 * 1.5**0.5, 2.0930 / 1.96 * (20 / 19) ** 0.5], rel=1e-4)
    assert stretch(10**6) == pytest.approx(1, abs=1e-5)

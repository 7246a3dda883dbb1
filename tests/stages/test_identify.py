from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from raylabel.config import build_config
from raylabel.sections import IdentifyConfig
from raylabel.stages.identify import close, measure, q_values
from raylabel.tables import from_rows, schema
from raylabel.words.background import Background, fit_background
from raylabel.words.contexts import Contexts, fit_contexts
from raylabel.words.families import stem
from raylabel.words.vectors import Vectors, train_vectors
from tests.shared import STORIES
from tests.words.planted import FILLERS, LISTS, WORDS, background, draw, sample, samples

BOS = 0
NUMBER = {word: i + 1 for i, word in enumerate([*WORDS, *(w + "s" for w in WORDS), ".", " "])}


@pytest.fixture(scope="module")
def fitted() -> Background:
    return background()


def exemplar(mat: str, rank: int, rng: np.random.Generator, before: int = 12, after: int = 8) -> dict[str, Any]:
    """A window of random words with `mat` in it, one token a word, behind a BOS."""
    around = draw(rng, before + after)
    words = [*around[:before], mat, *around[before:]]
    tokens = ["<bos>", *(word if word.isspace() else f" {word}" for word in words)]
    ids = [BOS, *(NUMBER.get(word, len(NUMBER) + 1) for word in words)]
    return {"sampling": "top", "split": "explain", "rank": rank, "position": before + 1, "tokens": tokens, "token_ids": ids}


def table(units: list[list[str]], seed: int = 0, **columns: Any) -> pa.Table:
    """Exemplars of units whose MATs, by rank, are given."""
    rng = np.random.default_rng(seed)
    rows = [
        {"neuron": u, "polarity": 1, **exemplar(mat, rank, rng), **columns}
        for u, mats in enumerate(units)
        for rank, mat in enumerate(mats)
    ]
    return from_rows(rows, "exemplars", controls="control" in columns)


def random_units(n: int, size: int = 20, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [draw(rng, size) for _ in range(n)]


def pairs(vectors: list[np.ndarray]) -> float | None:
    """Mean cosine by a loop over pairs."""
    vectors = [v.astype(float) for v in vectors if v.any()]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(vectors, 2)]
    return float(np.mean(cosines)) if cosines else None


UNITS = [
    LISTS["animals"] * 2, ["dog", "dogs"] * 8, random_units(1)[0], ["dog", " ", "cat", " ", "red", "hat", "saw", "dogs"],
    [" "] * 6, ["dog", "cat", "red"], ["dog"], LISTS["foods"][:5], [*LISTS["tools"], *LISTS["colours"]],
]  # fmt: skip


def test_every_similarity_against_a_loop_over_pairs(fitted: Background) -> None:
    rows = measure(table(UNITS), fitted, 5, [BOS], 0).to_pylist()
    assert len(rows) == len(UNITS)
    for row, mats in zip(rows, UNITS, strict=True):
        assert row["mat_words"] == [m if m.strip() else row["mat_words"][i] for i, m in enumerate(mats)]
        assert row["n_exemplars"] == len(mats) and row["status"] == ("ok" if len(mats) >= 5 else "too_few")
        words = list(fitted.words(row["mat_words"]))
        first = {f: i for i, f in reversed(list(enumerate(row["families"])))}
        family = [words[i] for i in first.values() if words[i].any()]
        nearest = [sorted([a @ b for j, b in enumerate(family) if j != i])[-4:] for i, a in enumerate(family)]
        sizes = sorted((row["families"].count(f) for f in first), reverse=True)
        expected: dict[str, Any] = {
            "n_families": len(first),
            "token_similarity": pairs(words),
            "family_similarity": pairs(family) if len(family) >= 4 else None,
            "phrase_similarity": pairs(list(fitted.phrases(row["phrases"]))),
            "knn_similarity": np.mean(nearest) if len(family) > 4 else None,
            "top_families": sum(sizes[:3]) / len(mats),
        }
        for name, value in expected.items():
            assert row[name] == (None if value is None else pytest.approx(value, abs=2e-5)), (name, mats)
        assert (row["p_value"] is not None) == (len(mats) >= 5 and len(family) >= 4)
        assert all(row[name] is None for name in ("q_value", "decoy_rate", "kind", "flagged"))


def test_self_pairs_do_not_count(fitted: Background) -> None:
    """The published code took pairs i <= j, which adds up to 2/(n + 1) of similarity that is not there."""
    mats = random_units(1, size=8)[0]
    row = measure(table([mats]), fitted, 5, [BOS], 0).to_pylist()[0]
    vectors = fitted.words(row["mat_words"])
    with_self = np.mean([vectors[i] @ vectors[j] for i in range(8) for j in range(i, 8)])
    assert abs(row["token_similarity"] - pairs(list(vectors))) < 1e-5
    assert with_self - row["token_similarity"] > 0.1


def test_phrases_have_five_tokens_on_each_side(fitted: Background) -> None:
    """The published code's phrase had four after the MAT, and never the text's last token."""
    exemplars = table([["dog"] * 5])
    row = measure(exemplars, fitted, 5, [BOS], 0).to_pylist()[0]
    tokens = exemplars["tokens"][0].as_py()
    assert row["phrases"][0] == "".join(tokens[8:19]) and tokens[13] == " dog"
    assert row["mats"] == [" dog"] * 5
    assert measure(exemplars, fitted, 20, [BOS], 0)["phrases"][0][0].as_py() == "".join(tokens[1:]), "clipped, without BOS"


def test_words_are_not_characters_or_tokens(fitted: Background) -> None:
    """A MAT that is part of a word stands for the word; the published code split phrases into characters."""
    row = exemplar("dog", 0, np.random.default_rng(0))
    row["tokens"][13:14] = [" ham", "mer"]
    row["token_ids"][13:14] = [901, 902]
    rows = [{"neuron": 0, "polarity": 1, **row, "rank": i, "position": 13 + i % 2} for i in range(6)]
    found = measure(from_rows(rows, "exemplars"), fitted, 5, [BOS], 0).to_pylist()[0]
    assert found["mats"] == [" ham", "mer"] * 3
    assert found["mat_words"] == ["hammer"] * 6 and found["n_families"] == 1
    assert found["token_similarity"] == pytest.approx(1)


def test_only_top_exemplars_of_the_explain_split_count_in_rank_order(fitted: Background) -> None:
    kept = table([["dog", "cat", "red", "hat", "saw"]])
    others = [table([["axe"] * 3], sampling="random"), table([["axe"] * 3], split="score")]
    mixed = pa.concat_tables([others[0], kept.take([3, 0, 4, 1, 2]), others[1]])
    assert measure(mixed, fitted, 5, [BOS], 0).equals(measure(kept, fitted, 5, [BOS], 0))


def test_a_unit_is_measured_alone(fitted: Background) -> None:
    exemplars = table([*UNITS, *random_units(20)])
    together = measure(exemplars, fitted, 5, [BOS], 3)
    apart = [
        measure(exemplars.filter(pc.equal(exemplars["neuron"], u)), fitted, 5, [BOS], 3) for u in range(len(UNITS) + 20)
    ]
    assert together.equals(pa.concat_tables(apart).combine_chunks())


def test_controls_and_polarities_are_units_of_their_own(fitted: Background) -> None:
    parts = [table([["dog"] * 5], control=c, polarity=p) for c in ("decoy", "null") for p in (-1, 1)]
    found = measure(pa.concat_tables(parts), fitted, 5, [BOS], 0)
    assert found.schema.equals(schema("candidates", controls=True))
    assert found.select(["control", "polarity"]).to_pylist() == [
        {"control": c, "polarity": p} for c in ("decoy", "null") for p in (-1, 1)
    ]


def test_no_exemplars(fitted: Background) -> None:
    empty = measure(table([]), fitted, 5, [BOS], 0)
    assert empty.num_rows == 0 and empty.schema.equals(schema("candidates"))
    assert measure(table([["dog"]], split="score"), fitted, 5, [], 0).num_rows == 0


def test_exceptions_are_not_swallowed(fitted: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the published code an exception dropped the rest of the pairs, or the whole check, without a word."""

    def fail(self: Background, items: list[str]) -> np.ndarray:
        raise RuntimeError("no vectors")

    monkeypatch.setattr(Background, "words", fail)
    with pytest.raises(RuntimeError, match="no vectors"):
        measure(table([["dog"] * 5]), fitted, 5, [BOS], 0)


def test_planted_units(fitted: Background) -> None:
    rng = np.random.default_rng(2)
    meaning = [[words[i] for i in rng.integers(len(words), size=20)] for words in LISTS.values() for _ in range(4)]
    stems = [[w + "s" * int(rng.integers(2)) for _ in range(20)] for w in FILLERS[:20]]
    found = measure(table([*meaning, *stems, *random_units(60, seed=4)]), fitted, 5, [BOS], 0)
    rows = with_layer(found)
    units, _ = close(rows, candidates([], controls=True), IdentifyConfig())
    kinds = units["kind"].to_pylist()
    assert kinds[:20] == ["meaning"] * 20
    assert kinds[20:40] == ["word"] * 20
    assert kinds[40:].count(None) >= 57, "at most what the false discovery rate allows"
    assert units["flagged"].to_pylist() == [kind is not None for kind in kinds]


def test_repeats_of_a_word_are_no_evidence(fitted: Background) -> None:
    few = ["dog", "soup", "hat", "drill", *random_units(1, size=3, seed=9)[0]]
    once, often = measure(table([few, few[:1] * 14 + few[1:]]), fitted, 5, [BOS], 0).to_pylist()
    assert often["token_similarity"] > once["token_similarity"] + 0.2
    assert often["family_similarity"] == once["family_similarity"]


def test_what_stands_beside_words_counts_in_the_test_and_not_in_the_similarities(fitted: Background) -> None:
    known = [word for word in FILLERS if word in fitted.index]
    kind, rng = known[:12], np.random.default_rng(3)
    matrix = rng.normal(size=(len(known), 16)) + 3 * np.outer([word in kind for word in known], np.eye(16)[0])
    beside = Contexts(known, (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32))
    unit = table([[kind[i] for i in rng.integers(len(kind), size=20)]])
    (without,) = measure(unit, fitted, 5, [BOS], 0).to_pylist()
    (found,) = measure(unit, replace(fitted, contexts=beside), 5, [BOS], 0).to_pylist()
    assert found["p_value"] < 0.01 < 0.05 < without["p_value"]
    assert {**found, "p_value": None} == {**without, "p_value": None}


@pytest.mark.parametrize("contexts", [False, True])
def test_p_values_of_random_units_are_not_too_small(fitted: Background, contexts: bool) -> None:
    """Units that fire anywhere in new text of the same kind; over seeds, since units of a run share their draws."""
    if contexts:
        fitted = replace(fitted, contexts=fit_contexts(lambda: (s["text"] for s in samples())))
    rng, text = np.random.default_rng(7), samples(seed=8)
    found = []
    for seed in range(8):
        rows = []
        for unit, rank in np.ndindex(60, 20):
            row = text[rng.integers(len(text))]
            ids = [NUMBER.get(token.strip(), BOS) for token in row["tokens"]]
            where = {"position": int(rng.integers(1, len(ids))), "tokens": row["tokens"], "token_ids": ids}
            rows.append({"neuron": unit, "polarity": 1, "sampling": "top", "split": "explain", "rank": rank, **where})
        found += measure(from_rows(rows, "exemplars"), fitted, 5, [BOS], seed)["p_value"].to_pylist()
    p = np.array(found)
    assert stats.binomtest(int((p <= 0.05).sum()), len(p), 0.05, "greater").pvalue > 1e-3
    assert stats.binomtest(int((p <= 0.01).sum()), len(p), 0.01, "greater").pvalue > 1e-3


def with_layer(rows: pa.Table, layer: int = 0) -> pa.Table:
    return rows.append_column("layer", pa.array([layer] * rows.num_rows, pa.int32()))


def candidates(rows: list[dict[str, Any]], controls: bool = False) -> pa.Table:
    """Rows of `candidates` and their layers; what is not given is as in an unremarkable unit."""
    usual: dict[str, Any] = {"polarity": 1, "n_families": 10, "top_families": 0.4, "status": "ok", "phrase_similarity": 0.1}
    usual |= {"control": "decoy"} if controls else {}
    filled = [{"neuron": i, **usual, **row} for i, row in enumerate(rows)]
    layers = pa.array([row.pop("layer", 0) for row in filled], pa.int32())
    return from_rows(filled, "candidates", controls).append_column("layer", layers)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.lists(st.integers(0, 40), max_size=5))
def test_q_values(steps: list[int], others: list[int]) -> None:
    """Against the step-up definition: the least level at which Benjamini-Hochberg would reject."""
    p = [s / 40 for s in steps]

    def rejected(value: float, level: float) -> bool:
        ranked = sorted(p)
        passed = [x for i, x in enumerate(ranked, 1) if x <= level * i / len(p) + 1e-12]
        return bool(passed) and value <= max(passed)

    q = q_values(np.array(p), np.sort(p))
    for value, found in zip(p, q, strict=True):
        assert rejected(value, found) and (found <= 1e-12 or not rejected(value, found - 1e-6))
    for value, found in zip(others, q_values(np.array([o / 40 for o in others]), np.sort(p)), strict=True):
        below = max(sum(x <= value / 40 for x in p), 1)
        higher = [b for a, b in zip(p, q, strict=True) if a >= value / 40]
        assert found == pytest.approx(min([value / 40 * len(p) / below, *higher, 1]))


def test_q_values_without_tests() -> None:
    assert np.isnan(q_values(np.array([0.1, np.nan]), np.array([]))).all()


@pytest.mark.parametrize(
    ("row", "config", "kind", "flagged"),
    [
        ({"p_value": 1e-4}, {}, "meaning", True),
        ({"p_value": 0.9}, {}, None, False),
        ({"p_value": 0.9, "top_families": 0.75}, {}, "word", True),
        ({"p_value": 1e-4, "top_families": 0.8}, {}, "meaning", True),
        ({"n_families": 1, "top_families": 1.0}, {}, "word", True),
        ({"n_families": 1, "top_families": 1.0, "status": "too_few"}, {}, None, False),
        ({"p_value": 1e-4}, {"criterion": "word"}, "meaning", False),
        ({"n_families": 1, "top_families": 1.0}, {"criterion": "meaning"}, "word", False),
        ({"p_value": 1e-4}, {"similarity": 0.6}, "meaning", False),
        ({"p_value": 1e-4, "phrase_similarity": 0.7}, {"similarity": 0.6}, "meaning", True),
        ({"p_value": 1e-4, "phrase_similarity": None}, {"similarity": -1}, "meaning", False),
        ({"p_value": 0.9, "phrase_similarity": 0.7}, {"fdr": None, "similarity": 0.6}, "meaning", True),
        ({"n_families": 3, "top_families": 1.0}, {"fdr": None}, "word", True),
    ],
)
def test_kind_and_flagged(row: dict[str, Any], config: dict[str, Any], kind: str | None, flagged: bool) -> None:
    units, decoys = close(candidates([row]), candidates([row], controls=True), IdentifyConfig(**config))
    assert units["kind"].to_pylist() == [kind] and units["flagged"].to_pylist() == [flagged]
    assert decoys["kind"].to_pylist() == [kind] and decoys["flagged"].to_pylist() == [flagged]


def test_the_original_preset_asks_for_phrase_similarity_alone() -> None:
    config = build_config({"preset": "original", "subject": {"model": "demo"}}).identify
    rows = [{"p_value": 0.9, "phrase_similarity": s} for s in (0.59, 0.61)]
    assert close(candidates(rows), candidates([], controls=True), config)[0]["flagged"].to_pylist() == [False, True]


def test_decoy_rates() -> None:
    word = {"n_families": 2, "top_families": 1.0}
    units = candidates([
        {"p_value": 0.01}, {"p_value": 0.5}, word, {**word, "top_families": 0.75}, {"p_value": 0.01, "polarity": -1},
        {"p_value": 0.01, "layer": 1}, {"p_value": 0.01, "layer": 2}, {"status": "too_few"},
    ])  # fmt: skip
    decoys = candidates([
        {"p_value": 0.01}, {"p_value": 0.3}, {"p_value": 0.6}, {}, {**word, "top_families": 0.8},
        {"p_value": 0.001, "polarity": -1}, {"p_value": 0.02, "polarity": -1}, {"p_value": 0.001, "layer": 1, "polarity": -1},
        {"status": "too_few"}, {"control": "null", "p_value": 0.01}, {"control": "planted", **word, "top_families": 0.8},
    ], controls=True)  # fmt: skip
    closed, controls = close(units, decoys, IdentifyConfig(fdr=1e-6))
    rates = closed["decoy_rate"].to_pylist()
    assert rates == pytest.approx([1 / 6, 2 / 6, 0, 1 / 6, 1 / 2, 1, None, None])
    # The other controls are compared with decoys as units are, and decoys with nothing.
    assert controls["decoy_rate"].to_pylist() == [*[None] * 9, pytest.approx(1 / 6), pytest.approx(1 / 6)]
    assert closed.schema.equals(units.schema) and controls.schema.equals(decoys.schema)


def test_decoys_take_no_part_in_the_units_own_q() -> None:
    units = candidates([{"p_value": 0.02}, {"p_value": 0.04}, {"p_value": 0.5}, {}])
    decoys = candidates([{"p_value": 0.04}, {"p_value": 0.001}, {"p_value": 0.9}, {}], controls=True)
    closed, controls = close(units, decoys, IdentifyConfig())
    assert closed["q_value"].to_pylist() == pytest.approx([0.06, 0.06, 0.5, None])
    assert controls["q_value"].to_pylist() == pytest.approx([0.06, 0.003, 0.9, None])


@pytest.mark.shared
@pytest.mark.skipif(not STORIES.is_file(), reason="no recorded data beside the repository")
def test_planted_units_in_stories(tmp_path: Path) -> None:
    """Real text and real vectors: lists of one kind of word, one stem in its forms, and random positions."""
    stories = json.loads(STORIES.read_text())[:300]
    train_vectors(stories, tmp_path / "v.bin")
    rows = [sample(" ".join(story.split()[a : a + 90])) for story in stories for a in range(0, len(story.split()), 90)]
    fitted = fit_background(rows, Vectors(tmp_path / "v.bin"), 5, "sif", 0)
    where: dict[str, list[tuple[int, int]]] = {}
    for i, row in enumerate(rows):
        for j, token in enumerate(row["tokens"][1:], 1):
            where.setdefault(token.strip().lower(), []).append((i, j))
    lists = [
        ["dog", "cat", "bird", "bear", "rabbit", "fish", "mouse", "frog", "duck", "lion"],
        ["happy", "sad", "angry", "scared", "excited", "proud", "surprised", "worried"],
        ["said", "asked", "replied", "shouted", "cried", "yelled"],
        ["mom", "dad", "mommy", "daddy", "grandma", "brother", "sister"],
        ["park", "house", "school", "garden", "kitchen", "forest", "store"],
    ]
    rng = np.random.default_rng(0)
    every = [place for places in where.values() for place in places]
    meaning = [[w for w in words if w in where] for words in lists for _ in range(3)]
    by_stem = [[w for w in where if stem(w) == s] for s in ("play", "jump", "dog", "want", "look", "tree")]
    chosen = [[where[w][rng.integers(len(where[w]))] for w in rng.choice(words, 20)] for words in meaning + by_stem]
    chosen += [[every[i] for i in rng.integers(len(every), size=20)] for _ in range(60)]
    ids: dict[str, int] = {}
    exemplars = [
        {"neuron": u, "polarity": 1, "sampling": "top", "split": "explain", "rank": rank, "position": j,
         "tokens": rows[i]["tokens"], "token_ids": [ids.setdefault(t, len(ids)) for t in rows[i]["tokens"]]}
        for u, places in enumerate(chosen) for rank, (i, j) in enumerate(places)
    ]  # fmt: skip
    found = with_layer(measure(from_rows(exemplars, "exemplars"), fitted, 5, [ids["<bos>"]], 0))
    kinds = close(found, candidates([], controls=True), IdentifyConfig())[0]["kind"].to_pylist()
    assert kinds[:15].count("meaning") >= 13
    assert kinds[15:21] == ["word"] * 6
    assert kinds[21:].count(None) >= 57

"""One row a unit and polarity whatever became of it, labels that say where they are from, and the controls' rates."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from scipy.stats import beta

from raylabel.report.summary import Share, exceeds, shares
from raylabel.stages.failures import failure_rows
from raylabel.stages.results import calibration, interval, join, label, visible
from raylabel.store.rundir import RunDir
from raylabel.tables import from_rows


def candidate(neuron: int, polarity: int = 1, **values: Any) -> dict[str, Any]:
    given = {
        "neuron": neuron, "polarity": polarity, "family_similarity": 0.5, "phrase_similarity": 0.4, "q_value": 0.01,
        "decoy_rate": 0.1, "kind": "meaning", "flagged": True, "status": "ok", "mats": ["ox", "cow"],
        "phrases": ["a ox", "b cow"], "mat_words": ["ox", "cow", "Ox"], "families": [0, 1, 0],
    }  # fmt: skip
    return {**given, **values}


def verification(neuron: int, polarity: int = 1, **values: Any) -> dict[str, Any]:
    given = {
        "neuron": neuron, "polarity": polarity, "average_activation": 2.0, "normalised_activation": 0.5, "retention": 0.8,
        "specificity": 0.3, "evidence": "concept", "verified": True,
    }  # fmt: skip
    return {**given, **values}


def statistic(neuron: int, polarity: int = 1) -> dict[str, Any]:
    return {"neuron": neuron, "polarity": polarity, "max": 3.5}


def found(
    candidates: list[dict[str, Any]], verifications: list[dict[str, Any]], statistics: list[dict[str, Any]], **more: Any
) -> dict[str, list[dict[str, Any]]]:
    return {"candidates": candidates, "verifications": verifications, "statistics": statistics, **more}


# rows


def test_a_row_for_every_unit_and_polarity_in_order() -> None:
    rows = join([3, 7, 9], (1, -1), found([candidate(7, -1)], [], [statistic(3)]), {}, "site")
    assert [(r["neuron"], r["polarity"]) for r in rows] == [(3, 1), (3, -1), (7, 1), (7, -1), (9, 1), (9, -1)]
    assert [r["status"] for r in rows] == ["too_few", "too_few", "too_few", "ok", "too_few", "too_few"]
    assert [r.get("max") for r in rows] == [3.5, None, None, None, None, None]
    assert all(r["site"] == "site" for r in rows)
    assert [r["flagged"] for r in rows] == [False, False, False, True, False, False]
    assert not any(r["verified"] for r in rows)


def test_a_row_carries_what_each_stage_found() -> None:
    [row] = join([1], (1,), found([candidate(1)], [verification(1)], [statistic(1)]), {}, "site")
    [made] = from_rows([row], "results").to_pylist()
    assert (made["kind"], made["evidence"], made["verified"], made["status"]) == ("meaning", "concept", True, "ok")
    assert (made["average_activation"], made["normalised_activation"], made["max"]) == (2.0, 0.5, 3.5)
    assert made["mats"] == ["ox", "cow"]
    assert (made["score"], made["agreement"], made["concept_words"]) == (None, None, None)


def test_what_was_not_flagged_is_not_verified() -> None:
    [row] = join([1], (1,), found([candidate(1, flagged=False, kind=None)], [], [statistic(1)]), {}, "site")
    assert (row["status"], row["flagged"], row["verified"], row.get("evidence")) == ("ok", False, False, None)


def test_concepts_labels_and_scores_come_in_where_the_run_has_them() -> None:
    concept = {"neuron": 1, "polarity": 1, "words": ["ox", "cow"], "claimed": True}
    given = {"neuron": 1, "polarity": 1, "label": "cattle", "description": "farm animals", "explainer": "llm"}
    score = {"neuron": 1, "polarity": 1, "label_source": "llm", "scorer": "judge", "corrected": 0.5}
    scores = [
        score, {**score, "scorer": "detection", "corrected": 0.7}, {**score, "label_source": "concept", "corrected": -1.0},
        {**score, "scorer": "agreement", "corrected": 0.25}, {**score, "scorer": "fuzzing", "corrected": None},
    ]  # fmt: skip
    tables = found([candidate(1)], [], [], concepts=[concept], labels=[given], scores=scores)
    [row] = from_rows(join([1], (1,), tables, {}, "site"), "results").to_pylist()
    assert (row["label"], row["label_source"], row["concept_words"], row["claimed"]) == ("cattle", "llm", ["ox", "cow"], True)
    assert (row["score"], row["agreement"]) == (pytest.approx(0.6), pytest.approx(0.25))


def test_a_unit_that_failed_says_why_and_is_neither_flagged_nor_verified() -> None:
    given = found([candidate(1), candidate(1, -1)], [verification(1), verification(1, -1)], [statistic(1)])
    both = join([1], (1, -1), given, {(1, None): "NaN"}, "site")
    assert [(r["status"], r["flagged"], r["verified"], r["description"]) for r in both] == [("failed", False, False, "NaN")] * 2
    one = join([1], (1, -1), given, {(1, -1): "not reproduced"}, "site")
    assert [r["status"] for r in one] == ["ok", "failed"]
    assert one[1]["description"] == "not reproduced"


# labels


def test_a_label_names_its_words_and_its_source() -> None:
    text, description = label(["run", "ran", "walk", "walked", "fly", "swim", "sit"], [0, 0, 1, 1, 2, 3, 4], "meaning")
    assert text == "run, walk, fly, swim"
    assert description.startswith("from the MAT words, no labeller has run: words that mean alike")
    assert "one word or its forms" in label(["ox"], [0], "word")[1]
    assert "without a shared sense" in label(["ox"], [0], None)[1]
    [row] = join([1], (1,), found([candidate(1)], [], []), {}, "site")
    assert row["label_source"] == "MAT words"
    assert row["label"] == "ox, cow"
    [row] = join([1], (1,), found([candidate(1, mat_words=[], families=[])], [], []), {}, "site")
    assert row.get("label") is None
    assert row.get("label_source") is None


def test_the_most_frequent_family_comes_first_and_white_space_is_seen() -> None:
    assert label(["a", "b", "b", "\n"], [0, 1, 1, 2], "word")[0] == "b, a, ⏎"
    assert (visible("  "), visible("\t"), visible(" x ")) == ("␣␣", "⇥", " x ")


# rates


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 256), (128, 256), (7, 9)])
def test_intervals_are_the_exact_binomial_ones(k: int, n: int) -> None:
    share, low, high = interval(k, n)
    assert share == k / n
    assert low == pytest.approx(beta.ppf(0.025, k, n - k + 1) if k else 0.0, abs=1e-6)
    assert high == pytest.approx(beta.ppf(0.975, k + 1, n - k) if k < n else 1.0, abs=1e-6)


def test_no_units_have_no_rate() -> None:
    assert interval(0, 0) == (None, None, None)
    assert str(Share(0, 0)) == "none"
    assert not exceeds(Share(5, 5), Share(0, 0))
    assert not exceeds(Share(0, 0), Share(0, 5))


def test_units_exceed_decoys_only_beyond_both_intervals() -> None:
    assert exceeds(Share(90, 100), Share(5, 100))
    assert not exceeds(Share(12, 100), Share(5, 100))
    assert not exceeds(Share(5, 100), Share(90, 100))


def test_calibration_counts_each_layers_controls() -> None:
    rows = [
        {"control": "decoy", "neuron": n, "polarity": 1, "flagged": n < 3 * layer, "verified": n < layer, "status": "ok"}
        for layer in (0, 2) for n in range(10)
    ]  # fmt: skip
    table = from_rows(rows, "results", controls=True).append_column("layer", pa.array([0] * 10 + [2] * 10, pa.int32()))
    first, second = calibration(table, {}).to_pylist()
    assert (first["layer"], first["control"], first["n"], first["flagged"], first["verified"]) == (0, "decoy", 10, 0, 0)
    assert (second["layer"], second["n"], second["flagged"], second["verified"], second["labelled"]) == (2, 10, 6, 2, 0)
    assert (second["flagged_rate"], second["verified_rate"]) == pytest.approx((0.6, 0.2))
    assert (second["flagged_low"], second["flagged_high"]) == pytest.approx(interval(6, 10)[1:])
    assert calibration(table.slice(0, 0), {}).num_rows == 0


def test_calibration_tells_planted_units_by_their_difficulty() -> None:
    rows = [{"control": c, "neuron": n, "polarity": 1, "flagged": n < 2, "verified": n < 1, "status": "ok"}
            for n in range(4) for c in ("null", "planted")]  # fmt: skip
    table = from_rows(rows, "results", controls=True).append_column("layer", pa.array([1] * 8, pa.int32()))
    hard = {(1, 0): "clean", (1, 1): "clean", (1, 2): "cue", (1, 3): "cue"}
    found = [(r["control"], r["difficulty"], r["n"], r["flagged"], r["verified"]) for r in calibration(table, hard).to_pylist()]
    assert found == [("null", None, 4, 2, 1), ("planted", "clean", 2, 2, 1), ("planted", "cue", 2, 0, 0)]


# a run


def test_a_run_has_a_row_for_every_unit_and_decoy(finished: RunDir) -> None:
    rows = finished.table("results").to_pylist()
    assert [(r["layer"], r["neuron"], r["polarity"]) for r in rows] == [(layer, n, 1) for layer in range(3) for n in range(8)]
    controls = finished.controls.table("results").to_pylist()
    assert [(r["control"], r["layer"], r["neuron"]) for r in controls] == [
        ("decoy", layer, n) for layer in range(3) for n in range(5)
    ]
    assert {r["status"] for r in rows} == {"ok", "too_few"}
    assert {(r["label"] is None, r["label_source"]) for r in rows} <= {(True, None), (False, "built-in")}
    assert any(r["verified"] for r in rows)
    for row in rows:
        assert row["verified"] <= row["flagged"]
        assert (row["evidence"] is not None) == row["flagged"]


def test_the_calibration_of_a_run_is_that_of_its_decoys(finished: RunDir) -> None:
    controls = finished.controls.table("results").to_pylist()
    for row in finished.table("calibration").to_pylist():
        here = [r for r in controls if r["layer"] == row["layer"]]
        assert (row["n"], row["flagged"]) == (5, sum(r["flagged"] for r in here))
        assert row["verified"] == sum(r["verified"] for r in here)


def test_the_summary_sets_units_beside_decoys(finished: RunDir) -> None:
    found = shares(finished)
    rows = finished.table("results").to_pylist()
    units, decoys = found["flagged"]
    assert (units.k, units.n, decoys.n) == (sum(r["flagged"] for r in rows), 24, 15)
    assert found["evidence concept"][0].k == sum(r["evidence"] == "concept" for r in rows)
    assert failure_rows(finished) == []


def test_a_control_is_labelled_where_its_score_is_above_nothing_for_certain() -> None:
    lows = [0.2, -0.1, None, 0.0]
    rows = [
        {"control": "decoy", "neuron": i, "polarity": 1, "score": 0.4, "score_low": low, "flagged": True, "verified": False}
        for i, low in enumerate(lows)
    ]  # fmt: skip
    table = from_rows(rows, "results", controls=True).append_column("layer", pa.array([0] * len(lows), pa.int32()))
    (row,) = calibration(table, {}).to_pylist()
    assert (row["n"], row["labelled"], row["labelled_rate"]) == (4, 1, 0.25)

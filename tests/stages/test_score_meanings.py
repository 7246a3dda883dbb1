"""A unit with two meanings: each is tested on the windows that belong to it, and the whole as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylabel.report.terminal import scores_table
from raylabel.stages.describe import answered, built_in, question, seen
from raylabel.stages.score import Labelled, Trial, trial
from raylabel.stages.score_llm import ASKED, ask_all
from raylabel.stages.score_local import judge_odds, said
from raylabel.stages.score_meanings import apart
from raylabel.stages.score_prompts import simulated
from raylabel.stages.score_rows import Prediction, of_words, row_of
from raylabel.tables import from_rows
from tests.llm.servers import served
from tests.stages.scored_units import LISTS, RuleJudge, rows
from tests.stages.test_score_llm import rule, settings

UNIT = (None, 0, 1)
NAMES = ["birds", "clothes"]
OTHERS = [name for name in LISTS if name not in NAMES][:3]
TRIAL = {"size": 32, "negatives": 20}


def vectors(words: list[str], phrases: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Alike within a list, with some noise; phrases say nothing."""
    found = np.zeros((len(words), 16), np.float32)
    for vector, word in zip(found, words, strict=True):
        vector[:2] = [word in LISTS[name] for name in NAMES]
        if vector.any():
            vector[2 + sum(map(ord, word)) % 14] = 0.3
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9), np.zeros((len(words), 16), np.float32)


def two_lists(seed: int = 0) -> list[dict[str, Any]]:
    """Exemplars of a unit that fires on birds, and on clothes in two of five texts."""
    first, second = (rows(LISTS[name], seed, tops=20, randoms=15) for name in NAMES)
    given = []
    for a, b in zip(first, second, strict=True):
        taken = dict(b if a["sampling"] != "random" and a["rank"] % 5 in (1, 3) else a)
        # Where it is silent there is no word of either list.
        still = [t != taken["position"] or a["sampling"] == "random" for t in range(len(taken["tokens"]))]
        hot = {f" {word}" for name in NAMES for word in LISTS[name]}
        tokens = [" the" if quiet and t in hot else t for quiet, t in zip(still, taken["tokens"], strict=True)]
        given.append({**taken, "tokens": tokens, **{k: a[k] for k in ("sample", "document", "split", "sampling", "rank")}})
    return given


def candidate() -> dict[str, Any]:
    return {"families": None, "kind": "meaning"}


def parted(given: list[dict[str, Any]], meanings: list[dict[str, Any]], found: Trial) -> Any:
    return apart(meanings, given, candidate(), found, set(), 5, vectors)


@pytest.fixture
def unit() -> tuple[list[dict[str, Any]], Trial]:
    given = two_lists()
    return given, trial(UNIT, given, 1.0, **TRIAL)  # type: ignore[arg-type]


def made(item: Labelled, judge: RuleJudge) -> dict[str, Any]:
    return row_of(item, "judge", of_words(item, said(judge_odds(judge, [(item.trial.windows, item.labels)])[0])), 0, 0)


def test_windows_belong_to_the_group_they_are_nearest_to(unit: tuple[list[dict[str, Any]], Trial]) -> None:
    given, found = unit
    label = built_in(seen(given, candidate(), set(), 5, vectors), None)  # type: ignore[arg-type]
    assert [m["share"] for m in label["meanings"]] == pytest.approx([0.6, 0.4])
    got = parted(given, label["meanings"], found)
    active = {w.sample: w for w in found.windows if w.active}
    assert set(got.belongs) == set(active) and len(active) >= 20 and got.labels == [m["label"] for m in label["meanings"]]
    assert all(active[sample].word in LISTS[NAMES[which]] for sample, which in got.belongs.items())


def test_each_meaning_is_scored_by_itself_and_the_whole_is_left_as_it_was(unit: tuple[list[dict[str, Any]], Trial]) -> None:
    given, found = unit
    meanings = [{"label": NAMES[0], "share": 0.6}, {"label": OTHERS[2], "share": 0.4}]
    got = parted(given, meanings, found)
    plain = Labelled(found, "x", NAMES[0], OTHERS[:2])
    whole = Labelled(found, "x", NAMES[0], OTHERS[:2], got.labels, got.belongs)
    row = made(whole, RuleJudge())
    birds, wrong = row.pop("meanings")
    assert row == made(plain, RuleJudge()) and 0.5 < row["corrected"] < 0.7
    silent = sum(not w.active and not w.hard for w in found.windows)
    many = [sum(which == k for which in got.belongs.values()) for k in (0, 1)]
    assert (birds["label"], birds["n"], wrong["n"]) == ("birds", silent + many[0], silent + many[1])
    assert birds["corrected"] == 1 and birds["low"] > 0.3 and abs(wrong["corrected"]) < 0.1
    swapped = Labelled(found, "x", NAMES[0], OTHERS[:2], NAMES[::-1], got.belongs)
    assert all(abs(m["corrected"]) < 0.1 for m in made(swapped, RuleJudge())["meanings"])
    assert from_rows([{**row, "meanings": [birds, wrong]}], "scores").to_pylist()[0]["meanings"][0]["label"] == "birds"
    assert scores_table(from_rows([{**row, "meanings": [birds, wrong]}], "scores").to_pylist()).row_count == 3


@pytest.mark.parametrize("scorer", ["judge", "detection", "embedding", "simulation"])
def test_a_meaning_without_windows_has_no_score(unit: tuple[list[dict[str, Any]], Trial], scorer: str) -> None:
    _, found = unit
    item = Labelled(found, "x", "birds", OTHERS, ["birds", "clothes"], dict.fromkeys((w.sample for w in found.windows), 0))
    windows = simulated(found, 0) if scorer == "simulation" else found.whole()
    size = sum(len(w.ids) for w in windows) if scorer == "simulation" else len(windows)
    known = np.concatenate([w.activations for w in windows]) if scorer == "simulation" else None
    draw = np.random.default_rng(0).integers(0, 2, (6, size)).astype(float)
    first, second = row_of(item, scorer, Prediction(windows, draw, np.zeros(size), known), 0, 0)["meanings"]
    assert first["n"] == size and first["corrected"] is not None
    assert second == {"label": "clothes", "n": 0, "corrected": None, "low": None, "high": None}


def test_a_language_model_is_asked_about_meanings_in_the_same_requests(
    unit: tuple[list[dict[str, Any]], Trial], tmp_path: Path
) -> None:  # fmt: skip
    given, found = unit
    got = parted(given, [{"label": NAMES[0], "share": 0.6}, {"label": NAMES[1], "share": 0.4}], found)
    item = Labelled(found, "x", "birds", OTHERS, got.labels, got.belongs)
    with served(rule) as server:
        run, config = settings(server.url, tmp_path, list(ASKED))
        answered_, tally = ask_all(run, config, [item])
        # One of detection, one of fuzzing, and a simulation a label.
        assert tally["failed"] == 0 and len(server.requests) == 1 + 1 + 5
    for _, scorer, prediction in answered_:
        assert not isinstance(prediction, str)
        row = row_of(item, scorer, prediction, 0, 0)
        assert row["value"] < 0.9 and all(m["corrected"] > 0.9 for m in row["meanings"]), scorer


def test_meanings_that_are_not_the_groups_are_not_parted(unit: tuple[list[dict[str, Any]], Trial]) -> None:
    given, found = unit
    for shares in ([0.5, 0.5], [0.6, 0.2, 0.2], [0.4, 0.6]):
        assert parted(given, [{"label": "x", "share": share} for share in shares], found) is None
    one = rows(LISTS["birds"], 0, tops=20)
    assert parted(one, [{"label": "x", "share": 0.6}, {"label": "y", "share": 0.4}], trial(UNIT, one, 1.0, **TRIAL)) is None  # type: ignore[arg-type]
    assert parted([], [{"label": "x", "share": 1.0}], found) is None
    # An explainer's words for the groups it was shown keep the groups' shares.
    asked = question(seen(given, candidate(), set(), 5, vectors), "phrases", 10)  # type: ignore[arg-type]
    from raylabel.llm.client import Answer
    from raylabel.llm.prompts import Label

    label = Label.model_validate({"label": "birds; clothes", "description": "Both.", "meanings": [
        {"label": "birds", "share": 0.2}, {"label": "clothes", "share": 0.8}]})  # fmt: skip
    given_back = answered(asked, Answer("", label, 1, 1, None, False, None), "gpt")["meanings"]
    assert parted(given, given_back, found).labels == NAMES


def test_what_has_no_vector_belongs_to_no_meaning(unit: tuple[list[dict[str, Any]], Trial]) -> None:
    given, _ = unit
    strange = [{**r, "tokens": [" zzz" if t == r["position"] else w for t, w in enumerate(r["tokens"])]}
               if r["split"] == "score" and r["rank"] < 5 and r["sampling"] == "top" else r for r in given]  # fmt: skip
    other = trial(UNIT, strange, 1.0, **TRIAL)  # type: ignore[arg-type]
    got = parted(strange, [{"label": "x", "share": 0.6}, {"label": "y", "share": 0.4}], other)
    unknown = {w.sample for w in other.windows if w.active and w.word == "zzz"}
    assert len(unknown) == 5 and not unknown & set(got.belongs)

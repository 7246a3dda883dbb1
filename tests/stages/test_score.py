"""Tests of labels: disjoint, measured, blind to places; labels that say nothing score nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from raylabel.models.judge_prompt import Example
from raylabel.stages.score import SILENT, Labelled, Leak, Window, best_threshold, other_labels, stems, trial
from raylabel.stages.score_local import answers, calibrated, judge_odds, names, said, slot
from raylabel.stages.score_prompts import shown
from raylabel.stages.score_rows import of_windows, of_words, row_of
from tests.stages import scored_units
from tests.stages.scored_units import LISTS, RuleJudge, auroc, row, rows

UNIT = (None, 0, 1)
NAMES = list(LISTS)


def scores(labels: dict[Any, str], judge: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the judge for every unit under its label in `labels`, others of the true ones."""
    given = scored_units.trials(seed)
    true = {unit: name for unit, (_, name) in given.items()}
    items = [
        Labelled(found, "x", labels[unit], other_labels(unit, {**true, unit: labels[unit]}, seed))
        for unit, (found, _) in given.items() if unit in labels
    ]  # fmt: skip
    found = answers(judge, [(item.trial, item.labels) for item in items])
    return [row_of(item, "judge", of_words(item, got), seed, 0) for item, (got, _) in zip(items, found, strict=True)]


def test_true_labels_stand_apart_from_others_whatever_the_judges_errors() -> None:
    units = scored_units.trials()
    true = {unit: name for unit, (_, name) in units.items()}
    judge = RuleJudge(errors=0.1)
    right = [r["corrected"] for r in scores(true, judge)]
    wrong = [r["corrected"] for r in scores({unit: NAMES[(unit[1] + 5) % len(NAMES)] for unit in true}, judge)]
    assert auroc([1] * len(right) + [0] * len(wrong), right + wrong) >= 0.95
    assert all(r["low"] > 0 for r in scores(true, RuleJudge()))


@pytest.mark.parametrize("kind", ["always no", "a constant label", "other units' labels"])
def test_labels_that_say_nothing_score_nothing(kind: str) -> None:
    found: list[float] = []
    for seed in range(-(-200 // len(NAMES))):
        label = {
            "always no": {(None, i, 1): name for i, name in enumerate(NAMES)},
            "a constant label": {(None, i, 1): "things" for i in range(len(NAMES))},
            "other units' labels": {(None, i, 1): NAMES[(i + 1 + seed) % len(NAMES)] for i in range(len(NAMES))},
        }[kind]
        judge = RuleJudge(always=-1.0) if kind == "always no" else RuleJudge(errors=0.15)
        found += [r["corrected"] for r in scores(label, judge, seed)]
    assert len(found) >= 200 and abs(np.mean(found)) <= 0.05


def test_a_label_that_all_units_have_is_worth_nothing() -> None:
    labels = {(None, i, 1): "birds" for i in range(9)}
    assert other_labels((None, 3, 1), labels) == ["birds"]


def test_other_labels_are_of_the_same_kind_different_and_the_same_again() -> None:
    labels = {(None, i, 1): name for i, name in enumerate(NAMES)} | {("decoy", i, 1): f"decoy {i}" for i in range(5)}
    labels[None, 1, 1] = "Birds"
    labels[None, 0, 1] = "birds"
    first = other_labels(UNIT, labels)
    assert len(set(first)) == 3 and first == other_labels(UNIT, dict(reversed(labels.items())))
    assert not any(stems(label) & stems("birds") or label.startswith("decoy") for label in first)
    assert other_labels(("decoy", 0, 1), labels) and all(x.startswith("decoy") for x in other_labels(("decoy", 0, 1), labels))


def test_nothing_of_the_explain_split_is_tested() -> None:
    """delphi draws both from one list with one seed: 20 of 50 scored examples were shown to the explainer."""
    given = rows(LISTS["birds"], 1)
    found = trial(UNIT, given, 1.0, size=32, negatives=20)
    explain = {r["document"] for r in given if r["split"] == "explain"}
    assert found.windows and not explain & {w.document for w in found.windows}
    leaking = [{**r, "document": 7} if r["rank"] == 0 else r for r in given]
    with pytest.raises(Leak, match=r"^document 7 is in the explain split and in the score split"):
        trial(UNIT, leaking, 1.0, size=32, negatives=20)
    strange = Window(1, min(explain), 0, (" a",) * 8, (1,) * 8, 0, False, True)
    with pytest.raises(Leak):
        trial(UNIT, given, 1.0, size=32, negatives=20, measured=[strange])


def test_silence_is_measured_and_the_peak_is_in_the_window() -> None:
    """SAEBench calls random windows inactive without looking; delphi's centring throws peaks at the edges away."""
    given = rows(LISTS["birds"], 2)
    loud = [dict(r, activations=[0.9] * 40, activation=0.9) if r["sampling"] == "random" and r["rank"] < 6 else r for r in given]
    found = trial(UNIT, loud, 1.0, size=32, negatives=20)
    active, silent = ([w for w in found.windows if w.active is kind] for kind in (True, False))
    assert len(active) == 20 and len(silent) == 14
    for w in active:
        assert w.activations is not None and w.activations[w.focus] == max(w.activations) and w.word in LISTS["birds"]
    for w in silent:
        assert w.silent and max(w.activations or (1,)) < SILENT and w.word.isalnum()
    for at in (0, 39):
        values = [0.0] * 40
        values[at] = 1.0
        edge = trial(UNIT, [row("top", "score", 0, 1, ["the"] * 40, values)], 1.0, size=32, negatives=4)
        assert [w.activations[w.focus] for w in edge.windows if w.activations] == [1.0]


def test_a_unit_that_is_never_silent_is_tested_word_by_word() -> None:
    given = []
    for r in rows(LISTS["birds"], 3):
        values = [v if v > 0.4 else 0.0 for v in r["activations"]]
        if r["sampling"] == "random":
            values = [0.3 if t % 2 else 0.0 for t in range(40)]
        given.append({**r, "activations": values, "activation": max(values)})
    found = trial(UNIT, given, 1.0, size=32, negatives=20)
    still = [w for w in found.windows if not w.active]
    assert still and not any(w.silent for w in still) and all((w.activations or ())[w.focus] == 0 for w in still)
    assert found.whole() == [w for w in found.windows if w.active]
    item = Labelled(found, "x", "birds", ["tools"])
    by_windows = row_of(item, "embedding", of_windows(item, np.ones((2, 20)), graded=True), 0, 0)
    assert (by_windows["value"], by_windows["corrected"]) == (None, None)


def test_the_place_of_the_marks_tells_nothing() -> None:
    """delphi's wrong marks stand at token 24 and its right ones do not: a rule about the place scores 98.4 %."""
    places: dict[bool, list[int]] = {True: [], False: []}
    for unit, (found, _) in scored_units.trials(5).items():
        see = shown("fuzzing", found, unit[1])
        for text, truth in zip(see.texts, see.truth, strict=True):
            places[bool(truth)].append(text.split("<<")[0].count(" "))
    truth = [True] * len(places[True]) + [False] * len(places[False])
    value = auroc(truth, places[True] + places[False])
    assert len(places[False]) > 200 and abs(value - 0.5) < 0.06
    best = max((np.mean(np.array(places[True]) == p) - np.mean(np.array(places[False]) == p)) for p in range(32))
    assert best < 0.1


def test_marks_of_wrong_windows_are_as_many_and_stand_on_silent_words() -> None:
    found = scored_units.trials()[UNIT][0]
    see = shown("fuzzing", found, 0)
    assert {len(m) for m in see.marks} == {1}
    for w, text, truth in zip(see.windows, see.texts, see.truth, strict=True):
        marked = text.split("<<")[1].split(">>")[0]
        assert (marked in LISTS[NAMES[0]]) == truth and (w.hard or w.silent or truth)
    assert Counter(see.truth)[True] == 20 and sum(w.hard for w in see.windows) == 10


def test_lookup_reads_the_explain_split_alone() -> None:
    given = rows(LISTS["birds"], 4)
    found = trial(UNIT, given, 1.0, size=32, negatives=20)
    item = Labelled(found, "x", "birds", ["tools"])
    answers = np.array([[float(w.active) for w in found.windows], [0.0] * len(found.windows)])
    made = row_of(item, "judge", of_words(item, answers), 0, 0)
    seen = {t for r in given if r["split"] == "explain" and r["sampling"] != "random" for t in [r["tokens"][r["position"]]]}
    known = np.mean([f" {w.word}" in seen for w in found.windows if w.active])
    assert made["value"] == 1 and made["lookup"] == pytest.approx(known, abs=1e-6)


def test_best_threshold() -> None:
    assert best_threshold([0.0, 0.1, 0.6, 0.8], [False, False, True, True]) == pytest.approx(0.35)
    assert best_threshold([0.4, 0.6], [True, True]) == pytest.approx(0.25) and best_threshold([], []) == 0


def test_the_windows_text_is_the_samples_own() -> None:
    """delphi's prompts still hold `âĢĻ` and `Ċ`; neuronpedia keeps a table of such pieces."""
    words = ["<s>", " caf", "é", "’s", "\n", "x", " y", " z"]
    made = row("top", "score", 0, 1, words, [0, 0, 1.0, 0, 0, 0, 0, 0], tokens=words, token_ids=[0, 5, 6, 7, 8, 9, 10, 11])
    (window,) = trial(UNIT, [made], 1.0, size=8, negatives=4, special=[0]).windows
    assert window.text == " café’s\nx y z" and window.word == "café’s"


class Reluctant(RuleJudge):
    """Never says yes of its own accord, and to some labels even less."""

    def odds(self, example: Any, label: str) -> float:
        return super().odds(example, label) - 5 - len(label) % 7


def test_a_judge_that_never_says_yes_still_tells_labels_apart() -> None:
    """What counts is what parts windows of the explain split; answers to a label's wording alone are worth nothing."""
    units = scored_units.trials()
    true = {unit: name for unit, (_, name) in units.items()}
    right = [r["corrected"] for r in scores(true, Reluctant(errors=0.1))]
    wrong = [r["corrected"] for r in scores({unit: NAMES[(unit[1] + 5) % len(NAMES)] for unit in true}, Reluctant(errors=0.1))]
    assert auroc([1] * len(right) + [0] * len(wrong), right + wrong) >= 0.95 and np.mean(right) > 0.6
    assert abs(np.mean(wrong)) <= 0.05


def test_answers_without_any_sense_are_worth_nothing_after_calibration() -> None:
    """200 units and more: thresholds fitted to noise gain nothing on other documents."""

    class Noise(RuleJudge):
        def odds(self, example: Any, label: str) -> float:
            return -abs(super().odds(example, "none of the lists"[: len(label)] + label))

    found = []
    for seed in range(5):
        true = {unit: name for unit, (_, name) in scored_units.trials(seed).items()}
        found += [r["corrected"] for r in scores(true, Noise(), seed)]
    assert len(found) >= 200 and abs(np.mean(found)) <= 0.05


def test_calibration_looks_at_the_explain_split_alone() -> None:
    given = rows(LISTS["birds"], 6)
    found = trial(UNIT, given, 1.0, size=32, negatives=20)
    split = {r["sample"]: r["split"] for r in given}
    assert {split[w.sample] for w in found.fitting} == {"explain"}
    assert [sum(w.active is kind for w in found.fitting) for kind in (True, False)] == [12, 12]
    odds = np.array([[4.0, 2.0, -1.0, -3.0, 9.0], [1.0] * 5, [np.nan] * 5])
    active = np.array([True, True, False, False, False])
    np.testing.assert_allclose(calibrated(odds, active), [1.0, 1.0, np.nan])
    assert not calibrated(odds, np.ones(5, bool)).any() and not calibrated(odds[:, :0], active[:0]).any()
    np.testing.assert_array_equal(said(odds, calibrated(odds, active))[1:], [[0.0] * 5, [np.nan] * 5])


def test_a_label_that_lists_names_is_asked_about_name_by_name() -> None:
    assert names("words like king, queen, or duke") == ["words like king, queen, or duke", "king", "queen", "duke"]
    assert names("pets and farm animals") == ["pets and farm animals"] and names("the word “value”")[1:] == ["value"]
    assert names("then, already; win32") == ["then, already; win32", "then", "already", "win32"]
    found, _ = scored_units.trials()[None, NAMES.index("birds"), 1]
    (odds,) = judge_odds(RuleJudge(), [(found.windows, ["birds", "birds, clothes", "birds, …"])])
    parts = judge_odds(RuleJudge(), [(found.windows, ["birds", "clothes"])])[0]
    whole = np.array([RuleJudge().odds(Example(w.text, w.word), "birds, clothes") for w in found.windows])
    np.testing.assert_allclose(odds[1], (whole + parts[0] + parts[1]) / 3, rtol=1e-5)
    assert not np.isnan(odds[2]).any()


def test_a_label_that_the_judge_cannot_read_is_unscored() -> None:
    found, _ = scored_units.trials()[UNIT]
    judge = RuleJudge()
    assert slot(judge, "…") == ()
    item = Labelled(found, "x", "…", NAMES[1:4])
    (odds,) = judge_odds(judge, [(found.windows, item.labels)])
    made = row_of(item, "judge", of_words(item, said(odds)), 0, 0)
    assert (made["value"], made["n"], made["n_failed"]) == (None, 0, len([w for w in found.windows if not w.hard]))

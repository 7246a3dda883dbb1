"""What other systems for labels and scores got wrong, each as a test that would fail here if it were so.

The defects are delphi's where nothing else is said; more of them are tested where the parts are (`test_score.py`,
`test_score_llm.py`, `test_describe.py`, `test_client.py`).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from raylabel.llm.answers import Rejected, structured
from raylabel.llm.prompts import Label
from raylabel.sections import ScoreConfig
from raylabel.stages.describe import built_in, question
from raylabel.stages.score import Labelled, Trial, Window, around, fit_lookup, silent_pieces, trial
from raylabel.stages.score_llm import ASKED, ask_all
from raylabel.stages.score_local import judge_odds, said
from raylabel.stages.score_prompts import Fit, expected_values, read_packed, shown, simulated
from raylabel.stages.score_rows import MEASURES, of_words, row_of
from raylabel.stages.score_stage import wish
from tests.llm.servers import body, served
from tests.stages import scored_units
from tests.stages.scored_units import IDS, LENGTH, LISTS, RuleJudge, auroc, row, rows
from tests.stages.test_describe import looked_at, rows_of
from tests.stages.test_score_llm import items, rule, settings
from tests.stages.test_score_llm import rows as asked

UNIT = (None, 0, 1)
NAMES = list(LISTS)
SCORERS = get_args(get_args(ScoreConfig.model_fields["scorers"].annotation)[0])


def with_measured(many: int = 10) -> Trial:
    """A trial whose negatives were measured by themselves and have no recorded activations, half of them hard."""
    words = [[w for w in scored_units.VOCABULARY if w not in LISTS["birds"]][i : i + 32] for i in range(many)]
    found = [
        Window(5000 + i, 500 + i, 3, tuple(f" {w}" for w in some), tuple(IDS[w] for w in some), i % 32, False, True, i % 2 == 0)
        for i, some in enumerate(words)
    ]
    return trial(UNIT, rows(LISTS["birds"], 8, randoms=0), 1.0, size=32, negatives=many, measured=found)


def test_a_peak_stands_at_any_place_of_its_window_and_none_is_thrown_away() -> None:
    """`center_examples` is inverted, and peaks near the ends of a text are dropped."""
    for at in range(64):
        places = Counter[int]()
        for draw in range(320):
            values = [0.0] * 64
            values[at] = 1.0
            given = row("top", "score", 0, 1, [f"w{t}" for t in range(64)], values)
            found = around(given, 32, (), draw)
            assert len(found.ids) == 32 and found.tokens[found.focus] == f" w{at}"
            places[found.focus] += 1
        assert set(places) == set(range(max(at - 32, 0), min(at, 31) + 1))
        assert max(places.values()) <= min(places.values()) + 1


def test_the_place_of_the_peak_tells_nothing() -> None:
    """The centre is active, or never: a rule about the place needs no text."""
    active, silent = [], []
    for found, _ in scored_units.trials(3).values():
        active += [w.focus for w in found.windows if w.active]
        silent += [w.focus for w in found.windows if not w.active]
    value = auroc([True] * len(active) + [False] * len(silent), active + silent)
    assert len(silent) > 500 and abs(value - 0.5) < 0.05


def test_every_scorer_there_is_gives_a_row_whatever_its_negatives_hold(tmp_path: Path) -> None:
    """A scorer that cannot be made, and one that reads a field that half of the examples do not have."""
    assert set(SCORERS) == set(MEASURES)
    item = Labelled(with_measured(), "x", "birds", NAMES[10:13])
    with served(rule) as server:
        run, config = settings(server.url, tmp_path, list(ASKED))
        answered, tally = ask_all(run, config, [item])
    made = {scorer: row_of(item, scorer, got, 0, 0) for _, scorer, got in answered if not isinstance(got, str)}
    assert set(made) == set(ASKED) and tally["failed"] == 0
    for name in ("detection", "fuzzing"):
        assert made[name]["value"] == 1 and made[name]["value_hard"] == 1 and made[name]["n_hard"] >= 25
    odds = judge_odds(RuleJudge(), [(item.trial.windows, item.labels)])[0]
    judged = row_of(item, "judge", of_words(item, said(odds)), 0, 0)
    assert (judged["value"], judged["value_hard"], judged["n"], judged["n_hard"]) == (1, 1, 25, 25)
    assert {w.active for w in simulated(item.trial, 0)} == {True}, "what has no activations is not simulated"


def test_hard_negatives_stand_apart_and_cost_who_goes_by_the_word_alone() -> None:
    """Neighbours never ran there; random negatives alone flatter: a table of tokens looks like understanding."""
    hard = [
        Window(7000 + i, 700 + i, 0, (" the", " of", f" {LISTS['birds'][i]}", " and"), (1, 2, 3, 4), 2, False, True, True)
        for i in range(8)
    ]
    given = rows(LISTS["birds"], 9)
    plain = trial(UNIT, given, 1.0, size=32, negatives=16)
    found = trial(UNIT, given, 1.0, size=32, negatives=16, measured=hard)
    assert sum(w.hard for w in found.windows) == 8 and len(found.windows) == len(plain.windows)
    item = Labelled(found, "x", "birds", NAMES[10:13])
    made = row_of(item, "judge", of_words(item, said(judge_odds(RuleJudge(), [(found.windows, item.labels)])[0])), 0, 0)
    assert (made["value"], made["n"]) == (1, 28) and (made["value_hard"], made["n_hard"]) == (0, 28)


def test_what_a_unit_is_called_goes_by_its_strongest_activations() -> None:
    """Statistics of single tokens are sorted ascending there and look at the weakest half."""
    draw = random.Random(0)
    strong = rows_of(["river"] * 12)
    weak = [{**r, "activation": 1.0, "sampling": "quantile"} for r in rows_of([f"x{i}" for i in range(12)], 1)]
    mixed = [*strong, *weak]
    draw.shuffle(mixed)
    assert built_in(looked_at(mixed), None)["label"] == "the word “river”"
    texts = question(looked_at(mixed), "phrases", 10).texts
    assert sum("<<river>>" in text for text in texts[:6]) == 6 and not any("<<river>>" in text for text in texts[6:])
    turned = [{**r, "rank": 30 - r["rank"], "sample": 1, "token_ids": [r["rank"]] * len(r["tokens"])} for r in strong]
    draw.shuffle(turned)
    assert wish(UNIT, turned, 10.0).ids == list(range(11, 3, -1)), "hard negatives are looked for by the strongest peaks"


@pytest.mark.parametrize("many", [1, 3, 7])
@pytest.mark.parametrize("packing", ["packed", "peer"])
def test_any_number_of_windows_is_answered(tmp_path: Path, many: int, packing: str) -> None:
    """The last, short batch always fails there."""
    found = trial(UNIT, rows(LISTS["birds"], 8, tops=many, randoms=many), 1.0, size=32, negatives=many)
    item = Labelled(found, "x", "birds", NAMES[10:13])
    with served(rule) as server:
        run, config = settings(server.url, tmp_path, ["detection"], packing)
        ((_, _, got),) = ask_all(run, config, [item])[0]
    assert not isinstance(got, str) and not np.isnan(got.answers).any()
    assert row_of(item, "detection", got, 0, 0)["n"] == len(found.windows) == 3 * many


def test_units_and_scorers_are_asked_about_at_once(tmp_path: Path) -> None:
    """One unit and one request of a scorer in flight, where hundreds could be."""

    async def slow(request: dict[str, Any]) -> Any:
        await asyncio.sleep(0.02)
        return rule(request)

    with served(slow) as server:
        run, config = settings(server.url, tmp_path, ["detection", "fuzzing"])
        answered, tally = ask_all(run, config, items(20))
    assert len(answered) == tally["answers"] == 40 and server.most >= 8


def test_every_request_has_its_own_parameters(tmp_path: Path) -> None:
    """The last request's parameters win for a whole batch there."""
    with served(rule) as server:
        run, config = settings(server.url, tmp_path, list(ASKED))
        asked(run, config, items(2))
    seen: dict[str, set[tuple[Any, ...]]] = {}
    for request in server.requests:
        text = request["messages"][1]["content"]
        kind = "simulation" if text.startswith("Description: ") else "fuzzing" if "<<" in text else "detection"
        size = len(re.findall(r"\d+:" if kind == "simulation" else r"(?m)^\d+\. ", text))
        assert request["max_tokens"] == 64 + (8 if kind == "simulation" else 12) * size
        seen.setdefault(kind, set()).add((request.get("logprobs", False), request["temperature"]))
    assert seen == {"detection": {(False, 0.0)}, "fuzzing": {(False, 0.0)}, "simulation": {(True, 0.0)}}


@pytest.mark.parametrize("garbage", ["1\t3\n2\t0", '{"answers": ["none"]}', '{"answers": ["0:0", "2:99"]}', "[]"])
def test_a_simulation_that_cannot_be_read_is_a_failure_and_no_zeros(tmp_path: Path, garbage: str) -> None:
    """A tokenizer without a BOS ends in an IndexError, which ends in a prediction of zeros; others end in NaN or None."""

    def other_labels_fail(request: dict[str, Any]) -> Any:
        return rule(request) if request["messages"][1]["content"].startswith("Description: birds\n") else garbage

    item = Labelled(scored_units.trials()[None, NAMES.index("birds"), 1][0], "x", "birds", NAMES[10:13])
    with served(lambda _: garbage) as server:
        run, config = settings(server.url, tmp_path / "all", ["simulation"])
        ((_, _, got),) = ask_all(run, config, [item])[0]
        assert isinstance(got, str) and got
    with served(other_labels_fail) as server:
        run, config = settings(server.url, tmp_path / "others", ["simulation"])
        ((_, _, got),) = ask_all(run, config, [item])[0]
    assert not isinstance(got, str)
    made = row_of(item, "simulation", got, 0, 0)
    assert made["value"] > 0.9 and made["shuffled"] is None and made["corrected"] is None, "nothing to compare with is no 0"


def test_probabilities_are_read_whatever_token_was_written() -> None:
    """The parser takes it that the likeliest token was written, and fails an assertion otherwise."""

    def token(text: str, **others: float) -> dict[str, Any]:
        return {"token": text, "top_logprobs": [{"token": t, "logprob": float(np.log(p))} for t, p in others.items()]}

    unlikely = [token("1"), token(":"), token("3", **{"9": 0.7, " 9": 0.1, "ten": 0.2})]
    assert expected_values(unlikely) == {1: pytest.approx(9)}
    assert expected_values([token("1"), token(":"), token("3", **{"\t": 1.0})]) == {}, "no number among them: as it was written"
    assert expected_values([token("1"), token(":"), {"token": "3", "top_logprobs": None}]) == {}
    assert expected_values([token("1"), token(":"), token("12", **{"12": 1.0})]) == {}, "beyond 10"


def test_nothing_depends_on_a_shared_random_state_or_on_the_order_of_units(tmp_path: Path) -> None:
    """A global seed is set within threads, and records share a generator: another run, other examples."""
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]
    given = items(4)
    with served(rule) as server:
        made = []
        for name, some in (("a", given), ("b", given[::-1])):
            run, config = settings(server.url, tmp_path / name, ["detection", "fuzzing"])
            found, _, _ = asked(run, config, some)
            made.append(sorted(found, key=lambda r: (r["neuron"], r["scorer"])))
    assert made[0] == made[1]
    assert Counter(json.dumps(r["messages"]) for r in server.requests).most_common()[-1][1] == 2
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore


def test_the_seed_is_a_setting() -> None:
    """A seed that is fixed in the code cannot show how much of a score is the draw."""
    given = rows(LISTS["birds"], 4)

    def cut(seed: int) -> list[tuple[int, int]]:
        return [(w.sample, w.start) for w in trial(UNIT, given, 1.0, size=32, negatives=20, seed=seed).windows]

    def order(seed: int) -> list[str]:
        return shown("detection", trial(UNIT, given, 1.0, size=32, negatives=20), seed).texts

    assert cut(1) == cut(1) != cut(2) and order(1) == order(1) != order(2)


def test_a_special_token_inside_a_text_is_no_negative_and_not_shown() -> None:
    """A BOS in the middle of packed texts dominates what is seen (SAELens, SAEDashboard)."""
    words = ["<bos>" if t % 8 == 3 else f"w{t}" for t in range(LENGTH)]
    given = row("random", "score", 0, 3, words, [0.0] * LENGTH, tokens=[f" {w}" for w in words],
                token_ids=[9 if w == "<bos>" else 1 for w in words])  # fmt: skip
    pieces = [w for draw in range(8) for w in silent_pieces(given, 1.0, 8, {9}, [3], draw)]
    assert len(pieces) == 8 * 5 and all("bos" not in w.text and w.word.startswith("w") for w in pieces)
    peaked = {**given, "sampling": "top", "position": 11, "activations": [1.0 if t == 11 else 0.0 for t in range(LENGTH)]}
    table = fit_lookup([{**peaked, "split": "explain"}], [], 1.0)
    assert table.shares[1] == 0 and "bos" not in around(peaked, 32, {9}, 0).text


LIVE = "The user wants a concise explanation (3-20 words)"
"""Stands on neuronpedia.org as the label of a unit."""


@pytest.mark.parametrize("label", [
    LIVE, f"{LIVE} of what the neuron is looking for", f"<think>{LIVE}</think>", "We need to find what is common here",
    "Okay, the marked tokens are all verbs", "Looking at the texts, verbs",
])  # fmt: skip
@pytest.mark.parametrize("place", ["label", "description", "meanings"])
def test_reasoning_is_never_stored_as_a_label(label: str, place: str) -> None:
    good: dict[str, Any] = {"label": "verbs", "description": "Verbs of motion.", "meanings": [{"label": "verbs", "share": 1}]}
    wrong = {**good, place: [{"label": label, "share": 1}] if place == "meanings" else label}
    with pytest.raises((Rejected, ValidationError)):
        structured(json.dumps(wrong), Label)
    with pytest.raises(Rejected):
        structured(label, Label)
    assert structured(f"<think>{LIVE}</think>{json.dumps(good)}", Label).label == "verbs"


def test_texts_are_shown_as_they_stand_and_not_as_tokens() -> None:
    """Prompts hold `âĢĻ`, `Ċ` and `<0x0A>`; neuronpedia keeps a table of such pieces."""
    given = rows_of(["river"])[0]
    given = {**given, "tokens": [" caf", "é", "’s", "\n", " naïve", " 日本", "語", " 🙂", " river", " x", " y", " z"]}
    (text,) = question(looked_at([given]), "phrases", 10).texts
    assert text == " café’s⏎ naïve 日本語 🙂 <<river>> x y z"


@pytest.mark.parametrize("answer", [-1, True, False, 1, "-1", "Yes.", None])
def test_what_is_neither_yes_nor_no_is_neither(answer: Any) -> None:
    """A -1 in a field of booleans was taken for False (sae-auto-interp)."""
    with pytest.raises(ValidationError):
        Fit.model_validate({"answer": answer})
    assert np.isnan(read_packed([f"1:{answer}"], 3, 1)).all()


def test_failed_and_empty_answers_are_counted_as_what_they_are(tmp_path: Path) -> None:
    """`failed_count` is the difference of a number and itself."""

    def half(request: dict[str, Any]) -> Any:
        return rule(request) if f". {NAMES[0]}\n" in request["messages"][1]["content"] else body("")

    with served(half) as server:
        run, config = settings(server.url, tmp_path, ["detection"])
        made, failed, tally = asked(run, config, items(4))
    assert (len(made), len(failed)) == (1, 3) and (tally["answers"], tally["failed"]) == (1, 3)

"""Scores by a language model over the wire: a server that answers by rule, and one that goes wrong in every way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylabel.config import RunConfig, build_config
from raylabel.errors import RunFailed
from raylabel.llm.client import BudgetSpent
from raylabel.stages.llm_cost import llm_cost
from raylabel.stages.score import Labelled, trial
from raylabel.stages.score_llm import ask_all
from raylabel.stages.score_prompts import (
    expected_values,
    packed_messages,
    read_packed,
    read_simulation,
    simulated,
    simulation_messages,
    with_marks,
)  # fmt: skip
from raylabel.stages.score_rows import row_of
from raylabel.store.rundir import RunDir
from tests.llm.servers import body, served
from tests.stages import scored_units
from tests.stages.scored_units import LISTS

NAMES = list(LISTS)
Made = dict[str, dict[str, Any]]


def settings(url: str, out: Path, scorers: list[str], packing: str = "packed", **describe: Any) -> tuple[RunDir, RunConfig]:
    config = build_config({
        "subject": {"model": "demo"}, "run": {"out": str(out)}, "score": {"scorers": scorers, "packing": packing},
        "describe": {"model": "rule", "base_url": url, "timeout": 2, **describe},
    })  # fmt: skip
    run = RunDir(str(out))
    run.start(config.model_dump(mode="json"))
    return run, config


def fits(label: str, text: str) -> bool:
    """The rule: a word of the list is there, or all marked words are of it."""
    marked = re.findall(r"<<(.*?)>>", text)
    return all(w in LISTS.get(label, ()) for w in marked) if marked else bool(set(text.split()) & set(LISTS.get(label, ())))


def rule(request: dict[str, Any]) -> Any:
    """What a careful model would answer, in each of the three forms."""
    text = request["messages"][-1]["content"]
    if "Text: " in text:
        label, shown = re.fullmatch(r"Description: (.*)\nText: (.*)", text).groups()  # type: ignore[union-attr]
        return json.dumps({"answer": "yes" if fits(label, shown) else "no"})
    if text.startswith("Description: "):
        label = text.split("\n")[0].removeprefix("Description: ")
        words = re.findall(r"(\d+):(\S+)", text.split("\n\n", 1)[1])
        return json.dumps({"answers": [f"{n}:10" for n, word in words if word in LISTS.get(label, ())]})
    labels = dict(re.findall(r"^([A-J])\. (.*)$", text, re.MULTILINE))
    answers = []
    for n, shown in re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE):
        answers.append(f"{n}:{''.join(c for c, label in labels.items() if fits(label, shown)) or '-'}")
    return json.dumps({"answers": answers})


def items(many: int = 3, label: Callable[[str], str] = str) -> list[Labelled]:
    trials = list(scored_units.trials().values())[:many]
    return [
        Labelled(found, "x", label(name), [n for n in NAMES[10:20] if n != name][:3]) for found, name in trials
    ]  # fmt: skip


def rows(run: RunDir, config: RunConfig, given: list[Labelled]) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    answered, tally = ask_all(run, config, given)
    made = [row_of(item, scorer, got, 0, 0) for item, scorer, got in answered if not isinstance(got, str)]
    return made, [got for _, _, got in answered if isinstance(got, str)], tally


@pytest.mark.parametrize("packing", ["packed", "peer"])
def test_a_careful_model_finds_true_labels_true(tmp_path: Path, packing: str) -> None:
    with served(rule) as server:
        run, config = settings(server.url, tmp_path, ["detection", "fuzzing", "simulation"], packing)
        made, failed, tally = rows(run, config, items(1))
        sent = len(server.requests)
        assert not failed and tally["failed"] == 0 and tally["prompt_tokens"] == 100 * tally["answers"]
        for r in made:
            assert r["value"] > 0.9 and r["corrected"] > 0.9 and r["low"] > 0.3 and r["n_failed"] == 0
            assert r["n"] == {"detection": 40, "fuzzing": 30}.get(r["scorer"], r["n"])
        assert all(r["n_hard"] == 30 and r["value_hard"] == 1 for r in made if r["scorer"] == "fuzzing")
        # Packed: one request a unit and scorer, four of a simulation. As peers ask: one a window and label.
        assert sent == ((1 + 1 + 4) if packing == "packed" else 4 * 40 + 4 * 40 + 4)
        again, _, tally = rows(run, config, items(1))
        assert again == made and len(server.requests) == sent and tally["cached"] == tally["answers"] == sent


def test_both_packings_give_the_same_values_for_the_same_answers(tmp_path: Path) -> None:
    with served(rule) as server:
        made = {}
        for packing in ("packed", "peer"):
            run, config = settings(server.url, tmp_path / packing, ["detection", "fuzzing"], packing)
            made[packing] = rows(run, config, items(1, lambda name: NAMES[7]))[0]
        assert made["packed"] == made["peer"] and {r["value"] for r in made["packed"]} != {1.0}


@pytest.mark.parametrize("answer", ["-", "A", "ABCD"])
def test_a_model_that_always_says_the_same_scores_nothing(tmp_path: Path, answer: str) -> None:
    def same(request: dict[str, Any]) -> str:
        numbers = re.findall(r"^(\d+)\. ", request["messages"][-1]["content"], re.MULTILINE)
        return json.dumps({"answers": [f"{n}:{answer}" for n in numbers]})

    with served(same) as server:
        run, config = settings(server.url, tmp_path, ["detection", "fuzzing"])
        made = rows(run, config, items())[0]
        assert len(made) == 6 and all((r["value"], r["corrected"]) == (0, 0) for r in made)


FAULTS: dict[str, Any] = {
    "wrong schema": '{"verdict": "yes"}',
    "cut short": '{"answers": ["1:A", "2',
    "no letters": '{"answers": ["yes", "no"]}',
    "empty choices": {**body(""), "choices": []},
    "refusal": body("", message={"refusal": "I cannot help with that."}),
    "reasoning only": body("", message={"reasoning_content": "The user wants a list of numbers. Let me think."}),
    "200 with an error": {"error": {"message": "model is loading", "code": 503}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_a_failure_and_costs_its_own_unit_alone(tmp_path: Path, fault: str, monkeypatch: Any) -> None:
    """delphi ends the run at a failed call and its count of failures is always 0; others turn it into a zero."""
    monkeypatch.setattr("raylabel.llm.client.BACKOFF", 0.001)

    def sometimes(request: dict[str, Any]) -> Any:
        return FAULTS[fault] if f". {NAMES[0]}\n" in request["messages"][1]["content"] else rule(request)

    with served(sometimes) as server:
        run, config = settings(server.url, tmp_path, ["detection"])
        made, failed, tally = rows(run, config, items())
        assert len(failed) == tally["failed"] == 1 and failed[0]
        assert [r["neuron"] for r in made] == [1, 2] and all(r["value"] > 0.9 for r in made)


def test_windows_without_an_answer_are_unscored(tmp_path: Path) -> None:
    """A short list is no reason to fail the rest; a window left out, answered twice or with a strange letter is no 'no'."""

    def lazy(request: dict[str, Any]) -> str:
        answers = json.loads(rule(request))["answers"]
        return json.dumps({"answers": [*answers[:30], "31:Z", "32:A", "32:-", "99:A"]})

    with served(lazy) as server:
        run, config = settings(server.url, tmp_path, ["detection"])
        made = rows(run, config, items())[0]
        assert [(r["n"], r["n_failed"]) for r in made] == [(30, 10)] * 3 and all(r["value"] > 0.85 for r in made)


def test_a_spent_budget_stops_and_what_was_paid_for_is_kept(tmp_path: Path) -> None:
    with served(rule) as server:
        run, config = settings(server.url, tmp_path, ["detection"], budget_tokens=3000, concurrency=1)
        with pytest.raises(BudgetSpent):
            rows(run, config, items(12))
        paid = len(server.requests)
        assert 0 < paid < 12
        run, config = settings(server.url, tmp_path, ["detection"], budget_tokens=10**7)
        assert len(rows(run, config, items(12))[0]) == 12 and len(server.requests) == 12


def test_an_account_without_credit_is_no_score(tmp_path: Path) -> None:
    """On neuronpedia it once was one, of 20 %, and could not be computed again."""
    from aiohttp import web

    error = {"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}}
    with served(lambda _: web.json_response(error, status=429)) as server:
        run, config = settings(server.url, tmp_path, ["detection"], concurrency=1)
        with pytest.raises(RunFailed):
            rows(run, config, items(1))


def test_packed_answers() -> None:
    found = read_packed(["1:-", "2: B", "3:A, C", "4.none", "5:E", "6:A", "6:B", "7:maybe", "9:A"], 3, 8)
    expected = np.full((3, 8), np.nan)
    expected[:, :4] = [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    np.testing.assert_array_equal(found, expected)


def test_the_own_label_stands_at_any_letter_and_texts_cannot_forge_marks(tmp_path: Path) -> None:
    letters = set()
    with served(rule) as server:
        run, config = settings(server.url, tmp_path, ["detection"])
        rows(run, config, items(12))
        for request in server.requests:
            named = dict(re.findall(r"^([A-D])\. (.*)$", request["messages"][1]["content"], re.MULTILINE))
            letters |= {letter for letter, label in named.items() if label in NAMES[:10]}
        assert len(letters) > 1
        first = {json.dumps(r["messages"][0]) for r in server.requests}
        assert len(first) == 1
    assert with_marks("x << y >> z", [(5, 6)]) == "x < < <<y>> > > z"
    assert "\n" not in packed_messages("detection", ["a\nB. b"], ["t"])[1]["content"].split("\n\n")[0]


def test_simulations_are_read_by_number_whatever_is_left_out() -> None:
    """delphi's simulator ends in length mismatches, None, and all-zero predictions."""
    found = scored_units.trials()[None, 0, 1][0]
    windows = simulated(found, 0)
    assert {w.active for w in windows} == {True, False} and len(windows) == 10
    messages, words = simulation_messages("birds", windows)
    shown = re.findall(r"(\d+):(\S+)", messages[1]["content"].split("\n\n", 1)[1])
    assert [int(n) for n, _ in shown] == list(range(1, len(words) + 1))
    got = read_simulation(["2:7", "3:12", "x", f"{len(words) + 5}:3"], words, windows, {})
    assert got is not None and got.sum() == 7 * len(words[1][1])
    assert read_simulation([], words, windows, {}) is not None and not read_simulation([], words, windows, {}).any()  # type: ignore
    assert read_simulation(["none"], words, windows, {}) is None
    assert read_simulation(["2:7"], words, windows, {2: 6.5}).max() == 6.5  # type: ignore[union-attr]


def test_expected_values_of_numbers_by_their_probabilities() -> None:
    def token(text: str, **others: float) -> dict[str, Any]:
        return {"token": text, "top_logprobs": [{"token": t, "logprob": float(np.log(p))} for t, p in others.items()]}

    given = [
        token('["'), token("1"), token(":"), token("8", **{"8": 0.6, "4": 0.2, "x": 0.2}), token('","2:'),
        token('3"', **{'3"': 0.5, '5"': 0.5}), token("3:"), token("1", **{"1": 1.0}), token("0"),
    ]  # fmt: skip
    assert expected_values(given) == {1: pytest.approx((8 * 0.6 + 4 * 0.2) / 0.8), 2: pytest.approx(4.0)}
    assert expected_values(None) == {}


@pytest.mark.parametrize("packing", ["packed", "peer"])
def test_the_dry_run_counts_what_tests_ask(tmp_path: Path, packing: str) -> None:
    """Calls as they are made, and tokens not below those of four bytes each, nor far above."""
    made = trial((None, 0, 1), scored_units.rows(LISTS["birds"], 0), 1.0, size=32, negatives=20)
    item = Labelled(made, "x", "birds", NAMES[10:13])
    more = {"exemplars": {"top": 20, "quantile": 10}, "run": {"out": str(tmp_path / "x"), "stages": ["score"]}}
    for scorer in ("detection", "fuzzing", "simulation"):
        with served(rule) as server:
            run, config = settings(server.url, tmp_path / scorer, [scorer], packing)
            ask_all(run, config, [item])
        tree = config.model_dump(mode="json", exclude_unset=True)
        found = llm_cost(RunConfig.model_validate({**tree, **more}), 1)
        sent = [m["content"] for r in server.requests for m in r["messages"]]
        sent += [json.dumps(r["response_format"]["json_schema"]["schema"]) for r in server.requests]
        size, answered = sum(map(len, sent)) / 4, sum(len(rule(r)) for r in server.requests) / 4
        assert found["LLM calls"] == found["LLM calls of score"] == len(server.requests)
        assert 0.9 * size <= found["LLM prompt tokens"] <= 2.2 * size, scorer
        room = sum(r["max_tokens"] for r in server.requests)
        assert 0.5 * answered <= found["LLM completion tokens"] <= min(room, 6 * answered if scorer != "simulation" else room)
    both = {**tree, **more, "run": {"out": "x"}, "describe": {**tree["describe"], "explainer": "e"}}
    one = llm_cost(RunConfig.model_validate(both), 10)
    assert one["LLM calls"] == 10 * (1 + 2 * 4) and one["LLM cost"] is None

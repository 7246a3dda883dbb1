"""The stage describe in whole runs, against real servers: nothing lost, nothing made up, every failure listed."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from raylabel.cli import run_command
from raylabel.config import RunConfig
from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import RunFailed
from raylabel.llm import client as client_module
from raylabel.report.status import stage_rows
from raylabel.stages import describe_stage
from raylabel.stages.arrays import table_bytes
from raylabel.stages.llm_cost import llm_cost
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.tables import from_rows
from tests.llm.chat_model import save_chat
from tests.llm.model_server import answering, mass
from tests.llm.servers import body, served
from tests.rundirs import config_file
from tests.runs import tiny_config

KEY = "sk-very-secret-0123456789"
GOOD = '{"label": "planted things", "description": "Things that were planted.", "meanings": [{"label": "things", "share": 1}]}'


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF", 0.01)
    monkeypatch.setattr(client_module, "LONGEST", 0.03)
    monkeypatch.setenv("TEST_KEY", KEY)


@pytest.fixture
def labelled(finished: RunDir, tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> Any:
    """Goes on with a copy of the finished run: every unit asked about at a server."""
    shutil.copytree(finished.files.root, tmp_path / "run")

    def config(url: str, **settings: Any) -> RunConfig:
        given = {"explainer": "test", "model": "m", "base_url": url, "api_key_env": "TEST_KEY", "units": "all",
                 "usd_per_million_prompt": 1.0, "usd_per_million_completion": 2.0, "timeout": 1, **settings}  # fmt: skip
        sections: dict[str, Any] = {"subject": {"neurons": [0, 8]}, "describe": given, "run": {"max_failures": 1.0}}
        return tiny_config(tiny_model, tiny_corpus, tmp_path / "run", **sections)

    return config


def rows(run: RunDir, table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.table(table).to_pylist()
    return found + [{**r} for r in run.controls.table(table).to_pylist()] if table != "failures" else found


def unit(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("control"), row["layer"], row["neuron"], row["polarity"]


def test_without_an_explainer_every_unit_with_exemplars_has_a_built_in_label(finished: RunDir) -> None:
    for run in (finished, finished.controls):
        labels = run.table("labels").to_pylist()
        assert {unit(r) for r in labels} == {unit(r) for r in run.table("candidates").to_pylist() if r["n_exemplars"]}
        assert {r["explainer"] for r in labels} == {"built-in"}
        for r in labels:
            assert r["label"] and len(r["label"].split()) <= 8 and len(r["description"].split()) <= 40
    shown = {unit(r): r for r in finished.table("results").to_pylist()}
    for r in finished.table("labels").to_pylist():
        assert shown[unit(r)]["label"] == r["label"] and shown[unit(r)]["label_source"] == "built-in"


def test_faults_cost_their_own_unit_at_most(labelled: Any) -> None:
    faults = itertools.cycle([
        None, web.HTTPTooManyRequests, None, "refusal", 500, None, "empty", None, "error", "cut", None, "wrong", "thought",
    ])  # fmt: skip
    by_question: dict[str, Any] = {}

    async def answer(request: dict[str, Any]) -> Any:
        # What a question meets the first time it meets every time: some units can have no label.
        text = request["messages"][1]["content"]
        if text not in by_question:
            by_question[text] = next(faults)
        fault = by_question[text]
        if fault is web.HTTPTooManyRequests and not by_question.get(f"again {text}"):
            by_question[f"again {text}"] = True
            return web.Response(status=429, headers={"Retry-After": "0.01"})
        return {
            None: GOOD, web.HTTPTooManyRequests: GOOD, "refusal": "I'm sorry, but I can't.",
            500: web.Response(status=500, text="no"),
            "empty": {"object": "chat.completion", "choices": []}, "error": {"error": {"message": "overloaded"}},
            "cut": '{"label": "plan', "wrong": '{"name": "x"}', "thought": body("", message={"reasoning_content": "hm"}),
        }[fault]  # fmt: skip

    with served(answer) as server:
        report = run_pipeline(labelled(server.url))
    run = RunDir(labelled(server.url).run.out)
    labels, failures = rows(run, "labels"), rows(run, "failures")
    wanted = {unit(r) for name in (run, run.controls) for r in name.table("candidates").to_pylist() if r["n_exemplars"]}
    assert {r["explainer"] for r in labels} == {"test"} and {r["label"] for r in labels} == {"planted things"}
    assert {unit(r) for r in labels} | {unit(r) for r in failures} == wanted
    assert not {unit(r) for r in labels} & {unit(r) for r in failures}
    assert report.failures == len(failures) > 0 and all(r["stage"] == "describe" and r["reason"] for r in failures)
    for word in ("refusal", "500", "without choices", "200 with an error", "cut short", "wrong schema", "only reasoning"):
        assert any(word in r["reason"] for r in failures), word
    # A unit without words keeps what was measured.
    before = {unit(r): r["status"] for r in run.table("candidates").to_pylist()}
    assert all(r["status"] == before[unit(r)] for r in run.table("results").to_pylist())


def test_a_real_model_labels_every_unit_and_its_tokens_are_counted(labelled: Any, tiny_model: Path) -> None:
    with served(answering(tiny_model)) as server:
        config = labelled(server.url, timeout=60)
        run_pipeline(config)
        run = RunDir(config.run.out)
        labels = rows(run, "labels")
        wanted = {unit(r) for name in (run, run.controls) for r in name.table("candidates").to_pylist() if r["n_exemplars"]}
        assert {unit(r) for r in labels} | {unit(r) for r in rows(run, "failures")} == wanted and len(labels) > len(wanted) / 2
        assert all(r["prompt_tokens"] > 50 and r["completion_tokens"] > 5 and len(r["prompt_hash"]) == 16 for r in labels)

        async def asked() -> Any:
            client = client_module.open_client(run, config)
            found = await client.ask([{"role": "user", "content": "the cat"}], max_tokens=3, logprobs=True)
            await client.close()
            return found

        found = asyncio.run(asked())
        assert len(found.logprobs) == found.completion_tokens == 3
        for token in found.logprobs:
            assert token["logprob"] == max(a["logprob"] for a in token["top_logprobs"])
            assert 0 < mass(token["top_logprobs"]) <= 1 + 1e-5


def test_a_budget_stops_in_one_line_and_more_of_it_goes_on(labelled: Any, tmp_path: Path, capsys: Any) -> None:
    with served(lambda request: body(GOOD, 500, 50)) as server:
        config = labelled(server.url, budget_tokens=9000)
        assert run_command(["run", str(config_file(config, tmp_path / "c.yaml"))]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert "describe.budget_tokens (9,000) is spent" in lines[-1] and "raise it" in lines[-1]
        bought = len(server.requests)
        assert 10 <= bought <= 9000 // 550 + 1
        whole = labelled(server.url, budget_tokens=10_000_000)
        run_pipeline(whole)
        run = RunDir(whole.run.out)
        asked = sum(table.num_rows for table in (run.table("labels"), run.controls.table("labels")))
        assert len(server.requests) <= asked, "nothing is bought twice"
        status = next(r for r in stage_rows(run) if r["stage"] == "describe")
        assert status["tokens"] == 550 * asked and status["money"] == pytest.approx(asked * (500 + 2 * 50) / 1e6)
        sent = len(server.requests)
        run_pipeline(whole)
        assert len(server.requests) == sent
    assert run.complete("results")


def test_labels_that_came_with_the_exemplars_stand_beside_our_own(labelled: Any) -> None:
    config = labelled("http://127.0.0.1:9/v1", explainer="built-in")
    run = RunDir(config.run.out)
    given = [{"neuron": n, "polarity": 1, "label": "theirs", "explainer": "neuronpedia"} for n in (2, 5, 9)]
    run.files.write("imported_labels/01.arrow", table_bytes(from_rows(given, "labels")))
    key = {"layer": 1, "first": 0, "last": 8, "controls": {}}
    found = describe_stage.DescribeWorker(run.files.url)(Unit("x", "describe", "labels", key))
    rows = next(iter(found.shards)).rows.to_pylist()
    theirs = [i for i, r in enumerate(rows) if r["explainer"] == "neuronpedia"]
    assert [rows[i]["neuron"] for i in theirs] == [2, 5]
    for i in theirs:
        same = [r["explainer"] for r in rows if (r["neuron"], r["polarity"]) == (rows[i]["neuron"], 1)]
        assert same[-1] == "neuronpedia" and same in (["built-in", "neuronpedia"], ["neuronpedia"])


def test_no_credit_ends_the_run_and_scores_nothing(labelled: Any) -> None:
    with served(lambda r: web.json_response({"error": {"message": "quota", "code": "insufficient_quota"}}, status=429)) as server:
        config = labelled(server.url)
        with pytest.raises(RunFailed, match="no credit"):
            run_pipeline(config)
    assert not RunDir(config.run.out).complete("labels")


def test_the_key_reaches_no_file_no_output_and_no_process_list(labelled: Any, tmp_path: Path, capfd: Any) -> None:
    seen: list[str] = []

    async def answer(request: dict[str, Any]) -> Any:
        if not seen:
            seen.append(subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout)
        if len(seen) % 3 == 0:
            return web.json_response({"error": {"message": f"key {KEY} is bad"}}, status=400)
        seen.append("")
        return GOOD

    with served(answer) as server:
        config = labelled(server.url)
        run_command(["run", str(config_file(config, tmp_path / "c.yaml"))])
        assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
        assert not any(KEY in json.dumps(r) for r in server.requests)
    out = capfd.readouterr()
    assert KEY not in out.out + out.err + seen[0]
    for path in Path(config.run.out).rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert os.environ["TEST_KEY"] == KEY


def test_workers_on_ray_share_what_was_bought(labelled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(request: dict[str, Any]) -> str:
        await asyncio.sleep(0.01)
        return GOOD

    with served(answer) as server:
        config = labelled(server.url, budget_tokens=2000)
        tree = config.model_dump(mode="json", exclude_unset=True)
        tree["run"] |= {"address": "local", "workers": 2}
        with pytest.raises(RunFailed, match="is spent"):
            run_pipeline(RunConfig.model_validate(tree))
        assert len(server.requests) <= 2000 // 120 + 1
        bought = len(server.requests)
        tree["describe"]["budget_tokens"] = 10_000_000
        run_pipeline(RunConfig.model_validate(tree))
        run = RunDir(config.run.out)
        asked = sum(table.num_rows for table in (run.table("labels"), run.controls.table("labels")))
        assert bought < len(server.requests) <= asked


def test_the_dry_run_prices_every_unit_or_says_that_it_cannot(labelled: Any) -> None:
    found = llm_cost(labelled("http://127.0.0.1:9/v1"), 100)
    assert found["LLM calls"] == 100 and 30_000 < found["LLM prompt tokens"] < 100_000
    assert found["LLM cost"] == pytest.approx((found["LLM prompt tokens"] + 2 * found["LLM completion tokens"]) / 1e6)
    assert llm_cost(labelled("http://127.0.0.1:9/v1", usd_per_million_prompt=None), 100)["LLM cost"] is None
    assert llm_cost(labelled("http://127.0.0.1:9/v1", explainer="built-in"), 100)["LLM calls"] == 0


def everyone(run: RunDir) -> set[tuple[Any, ...]]:
    return {unit(r) for part in (run, run.controls) for r in part.table("candidates").to_pylist() if r["n_exemplars"]}


def test_a_model_in_the_worker_labels_every_unit_or_says_why_not(labelled: Any, tmp_path: Path) -> None:
    noise = labelled("local", model=str(save_chat(tmp_path / "noise")))
    run_pipeline(noise)
    run = RunDir(noise.run.out)
    assert not rows(run, "labels") and {unit(r) for r in rows(run, "failures")} == everyone(run)
    assert all("rejected 3 times" in r["reason"] for r in rows(run, "failures"))
    good = labelled("local", model=str(save_chat(tmp_path / "good", GOOD)), budget_tokens=10_000_000)
    run_pipeline(good)
    labels = rows(run, "labels")
    assert {unit(r) for r in labels} == everyone(run) and not rows(run, "failures")
    assert {(r["label"], r["explainer"], r["completion_tokens"]) for r in labels} == {("planted things", "test", 1)}
    status = next(r for r in stage_rows(run) if r["stage"] == "describe")
    assert status["tokens"] == sum(r["prompt_tokens"] + 1 for r in labels)


@pytest.mark.slow
def test_a_model_in_the_workers_on_ray(labelled: Any, tmp_path: Path) -> None:
    config = labelled("local", model=str(save_chat(tmp_path / "good", GOOD)))
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["run"] |= {"address": "local", "workers": 2}
    run_pipeline(RunConfig.model_validate(tree))
    run = RunDir(config.run.out)
    assert {unit(r) for r in rows(run, "labels")} == everyone(run) and not rows(run, "failures")

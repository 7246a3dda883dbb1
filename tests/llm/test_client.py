"""The client against real servers on loopback: what passes, what is final, what is kept, what is spent."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pydantic import BaseModel, ConfigDict, field_validator

from raylabel.config import RunConfig, build_config
from raylabel.errors import BadInput, RunFailed
from raylabel.llm import client as client_module
from raylabel.llm.client import AskFailed, BudgetSpent, Client, open_client
from raylabel.store.rundir import RunDir
from tests.llm.servers import body, served

KEY = "sk-very-secret-0123456789"
LONG = "word " * 55
"""About as many tokens as the servers here say that a prompt has."""
GOOD = '{"colour": "red", "size": 3}'


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: str
    size: int

    @field_validator("colour")
    @classmethod
    def _short(cls, value: str) -> str:
        if len(value.split()) > 2:
            raise ValueError("colour has more than 2 words")
        return value


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BACKOFF", 0.01)
    monkeypatch.setattr(client_module, "LONGEST", 0.03)
    monkeypatch.setenv("TEST_KEY", KEY)


def config(url: str, **settings: Any) -> RunConfig:
    given = {"explainer": "test", "model": "m", "base_url": url, "api_key_env": "TEST_KEY", **settings}
    return build_config({"subject": {"model": "demo"}, "describe": given})


def ask(
    path: Path, url: str, *questions: str, schema: Any = Thing, settings: dict[str, Any] | None = None, **more: Any
) -> list[Any]:  # fmt: skip
    """What each question gives, in order: an Answer or the exception."""
    return asked(path, url, questions, settings or {}, schema=schema, **more)[0]


def asked(path: Path, url: str, questions: Any, settings: dict[str, Any], **more: Any) -> tuple[list[Any], Client]:
    client = open_client(RunDir(str(path)), config(url, **settings))

    async def all_of_them() -> list[Any]:
        try:
            calls = [client.ask([{"role": "user", "content": q}], **more) for q in questions]
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await client.close()

    return asyncio.run(all_of_them()), client


def test_answers_are_parsed_counted_priced_and_kept(tmp_path: Path) -> None:
    prices = {"usd_per_million_prompt": 2.0, "usd_per_million_completion": 10.0}
    with served(lambda request: GOOD) as server:
        (first,), client = asked(tmp_path, server.url, ["a"], prices, schema=Thing)
        tally = client.tally()
        (again,), later = asked(tmp_path, server.url, ["a"], prices, schema=Thing)
    assert first.parsed == Thing(colour="red", size=3) and not first.cached
    assert (first.prompt_tokens, first.completion_tokens) == (100, 20)
    assert first.usd == pytest.approx((100 * 2 + 20 * 10) / 1e6)
    assert again.cached and again.parsed == first.parsed and again.usd == first.usd
    assert len(server.requests) == 1
    assert tally == {"answers": 1, "cached": 0, "failed": 0, "prompt_tokens": 100, "completion_tokens": 20, "usd": first.usd}
    assert later.tally()["cached"] == 1
    wanted = server.requests[0]["response_format"]["json_schema"]
    assert wanted["strict"] and wanted["schema"]["required"] == ["colour", "size"]
    assert wanted["schema"]["additionalProperties"] is False


@pytest.mark.parametrize("fault", [
    lambda: web.Response(status=429, headers={"Retry-After": "0.05"}, text="slow down"),
    lambda: web.Response(status=500, text="oh"),
    lambda: web.Response(status=503, text="busy"),
    lambda: web.json_response({"error": {"message": "overloaded", "code": 503}}),
    lambda: web.json_response({"object": "chat.completion", "choices": []}),
    lambda: web.Response(text='{"id": "x", "choices": [{"mess', content_type="application/json"),
    lambda: web.Response(text="<html>gateway</html>", content_type="text/html"),
    lambda: web.json_response([1, 2]),
    lambda: web.json_response({"choices": [{"index": 0}]}),
])  # fmt: skip
def test_what_passes_is_sent_again_and_nothing_is_made_up(tmp_path: Path, fault: Any) -> None:
    counter = itertools.count()
    with served(lambda request: fault() if next(counter) < 2 else GOOD) as server:
        (answer,) = ask(tmp_path / "a", server.url, "q")
        assert answer.parsed.size == 3 and answer.prompt_tokens == 100
        assert len(server.requests) == 3
    with served(lambda request: fault()) as server:
        (answer,) = ask(tmp_path / "b", server.url, "q")
        assert isinstance(answer, AskFailed) and answer.reason and answer.prompt_tokens == 0
    assert not list((tmp_path / "b").rglob("*.json")), "nothing that is no answer is kept"


def test_a_server_that_hangs_costs_its_question_and_no_other(tmp_path: Path) -> None:
    async def answer(request: dict[str, Any]) -> Any:
        if request["messages"][0]["content"] == "hang":
            await asyncio.sleep(30)
        return GOOD

    with served(answer) as server:
        found = ask(tmp_path, server.url, "hang", "a", "b", settings={"timeout": 0.2})
    assert isinstance(found[0], AskFailed) and "no answer within 0.2 s" in found[0].reason
    assert [one.parsed.colour for one in found[1:]] == ["red", "red"]


def test_retry_after_is_kept_to(tmp_path: Path) -> None:
    times: list[float] = []

    def answer(request: dict[str, Any]) -> Any:
        times.append(time.monotonic())
        return web.Response(status=429, headers={"Retry-After": "0.4"}) if len(times) == 1 else GOOD

    with served(answer) as server:
        ask(tmp_path, server.url, "q")
    assert times[1] - times[0] >= 0.4


@pytest.mark.parametrize(("text", "why"), [
    ("I'm sorry, but I can't help with that.", "refusal"),
    ("<think>The user wants a colour. Perhaps red.", "only reasoning"),
    ("The user wants a colour, so I should think about it.", "no JSON"),
    ('{"colour": "red", "si', "cut short or not valid"),
    ('{"colour": "red"}', "wrong schema: size"),
    ('{"colour": "red", "size": 3, "more": 1}', "wrong schema: more"),
    ('{"colour": "a very long colour", "size": 3}', "more than 2 words"),
    ("", "an empty answer"),
    ("[1, 2]", "no JSON"),
])  # fmt: skip
def test_what_is_no_answer_is_asked_again_and_then_a_failure(tmp_path: Path, text: str, why: str) -> None:
    with served(lambda request: text) as server:
        (failed,) = ask(tmp_path / "a", server.url, "q")
        assert isinstance(failed, AskFailed) and why in failed.reason
        assert failed.prompt_tokens == 300, "what was rejected was paid for"
        assert len(server.requests) == 3
        assert why in server.requests[1]["messages"][-1]["content"]
        (again,) = ask(tmp_path / "a", server.url, "q")
        assert isinstance(again, AskFailed) and len(server.requests) == 3, "paid for once"
    counter = itertools.count()
    with served(lambda request: text if next(counter) == 0 else GOOD) as server:
        (answer,) = ask(tmp_path / "b", server.url, "q")
    assert answer.parsed.size == 3 and answer.prompt_tokens == 200


def test_reasoning_and_fences_around_an_answer_are_taken_off(tmp_path: Path) -> None:
    texts = iter([f"<think>{{hm}} red?</think>\n{GOOD}", f"```json\n{GOOD}\n```", f"Here it is: {GOOD} Bye.",
                  f"well</think>{GOOD}"])  # fmt: skip
    with served(lambda request: next(texts)) as server:
        found = ask(tmp_path, server.url, "a", "b", "c", "d")
    assert [one.parsed.size for one in found] == [3, 3, 3, 3]


def test_refusals_reasoning_and_filters_of_the_protocol(tmp_path: Path) -> None:
    answers = {
        "refusal": body("", message={"refusal": "no", "content": None}),
        "filter": body("", finish_reason="content_filter"),
        "reasoning": body("", message={"reasoning_content": "hm", "content": None}),
    }
    with served(lambda request: answers[request["messages"][0]["content"]]) as server:
        found = ask(tmp_path, server.url, *answers)
    assert [type(one) for one in found] == [AskFailed] * 3
    assert ["a refusal" in one.reason for one in found] == [True, True, False]
    assert "only reasoning" in found[2].reason


def test_an_answer_cut_short_gets_more_room(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> Any:
        return GOOD if request["max_tokens"] >= 40 else body('{"colour": "re', finish_reason="length")

    with served(answer) as server:
        (found,) = ask(tmp_path, server.url, "q", max_tokens=20)
    assert found.parsed.size == 3 and [r["max_tokens"] for r in server.requests] == [20, 40]


def test_final_errors_are_not_sent_again(tmp_path: Path) -> None:
    with served(lambda request: web.json_response({"error": {"message": f"too long {KEY}"}}, status=400)) as server:
        (failed,) = ask(tmp_path, server.url, "q")
    assert isinstance(failed, AskFailed) and "400: " in failed.reason and len(server.requests) == 1
    assert KEY not in failed.reason


@pytest.mark.parametrize(("status", "payload", "kind", "word"), [
    (401, {"message": f"Incorrect API key provided: {KEY}"}, BadInput, "describe.api_key_env"),
    (404, {"message": "no such model"}, BadInput, "describe.model"),
    (402, {"message": "pay"}, RunFailed, "no credit"),
    (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}, RunFailed, "no credit"),
])  # fmt: skip
def test_what_the_user_must_mend_ends_the_run(tmp_path: Path, status: int, payload: Any, kind: type, word: str) -> None:
    with served(lambda request: web.json_response({"error": payload}, status=status)) as server:
        (found,) = ask(tmp_path, server.url, "q")
    assert isinstance(found, kind) and word in str(found) and KEY not in str(found) and len(server.requests) == 1


def test_no_server_key_or_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = ask(tmp_path, "http://127.0.0.1:9/v1", "q")
    assert isinstance(found, BadInput) and "describe.base_url" in str(found)
    monkeypatch.delenv("TEST_KEY")
    run = RunDir(str(tmp_path))
    for settings, word in (
        ({"base_url": None}, "TEST_KEY is not set"), ({"model": None}, "describe.model"),
        ({"budget_usd": 1.0}, "usd_per_million_prompt"), ({"base_url": "ftp://x"}, "describe.base_url"),
        ({"base_url": "http://me:secret@x/v1"}, "describe.base_url: holds a user name or password"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=word):
            open_client(run, config(**{"url": "http://127.0.0.1:9/v1", **{k: v for k, v in settings.items() if k != "base_url"},
                                       **({"url": settings["base_url"]} if "base_url" in settings else {})}))  # fmt: skip


def test_a_key_in_place_of_its_variable_is_refused_without_being_shown() -> None:
    with pytest.raises(BadInput) as error:
        config("http://127.0.0.1:9/v1", api_key_env="sk-abc-123")
    assert "describe.api_key_env" in str(error.value) and "abc" not in str(error.value)


def test_what_a_server_does_not_know_is_left_out(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> Any:
        if "max_tokens" in request:
            return web.json_response({"error": {"message": "use max_completion_tokens"}}, status=400)
        if "temperature" in request:
            return web.json_response({"error": {"message": "temperature is not supported"}}, status=400)
        if "top_logprobs" in request:
            return web.json_response({"error": {"message": "logprobs are not supported"}}, status=400)
        if request.get("response_format", {}).get("type") == "json_schema":
            return web.json_response({"error": {"message": "literal_error: response_format.type"}}, status=500)
        return GOOD

    with served(answer) as server:
        found = ask(tmp_path, server.url, "a", logprobs=True)
        sent = len(server.requests)
        assert found[0].parsed.size == 3 and found[0].logprobs is None
        assert server.requests[-1]["response_format"]["type"] == "json_object"
    assert sent == 5


def test_logprobs_come_through_and_are_kept(tmp_path: Path) -> None:
    others = [{"token": " no", "logprob": -2.3, "bytes": None}]
    listed = [{"token": " yes", "logprob": -0.1, "bytes": None, "top_logprobs": others}]
    with served(lambda request: body(" yes", logprobs={"content": listed, "refusal": None})) as server:
        first, = ask(tmp_path, server.url, "a", schema=None, logprobs=True, max_tokens=1)
        again, = ask(tmp_path, server.url, "a", schema=None, logprobs=True, max_tokens=1)
    assert first.text == " yes" and first.parsed is None
    assert first.logprobs[0]["top_logprobs"][0]["logprob"] == -2.3 and again.logprobs == first.logprobs and again.cached


def test_the_same_question_at_once_is_bought_once(tmp_path: Path) -> None:
    async def answer(request: dict[str, Any]) -> str:
        await asyncio.sleep(0.05)
        return GOOD

    with served(answer) as server:
        found = ask(tmp_path, server.url, *["same"] * 8)
    assert len(server.requests) == 1 and sum(not one.cached for one in found) == 1


def test_in_flight_climbs_while_the_server_keeps_up_and_backs_off(tmp_path: Path) -> None:
    capacity = asyncio.Semaphore(6)

    async def answer(request: dict[str, Any]) -> Any:
        async with capacity:
            await asyncio.sleep(0.02)
        return GOOD

    questions = [str(i) for i in range(150)]
    with served(answer) as server:
        _, client = asked(tmp_path / "a", server.url, questions, {"concurrency": 200}, schema=Thing)
        assert 6 <= server.most <= 60, "climbs to where it slows, not to all it may"

    async def wide(request: dict[str, Any]) -> Any:
        await asyncio.sleep(0.3)
        return GOOD

    with served(wide) as server:
        asked(tmp_path / "b", server.url, questions, {"concurrency": 64}, schema=Thing)
        assert server.most >= 20, "a server that keeps up gets more"

    async def few(request: dict[str, Any]) -> Any:
        if server.inside > 5:
            return web.Response(status=429, headers={"Retry-After": "0.02"})
        await asyncio.sleep(0.02)
        return GOOD

    with served(few) as server:
        found, client = asked(tmp_path / "c", server.url, questions[:60], {"concurrency": 64}, schema=Thing)
    assert all(not isinstance(one, Exception) for one in found), "no answer is lost to 429"
    assert client.gate.limit <= 12


def test_a_budget_of_tokens_is_kept_and_what_was_paid_is_too(tmp_path: Path) -> None:
    questions = [f"{i} {LONG}" for i in range(40)]
    with served(lambda request: GOOD) as server:
        found, client = asked(tmp_path, server.url, questions, {"budget_tokens": 2000}, schema=Thing, max_tokens=50)
        client.tally()
        bought = [one for one in found if not isinstance(one, Exception)]
        assert {type(one) for one in found if isinstance(one, Exception)} == {BudgetSpent}
        assert 12 <= len(bought) <= 2000 // 120 and len(server.requests) == len(bought)
        # More money: only what is missing is bought.
        found, client = asked(tmp_path, server.url, questions, {"budget_tokens": 40 * 120 + 200}, schema=Thing, max_tokens=50)
        assert all(not isinstance(one, Exception) for one in found) and len(server.requests) == 40
        assert sum(one.cached for one in found) == len(bought)


def test_two_processes_together_keep_to_the_budget(tmp_path: Path) -> None:
    prices = {"usd_per_million_prompt": 1e4, "usd_per_million_completion": 0.0}  # a dollar an answer
    with served(lambda request: GOOD) as server:
        clients = [open_client(RunDir(str(tmp_path)), config(server.url, budget_usd=20, **prices)) for _ in range(3)]

        async def both() -> list[Any]:
            calls = [c.ask([{"role": "user", "content": f"{i} {j} {LONG}"}], max_tokens=5, schema=Thing)
                     for i, c in enumerate(clients) for j in range(15)]  # fmt: skip
            found = await asyncio.gather(*calls, return_exceptions=True)
            for c in clients:
                await c.close()
            return found

        found = asyncio.run(both())
    bought = sum(not isinstance(one, Exception) for one in found)
    assert bought == len(server.requests) and 15 <= bought <= 20
    assert {type(one) for one in found if isinstance(one, Exception)} == {BudgetSpent}


def test_requests_a_minute(tmp_path: Path) -> None:
    times: list[float] = []

    def answer(request: dict[str, Any]) -> str:
        times.append(time.monotonic())
        return GOOD

    with served(answer) as server:
        ask(tmp_path, server.url, *map(str, range(12)), settings={"requests_per_minute": 600})
    # Ten a second with a burst of ten: two wait.
    assert max(times) - min(times) >= 0.15


def test_the_key_is_in_the_header_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with served(lambda request: GOOD) as server:
        _, client = asked(tmp_path, server.url, ["q"], {}, schema=Thing)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(client) and KEY not in json.dumps(server.requests) and KEY not in caplog.text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text()
    with pytest.raises(TypeError):
        import pickle

        pickle.dumps(client)


def test_a_broken_file_in_the_cache_is_bought_again(tmp_path: Path) -> None:
    with served(lambda request: GOOD) as server:
        ask(tmp_path, server.url, "q")
        (kept,) = (tmp_path / "_llm" / "answers").rglob("*.json")
        kept.write_text('{"text": "cut')
        (found,) = ask(tmp_path, server.url, "q")
    assert found.parsed.size == 3 and len(server.requests) == 2

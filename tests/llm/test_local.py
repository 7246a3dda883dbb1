"""The explainer inside the worker: real models of transformers, the same questions and answers as of a server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from raylabel.config import build_config
from raylabel.errors import BadInput
from raylabel.llm.budget import BudgetSpent
from raylabel.llm.client import AskFailed, open_client
from raylabel.llm.local import Local, encoded, opened
from raylabel.stages.llm_cost import llm_cost
from raylabel.store.rundir import RunDir
from tests.llm.chat_model import save_chat
from tests.llm.model_server import mass
from tests.models.test_judge import tokenizer

GOOD = '{"name": "otter", "size": 3}'


class Animal(BaseModel):
    name: str
    size: int


def asked(folder: Path, out: Path, questions: list[str], keep: Any = None, **more: Any) -> list[Any]:
    """Answers or errors, asked at once."""
    given = {k: more.pop(k) for k in ("schema", "logprobs", "max_tokens", "temperature") if k in more}
    config = build_config({
        "subject": {"model": "demo", "device": "cpu"}, "run": {"out": str(out)},
        "describe": {"explainer": "mine", "model": str(folder), "base_url": "local", **more},
    })  # fmt: skip
    run = RunDir(str(out))
    run.start(config.model_dump(mode="json"))

    async def ask() -> list[Any]:
        client = open_client(run, config)
        calls = [client.ask([{"role": "system", "content": "s"}, {"role": "user", "content": q}], **given) for q in questions]
        found = await asyncio.gather(*calls, return_exceptions=True)
        if keep is not None:
            keep.append(client.tally())
        await client.close()
        return list(found)

    return asyncio.run(ask())


def test_an_answer_is_the_models_own_parsed_counted_and_kept(tmp_path: Path) -> None:
    folder, tallies = save_chat(tmp_path / "m", GOOD), list[Any]()
    first = asked(folder, tmp_path / "run", ["a", "b", "b"], tallies, schema=Animal)
    assert [a.parsed for a in first] == [Animal(name="otter", size=3)] * 3 and not any(a.cached for a in first[:2])
    assert all(a.completion_tokens == 1 and 5 < a.prompt_tokens < 60 and a.usd is None for a in first)
    opened.cache_clear()
    again = asked(folder, tmp_path / "run", ["a", "b"], tallies, schema=Animal)
    assert all(a.cached for a in again) and opened.cache_info().misses == 0, "the model is not even loaded"
    assert tallies[1]["answers"] == tallies[1]["cached"] == 2
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert not asked(folder, tmp_path / "run", ["a"], schema=Animal)[0].cached, "another model in the same folder"


def test_what_random_weights_say_is_a_failure(tmp_path: Path) -> None:
    folder, tallies = save_chat(tmp_path / "m"), list[Any]()
    found = asked(folder, tmp_path / "run", [f"question {i}" for i in range(4)], tallies, schema=Animal, max_tokens=20)
    assert all(isinstance(error, AskFailed) and "rejected 3 times" in error.reason for error in found)
    assert tallies[0]["failed"] == 4 and tallies[0]["prompt_tokens"] > 0
    assert isinstance(asked(folder, tmp_path / "b", ["x " * 400], schema=Animal, budget_tokens=600)[0], BudgetSpent)


def test_answers_and_probabilities_are_those_of_greedy_steps(tmp_path: Path) -> None:
    import torch

    folder = save_chat(tmp_path / "m")
    model, known = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (found,) = asked(folder, tmp_path / "run", ["the cat"], logprobs=True, max_tokens=8)
    ids = encoded(known, [{"role": "system", "content": "s"}, {"role": "user", "content": "the cat"}])
    made: list[int] = []
    for token in found.logprobs:
        with torch.no_grad():
            scores = model(torch.tensor([ids + made])).logits[0, -1].log_softmax(-1)
        made.append(int(scores.argmax()))
        assert token["token"] == known.decode([made[-1]]) and token["logprob"] == pytest.approx(float(scores.max()), abs=1e-4)
        assert 0 < mass(token["top_logprobs"]) <= 1 + 1e-5
    assert found.text == known.decode(made, skip_special_tokens=True)
    assert len(made) == found.completion_tokens <= 8


def test_prompts_are_in_the_models_own_form_and_texts_cannot_leave_their_turn(tmp_path: Path) -> None:
    known = tokenizer(None)
    ids = encoded(known, [{"role": "system", "content": "the </s> cat"}, {"role": "user", "content": "<pad> sat"}])
    assert known.decode(ids) == "<s>the < /s> cat\n\n< pad> sat\n\n" and ids.count(known.eos_token_id) == 0
    known.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"  # noqa: E501
    text = known.decode(encoded(known, [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]))
    assert text == "[user]s\n\nu"


def test_what_the_model_cannot_take_fails_by_itself(tmp_path: Path) -> None:
    folder = save_chat(tmp_path / "m", GOOD, positions=64)
    long, short = asked(folder, tmp_path / "run", ["word " * 200, "a"], schema=Animal)
    assert isinstance(long, AskFailed) and "has 64 positions" in long.reason and short.parsed.name == "otter"


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    config = build_config({"subject": {"model": "demo"}, "describe": {"explainer": "x", "base_url": "local"}})
    with pytest.raises(BadInput, match=r"^describe.model is required: a folder"):
        Local(config.describe, "cpu")
    (error,) = asked(tmp_path / "nothing", tmp_path / "run", ["a"])
    assert isinstance(error, BadInput) and str(error).startswith("describe.model")
    config = config.model_copy(update={"describe": config.describe.model_copy(update={"model": "m"})})
    cost = llm_cost(config, 10)
    assert cost["LLM cost"] == 0 and cost["LLM calls"] == 10

"""score by a language model: asks, and gathers what was answered.

`ask_all` takes labelled units and the client, and gives for each (unit, scorer) a Prediction, or the reason why there is
none. All questions run at once; the client keeps its own limits. A question without an answer leaves its windows unscored;
only where nothing at all was answered has the unit failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raylabel.stages.score import Labelled, Window
from raylabel.stages.score_prompts import (
    Activations,
    Fit,
    Fits,
    Shown,
    expected_values,
    packed_messages,
    peer_messages,
    read_packed,
    read_simulation,
    shown,
    simulated,
    simulation_messages,
)  # fmt: skip
from raylabel.stages.score_rows import Prediction

ASKED = ("detection", "fuzzing", "simulation")
"""Scorers that need a language model."""
FAILED = "no answer"


@dataclass
class Spent:
    """What questions took, those answered from the cache included."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    unanswered: int = 0

    def add(self, answer: Any) -> None:
        """Counts an answer."""
        self.requests += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.usd += answer.usd or 0.0


@dataclass
class Asking:
    """The client, how it is asked, and what that took."""

    client: Any
    packing: str
    seed: int
    spent: Spent = field(default_factory=Spent)

    async def ask(self, messages: list[dict[str, str]], schema: Any, tokens: int, logprobs: bool = False) -> Any:
        """The Answer, or the reason (a str) why there is none."""
        from raylabel.llm.client import AskFailed

        try:
            answer = await self.client.ask(messages, schema=schema, max_tokens=tokens, logprobs=logprobs)
        except AskFailed as error:
            self.spent.unanswered += 1
            return error.reason or FAILED
        self.spent.add(answer)
        return answer


def ask_all(
    asking: Asking, items: Sequence[Labelled], scorers: Sequence[str]
) -> list[tuple[Labelled, str, Prediction | str]]:  # fmt: skip
    """(labelled unit, scorer, its Prediction or why there is none) for all units and those scorers that ask.

    Raises BudgetSpent; what was answered until then is in the client's cache.
    """
    jobs: list[tuple[Labelled, str]] = [(item, scorer) for scorer in ASKED if scorer in scorers for item in items]

    async def run() -> list[Prediction | str]:
        tasks = [asyncio.create_task(_one(asking, item, scorer)) for item, scorer in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            # One that raised stops those that wait; what is under way is paid for and let to its end.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return [(*job, got) for job, got in zip(jobs, asyncio.run(run()), strict=True)]


def _one(asking: Asking, item: Labelled, scorer: str) -> Coroutine[Any, Any, Prediction | str]:
    if scorer == "simulation":
        return _simulate(asking, item)
    return _judge(asking, item, scorer)


async def _judge(asking: Asking, item: Labelled, scorer: str) -> Prediction | str:
    see = shown(scorer, item.trial, asking.seed)
    if not see.windows:
        return Prediction([], np.zeros((len(item.labels), 0)), np.zeros(0), np.zeros(0, bool))
    ask = _packed if asking.packing == "packed" else _singly
    answers, why = await ask(asking, item, scorer, see)
    if why is not None and np.isnan(answers).all():
        return why
    return Prediction(see.windows, answers, _lookup(item, scorer, see), see.truth)


async def _packed(asking: Asking, item: Labelled, scorer: str, see: Shown) -> tuple[np.ndarray, str | None]:
    labels = item.labels
    # The own label stands at any place.
    place = np.random.default_rng([asking.seed, *item.label.encode()[:16], item.trial.unit[1]]).permutation(len(labels))
    order = [labels[i] for i in place]
    got = await asking.ask(packed_messages(scorer, order, see.texts), Fits, 64 + 12 * len(see.texts))
    if isinstance(got, str):
        return np.full((len(labels), len(see.texts)), np.nan), got
    answers = np.empty((len(labels), len(see.texts)))
    answers[place] = read_packed(got.parsed.answers, len(labels), len(see.texts))
    return answers, "the answer could not be read"


async def _singly(asking: Asking, item: Labelled, scorer: str, see: Shown) -> tuple[np.ndarray, str | None]:
    questions = [(i, k) for i in range(len(item.labels)) for k in range(len(see.texts))]
    got = await asyncio.gather(*(
        asking.ask(peer_messages(scorer, item.labels[i], see.texts[k]), Fit, 32) for i, k in questions
    ))  # fmt: skip
    answers = np.full((len(item.labels), len(see.texts)), np.nan)
    why = None
    for (i, k), answer in zip(questions, got, strict=True):
        if isinstance(answer, str):
            why = answer
        else:
            answers[i, k] = float(answer.parsed.answer == "yes")
    return answers, why


def _lookup(item: Labelled, scorer: str, see: Shown) -> np.ndarray:
    """The table's answers: of a window's strongest token, or of the weakest marked word."""
    table = item.trial.lookup
    if scorer == "detection":
        return np.array([float(table.window(w) >= table.at_window) for w in see.windows])
    marked = [[table.at(w, span) for span in marks] for w, marks in zip(see.windows, see.marks, strict=True)]
    return np.array([float(min(found, default=0.0) >= table.at_word) for found in marked])


async def _simulate(asking: Asking, item: Labelled) -> Prediction | str:
    windows = simulated(item.trial, asking.seed)
    if not windows:
        return Prediction([], np.zeros((len(item.labels), 0)), np.zeros(0), np.zeros(0))
    got = await asyncio.gather(*(_simulation(asking, label, windows) for label in item.labels))
    if isinstance(got[0], str):
        return got[0]
    size = sum(len(w.ids) for w in windows)
    answers = np.stack([np.full(size, np.nan) if isinstance(found, str) else found for found in got])
    table = item.trial.lookup
    actual = np.concatenate([np.maximum(np.array(w.activations, np.float64), 0.0) for w in windows])
    return Prediction(windows, answers, np.concatenate([table.tokens(w) for w in windows]), actual)


async def _simulation(asking: Asking, label: str, windows: list[Window]) -> np.ndarray | str:
    messages, words = simulation_messages(label, windows)
    got = await asking.ask(messages, Activations, 64 + 8 * len(words), logprobs=True)
    if isinstance(got, str):
        return got
    found = read_simulation(got.parsed.answers, words, windows, expected_values(got.logprobs))
    return "no activation could be read" if found is None else found

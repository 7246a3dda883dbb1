"""score by a language model: asks, and gathers what was answered.

`ask_all` takes labelled units and gives for each (unit, scorer) a Prediction, or the reason why there is
none. All questions run at once; the client keeps its own limits. A question without an answer leaves its windows unscored;
only where nothing at all was answered has the unit failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylabel.config import RunConfig
from raylabel.llm.answers import Rejected
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
from raylabel.store.rundir import RunDir

ASKED = ("detection", "fuzzing", "simulation")
"""Scorers that need a language model."""
FAILED = "no answer"


@dataclass
class Asking:
    """The client and how it is asked."""

    client: Any
    packing: str
    seed: int

    async def ask(
        self, messages: list[dict[str, str]], schema: Any, tokens: int, logprobs: bool = False, check: Any = None
    ) -> Any:  # fmt: skip
        """The Answer, or the reason (a str) why there is none."""
        from raylabel.llm.client import AskFailed

        try:
            return await self.client.ask(messages, schema=schema, max_tokens=tokens, logprobs=logprobs, check=check)
        except AskFailed as error:
            return error.reason or FAILED


def ask_all(
    run: RunDir, config: RunConfig, items: Sequence[Labelled]
) -> tuple[list[tuple[Labelled, str, Prediction | str]], dict[str, Any]]:  # fmt: skip
    """(labelled unit, scorer, its Prediction or why there is none) for all units and those scorers that ask, and the tally.

    Raises BudgetSpent; what was answered until then is in the client's cache.
    """
    from raylabel.llm.client import open_client

    jobs: list[tuple[Labelled, str]] = [(i, scorer) for scorer in ASKED if scorer in config.score.scorers for i in items]

    async def ask() -> tuple[list[Prediction | str], dict[str, Any]]:
        asking = Asking(open_client(run, config), config.score.packing, config.run.seed)
        tasks = [asyncio.create_task(_one(asking, item, scorer)) for item, scorer in jobs]
        try:
            found = list(await asyncio.gather(*tasks))
        finally:
            # One that raised stops those that wait.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            tally = asking.client.tally()
            await asking.client.close()
        return found, tally

    found, tally = asyncio.run(ask())
    return [(*job, got) for job, got in zip(jobs, found, strict=True)], tally


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
    shape = len(labels), len(see.texts)

    def check(given: Fits) -> None:
        if np.isnan(read_packed(given.answers, *shape)).all():
            raise Rejected("no line of it reads number:letters")

    got = await asking.ask(packed_messages(scorer, order, see.texts), Fits, 64 + 12 * len(see.texts), check=check)
    if isinstance(got, str):
        return np.full((len(labels), len(see.texts)), np.nan), got
    answers = np.empty(shape)
    answers[place] = read_packed(got.parsed.answers, *shape)
    return answers, None


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

    def check(given: Activations) -> None:
        if read_simulation(given.answers, words, windows, {}) is None:
            raise Rejected("no line of it reads number:activation")

    got = await asking.ask(messages, Activations, 64 + 8 * len(words), logprobs=True, check=check)
    if isinstance(got, str):
        return got
    found = read_simulation(got.parsed.answers, words, windows, expected_values(got.logprobs))
    return FAILED if found is None else found

"""What labels and their tests would ask of a language model: calls, tokens and money, before anything is asked.

Upper bounds for typical text: every unit is asked about, every window is there, and tokens are counted as four bytes each
beside those of the subject. Meanings that are tested apart add a line a question (a simulation each), and are not counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from raylabel.config import RunConfig
from raylabel.llm.answers import strict_schema
from raylabel.llm.local import LOCAL
from raylabel.llm.prompts import SYSTEM, SYSTEM_MATS, Label
from raylabel.stages.describe import AFTER, BEFORE, BUILT_IN
from raylabel.stages.score import SHUFFLED
from raylabel.stages.score_prompts import (
    SIMULATED,
    Activations,
    Fit,
    Fits,
    Message,
    packed_messages,
    peer_messages,
    simulation_messages,
)  # fmt: skip

ASKING = ("detection", "fuzzing", "simulation")
MARKS, ANSWER, LINE, LABEL = 6, 80, 5, 12
"""Tokens of the marks and the number of a shown text, of a described unit, of an answer for one window, of a label."""
WORD = 1.4
"""Tokens of running text a word, about."""


class Asked(NamedTuple):
    """Requests and the tokens of their prompts and answers."""

    calls: int = 0
    prompt: int = 0
    answer: int = 0

    def times(self, n: int) -> Asked:
        """`n` of these."""
        return Asked(self.calls * n, self.prompt * n, self.answer * n)


def llm_cost(config: RunConfig, units: int) -> dict[str, Any]:
    """Calls, tokens and price of asking about all of `units`; the price is null without prices."""
    wanted = config.describe
    described = _described(config).times(units)
    # Labels of describe, or MAT words without it, and the words of concepts.
    sources = 1 + _runs(config, "optimize")
    scored = [_scored(config, scorer).times(units * sources) for scorer in config.score.scorers if scorer in ASKING]
    found = Asked(*(sum(parts) for parts in zip(described, *scored, strict=True)))
    prices = (wanted.usd_per_million_prompt, wanted.usd_per_million_completion)
    cost = None if None in prices else (found.prompt * (prices[0] or 0) + found.answer * (prices[1] or 0)) / 1e6
    return {
        "LLM calls": found.calls, "LLM calls of score": found.calls - described.calls, "LLM prompt tokens": found.prompt,
        "LLM completion tokens": found.answer, "LLM cost": cost if found.calls and wanted.base_url != LOCAL else 0.0,
    }  # fmt: skip


def _runs(config: RunConfig, stage: str) -> bool:
    return config.run.stages == "all" or stage in config.run.stages


def _described(config: RunConfig) -> Asked:
    """Of a unit's label."""
    wanted = config.describe
    if wanted.explainer == BUILT_IN or not _runs(config, "describe"):
        return Asked()
    mats = wanted.prompt == "mats"
    shown = config.exemplars.top * 3 if mats else wanted.exemplars * (BEFORE + AFTER + MARKS)
    return Asked(1, _bytes(SYSTEM_MATS if mats else SYSTEM) + shown + _schema(Label), ANSWER)


def _scored(config: RunConfig, scorer: str) -> Asked:
    """Of one label's test by one scorer."""
    if not _runs(config, "score"):
        return Asked()
    score, wanted = config.score, config.exemplars
    active, labels = wanted.top // 2 + wanted.quantile, 1 + SHUFFLED
    if scorer == "simulation":
        words = int(2 * SIMULATED * score.window / WORD)
        prompt = _static(simulation_messages("", [])[0]) + LABEL + int(words * (WORD + 4)) + _schema(Activations)
        return Asked(1, prompt, words // 2 * LINE).times(labels)
    # Fuzzing also marks wrong words of active windows, in place of silent windows.
    windows, text = active + score.negatives, score.window + MARKS
    if score.packing == "peer":
        return Asked(1, _static(peer_messages(scorer, "", "")) + LABEL + text + _schema(Fit), 2 * LINE).times(windows * labels)
    static = _static(packed_messages(scorer, [], []))
    return Asked(1, static + labels * LABEL + windows * text + _schema(Fits), windows * LINE)


def _static(messages: Sequence[Message]) -> int:
    return sum(_bytes(m["content"]) for m in messages)


def _bytes(text: str) -> int:
    return len(text.encode()) // 4 + 1


def _schema(schema: Any) -> int:
    return _bytes(json.dumps(strict_schema(schema)))

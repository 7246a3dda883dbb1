"""Questions to a language model behind an OpenAI-compatible server.

`open_client(run, config)` gives a Client with the settings of `describe`; `await client.ask(messages, schema=Model)`
gives an Answer, raises AskFailed where the model cannot be made to answer, and BudgetSpent where money or tokens are
used up. A client may be used by many coroutines of one event loop at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from raylabel.config import RunConfig
from raylabel.store.rundir import RunDir


@dataclass(frozen=True)
class Answer:
    """What the model answered.

    Attributes:
        text: the answer as it came.
        parsed: an instance of the schema asked for, None without one.
        prompt_tokens, completion_tokens: as the server counted them, also for an answer out of the cache.
        usd: price of the request, None where no price is configured; what a cached answer did cost when it was bought.
        cached: nothing was sent and nothing paid.
        logprobs: the server's list of tokens with their alternatives (`token`, `logprob`, `top_logprobs`), None without.
    """

    text: str
    parsed: Any | None
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    cached: bool
    logprobs: Any | None


class AskFailed(Exception):
    """The question has no answer and asking again would not help: refusal, wrong schema after retries, 4xx, ..."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BudgetSpent(Exception):
    """`describe.budget_usd` or `describe.budget_tokens` is used up; nothing more is sent."""


class Client:
    """A server, a model, and what is shared by all who ask: cache, limits, budget."""

    async def ask(
        self,
        messages: list[dict[str, str]],
        *,
        schema: type[BaseModel] | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        logprobs: bool = False,
    ) -> Answer:
        """The answer to a conversation (`role`, `content`), from the cache where it was asked before.

        Raises AskFailed and BudgetSpent.
        """
        raise NotImplementedError


def open_client(run: RunDir, config: RunConfig) -> Client:
    """The client of a run: server, model and budget of `describe`, cache in the run directory."""
    raise NotImplementedError

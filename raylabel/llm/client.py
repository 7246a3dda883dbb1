"""Questions to a language model behind an OpenAI-compatible server.

`open_client(run, config)` gives a Client with the settings of `describe`; `await client.ask(messages, schema=Model)`
gives an Answer, raises AskFailed where the model cannot be made to answer, and BudgetSpent where money or tokens are
used up. A client may be used by many coroutines of one event loop at once.

An answer that is rejected (wrong schema, refusal, cut short, reasoning only, what the caller's own check does not take)
is asked for again twice, with a word on what was wrong; every answer that was paid for is kept, rejected ones too.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.limits import limiter
from raylabel.llm.answers import Rejected, bare, refuses, strict_schema, structured
from raylabel.llm.budget import Budget, BudgetSpent, Cost
from raylabel.llm.cache import Cache, key_of
from raylabel.llm.gate import Gate
from raylabel.llm.local import LOCAL, Local
from raylabel.llm.wire import Final, Passing, Server
from raylabel.store.rundir import RunDir

__all__ = ["Answer", "AskFailed", "BudgetSpent", "Client", "open_client"]

ASKED = 3
"""Times a question is asked whose answers are rejected."""
SENT, SENT_BUSY = 5, 12
"""Times a request is sent that fails, and one that the server has no time for."""
BACKOFF, LONGEST = 0.5, 30.0
QUOTED = 600
AGAIN = "That answer cannot be used: {why}. Answer the same question again{form}."


@dataclass(frozen=True)
class Answer:
    """What the model answered.

    Attributes:
        text: the answer as it came.
        parsed: an instance of the schema asked for, None without one.
        prompt_tokens, completion_tokens: as the server counted them (estimated where it does not), of rejected answers
            too, also for an answer out of the cache.
        usd: price of these tokens, None where no price is configured; what a cached answer did cost when it was bought.
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
    """The question has no answer and asking again would not help: refusal, wrong schema after retries, 4xx, ...

    `prompt_tokens` and `completion_tokens` are what the answers cost that came all the same.
    """

    def __init__(self, reason: str, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.prompt_tokens, self.completion_tokens = reason, prompt_tokens, completion_tokens


class Client:
    """A server, a model, and what is shared by all who ask: cache, limits, budget."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        wanted = config.describe
        self.prices = (wanted.usd_per_million_prompt, wanted.usd_per_million_completion)
        if wanted.budget_usd is not None and None in self.prices:
            raise BadInput("describe.budget_usd: give the prices too: usd_per_million_prompt and usd_per_million_completion")
        self._server = Local(wanted, config.subject.device) if wanted.base_url == LOCAL else Server(wanted)
        self._cache = Cache(run.files)
        self._budget = Budget(run.files, wanted.budget_tokens, wanted.budget_usd)
        self.gate = Gate(wanted.concurrency)
        # A second's worth of requests at once, and a minute's of tokens: a single request may take more than a second's.
        rate, size = wanted.requests_per_minute, wanted.tokens_per_minute
        where = run.files.url
        self._requests = limiter(f"requests {rate} {where}", rate / 60, max(1.0, rate / 60)) if rate else None
        self._tokens = limiter(f"tokens {size} {where}", size / 60, float(size)) if size else None
        self._asking: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._counts = dict.fromkeys(("answers", "cached", "failed", "prompt_tokens", "completion_tokens"), 0)

    def __repr__(self) -> str:
        return f"Client({self._server!r})"

    async def ask(
        self,
        messages: list[dict[str, str]],
        *,
        schema: type[BaseModel] | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
        logprobs: bool = False,
        check: Callable[[Any], None] | None = None,
    ) -> Answer:
        """The answer to a conversation (`role`, `content`), from the cache where it was asked before.

        `check` is given what was parsed (the text without a schema) and raises Rejected for what is no use.
        Raises AskFailed, BudgetSpent, and BadInput where the settings are at fault (key, model, URL).
        """
        wanted = strict_schema(schema) if schema else None
        asked = [*messages]
        prompt, completion, cached, why = 0, 0, True, ""
        for _ in range(ASKED):
            question = {
                "model": self._server.model, "messages": asked, "schema": wanted, "max_tokens": max_tokens,
                "temperature": temperature, "logprobs": logprobs,
            }  # fmt: skip
            try:
                raw, kept = await self._raw(question)
            except (Final, Passing) as error:
                self._counts["failed"] += 1
                raise AskFailed(str(error), prompt, completion) from None
            prompt, completion, cached = prompt + raw["prompt_tokens"], completion + raw["completion_tokens"], cached and kept
            try:
                parsed = _parse(raw, schema)
                if check is not None:
                    check(parsed if schema else raw["text"])
            except Rejected as error:
                why = str(error)
                form = " with the JSON object alone" if schema else ""
                # At temperature 0 the same words would get the same answer.
                asked = [*asked, {"role": "assistant", "content": raw["text"][:QUOTED] or "(nothing)"},
                         {"role": "user", "content": AGAIN.format(why=why, form=form)}]  # fmt: skip
                if raw["finish"] == "length":
                    asked, max_tokens = [*messages], 2 * max_tokens
                continue
            usd = self._price(prompt, completion)
            self._count(prompt, completion, cached, failed=False)
            return Answer(raw["text"], parsed, prompt, completion, usd, cached, raw["logprobs"])
        self._count(prompt, completion, cached, failed=True)
        raise AskFailed(f"rejected {ASKED} times, last: {why}", prompt, completion)

    def tally(self) -> dict[str, Any]:
        """What was asked since the last tally, for a unit's notes: answers, those out of the cache, failures, tokens, usd.

        Tokens and usd are of all answers, whether bought now or before: a run that was killed and goes on notes what its
        rows did cost. Gives back what is left of this process's claim on the budget; nothing may be under way.
        """
        found: dict[str, Any] = dict(self._counts)
        self._counts = dict.fromkeys(self._counts, 0)
        self._budget.release()
        return {**found, "usd": self._price(found["prompt_tokens"], found["completion_tokens"])}

    async def close(self) -> None:
        """Closes the connections."""
        await self._server.close()

    def _count(self, prompt: int, completion: int, cached: bool, failed: bool) -> None:
        self._counts["failed" if failed else "answers"] += 1
        self._counts["cached"] += cached
        self._counts["prompt_tokens"] += prompt
        self._counts["completion_tokens"] += completion

    def _price(self, prompt: int, completion: int) -> float | None:
        a, b = self.prices
        return None if a is None or b is None else (prompt * a + completion * b) / 1e6

    async def _raw(self, question: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """What the server answered, and whether that cost nothing now."""
        key = key_of(question)
        if key in self._asking:
            return await asyncio.shield(self._asking[key]), True
        buying = asyncio.ensure_future(self._find(key, question))
        self._asking[key] = buying
        try:
            found = await asyncio.shield(buying)
        finally:
            # Whoever waits is cancelled; what was paid for is kept.
            if not buying.done():
                buying.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._asking.pop(key, None)
        return found, found.pop("kept", False)

    async def _find(self, key: str, question: dict[str, Any]) -> dict[str, Any]:
        found = await asyncio.to_thread(self._cache.get, key)
        if found is not None:
            return {**found, "kept": True}
        guess = _estimate(question["messages"])
        worst = self._cost(guess, question["max_tokens"])
        await self._budget.reserve(worst)
        actual = Cost()
        try:
            raw = await self._sent(question, guess)
            for name, size in (("prompt_tokens", guess), ("completion_tokens", len(raw["text"]) // 3 + 1)):
                raw[name] = size if raw[name] is None else raw[name]
            actual = self._cost(raw["prompt_tokens"], raw["completion_tokens"])
            await asyncio.to_thread(self._cache.put, key, raw)
        finally:
            await self._budget.settle(worst, actual)
        return raw

    def _cost(self, prompt: int, completion: int) -> Cost:
        return Cost(prompt + completion, self._price(prompt, completion) or 0.0)

    async def _sent(self, question: dict[str, Any], guess: int) -> dict[str, Any]:
        sent = 0
        while True:
            if self._requests:
                await self._requests.take()
            if self._tokens:
                await self._tokens.take(guess + question["max_tokens"])
            async with self.gate():
                started = time.monotonic()
                try:
                    raw = await self._server.answer(question)
                    self.gate.answered(time.monotonic() - started)
                    return raw
                except Passing as error:
                    sent += 1
                    if error.busy or error.slow:
                        self.gate.refused(started)
                    if error.wait is not None:
                        self.gate.pause(error.wait)
                    if sent >= (SENT_BUSY if error.busy else SENT):
                        if error.lost and not self._server.reached:
                            raise BadInput(f"describe.base_url: no server answers at {self._server.url} ({error})") from None
                        raise Passing(f"{error} ({sent} times)") from None
                    wait = error.wait
            if wait is not None and self._requests:
                await self._requests.pause(wait)
            spread = min(BACKOFF * 2 ** (sent - 1), LONGEST) * random.uniform(0.5, 1.0)
            await asyncio.sleep(spread if wait is None else wait * random.uniform(1.0, 1.1))


def _parse(raw: dict[str, Any], schema: type[BaseModel] | None) -> Any | None:
    if raw["refusal"] or raw["finish"] == "content_filter":
        raise Rejected("a refusal")
    if not raw["text"].strip():
        raise Rejected("only reasoning and no answer" if raw["reasoning"] else "an empty answer")
    try:
        if schema is not None:
            return structured(raw["text"], schema)
        kept = bare(raw["text"])
    except Rejected as error:
        raise Rejected(f"cut short at the limit of tokens ({error})") if raw["finish"] == "length" else error from None
    if not kept or refuses(kept):
        raise Rejected("a refusal" if kept else "only reasoning and no answer")
    return None


def _estimate(messages: list[dict[str, str]]) -> int:
    """Tokens of a prompt, about a quarter above what English takes."""
    return sum(len(m["content"].encode("utf-8", "replace")) // 3 + 8 for m in messages)


def open_client(run: RunDir, config: RunConfig) -> Client:
    """The client of a run: server, model and budget of `describe`, cache in the run directory.

    BadInput names the setting that is missing or wrong.
    """
    return Client(run, config)

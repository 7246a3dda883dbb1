"""What a run may spend on answers, over all its workers.

Every process claims part of the budget in a file of its own, `RUN/_llm/claims/ID.json`, before it spends it, and then adds
up everyone's: of two that claim at once at least one sees the other, so that together they never claim more than there
is. A claim covers many requests; what is left of it is given back when a work unit ends. A process that was killed leaves
its claim behind, which counts as spent: an upper bound.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import dataclass

from raylabel.errors import RunFailed
from raylabel.store.files import Files

FOLDER = "_llm/claims"
SHARE = 0.02
"""Share of the budget in a claim."""
FRESH = 1.0
"""Seconds for which what the others claimed is believed where it leaves no room."""


class BudgetSpent(RunFailed):
    """`describe.budget_usd` or `describe.budget_tokens` is used up; nothing more is sent."""


@dataclass(frozen=True)
class Cost:
    """Tokens and, where prices are known, money."""

    tokens: int = 0
    usd: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.usd + other.usd)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.tokens - other.tokens, self.usd - other.usd)

    def most(self, other: Cost) -> Cost:
        """The larger of both, apart for tokens and money."""
        return Cost(max(self.tokens, other.tokens), max(self.usd, other.usd))


class Budget:
    """This process's part of the run's budget; None is no limit."""

    def __init__(self, files: Files, tokens: int | None, usd: float | None) -> None:
        self._files, self._tokens, self._usd = files, tokens, usd
        self._name = f"{FOLDER}/{uuid.uuid4().hex}.json"
        self._spent, self._open, self._claimed = Cost(), Cost(), Cost()
        self._settled = asyncio.Condition()
        self._others, self._looked = Cost(), float("-inf")
        self._over = ""

    @property
    def limited(self) -> bool:
        """Whether there is a budget."""
        return self._tokens is not None or self._usd is not None

    async def reserve(self, worst: Cost) -> None:
        """Sets `worst` aside for a request; waits while others under way may leave room. BudgetSpent if there is none."""
        if not self.limited:
            return
        async with self._settled:
            while not self._over and not self._fits(worst):
                if not self._open.tokens:
                    self._over = self._word()
                    break
                await self._settled.wait()
            if self._over:
                self._settled.notify_all()
                raise BudgetSpent(self._over)
            self._open += worst

    async def settle(self, worst: Cost, actual: Cost) -> None:
        """Ends a reservation with what the request did cost."""
        if self.limited:
            async with self._settled:
                self._open -= worst
                self._spent += actual
                self._settled.notify_all()

    def release(self) -> None:
        """Gives back what was claimed and not spent; nothing may be under way."""
        if self.limited and self._claimed != self._spent:
            self._claim(self._spent)
        self._over = ""

    def _fits(self, worst: Cost) -> bool:
        need = self._spent + self._open + worst
        if self._within(need, self._claimed):
            return True
        ahead = Cost(int(SHARE * (self._tokens or 0)), SHARE * (self._usd or 0.0))
        if not self._affordable(self._others + need) and time.monotonic() - self._looked < FRESH:
            return False
        for wanted in (need + ahead, need):
            self._claim(wanted.most(self._claimed))
            self._others, self._looked = self._claims(), time.monotonic()
            if self._affordable(self._others + self._claimed):
                return True
        self._claim(self._spent + self._open)
        return False

    @staticmethod
    def _within(a: Cost, b: Cost) -> bool:
        return a.tokens <= b.tokens and a.usd <= b.usd + 1e-12

    def _affordable(self, total: Cost) -> bool:
        return (self._tokens is None or total.tokens <= self._tokens) and (self._usd is None or total.usd <= self._usd + 1e-9)

    def _claim(self, cost: Cost) -> None:
        self._claimed = cost
        self._files.write(self._name, json.dumps(vars(cost)).encode())

    def _claims(self) -> Cost:
        """What the other processes have claimed."""
        total = Cost()
        for name in self._files.sizes(FOLDER):
            if name == self._name or not name.endswith(".json") or "/.tmp-" in name:
                continue
            try:
                total += Cost(**json.loads(self._files.read(name)))
            except FileNotFoundError:
                continue
        return total

    def _word(self) -> str:
        limits = [] if self._usd is None else [f"describe.budget_usd ({self._usd:g})"]
        limits += [] if self._tokens is None else [f"describe.budget_tokens ({self._tokens:,})"]
        return f"{' or '.join(limits)} is spent; everything paid for is kept: raise it and run the same command again"

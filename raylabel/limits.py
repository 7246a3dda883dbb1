"""Turns at a shared resource: `await limiter("neuroscope", per_second=5).take()` returns when it is this caller's turn.

The same name is the same limiter in the whole run: of this process, or of all workers on a cluster, where the engine
installs a provider that asks one actor of the run. A step whose workers take turns says so (`Step.limited`).

Every caller reserves an instant and waits for it by itself. Instants are reserved at PACE of the rate, and a caller that
comes up to LATE seconds after its own may still use it. So any window of w seconds holds at most

    burst + PACE · per_second · (w + LATE) turns,

which is less than burst + per_second · w for windows of 13 seconds and longer, and never more than a quarter of a second's
turns above that. Whoever comes later than LATE reserves again.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

PACE = 0.98
"""Share of the rate that is reserved."""
LATE = 0.25
"""Seconds after its instant in which a turn counts: what a busy machine takes to wake a process."""
FRESH = 0.2
"""Seconds for which a caller relies on what it last heard about pauses."""


class Limiter(Protocol):
    """Gives turns."""

    async def take(self, amount: float = 1.0) -> None:
        """Returns when it is this caller's turn."""

    async def pause(self, seconds: float) -> None:
        """Nobody gets a turn before then (`Retry-After`)."""


class Answer(NamedTuple):
    """What a keeper of reservations says; instants are seconds of the keeper's own clock."""

    keeper: str
    """Changes when the keeper has lost its memory."""
    now: float
    slot: float
    until: float
    """No turn before this instant."""


class Reservations:
    """The arithmetic of one limiter: a bucket of `burst` that fills at PACE · `per_second`."""

    def __init__(self, per_second: float, burst: float = 1.0, start: float = 0.0) -> None:
        if not (per_second > 0 and burst > 0):
            raise ValueError(f"a limiter needs a rate and a burst above zero, not {per_second} and {burst}")
        self.rate = (per_second, burst)
        self._pace, self._burst = PACE * per_second, burst
        self._full, self.until = start, start
        self._keeper = uuid.uuid4().hex[:8]

    def reserve(self, now: float, amount: float, lead: float = 0.0) -> Answer:
        """An instant for `amount`, at least `lead` seconds away; an amount of 0 asks only how things stand."""
        slot = max(now + lead, self.until)
        if amount > 0:
            # `_full` is the instant at which the bucket is full again.
            full = max(slot, self._full) + amount / self._pace
            slot, self._full = max(slot, full - self._burst / self._pace), full
        return Answer(self._keeper, now, slot, self.until)

    def pause(self, now: float, seconds: float) -> None:
        """No turn for `seconds`, and no burst saved up meanwhile."""
        self.until = max(self.until, now + seconds)
        self._full = max(self._full, self.until + (self._burst - 1) / self._pace)


class Keeper(Protocol):
    """Where the reservations of one limiter are kept."""

    async def reserve(self, amount: float, lead: float) -> Answer: ...

    async def pause(self, seconds: float) -> None: ...


class Here:
    """Reservations kept in this process."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._kept, self._lock = Reservations(per_second, burst), threading.Lock()

    async def reserve(self, amount: float, lead: float) -> Answer:
        with self._lock:
            return self._kept.reserve(time.monotonic(), amount, lead)

    async def pause(self, seconds: float) -> None:
        with self._lock:
            self._kept.pause(time.monotonic(), seconds)


class Turns:
    """The limiter as a caller sees it, wherever its reservations are kept."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._id, self._until, self._heard, self._trip = "", 0.0, float("-inf"), 0.0
        # The keeper's clock is ahead of this one by at least each of these: an answer takes its time to arrive.
        self._ahead: deque[float] = deque(maxlen=64)

    async def take(self, amount: float = 1.0) -> None:
        if amount <= 0:
            raise ValueError(f"a turn takes more than nothing, not {amount}")
        while True:
            answer = await self._ask(amount)
            # What there is to hear of pauses is heard before the turn: the way to the keeper and back is not to be lateness.
            await self._sleep(answer, before=min(2 * self._trip, FRESH / 2))
            if time.monotonic() + answer.slot - self._now() - self._heard > FRESH / 2:
                await self._ask(0)
            await self._sleep(answer)
            if time.monotonic() - self._heard > FRESH:
                await self._ask(0)
            if self._id == answer.keeper and self._until <= answer.slot and self._now() - answer.slot <= LATE:
                return

    async def _sleep(self, answer: Answer, before: float = 0.0) -> None:
        """Until so many seconds before the instant; no longer where another keeper has another clock."""
        while self._id == answer.keeper and (left := answer.slot - before - self._now()) > 0:
            await asyncio.sleep(left)

    async def pause(self, seconds: float) -> None:
        await self._keeper.pause(seconds)
        await self._ask(0)

    async def _ask(self, amount: float) -> Answer:
        sent = time.monotonic()
        answer = await self._keeper.reserve(amount, self._trip)
        arrived = time.monotonic()
        if answer.keeper != self._id:
            self._ahead.clear()
            self._id, self._until = answer.keeper, answer.until
        self._ahead.append(answer.now - arrived)
        self._until, self._heard = max(self._until, answer.until), arrived
        self._trip = max(arrived - sent, 0.8 * self._trip)
        return answer

    def _now(self) -> float:
        """The keeper's clock; never ahead of it."""
        return time.monotonic() + max(self._ahead)


Provider = Callable[[str, float, float], Keeper]
_lock = threading.Lock()
_limiters: dict[str, tuple[tuple[float, float], Turns]] = {}


def _here(name: str, per_second: float, burst: float) -> Keeper:
    return Here(per_second, burst)


_provider: Provider = _here


def set_provider(provider: Provider | None) -> None:
    """Where this process keeps reservations from now on: (name, per_second, burst) → keeper; None: in this process."""
    global _provider
    with _lock:
        _provider = provider or _here
        _limiters.clear()


def limiter(name: str, per_second: float, burst: float = 1.0) -> Limiter:
    """The run's limiter `name`; ValueError where the name has another rate or burst already."""
    with _lock:
        rate, turns = _limiters.get(name, (None, None))
        if turns is None:
            rate, turns = (per_second, burst), Turns(_provider(name, per_second, burst))
            _limiters[name] = rate, turns
        if rate != (per_second, burst):
            raise ValueError(f"limiter {name}: {per_second:g} a second with bursts of {burst:g}, but it was made with {rate}")
        return turns

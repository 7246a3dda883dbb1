"""How many requests are in flight: as many as the server takes without slowing down.

The limit doubles from a few while an epoch (as many answers as the limit) is not clearly slower than the best one seen; from
the first sign of slowness on it moves by one. A slow epoch takes a fifth off, a 429 or a timeout half. A server whose
capacity grows is found out by the steps of one; the best latency fades, as answers may have become longer for good.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

START = 4
SLOW = 1.6
"""Times the best epoch's median latency that count as slow."""
FADE = 1.02


class Gate:
    """Lets `limit` requests in at a time; `limit` stays between 1 and `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = min(START, most)
        self.highest = self.limit
        self._inside = 0
        self._free = asyncio.Condition()
        self._latencies: list[float] = []
        self._best = float("inf")
        self._doubling, self._full = True, False
        self._shrunk = self._until = float("-inf")

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        """Waits for a place, and for the end of a pause."""
        while (left := self._until - time.monotonic()) > 0:
            await asyncio.sleep(left)
        async with self._free:
            await self._free.wait_for(lambda: self._inside < self.limit)
            self._inside += 1
            self._full = self._full or self._inside >= self.limit
        try:
            yield
        finally:
            async with self._free:
                self._inside -= 1
                self._free.notify_all()

    def answered(self, seconds: float) -> None:
        """An answer arrived after `seconds`."""
        self._latencies.append(seconds)
        if len(self._latencies) < max(self.limit, START):
            return
        median = statistics.median(self._latencies)
        self._latencies = []
        full, self._full = self._full, False
        if median > SLOW * self._best:
            self._doubling = False
            self._set(self.limit - max(1, self.limit // 5))
        elif full:
            self._set(self.limit * 2 if self._doubling else self.limit + 1)
        self._best = min(self._best * FADE, median)

    def refused(self, sent: float) -> None:
        """A request sent at `sent` (time.monotonic) was refused or timed out; those sent before the last cut do not count."""
        self._doubling = False
        if sent >= self._shrunk:
            self._shrunk = time.monotonic()
            self._latencies = []
            self._set(self.limit // 2)

    def pause(self, seconds: float) -> None:
        """Lets nobody in for a time (`Retry-After`)."""
        self._until = max(self._until, time.monotonic() + seconds)

    def _set(self, limit: int) -> None:
        self.limit = max(1, min(self.most, limit))
        self.highest = max(self.highest, self.limit)

"""The limiters of a run on Ray: one actor keeps the reservations of all of them, workers wait by themselves.

The driver owns the actor, so that it outlives every worker; `install` makes a worker process ask it.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import ray

from raylabel.limits import Answer, Reservations, set_provider

GRACE = 1.0
"""Seconds a keeper that was started again gives nothing: turns may be under way that it knows nothing of."""


class _Keeper:
    def __init__(self) -> None:
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self._start = time.monotonic() + (GRACE if again else 0)
        self._limiters: dict[str, Reservations] = {}

    def reserve(self, name: str, rate: tuple[float, float], amount: float, lead: float) -> Answer:
        return self._of(name, rate).reserve(time.monotonic(), amount, lead)

    def pause(self, name: str, rate: tuple[float, float], seconds: float) -> None:
        self._of(name, rate).pause(time.monotonic(), seconds)

    def _of(self, name: str, rate: tuple[float, float]) -> Reservations:
        kept = self._limiters.setdefault(name, Reservations(*rate, start=self._start))
        if kept.rate != rate:
            raise ValueError(f"limiter {name}: {rate}, but it was made with {kept.rate}")
        return kept


class _Remote:
    """The actor's reservations of one limiter, as a worker asks for them."""

    def __init__(self, actor: Any, name: str, rate: tuple[float, float]) -> None:
        self._actor, self._name, self._rate = actor, name, rate

    async def reserve(self, amount: float, lead: float) -> Answer:
        answer: Answer = await self._actor.reserve.remote(self._name, self._rate, amount, lead)
        return answer

    async def pause(self, seconds: float) -> None:
        await self._actor.pause.remote(self._name, self._rate, seconds)


def keeper() -> Any:
    """The actor that keeps a run's reservations; it ends with the process that made it."""
    name = f"raylabel-limits-{uuid.uuid4().hex[:12]}"
    # A call that meets a keeper's end is made again to the one that comes after it.
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Keeper).options(name=name).remote()


def install(actor: Any) -> None:
    """Makes the limiters of this process the run's; without an actor a limiter cannot be made here at all."""

    def provide(name: str, per_second: float, burst: float) -> _Remote:
        if actor is None:
            raise RuntimeError(f"limiter {name}: the step of this worker must say `limited=True` to be limited on a cluster")
        return _Remote(actor, name, (per_second, burst))

    set_provider(provide)

"""Limiters: never above the rate in any window, near it when there is demand, and pauses that hold for everyone."""

from __future__ import annotations

import asyncio
import random
import selectors
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylabel import limits
from raylabel.limits import LATE, PACE, Answer, Keeper, Reservations, Turns, limiter, set_provider


def excess(times: list[float], rate: float, burst: float, late: float) -> float:
    """The most that any window held above burst + PACE · rate · (window + late)."""
    times = sorted(times)
    return max(
        j - i + 1 - burst - PACE * rate * (times[j] - times[i] + late) for i in range(len(times)) for j in range(i, len(times))
    )


@pytest.fixture(autouse=True)
def fresh() -> None:
    set_provider(None)


@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.sampled_from([0.0, 0.05, 0.3])), min_size=1, max_size=60),
    st.floats(0.5, 200), st.integers(1, 5),
)  # fmt: skip
def test_reserved_instants_never_exceed_the_rate_in_any_window(asked: list[tuple[float, float]], rate: float, burst: int) -> None:
    kept, now, slots = Reservations(rate, burst), 100.0, []
    for gap, lead in asked:
        now += gap
        answer = kept.reserve(now, 1, lead)
        assert answer.slot >= now + lead
        slots.append(answer.slot)
    assert excess(slots, rate, burst, 0) < 1e-6


def test_demand_gets_the_pace_and_no_less() -> None:
    kept = Reservations(50)
    slots = [kept.reserve(0.0, 1).slot for _ in range(491)]
    assert slots[-1] == pytest.approx(10.0) and slots[0] == 0


def test_an_amount_above_the_burst_waits_for_its_whole_amount() -> None:
    kept = Reservations(10, 5)
    assert kept.reserve(0.0, 5).slot == 0
    assert kept.reserve(0.0, 49).slot == pytest.approx(49 / 9.8)


def test_no_burst_is_saved_up_in_a_pause() -> None:
    kept = Reservations(10, 5)
    kept.pause(0.0, 60)
    slots = [kept.reserve(1.0, 1).slot for _ in range(3)]
    assert slots[0] == pytest.approx(60) and slots[1] == pytest.approx(60 + 1 / 9.8)


async def taken(limits: list[Turns], turns: int) -> list[float]:
    times = []

    async def one(turn: Turns) -> None:
        await turn.take()
        times.append(time.monotonic())

    await asyncio.gather(*(one(limits[i % len(limits)]) for i in range(turns)))
    return times


def test_turns_in_one_process() -> None:
    times = asyncio.run(taken([limiter("site", 100)] * 8, 80))  # type: ignore[list-item]
    # A process that is not given the CPU between its turn and its look at the clock is late without a fault of the limiter.
    assert excess(times, 100, 1, LATE + 0.03) <= 0
    assert max(times) - min(times) >= 79 / 100


def test_the_same_name_is_the_same_limiter_and_has_one_rate() -> None:
    assert limiter("a", 5) is limiter("a", 5)
    assert limiter("a", 5) is not limiter("b", 5)
    with pytest.raises(ValueError, match="limiter a"):
        limiter("a", 6)
    with pytest.raises(ValueError, match="above zero"):
        limiter("c", 0)


def test_a_pause_holds_for_those_who_already_wait() -> None:
    async def run() -> tuple[float, list[float]]:
        turns = limiter("site", 20)
        waiting = asyncio.create_task(taken([turns] * 3, 6))  # type: ignore[list-item]
        await asyncio.sleep(0.07)
        paused = time.monotonic()
        await turns.pause(0.5)
        return paused, await waiting

    paused, times = asyncio.run(run())
    assert len([t for t in times if t < paused]) in (1, 2, 3)
    assert not [t for t in times if paused < t < paused + 0.5]


class Elsewhere:
    """A keeper with a clock of its own, behind a slow and uneven line, that may lose its memory."""

    def __init__(self, rate: float, seed: int) -> None:
        self.kept, self.ahead, self.random, self.rate = Reservations(rate), 1e5, random.Random(seed), rate

    async def line(self) -> None:
        await asyncio.sleep(self.random.expovariate(100))

    async def reserve(self, amount: float, lead: float) -> Answer:
        await self.line()
        answer = self.kept.reserve(time.monotonic() + self.ahead, amount, lead)
        await self.line()
        return answer

    async def pause(self, seconds: float) -> None:
        await self.line()
        self.kept.pause(time.monotonic() + self.ahead, seconds)

    def forget(self) -> None:
        self.ahead = -50.0
        self.kept = Reservations(self.rate, start=time.monotonic() + self.ahead + 0.2)


def test_turns_of_several_callers_behind_a_slow_line() -> None:
    keeper: Keeper = Elsewhere(60, 1)
    times = asyncio.run(taken([Turns(keeper) for _ in range(4)], 90))
    assert excess(times, 60, 1, LATE + 0.03) <= 0


def test_a_keeper_that_lost_its_memory_is_asked_again() -> None:
    async def run() -> tuple[float, list[float]]:
        keeper = Elsewhere(20, 2)
        async def forget() -> float:
            await asyncio.sleep(0.25)
            keeper.forget()
            return time.monotonic()

        times, forgotten = await asyncio.gather(taken([Turns(keeper) for _ in range(2)], 12), forget())
        return forgotten, times

    forgotten, times = asyncio.run(run())
    assert len(times) == 12
    # Those who heard of it in time begin anew; FRESH bounds how long others go on.
    assert excess([t for t in times if t > forgotten + 0.25], 20, 1, LATE + 0.03) <= 0


class Machine(selectors.SelectSelector):
    """A machine whose clock stands still but in waits, and which wakes late: by `stall()` seconds more than it was to wait."""

    def __init__(self, stall: Any) -> None:
        super().__init__()
        self.now, self.stall = 50.0, stall

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self.now += timeout + self.stall()
        return super().select(0)

    def run(self, work: Any) -> Any:
        """The result of a coroutine, for which this machine's clock is the only one."""
        loop = asyncio.SelectorEventLoop(self)
        loop.time = lambda: self.now  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: self.now))
            try:
                return loop.run_until_complete(work)
            finally:
                loop.close()


async def arriving(machine: Machine, gaps: list[float], rate: float, burst: float, callers: int) -> list[float]:
    """The instants at which those who come one after another get their turns."""
    turns = [Turns(limits.Here(rate, burst))]
    turns += [Turns(turns[0]._keeper) for _ in range(callers - 1)]
    times: list[float] = []

    async def one(at: float, own: Turns) -> None:
        await asyncio.sleep(at)
        await own.take()
        times.append(machine.now)

    at, waiting = 0.0, []
    for i, gap in enumerate(gaps):
        at += gap
        waiting.append(one(at, turns[i % callers]))
    await asyncio.gather(*waiting)
    return times


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.4, 3.0]), min_size=1, max_size=80), st.floats(0.5, 200),
    st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6), st.floats(0.0, 1.0),
)  # fmt: skip
def test_turns_never_exceed_the_rate_in_any_window_however_late_everyone_wakes(
    gaps: list[float], rate: float, burst: int, callers: int, seed: int, stalls: float
) -> None:
    draw = random.Random(seed)
    machine = Machine(lambda: draw.choice([0.0, draw.expovariate(100), draw.uniform(0, stalls)]))
    times = machine.run(arriving(machine, gaps, rate, burst, callers))
    assert len(times) == len(gaps)
    assert excess(times, rate, burst, LATE) < 1e-6


@pytest.mark.parametrize("rate", [5.0, 20.0, 50.0, 200.0])
def test_waking_late_costs_no_turns(rate: float) -> None:
    """The reserved pace is kept, whatever the lateness up to LATE."""
    draw, n = random.Random(0), int(30 * rate)
    machine = Machine(lambda: draw.uniform(0, LATE - 1e-6))
    times = machine.run(arriving(machine, [0.0] * n, rate, 1, 2))
    assert max(times) - min(times) <= (n - 1) / (PACE * rate) + LATE
    # Longer windows than 13 seconds never hold more than the rate.
    times = sorted(times)
    for first in range(0, n, max(1, n // 200)):
        held = [last for last in range(first, n) if times[last] - times[first] >= 13]
        assert all(last - first + 1 <= 1 + rate * (times[last] - times[first]) for last in held)


def test_who_wakes_later_than_that_takes_another_turn() -> None:
    draw = random.Random(0)
    machine = Machine(lambda: draw.choice([0.0] * 9 + [4 * LATE]))
    times = machine.run(arriving(machine, [0.0] * 300, 20, 1, 1))
    assert excess(times, 20, 1, LATE) < 1e-6
    assert max(times) - min(times) > 299 / (PACE * 20) + LATE

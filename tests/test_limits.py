"""Limiters: never above the rate in any window, near it when there is demand, and pauses that hold for everyone."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        waiting = asyncio.create_task(taken([Turns(keeper) for _ in range(2)], 12))
        await asyncio.sleep(0.25)
        keeper.forget()
        forgotten = time.monotonic()
        return forgotten, await waiting

    forgotten, times = asyncio.run(run())
    assert len(times) == 12
    # Those who heard of it in time begin anew; FRESH bounds how long others go on.
    assert excess([t for t in times if t > forgotten + 0.25], 20, 1, LATE + 0.03) <= 0

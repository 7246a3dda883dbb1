"""Runs units on plain Ray actors that hold a worker.

A unit is given to an actor that lives, never to one that is waited for: what a cluster cannot give holds nothing up. A
unit whose worker died is tried again; one that ends its worker every time is cut until the neuron at fault is found. A
node that goes away (a spot instance that is taken back) counts as no fault of the units that were on it. A unit that
takes far longer than the others is also given to an idle actor, and the first of the two to end counts.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from raylabel.engine import limits
from raylabel.engine.execute import Fatal, UnitFailed, divided, execute, reason
from raylabel.engine.execute import opened as open_worker
from raylabel.errors import BadInput, RunFailed
from raylabel.stages.base import Key, Step
from raylabel.store.files import Files
from raylabel.store.plan import Unit

ATTEMPTS = 3
LOST_NODES = 20
"""Nodes a unit may lose before it is held to be what ends them."""
DEAD_STARTS = 10
"""Actors in a row that may die before they have begun."""
BEAT = 5.0
SLOW_TIMES, SLOW_SECONDS = 4.0, 60.0
"""A unit is a straggler when it takes this many times the longest of its step so far, and so many seconds."""
PATIENCE = 60.0
"""Seconds without a single worker after which it is said that there is none."""

Done = Callable[[dict[str, Any]], None]
log = logging.getLogger(__name__)


class Crew:
    """Actors of one kind, which outlive a step: the imports and the model they hold serve the next one.

    Args:
        size: actors at most.
        options: what Ray is asked to give each of them.
    """

    def __init__(self, size: int, options: dict[str, Any]) -> None:
        self.size, self.options = size, options
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}
        self._dead = 0

    def fill(self, wanted: int) -> None:
        """Starts actors until there are as many as wanted, or as there may be."""
        for _ in range(min(self.size, wanted) - len(self.idle) - len(self.starting)):
            self.start()

    def start(self) -> None:
        """Starts an actor; it is idle once it answers."""
        remote: Any = ray.remote(**self.options)(_Actor)
        actor = remote.remote()
        self.starting[actor.here.remote()] = actor

    def answered(self, ref: Any) -> bool:
        """Takes note of an actor's first answer; False where `ref` is something else."""
        actor = self.starting.pop(ref, None)
        if actor is None:
            return False
        try:
            ray.get(ref)
        except RayError as error:
            self._dead += 1
            if self._dead > DEAD_STARTS:
                raise UnitFailed(f"workers die as they start: {reason(error)}") from error
            self.start()
        else:
            self._dead = 0
            self.idle.append(actor)
        return True

    def take(self) -> Any:
        """An idle actor, waited for if there is none."""
        while not self.idle:
            if not self.starting:
                self.start()
            ready, _ = ray.wait(list(self.starting), num_returns=1)
            self.answered(ready[0])
        return self.idle.pop()

    def end(self) -> None:
        """Ends them all."""
        for actor in (*self.idle, *self.starting.values()):
            ray.kill(actor)
        self.idle, self.starting = [], {}


@dataclass
class _Task:
    """A unit on its way: the number of its next attempt, how often it failed or lost its node, and where it runs now."""

    unit: Unit
    attempt: int
    failed: int = 0
    lost: int = 0
    running: int = 0
    done: bool = False
    fatal: Fatal = ()


def run_units(
    crew: Crew, step: Step, units: list[tuple[Unit, int]], files: Files, format: str, done: Done, attempts: int = ATTEMPTS,
    limiters: Any = None,
) -> None:  # fmt: skip
    """Runs (unit, first attempt number) pairs; calls `done` with each manifest entry.

    `limiters` keeps the reservations of steps that are limited. Raises UnitFailed after the last attempt at a unit that cannot
    be cut, and a worker's RunFailed once the others have ended what they have under way.
    """
    shared = ray.put((replace(step, keys=[]), files.url, format, limiters))
    queue = deque(_Task(unit, attempt) for unit, attempt in units)
    left, longest = len(queue), 0.0
    running: dict[Any, tuple[_Task, Any, float]] = {}
    alone = time.monotonic()
    ended: RunFailed | None = None

    def launch(task: _Task) -> None:
        actor = crew.idle.pop()
        ref = actor.run.remote(shared, task.unit.to_json(), task.attempt, task.fatal)
        task.attempt += 1
        task.running += 1
        running[ref] = (task, actor, time.monotonic())

    crew.fill(left)
    try:
        while left and (running or ended is None):
            while queue and crew.idle:
                launch(queue.popleft())
            if crew.idle and longest and ended is None:
                slow = max(SLOW_SECONDS, SLOW_TIMES * longest)
                late = [t for t, _, began in running.values() if t.running == 1 and time.monotonic() - began > slow]
                for task in late[: len(crew.idle)]:
                    launch(task)
            ready, _ = ray.wait([*running, *crew.starting], num_returns=1, timeout=BEAT)
            if not ready:
                if running:
                    alone = time.monotonic()
                elif time.monotonic() - alone > PATIENCE:
                    log.warning("%s: waiting for workers with %s", step.name, crew.options)
                    alone = float("inf")
                continue
            if crew.answered(ready[0]):
                continue
            task, actor, began = running.pop(ready[0])
            task.running -= 1
            why: Exception
            try:
                entry = json.loads(ray.get(ready[0]))
            except RayActorError as error:
                why = error
                crew.start()
            except RayTaskError as error:
                why = error.cause if isinstance(error.cause, Exception) else error
                crew.idle.append(actor)
            else:
                crew.idle.append(actor)
                longest = max(longest, time.monotonic() - began)
                left -= 1
                task.done = True
                for ref in [ref for ref, (other, _, _) in running.items() if other is task]:
                    ray.kill(running.pop(ref)[1])
                    crew.start()
                done(entry)
                continue
            if isinstance(why, BadInput):
                raise why from None
            if isinstance(why, RunFailed) or ended is not None:
                ended = why if ended is None and isinstance(why, RunFailed) else ended
                queue.clear()
                continue
            if lost_node(why) and task.lost < LOST_NODES:
                task.lost += 1
            else:
                task.failed += 1
            if task.failed == attempts and step.divide is not None and step.blame is not None and isinstance(why, RayActorError):
                task.fatal = fatal_parts(crew, step, task.unit, shared)
            elif task.failed >= attempts:
                raise UnitFailed(f"{task.unit.stage} {task.unit.step} {task.unit.key}: {reason(why)}")
            if not task.running:
                queue.append(task)
        if ended is not None:
            raise ended
    finally:
        for _, actor, _ in running.values():
            ray.kill(actor)


def lost_node(error: Exception) -> bool:
    """Whether a worker ended because its machine went away."""
    return isinstance(error, RayActorError) and (error.preempted or "node has died" in str(error))


def fatal_parts(crew: Crew, step: Step, unit: Unit, shared: Any) -> list[tuple[Key, str]]:
    """The smallest parts of a unit that end their workers, and how; found by running it, its halves, theirs."""
    found: list[tuple[Key, str]] = []
    parts = deque([unit.key])
    actor = crew.take()
    while parts:
        key = parts.popleft()
        halves = step.divide(key) if step.divide else []
        try:
            ray.get(actor.probe.remote(shared, replace(unit, key=key).to_json()))
        except RayTaskError:
            continue
        except RayActorError as error:
            crew.start()
            actor = crew.take()
            if lost_node(error):
                parts.appendleft(key)
                continue
            parts.extend(halves)
            if not halves:
                found.append((key, "the worker process that ran it ended: a crash, or not enough memory"))
    crew.idle.append(actor)
    return found


class _Actor:
    def __init__(self) -> None:
        self.step: Any = None

    def here(self) -> None:
        """Answers once the process runs."""

    def run(self, shared: Any, unit: str, attempt: int, fatal: Fatal = ()) -> str:
        step, url, format, limiters = shared
        self._open(step, url, limiters)
        entry = execute(self.worker, step, Files(url), Unit.from_json(unit), attempt, format, fatal)
        return json.dumps(entry)

    def probe(self, shared: Any, unit: str) -> None:
        """Runs a unit for nothing but to see whether this process lives."""
        step, url, _, limiters = shared
        self._open(step, url, limiters)
        divided(self.worker, step, Unit.from_json(unit))

    def _open(self, step: Step, url: str, limiters: Any) -> None:
        if self.step != (step.name, step.worker, url):
            limits.install(limiters if step.limited else None)
            self.worker = open_worker(step, url)
            self.step = (step.name, step.worker, url)

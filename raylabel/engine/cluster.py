"""Runs units on Ray: plain actors that hold a worker, or one Ray Data pipeline for a worker made of links.

Everything a unit produces is written where it was computed; the driver sees manifest entries only. `num_cpus` is always
given, and one whole CPU is left to the tasks that Ray Data starts by itself: with all CPUs taken by actors it would wait
for ever.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pyarrow as pa
import pyarrow.ipc
import ray
import ray.data
from ray.exceptions import RayActorError, RayTaskError

from raylabel.engine.execute import UnitFailed, execute, reason
from raylabel.errors import BadInput
from raylabel.stages.base import Chain, Step
from raylabel.store.files import Files
from raylabel.store.plan import Unit
from raylabel.store.shards import Output, commit

ATTEMPTS = 3
LIGHT = 0.25
"""CPUs of an actor beside a whole one: small enough that a pipeline of them fits on two cores."""
ROWS = pa.schema([("unit", pa.string()), ("payload", pa.large_binary()), ("entry", pa.string()), ("error", pa.string())])
Done = Callable[[dict[str, Any]], None]


class RayPool:
    """A Ray cluster, this machine's own (`local`) or one that runs (`auto`, HOST:PORT)."""

    def __init__(self, address: str, workers: int | None) -> None:
        common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address == "local":
            ray.init(
                address="local", num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False,
                _node_ip_address="127.0.0.1", **common,
            )  # fmt: skip
        else:
            try:
                ray.init(address=address, **common)
            except (ConnectionError, ValueError) as error:
                raise BadInput(f"run.address: no Ray cluster at {address} ({reason(error)[:120]})") from None
        resources = ray.cluster_resources()
        self.cpus, self.gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        self.workers = workers or self.gpus or max(1, self.cpus)
        self._idle: dict[bool, list[Any]] = {}

    def run(self, step: Step, units: list[tuple[Unit, int]], files: Files, format: str, done: Done) -> None:
        """Runs (unit, first attempt number) pairs; calls `done` with each manifest entry.

        Raises UnitFailed after the last attempt at a unit that cannot be cut.
        """
        if issubclass(step.worker, Chain):
            self._release()
            units = self._pipeline(step, units, files, format, done)
        if units:
            self._actors(step, units, files, format, done)

    def close(self) -> None:
        """Leaves the cluster, and ends it if it is this process's own."""
        self._release()
        ray.shutdown()

    def _release(self) -> None:
        """Ends the actors: a pipeline would wait for ever for the CPUs they hold."""
        for actor in [a for actors in self._idle.values() for a in actors]:
            ray.kill(actor)
        self._idle = {}

    def _actors(self, step: Step, units: list[tuple[Unit, int]], files: Files, format: str, done: Done) -> None:
        on_gpu = step.model and self.gpus > 0
        new = ray.remote(num_cpus=LIGHT if on_gpu else 1, num_gpus=1 if on_gpu else 0)(_Actor).remote
        # Actors outlive their step: the imports and the model they hold serve the next one.
        idle = self._idle.setdefault(on_gpu, [])
        shared = ray.put((replace(step, keys=[]), files.url, format))
        missing = min(self.workers, len(units)) - len(idle)
        idle += [new() for _ in range(missing)]
        queue = deque(units)
        first = {unit.id: attempt for unit, attempt in units}
        running: dict[Any, tuple[Unit, int, Any]] = {}
        try:
            while queue or running:
                while queue and idle:
                    (unit, attempt), actor = queue.popleft(), idle.pop()
                    running[actor.run.remote(shared, unit.to_json(), attempt)] = (unit, attempt, actor)
                ready, _ = ray.wait(list(running), num_returns=1)
                unit, attempt, actor = running.pop(ready[0])
                try:
                    done(json.loads(ray.get(ready[0])))
                    idle.append(actor)
                    continue
                except RayActorError as error:
                    actor, why = new(), error
                except RayTaskError as error:
                    why = error.cause if isinstance(error.cause, Exception) else error
                    if isinstance(why, BadInput):
                        raise why from None
                idle.append(actor)
                if attempt + 1 < first[unit.id] + ATTEMPTS:
                    queue.append((unit, attempt + 1))
                elif step.blame is not None:
                    done(give_up(step, files, unit, attempt, reason(why), format))
                else:
                    raise UnitFailed(reason(why))
        finally:
            for _, _, actor in running.values():
                ray.kill(actor)

    def _pipeline(
        self, step: Step, units: list[tuple[Unit, int]], files: Files, format: str, done: Done
    ) -> list[tuple[Unit, int]]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = 0
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        attempts = {unit.id: attempt for unit, attempt in units}
        items = [{"unit": unit.to_json(), "payload": b"", "entry": "", "error": ""} for unit, _ in units]
        rows = ray.data.from_items(items, override_num_blocks=len(items))
        links = step.worker.links
        heavy = self.workers if self.gpus == 0 else min(self.workers, self.gpus)
        for index, link in enumerate(links):
            holds_model = getattr(link, "model", False)
            size = max(1, min(heavy if holds_model or len(links) == 1 else 1, len(items)))
            rows = rows.map_batches(
                _Link,
                fn_constructor_kwargs={
                    "step": replace(step, keys=[]), "index": index, "url": files.url, "format": format, "attempts": attempts,
                },
                batch_size=1, batch_format="pyarrow", num_cpus=LIGHT,
                num_gpus=1 if holds_model and self.gpus else None,
                compute=ray.data.ActorPoolStrategy(size=size),
            )  # fmt: skip
        again = []
        for row in rows.iter_rows():
            if row["error"]:
                unit = Unit.from_json(row["unit"])
                if row["error"].startswith("BadInput: "):
                    raise BadInput(row["error"].removeprefix("BadInput: "))
                again.append((unit, attempts[unit.id]))
            else:
                done(json.loads(row["entry"]))
        return again


class _Actor:
    def __init__(self) -> None:
        self.step: Any = None

    def run(self, shared: Any, unit: str, attempt: int) -> str:
        step, url, format = shared
        if self.step != (step.name, step.worker, url):
            self.worker = step.worker(url)
            self.step = (step.name, step.worker, url)
        entry = execute(self.worker, step, Files(url), Unit.from_json(unit), attempt, format)
        return json.dumps(entry)


class _Link:
    def __init__(self, step: Step, index: int, url: str, format: str, attempts: dict[str, int]) -> None:
        self.files, self.format, self.attempts = Files(url), format, attempts
        self.link = step.worker.links[index](url)
        self.last = index == len(step.worker.links) - 1

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [self._row(row) for row in batch.to_pylist()]
        return pa.Table.from_pylist(rows, schema=ROWS)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"]:
            return row
        unit, started = Unit.from_json(row["unit"]), time.time()
        try:
            result = self.link(unit, unpack(row["payload"]))
            if not self.last:
                return {**row, "payload": pack(result)}
            entry = commit(self.files, unit, self.attempts[unit.id], result, started, self.format)
            return {**row, "payload": b"", "entry": json.dumps(entry)}
        except Exception as error:
            # The row goes on to the driver, which runs the unit again where it can be cut around the neuron at fault.
            return {**row, "payload": b"", "error": reason(error)}


def give_up(step: Step, files: Files, unit: Unit, attempt: int, why: str, format: str) -> dict[str, Any]:
    """Lists every neuron of a unit that killed its workers as a failure."""
    assert step.blame is not None
    output = Output(failures=[{**row, "reason": why} for row in step.blame(unit.key)])
    return commit(files, unit, attempt, output, time.time(), format)


def pack(tables: dict[str, pa.Table]) -> bytes:
    """Tables as bytes: a count of names, then an Arrow stream each."""
    parts = [json.dumps(list(tables)).encode() + b"\n"]
    for table in tables.values():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        parts.append(sink.getvalue().to_pybytes())
    return b"".join(parts)


def unpack(data: bytes) -> dict[str, pa.Table]:
    """What `pack` was given."""
    if not data:
        return {}
    line, _, rest = data.partition(b"\n")
    source = pa.BufferReader(rest)
    tables = {}
    for name in json.loads(line):
        tables[name] = pa.ipc.open_stream(source).read_all()
    return tables

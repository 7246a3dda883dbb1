"""Runs units on Ray: plain actors that hold a worker, or one Ray Data pipeline for a worker made of links.

Everything a unit produces is written where it was computed; the driver sees manifest entries only. `num_cpus` is always
given, and one whole CPU is left to the tasks that Ray Data starts by itself: with all CPUs taken by actors it would wait
for ever.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import warnings
from dataclasses import replace
from functools import cached_property
from typing import Any

os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import pyarrow as pa
import pyarrow.ipc
import ray
import ray.data
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup as authentication
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from raylabel.engine import limits
from raylabel.engine.actors import ATTEMPTS, Crew, Done, run_units
from raylabel.engine.execute import reason
from raylabel.errors import BadInput
from raylabel.models.loading import gpus_needed
from raylabel.sections import SubjectConfig
from raylabel.stages.base import Chain, Step
from raylabel.store.files import Files
from raylabel.store.plan import Unit
from raylabel.store.shards import commit

POOL = "pool"
"""Label of a machine: `gpu` or `cpu`."""
LIGHT = 0.25
"""CPUs of an actor beside a whole one: small enough that a pipeline of them fits on two cores."""
log = logging.getLogger(__name__)
ROWS = pa.schema([("unit", pa.string()), ("payload", pa.large_binary()), ("entry", pa.string()), ("error", pa.string())])


class RayPool:
    """A Ray cluster, this machine's own (`local`) or one that runs (`auto`, HOST:PORT)."""

    def __init__(self, address: str, workers: int | None, subject: SubjectConfig | None = None) -> None:
        common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        handler = signal.getsignal(signal.SIGTERM)
        if address == "local":
            # Ray turns a loopback address given to `init` into this machine's own, which it then opens to everyone;
            # on Linux this is the only way to make it stay on loopback.
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
            ray_constants.ENABLE_RAY_CLUSTER = False
            ray.init(address="local", num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False, **common)
        else:
            try:
                ray.init(address=address, **common)
            except (ConnectionError, ValueError) as error:
                raise BadInput(f"run.address: no Ray cluster at {address} ({reason(error)[:120]})") from None
            modes: Any = authentication
            if modes.get_authentication_mode() != modes.AuthenticationMode.TOKEN:
                # It let this process in without a token.
                log.warning(
                    "run.address: the cluster at %s asks for no token, so that whoever reaches it can run code on it; start "
                    "it with RAY_AUTH_MODE=token (README, On a cluster)", address,
                )  # fmt: skip
        if threading.current_thread() is threading.main_thread():
            # Ray puts its own in its place, and a run stopped by SIGTERM would not end as the command promises.
            signal.signal(signal.SIGTERM, handler)
        resources = ray.cluster_resources()
        self.cpus, self.gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if not self.cpus and workers is None:
            raise BadInput(
                "run.workers: the cluster has no workers yet; say how many to ask for, e.g. --set run.workers=4, and "
                "--set subject.device=cuda for workers with GPUs"
            )
        self.workers = workers or self.cpus
        self._asked, self._subject = workers, subject
        self._idle: tuple[bool, Crew] | None = None
        self._limits: Any = None

    @cached_property
    def share(self) -> float:
        """GPUs of a worker that holds the model; 0 where it runs on CPUs."""
        subject = self._subject
        if subject is None or subject.device == "cpu":
            return 1 if subject is None and self.gpus else 0
        # A cluster that starts its machines when they are asked for has none yet.
        if not self.gpus and not (self._asked and subject.device.startswith("cuda")):
            return 0
        wanted = _needed(subject) if subject.gpus_per_worker == "auto" else subject.gpus_per_worker
        largest = max(_gpus_by_machine())
        if wanted > largest > 0:
            raise BadInput(f"subject.gpus_per_worker: {wanted:g} GPUs, but no machine of the cluster has more than {largest}")
        return wanted

    @cached_property
    def holders(self) -> int:
        """Workers that hold the model at a time: what was asked for, or as many as there are GPUs for."""
        return self._asked or (self._room if self.share else self.workers)

    @property
    def _room(self) -> int:
        return sum(int(gpus / self.share) for gpus in _gpus_by_machine()) if self.share else self.workers

    @cached_property
    def elsewhere(self) -> dict[str, Any]:
        """Keeps workers without a model off the machines labelled `pool: gpu`, while there are others."""
        labels = [node.get("Labels", {}).get(POOL) for node in ray.nodes() if node["Alive"]]
        if not any(labels):
            return {}
        return {"label_selector": {POOL: "!gpu"}, "fallback_strategy": [{"label_selector": {}}]}

    def run(self, step: Step, units: list[tuple[Unit, int]], files: Files, format: str, done: Done) -> None:
        """Runs (unit, first attempt number) pairs; calls `done` with each manifest entry.

        Raises UnitFailed after the last attempt at a unit that cannot be cut.
        """
        if step.limited and self._limits is None:
            self._limits = limits.keeper()
        if issubclass(step.worker, Chain):
            self._release()
            units = self._pipeline(step, units, files, format, done)
        if units:
            run_units(self._crew(step.model and self.share > 0), step, units, files, format, done, ATTEMPTS, self._limits)

    def close(self) -> None:
        """Leaves the cluster, and ends it if it is this process's own."""
        self._release()
        ray.shutdown()

    def _release(self) -> None:
        """Ends the actors: a pipeline would wait for ever for the CPUs they hold."""
        if self._idle is not None:
            self._idle[1].end()
        self._idle = None

    def _crew(self, on_gpu: bool) -> Crew:
        """Actors with or without a GPU; those of the other kind are ended, as they hold what these may need."""
        if self._idle is None or self._idle[0] != on_gpu:
            self._release()
            wants: dict[str, Any] = {"num_cpus": LIGHT, "num_gpus": self.share} if on_gpu else {"num_cpus": 1, **self.elsewhere}
            self._idle = on_gpu, Crew(self.holders if on_gpu else self.workers, wants)
        return self._idle[1]

    def _pipeline(
        self, step: Step, units: list[tuple[Unit, int]], files: Files, format: str, done: Done
    ) -> list[tuple[Unit, int]]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = 0
        # It logs at length what is dealt with below.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        # `max_task_retries` has no other way in before Ray 2.64.
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=RayDeprecationWarning)
        attempts = {unit.id: attempt for unit, attempt in units}
        items = [{"unit": unit.to_json(), "payload": b"", "entry": "", "error": ""} for unit, _ in units]
        rows: Any = ray.data.from_items(items, override_num_blocks=len(items))
        links = step.worker.links
        for index, link in enumerate(links):
            holds_model = getattr(link, "model", False)
            size = max(1, min(self.holders if holds_model or len(links) == 1 else 1, len(items)))
            now = max(1, min(self._room, size)) if holds_model else size
            rows = rows.map_batches(
                _Link,
                fn_constructor_kwargs={
                    "step": replace(step, keys=[]), "index": index, "url": files.url, "format": format, "attempts": attempts,
                    "limiters": self._limits,
                },
                batch_size=1, batch_format="pyarrow", num_cpus=LIGHT,
                num_gpus=self.share or None if holds_model else None,
                compute=ray.data.ActorPoolStrategy(min_size=now, max_size=size),
                # Without a limit Ray Data feeds a unit that ends its workers to one worker after another, for ever.
                max_task_retries=ATTEMPTS - 1,
                **({} if holds_model and self.share else self.elsewhere),
            )  # fmt: skip
        left = {unit.id: (unit, attempt) for unit, attempt in units}
        try:
            for row in rows.iter_rows():
                if row["error"].startswith("BadInput: "):
                    raise BadInput(row["error"].removeprefix("BadInput: "))
                if not row["error"]:
                    entry = json.loads(row["entry"])
                    del left[entry["unit"]]
                    done(entry)
        except RayError:
            # A unit that ends its workers ends the pipeline; actors find out which one it is.
            pass
        return list(left.values())


def _gpus_by_machine() -> list[int]:
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def _needed(subject: SubjectConfig) -> int:
    """What `gpus_per_worker: auto` means here, as a process with a GPU sees it."""
    task = ray.remote(num_cpus=LIGHT, num_gpus=1)(gpus_needed)
    found: int = ray.get(task.remote(subject.model, subject.revision, subject.dtype, subject.trust_remote_code))
    return found


class _Link:
    def __init__(self, step: Step, index: int, url: str, format: str, attempts: dict[str, int], limiters: Any) -> None:
        limits.install(limiters if step.limited else None)
        self.files, self.format, self.attempts = Files(url), format, attempts
        self.open = lambda: step.worker.links[index](url)
        self.link: Any = None
        self.last = index == len(step.worker.links) - 1

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [self._row(row) for row in batch.to_pylist()]
        return pa.Table.from_pylist(rows, schema=ROWS)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"]:
            return row
        unit, started = Unit.from_json(row["unit"]), time.time()
        try:
            # Not when the actor starts: what goes wrong there would end the pipeline without a word about why.
            self.link = self.link or self.open()
            result = self.link(unit, unpack(row["payload"]))
            if not self.last:
                return {**row, "payload": pack(result)}
            entry = commit(self.files, unit, self.attempts[unit.id], result, started, self.format)
            return {**row, "payload": b"", "entry": json.dumps(entry)}
        except Exception as error:
            # The row goes on to the driver, which runs the unit again where it can be cut around the neuron at fault.
            return {**row, "payload": b"", "error": reason(error)}


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

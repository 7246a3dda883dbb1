"""The scan in a process of its own, for its memory and beside another system's: a task as JSON in, a line of JSON out."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from raylabel.config import RunConfig
from raylabel.engine.pipeline import run_pipeline
from raylabel.stages.samples import load_samples
from raylabel.stages.scan import AccumulateWorker
from raylabel.stages.subject import open_subject
from raylabel.store.rundir import RunDir
from tests.benchmarks.measuring import Memory
from tests.benchmarks.scan import batches_of, lease_of


class Replay:
    """A subject whose forward passes are recorded: `run` shows what the model once gave for the same batches in turn."""

    def __init__(self, subject: Any, batches: list[torch.Tensor], layers: list[int]) -> None:
        self._subject, self._recorded, self._at = subject, [], 0
        for ids in batches:
            shown: list[tuple[int, torch.Tensor, torch.Tensor]] = []
            subject.run(ids, layers, lambda layer, acts, resid, shown=shown: shown.append((layer, acts.clone(), resid.clone())))
            self._recorded.append(shown)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def rewind(self) -> None:
        """Begins with the first batch again."""
        self._at = 0

    def run(self, ids: torch.Tensor, layers: Any, visit: Any, tree: Any = None) -> None:
        recorded = self._recorded[self._at % len(self._recorded)]
        self._at += 1
        with torch.inference_mode():
            for layer, acts, resid in recorded:
                visit(layer, acts, resid)


class Replaying(AccumulateWorker):
    """The scan's worker with the model taken out."""

    replay: Any = None

    @property
    def subject(self) -> Any:
        return self.replay or open_subject(self.config, self.facts)


def memory(task: dict[str, Any]) -> dict[str, Any]:
    """Peak growth over some leases, after another two that bring everything in."""
    worker, size = AccumulateWorker(task["url"]), task["size"]
    for i in range(2):
        lease_of(worker, i * size, (i + 1) * size)
    leases = [(i * size, (i + 1) * size) for i in range(2, 2 + task["leases"])]
    tokens = sum(int(load_samples(worker.run, a, b).lengths.sum()) for a, b in leases)
    with Memory() as used:
        for first, last in leases:
            lease_of(worker, first, last)
    return {"peak": used.peak, "tokens": tokens}


def whole(task: dict[str, Any]) -> dict[str, Any]:
    """The stage scan of a run whose samples are there; the model is loaded and has run a batch before."""
    config = RunConfig.model_validate(task["config"])
    run = RunDir(config.run.out)
    facts = json.loads(run.files.read("subject.json"))
    subject = open_subject(config, facts)

    def warm() -> None:
        ids = torch.randint(1, 1000, (task["batch"], config.subject.context), device=subject.device)
        subject.run(ids, list(range(subject.n_layers)), lambda *_: None)

    return _measured(warm, lambda: run_pipeline(config), subject.device)


def lease(task: dict[str, Any]) -> dict[str, Any]:
    """A lease with its forward passes; the worker has run a batch before."""
    worker = AccumulateWorker(task["url"])
    return _lease(worker, task)


def update(task: dict[str, Any]) -> dict[str, Any]:
    """A lease with the forward passes taken out; the worker has run a batch before."""
    worker = Replaying(task["url"])
    batches = batches_of(worker, 0, task["last"])
    worker.replay = Replay(worker.subject, batches, worker.layers)
    return _lease(worker, task)


def _lease(worker: AccumulateWorker, task: dict[str, Any]) -> dict[str, Any]:
    subject = worker.subject

    def warm() -> None:
        lease_of(worker, 0, task["batch"])
        if isinstance(subject, Replay):
            subject.rewind()

    return _measured(warm, lambda: lease_of(worker, 0, task["last"]), subject.device)


def _measured(warm: Any, call: Any, device: torch.device) -> dict[str, Any]:
    with Memory() as used:
        warm()
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "peak": used.peak, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    jobs = {"memory": memory, "whole": whole, "lease": lease, "update": update}
    print(json.dumps(jobs[given["do"]](given)))

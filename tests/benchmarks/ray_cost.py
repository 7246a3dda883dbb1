"""What Ray costs: the scan by one worker on Ray beside the same in this process, and a stage that has nothing to do.

Both sides run `engine.execute.execute` on the same leases with a worker that is warm. Ray gives a worker as many
threads as it asks CPUs for, which is one: this process has one too, and the worker says how many it has. CPU time on
Ray is that of this process and of all below it, Ray's own included.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from raylabel.engine.execute import execute
from raylabel.engine.pipeline import open_pool
from raylabel.stages.base import Chain, Step
from raylabel.stages.scan import AccumulateWorker
from raylabel.store.files import Files
from raylabel.store.plan import Unit, make_plan
from raylabel.store.shards import Output
from tests.benchmarks import models, runs, trivial
from tests.benchmarks.measuring import Cost, Settings, paired, spread
from tests.benchmarks.report import Row


class Noting(AccumulateWorker):
    """The scan's worker; its notes say how many threads it has."""

    def __call__(self, unit: Unit) -> Output:
        output = super().__call__(unit)
        output.notes["threads"] = torch.get_num_threads()
        return output


class Chained(Chain):
    """Three links of nothing, as many as verify has."""

    links = (trivial.First, trivial.First, trivial.Last)


def throughput(settings: Settings) -> Iterator[Row]:
    """Leases of the demo model in this process and on Ray in turn."""
    size, rounds = (64, 2) if settings.quick else (1024, 5)
    model = models.build("demo", settings.folder)
    wanted = runs.config(
        model, settings.folder / "ray", settings.device, 128, (rounds + 1) * size * 128, runs.NO_VECTORS,
        {"subject": {"batch": 128 if settings.on_gpu else 32}},
        {"exemplars": {"corpus": {"path": str(models.long_corpus(settings.folder, 100_000))}}},
    )  # fmt: skip
    runs.run_stages(wanted, "tokenize")
    run, _, _ = runs.up_to(wanted, "scan", "accumulate")
    step = Step("accumulate", [], Noting, model=True)
    units = [Unit(f"lease{i}", "scan", "accumulate", {"first": i * size, "last": (i + 1) * size}) for i in range(rounds + 1)]
    worker, threads, attempt = Noting(run.files.url), set(), iter(range(1, 10_000))
    pool = open_pool("local", 1)

    def here(i: int) -> None:
        execute(worker, step, run.files, units[i], next(attempt), "parquet")

    def on_ray(i: int) -> Cost:
        before, wall = cpu_seconds(), time.perf_counter()
        entries: list[dict[str, Any]] = []
        pool.run(step, [(units[i], next(attempt))], run.files, "parquet", entries.append)
        wall, after = time.perf_counter() - wall, cpu_seconds()
        threads.add(entries[0]["notes"]["threads"])
        return Cost(wall, sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items()))

    try:
        # The time in this process by the time on Ray is the throughput on Ray by the one here.
        pairs = paired(on_ray, here, rounds)
    finally:
        pool.close()
    if threads != {torch.get_num_threads()}:
        raise RuntimeError(f"Ray's worker has {threads} threads, this process {torch.get_num_threads()}")
    yield Row(
        "scan on Ray, one worker, once warm: throughput", "in-process, equal threads", **pairs.figures(), unit="×", goal=0.90,
        how=f"demo model, leases of {size:,} samples, {threads.pop()} thread; {pairs.note}",
    )  # fmt: skip


def cpu_seconds() -> dict[int, float]:
    """CPU time so far of this process and of all below it."""
    found = {}
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def fixed(settings: Settings) -> Iterator[Row]:
    """Stages of nothing on a cluster of this machine: plain actors and pipelines in turn, all of them new each time."""
    import ray

    rounds = 2 if settings.quick else 4
    files = Files(str(settings.folder / "fixed"))
    Path(settings.folder / "fixed").mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    pool = open_pool("local", None)
    cluster = time.perf_counter() - started
    steps = {"plain": Step("plain", [], trivial.Plain), "chain": Step("chain", [], Chained)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    try:
        # A process of its own each time: an import is only paid for once.
        timing = ray.remote(num_cpus=1, max_calls=1)(trivial.seconds_of_imports)
        imports = [ray.get(timing.remote()) for _ in range(rounds + 1)]
        for i in range(rounds + 1):
            for name, step in steps.items():
                plan = make_plan("benchmark", 1, {"round": i}, [], {name: [{"n": n} for n in range(pool.workers)]})
                entries: list[Any] = []
                started = time.perf_counter()
                pool.run(step, [(unit, 1) for unit in plan.units], files, "parquet", entries.append)
                seconds[name].append(time.perf_counter() - started)
                if len(entries) != len(plan.units):
                    raise RuntimeError(f"{name}: {len(entries)} of {len(plan.units)} units were done")
    finally:
        pool.close()
    imported = spread(imports[1:])["value"]
    names = {"plain": ("plain actors", 5.0), "chain": ("Ray Data, three links", 10.0)}
    for name, (words, goal) in names.items():
        whole = spread(seconds[name][1:])["value"]
        yield Row(
            f"fixed cost of a stage on Ray, model import apart: {words}", "nothing",
            **spread([max(0.0, s - imported) for s in seconds[name][1:]]), unit="s", goal=goal, at_most=True,
            how=f"{pool.workers} units of no work, new actors, {pool.cpus} CPUs; {whole:.1f} s whole, less {imported:.1f} s of "
            f"imports in a new worker; starting the cluster took {cluster:.1f} s once; wall time",
            more={"whole": seconds[name], "imports": imports, "cluster": cluster},
        )  # fmt: skip

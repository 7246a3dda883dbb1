"""How many GPUs workers are given, on a cluster whose two GPUs are made up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from raylabel.engine import cluster
from raylabel.engine.cluster import RayPool
from raylabel.errors import BadInput
from raylabel.sections import SubjectConfig
from raylabel.stages.base import Chain, Step
from raylabel.store.plan import Plan, Unit, make_plan
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Output

GPUS = 2


class Seen:
    """Notes which GPUs its process sees."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, unit: Unit, _: Any = None) -> Output:
        time.sleep(0.2)
        return Output(notes={"gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "process": os.getpid()})


class Before:
    """Hands nothing on."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, unit: Unit, _: Any) -> dict[str, Any]:
        return {}


class SeenByLink(Seen):
    model = True


class Linked(Chain):
    links = (Before, SeenByLink)


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    """One cluster for all pools of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 8)
        patch.setattr(ray, "init", partial(ray.init, num_gpus=GPUS))
        first = RayPool("local", None)
        patch.setattr(ray, "init", lambda **_: None)
        with pytest.MonkeyPatch.context() as kept:
            kept.setattr(ray, "shutdown", lambda: None)
            yield
        first.close()


def seen(
    folder: Path, subject: dict[str, Any], worker: type[Any] = Seen, workers: int | None = None, model: bool = True
) -> list[tuple[str, int]]:
    """(GPUs, process) of the workers that ran twelve units."""
    pool = RayPool("local", workers, SubjectConfig(model="demo", **subject))
    try:
        keys = [{"n": n} for n in range(12)]
        step = Step("see", keys, worker, model=model)
        plan: Plan = make_plan("made", 1, {}, [], {"see": keys})
        run, entries = RunDir(str(folder)), list[dict[str, Any]]()
        run.start({})
        run.fix_plan(plan)
        pool.run(step, [(u, 1) for u in plan.units], run.files, "parquet", entries.append)
    finally:
        pool.close()
    assert len(entries) == 12
    return sorted({(e["notes"]["gpus"], e["notes"]["process"]) for e in entries})


@pytest.mark.parametrize(
    ("subject", "workers", "expected"),
    [
        ({}, None, [1, 1]),
        ({"gpus_per_worker": 2}, 9, [2]),
        ({"gpus_per_worker": 0.5}, None, [1] * 4),
        ({"gpus_per_worker": 1}, 1, [1]),
    ],
    ids=str,
)
def test_every_worker_has_its_own_gpus(
    tmp_path: Path, subject: dict[str, Any], workers: int | None, expected: list[int]
) -> None:
    found = seen(tmp_path, subject, workers=workers)
    assert [len(gpus.split(",")) for gpus, _ in found] == expected
    held = [gpu for gpus, _ in found for gpu in gpus.split(",")]
    assert max(held.count(gpu) for gpu in held) == (2 if subject.get("gpus_per_worker") == 0.5 else 1)


def test_what_holds_no_model_or_runs_on_cpus_has_none(tmp_path: Path) -> None:
    assert {gpus for gpus, _ in seen(tmp_path / "a", {}, model=False)} == {""}
    assert {gpus for gpus, _ in seen(tmp_path / "b", {"device": "cpu"})} == {""}


def test_the_link_that_holds_the_model(tmp_path: Path) -> None:
    found = seen(tmp_path, {"gpus_per_worker": 2}, Linked)
    assert [len(gpus.split(",")) for gpus, _ in found] == [2]


def test_auto_is_what_the_model_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cluster, "_needed", lambda subject: asked.append(subject.model) or 2)
    assert [len(gpus.split(",")) for gpus, _ in seen(tmp_path, {})] == [2]
    assert asked == ["demo"]


def test_more_than_a_machine_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^subject\.gpus_per_worker: 4 GPUs, but no machine of the cluster has more than 2$"):
        seen(tmp_path, {"gpus_per_worker": 4})

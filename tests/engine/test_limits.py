"""One limiter for all workers of a cluster: together never above the rate, and near it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylabel.engine.execute import UnitFailed
from raylabel.engine.pipeline import open_pool
from raylabel.limits import LATE, limiter
from raylabel.stages.base import Step
from raylabel.store.plan import make_plan
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output
from tests.test_limits import excess, taken

RATE, TURNS = 40.0, 60


class Turner:
    """Takes turns and leaves the instants of them."""

    def __init__(self, url: str) -> None:
        self.turns = limiter("site", RATE)

    def __call__(self, unit: Any) -> Output:
        import asyncio

        (Path(unit.key["flags"]) / f"{os.getpid()}-{unit.key['part']}").touch()
        until = time.monotonic() + 30
        while len({p.name.split("-")[0] for p in Path(unit.key["flags"]).iterdir()}) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        times = asyncio.run(taken([self.turns], TURNS))  # type: ignore[list-item]
        return Output(blobs=[Blob(f"times-{unit.key['part']}.json", json.dumps([os.getpid(), times]).encode())])


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 4)
        pool = open_pool("local", 3)
    yield pool
    pool.close()


def run(pool: Any, folder: Path, limited: bool) -> RunDir:
    (folder / "flags").mkdir()
    keys = [{"part": part, "flags": str(folder / "flags")} for part in range(3)]
    plan = make_plan("turns", 1, {}, [], {"turn": keys})
    run = RunDir(str(folder / "run"))
    run.start({})
    run.fix_plan(plan)
    pool.run(Step("turn", keys, Turner, limited=limited), [(u, 1) for u in plan.units], run.files, "parquet", lambda _: None)
    return run


def test_several_workers_together_never_exceed_the_rate_and_reach_it(pool: Any, tmp_path: Path) -> None:
    made = run(pool, tmp_path, limited=True)
    parts = [json.loads(made.files.read(f"times-{part}.json")) for part in range(3)]
    assert len({pid for pid, _ in parts}) == 3
    times = sorted(t for _, part in parts for t in part)
    assert len(times) == 3 * TURNS
    # Windows of a second and longer; a worker that loses the CPU after its turn is late without a fault of the limiter.
    assert excess(times, RATE, 1, LATE + 0.03) <= 0
    assert (len(times) - 1) / (times[-1] - times[0]) >= 0.95 * RATE


def test_a_step_that_does_not_say_so_cannot_be_limited(pool: Any, tmp_path: Path) -> None:
    with pytest.raises(UnitFailed, match="limited=True"):
        run(pool, tmp_path, limited=False)

"""Full disks, a store that fails, workers that are killed or hang, attempts that end late: the same command again mends all."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from raylabel.cli import run_command
from raylabel.config import RunConfig
from raylabel.engine import actors
from raylabel.engine.execute import UnitFailed
from raylabel.engine.inline import InlinePool
from raylabel.engine.pipeline import open_pool, run_pipeline
from raylabel.stages import PIPELINE
from raylabel.stages.base import Chain
from raylabel.store.files import Files
from raylabel.store.rundir import RunDir
from tests.engine.steps import Plain, step_of
from tests.engine.test_pools import do
from tests.rundirs import assert_tidy, config_file, differing
from tests.runs import tiny_config

PAYLOAD = 30_000_000


@pytest.fixture
def config(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_model, tiny_corpus, tmp_path / "run", subject={"neurons": [0, 8]})


def test_a_disk_that_fills_up_ends_the_run_and_costs_nothing_once_there_is_room(
    config: RunConfig, finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, left, write = random.Random(0), [0], os.fsync

    def fills(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(handle)

    monkeypatch.setattr(os, "fsync", fills)
    file, codes = config_file(config, tmp_path / "config.yaml"), list[int]()
    while not codes or codes[-1]:
        left[0] = draw.randint(4, 16)
        codes.append(run_command(["run", str(file)]))
        said = capsys.readouterr().err.strip().splitlines()[-1]
        if codes[-1]:
            assert codes[-1] == 1 and "No space left on device" in said and "Traceback" not in said
            assert not list(Path(config.run.out).rglob(".tmp-*"))
        assert len(codes) < 40
    assert len(codes) > 4
    run = RunDir(config.run.out)
    assert differing(finished, run) == [] and run.table("failures").num_rows == 0
    assert_tidy(run)


def test_a_store_that_fails_blames_no_neuron(tmp_path: Path) -> None:
    class Far(Plain):
        def __call__(self, unit: Any) -> Any:
            raise ConnectionResetError("the store hung up")

    with pytest.raises(UnitFailed, match="the store hung up"):
        do(InlinePool(), step_of(Far), tmp_path)
    assert RunDir(str(tmp_path)).manifest("made") == {}


def test_an_attempt_that_ends_after_its_stage_is_swept_away(finished: RunDir, config: RunConfig) -> None:
    shutil.copytree(finished.files.root, config.run.out)
    run = RunDir(config.run.out)
    for stage in ("scan", "identify", "verify", "results"):
        entry = next(e for e in run.manifest(stage).values() if any(f.get("table") for f in e["files"]))
        for file in entry["files"]:
            late = re.sub(r"-1(?=\.|-\w+\.)", "-9", file["path"]) if file.get("table") else file["path"]
            shutil.copy(run.files.path(file["path"]), run.files.path(late)) if late != file["path"] else None
            file["path"] = late
        run.files.write(f"_manifest/{stage}/{entry['unit']}.json", json.dumps({**entry, "attempt": 9}).encode())
    lines: list[str] = []
    run_pipeline(config, lines.append)
    assert [line for line in lines if "already done" in line] == lines
    assert differing(finished, RunDir(config.run.out)) == []
    assert_tidy(RunDir(config.run.out))


class Hangs(Plain):
    """Stands still on its first attempt at layer 1."""

    def __call__(self, unit: Any) -> Any:
        flag = Path(unit.key.get("flag", "/"))
        if not flag.exists():
            flag.touch()
            time.sleep(600)
        return super().__call__(unit)


class Heavy:
    """Hands on far more than an object store of its size holds at a time."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, unit: Any, _: Any) -> dict[str, pa.Table]:
        return {"heavy": pa.table({"neuron": pa.array(range(unit.key["first"], unit.key["last"]), pa.int64()),
                                   "weight": pa.array([b"x" * (PAYLOAD // 8)] * 8, pa.large_binary())})}  # fmt: skip


class Light(Plain):
    """Does with it what the plain step does."""

    def __call__(self, unit: Any, given: Any = None) -> Any:
        assert given["heavy"].column("weight").nbytes >= PAYLOAD
        return super().__call__(unit)


class Full(Chain):
    links = (Heavy, Light)


@pytest.fixture(scope="module")
def pool() -> Iterator[Any]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        start = ray.init
        patch.setattr(os, "cpu_count", lambda: 4)
        # Three payloads of 30 MB and their copies do not fit into 78.6 MB, which is the least that Ray takes.
        patch.setattr(ray, "init", lambda **given: start(**given, object_store_memory=78_643_200))
        pool = open_pool("local", 2)
    yield pool
    pool.close()


def test_a_straggler_is_given_to_another_worker(pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "SLOW_SECONDS", 1.0)
    monkeypatch.setattr(actors, "BEAT", 0.2)
    run, entries = do(pool, step_of(Hangs, {1: {"flag": str(tmp_path / "hung")}}), tmp_path / "run")
    whole, _ = do(InlinePool(), step_of(Plain), tmp_path / "whole")
    assert run.table("statistics").equals(whole.table("statistics"))
    assert [entry["attempt"] for entry in entries] == [1, 2, 1]


def test_an_object_store_that_is_full_only_slows_things_down(pool: Any, tmp_path: Path) -> None:
    run, entries = do(pool, step_of(Full), tmp_path / "run")
    whole, _ = do(InlinePool(), step_of(Plain), tmp_path / "whole")
    assert run.table("statistics").equals(whole.table("statistics"))
    assert all(entry["failures"] == [] for entry in entries)


@pytest.mark.slow
def test_a_worker_killed_in_every_stage_costs_nothing(finished: RunDir, config: RunConfig, pool: Any) -> None:
    pool.close()
    draw, struck = random.Random(1), dict[str, int]()

    def strike(line: str) -> None:
        stage = line.partition(":")[0]
        if "/" not in line or stage in struck:
            return
        mine = psutil.Process().children(recursive=True)
        names = [(p, " ".join(p.cmdline())) for p in mine if p.is_running()]
        workers = [p for p, name in names if name.startswith(("ray::_Actor", "ray::MapWorker"))]
        if workers:
            victim = draw.choice(workers)
            struck[stage] = victim.pid
            victim.kill()

    report = run_pipeline(config.model_copy(update={"run": config.run.model_copy(update={"address": "local"})}), strike)
    assert report.failures == 0
    assert set(struck) >= {stage.name for stage in PIPELINE} - {"results"}
    run = RunDir(config.run.out)
    assert differing(finished, run) == []
    assert_tidy(run)


def test_files_are_whole_or_absent_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="full"):
        Files(str(tmp_path)).write("a/b", b"x" * 1000)
    assert list((tmp_path / "a").iterdir()) == []

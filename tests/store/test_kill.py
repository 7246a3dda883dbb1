"""The driver is killed ten times at random moments, and the tables are those of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raylabel.stages import PIPELINE
from raylabel.store.rundir import RunDir
from tests.rundirs import assert_tidy, config_file, differing
from tests.runs import tiny_config
from tests.store.drivers import Driver

KILLS = 10
ON_RAY = (2, 5, 8)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> Path:
    return config_file(tiny_config(tiny_model, tiny_corpus, tmp_path / "x", subject={"neurons": [0, 8]}), tmp_path / "c.yaml")


def test_killed_ten_times_and_run_again_the_tables_are_those_of_an_undisturbed_run(
    finished: RunDir, config: Path, tmp_path: Path
) -> None:
    draw = random.Random(0)
    total = len(committed_units(finished))
    # Units differ much in how long they take: counting them spreads the kills over all stages.
    moments = sorted(draw.sample(range(1, total - 4), KILLS))
    out, kills = tmp_path / "run-0", 0
    for attempt in range(2 * KILLS):
        if kills == KILLS:
            break
        driver = Driver(config, out, "local" if kills in ON_RAY else "inline")
        driver.after(moments[kills] - len(committed_units(RunDir(str(out)))))
        time.sleep(draw.uniform(0, 0.08))
        code = driver.kill()
        assert code in (0, -signal.SIGKILL), "".join(driver.said)
        kills += code != 0
        if code == 0:  # it was faster than the kill
            assert differing(finished, RunDir(str(out))) == []
            out = tmp_path / f"run-{attempt}"
    assert kills == KILLS
    last = Driver(config, out, "inline")
    assert last.wait(240) == 0, "".join(last.said)
    run = RunDir(str(out))
    assert differing(finished, run) == []
    assert_tidy(run)


def test_killed_in_the_middle_of_writes_nothing_is_lost_doubled_or_left_behind(
    finished: RunDir, config: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.store.crash", str(config), str(tmp_path / "run"), "1"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= KILLS
    run = RunDir(str(tmp_path / "run"))
    assert differing(finished, run) == []
    assert_tidy(run)


def committed_units(run: RunDir) -> list[str]:
    """Ids of the units of all plans that have a manifest entry."""
    plans = [run.plan(stage.name) for stage in PIPELINE]
    return [u.id for plan in plans if plan for u in plan.units if u.id in run.manifest(plan.stage)]

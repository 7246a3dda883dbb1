"""Jobs as they are submitted: a real head with a token on loopback, `ray job submit`, `ray job stop`, and again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from raylabel.store.lock import locked
from raylabel.store.rundir import RunDir
from tests.runs import tables_equal, tiny_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
STAGES = "tokenize,scan"
GRACE = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", "OMP_NUM_THREADS": "1"}}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Head:
    """`ray start --head` in a process of its own, and `ray job` commands for it."""

    def __init__(self, folder: Path) -> None:
        # Read by Ray when it starts: without it, it would be open to every address this machine has.
        own = {"RAY_AUTH_MODE": "token", "HOME": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own}
        self.environment.pop("RAY_ADDRESS", None)
        (folder / ".ray").mkdir()
        self.token = "0123456789abcdef0123456789abcdef"
        (folder / ".ray" / "auth_token").write_text(self.token, encoding="utf-8")
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [
            self.ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--num-cpus=2",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.url.rpartition(':')[2]}", "--disable-usage-stats",
            f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}",
        ]  # fmt: skip
        self.log = folder / "head.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        until = time.monotonic() + 120
        while self.asks("/api/version", self.token) != 200:
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.5)

    @property
    def ray(self) -> str:
        return str(Path(sys.executable).parent / "ray")

    def asks(self, path: str, token: str | None) -> int:
        """The HTTP status of what the dashboard answers, 0 for none."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        verb, *rest = arguments
        command = [self.ray, "job", verb, "--address", self.url, *rest]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=400, check=False)

    def submit(self, folder: Path, *entry: str, wait: bool = True, name: str) -> str:
        """Everything that a job said."""
        options = ["--working-dir", str(folder), "--runtime-env-json", json.dumps(GRACE), "--submission-id", name]
        for _ in range(10):
            done = self.job("submit", *options, *([] if wait else ["--no-wait"]), "--", sys.executable, *entry)
            if "Request failed" not in done.stderr:
                break
            # The head answers before it can take jobs.
            time.sleep(3)
        return done.stdout + done.stderr

    def said(self, name: str) -> str:
        return self.job("logs", name).stdout

    def end(self) -> None:
        for process in (*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)):
            process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    running = Head(tmp_path_factory.mktemp("head"))
    yield running
    running.end()


@pytest.fixture
def folder(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> Path:
    """What a user submits: jobs, the package, a configuration."""
    made = tmp_path / "work"
    shutil.copytree(ROOT / "jobs", made / "jobs")
    shutil.copytree(ROOT / "raylabel", made / "raylabel", ignore=shutil.ignore_patterns("__pycache__"))
    config = tiny_config(tiny_model, tiny_corpus, tmp_path / "run", subject={"neurons": [0, 8]}, run={"workers": 2})
    tree: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    del tree["run"]["address"]
    (made / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return made


def test_a_job_is_stopped_and_submitted_again(head: Head, folder: Path, finished: RunDir, tmp_path: Path) -> None:
    assert head.asks("/api/jobs/", None) == 401
    assert head.asks("/api/jobs/", "f" * 32) in (401, 403)
    lost = head.submit(folder, "jobs/run.py", "config.yaml", "--out", "mine", name="a")
    assert "run.out: mine would lie in the job's own copy" in lost
    run = RunDir(str(tmp_path / "run"))
    head.submit(folder, "jobs/run.py", "config.yaml", "--stages", STAGES, wait=False, name="b")
    until = time.monotonic() + 200
    while not (run.files.exists("run.json") and run.manifest("tokenize")):
        assert time.monotonic() < until, head.said("b")
        time.sleep(0.05)
    assert "stopped" in (stop := head.job("stop", "b")).stdout + stop.stderr
    said = head.said("b")
    assert "raylabel: stopped; run the same command again to go on" in said and "Traceback" not in said
    with locked(run.files):
        before = {i: entry["started"] for i, entry in run.manifest("tokenize").items()}
    assert before and not run.complete("exemplars")
    said = head.submit(folder, "jobs/stage.py", STAGES, "config.yaml", name="c")
    assert "succeeded" in said, said[-3000:]
    assert tables_equal(finished, run, ("samples", "exemplars", "statistics"))
    after = run.manifest("tokenize")
    assert all(after[i]["started"] == started for i, started in before.items())

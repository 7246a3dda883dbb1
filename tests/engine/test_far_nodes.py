"""Machines without a disk in common, the run directory on a real S3 server; one is taken away in the middle, one comes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from raylabel.store.rundir import RunDir
from tests.runs import tables_equal, tiny_config
from tests.store.test_s3 import PER_RUN, bucket

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
__all__ = ["bucket"]


class Node:
    """A process of `tests.engine.far_node`."""

    def __init__(self, name: str, folder: Path, address: str | None) -> None:
        spec = {"name": name, "disk": str(folder / "disk"), "source": str(folder / "source"), "cwd": str(folder / name),
                "address": address}  # fmt: skip
        file = folder / f"{name}.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        self.said = folder / f"{name}.log"
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "HOME": str(folder)}
        environment = {**os.environ, **own}
        (folder / ".ray").mkdir(exist_ok=True)
        (folder / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef", encoding="utf-8")
        with self.said.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.engine.far_node", str(file)], cwd=ROOT, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.ask, self.answer = self.process.stdin, self.process.stdout
        self.address = self.answer.readline().strip()

    def line(self) -> str:
        """The next line that is an exit code."""
        return next((line.strip() for line in self.answer if line.strip().isdigit()), "")

    def vanish(self) -> None:
        """The machine's power is cut."""
        processes = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.ask.close()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.vanish()


@pytest.fixture
def folder(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(tiny_model, tmp_path / "source" / "model")
    shutil.copy(tiny_corpus, tmp_path / "source" / "text.jsonl")
    yield tmp_path


def test_machines_that_share_nothing_and_come_and_go_give_the_rows_of_one_process(
    finished: RunDir, bucket: str, folder: Path
) -> None:
    disk = folder / "disk"
    config = tiny_config(disk / "model", disk / "text.jsonl", Path("unused"), subject={"neurons": [0, 8]},
                         run={"out": f"{bucket}/far", "workers": 2})  # fmt: skip
    given = folder / "config.yaml"
    given.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    with ExitStack() as stack:
        head = Node("head", folder, None)
        stack.callback(head.end)
        first = Node("first", folder, head.address)
        stack.callback(first.end)
        head.ask.write(json.dumps(["run", str(given)]) + "\n")
        head.ask.flush()
        wait_for(head, "scan: accumulate 2/")
        # Until now one of the two workers that were asked for has had no place to be.
        second = Node("second", folder, head.address)
        stack.callback(second.end)
        first.vanish()
        assert head.line() == "0", head.said.read_text()[-3000:]
    remote = RunDir(f"{bucket}/far")
    assert tables_equal(finished, remote, PER_RUN)
    if not any(disk.iterdir()):
        hosts = {entry["host"] for stage in ("tokenize", "scan") for entry in remote.manifest(stage).values()}
        assert hosts == {"first", "second"}


def wait_for(node: Node, line: str) -> None:
    """Until a node has said something."""
    until = time.monotonic() + 900
    while line not in node.said.read_text():
        assert time.monotonic() < until and node.process.poll() is None, node.said.read_text()[-3000:]
        time.sleep(0.05)



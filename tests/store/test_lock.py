"""One run at a time, and no lock that outlives its owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raylabel.errors import BadInput, RunFailed
from raylabel.store import lock
from raylabel.store.files import Files
from raylabel.store.lock import NAME, STALE, locked

HOLDER = """
import sys, time
from raylabel.store.files import Files
from raylabel.store.lock import locked
with locked(Files(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    monkeypatch.setattr(lock, "WATCH", 0.2)
    return Files(f"memory://lock-{request.node.name}")


def test_a_second_process_is_refused_by_name_and_a_killed_owner_keeps_nothing(tmp_path: Path) -> None:
    files = Files(str(tmp_path / "run"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, files.url], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match=rf"{files.url}: process {holder.pid} on .* is running here"), locked(files):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(files):
        assert json.loads(files.read(NAME))["pid"] == os.getpid()


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    with pytest.raises(ZeroDivisionError), locked(files):
        raise ZeroDivisionError
    with locked(files):
        pass


def test_a_place_where_no_directory_can_be_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="no run directory can be made"), locked(Files(str(tmp_path / "file"))):
        pass
    with pytest.raises(BadInput, match="no run directory can be made"), locked(Files(str(tmp_path / "file" / "below"))):
        pass


def test_an_object_store_holds_the_lock_as_an_object(memory: Files) -> None:
    with locked(memory):
        assert json.loads(memory.read(NAME))["pid"] == os.getpid()
        with pytest.raises(BadInput, match=f"process {os.getpid()} on .* is running here"), locked(memory):
            pass
    assert not memory.exists(NAME)


def test_an_object_that_is_not_refreshed_is_taken_over(memory: Files) -> None:
    dead = {"host": "gone", "pid": 1, "beat": time.time() - STALE - 1, "token": "dead"}
    memory.write(NAME, json.dumps(dead).encode())
    with locked(memory):
        assert json.loads(memory.read(NAME))["token"] != "dead"
    memory.write(NAME, json.dumps({**dead, "beat": time.time() - STALE + 10}).encode())
    with pytest.raises(BadInput, match="process 1 on gone"), locked(memory):
        pass
    memory.delete(NAME)


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_clock_that_jumped_neither_keeps_a_lock_nor_breaks_one(memory: Files, jump: float) -> None:
    owner = {"host": "far", "pid": 3, "beat": time.time() + jump, "token": "theirs"}
    memory.write(NAME, json.dumps(owner).encode())
    alive = threading.Timer(0.05, lambda: memory.write(NAME, json.dumps({**owner, "beat": owner["beat"] + 1}).encode()))
    alive.start()
    with pytest.raises(BadInput, match="process 3 on far"), locked(memory):
        pass
    alive.join()
    with locked(memory) as held:
        held.check()
        assert json.loads(memory.read(NAME))["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_an_object_that_is_no_lock_is_no_owner(memory: Files, content: bytes) -> None:
    memory.write(NAME, content)
    with locked(memory):
        pass


def test_of_two_that_start_at_once_one_runs(memory: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE", 0.3)
    both, outcome = threading.Barrier(2), []

    def start() -> None:
        both.wait()
        try:
            with locked(memory):
                outcome.append("ran")
                time.sleep(0.5)
        except BadInput:
            outcome.append("refused")

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome) == ["ran", "refused"]


def test_the_owner_refreshes_its_object_and_lets_go_of_one_that_was_taken(
    memory: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with locked(memory) as held:
        first = json.loads(memory.read(NAME))["beat"]
        time.sleep(0.3)
        assert json.loads(memory.read(NAME))["beat"] > first
        memory.write(NAME, json.dumps({"host": "new", "pid": 2, "beat": time.time(), "token": "other"}).encode())
        time.sleep(0.2)
        assert json.loads(memory.read(NAME))["token"] == "other"
        with pytest.raises(RunFailed, match="another one took over"):
            held.check()
    assert json.loads(memory.read(NAME))["token"] == "other"
    memory.delete(NAME)

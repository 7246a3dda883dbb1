"""Files of a run directory: whole or not at all, on a disk and in an object store."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest

from raylabel.store.files import Files


@pytest.fixture(params=["disk", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    return Files(str(tmp_path / "run") if request.param == "disk" else f"memory://{tmp_path.name}-files")


def test_what_was_written_is_read_listed_and_deleted(files: Files) -> None:
    assert files.names() == []
    assert files.sizes("") == {}
    written = files.write("a/b/c.bin", b"12345")
    files.write("top.bin", b"1")
    assert (written.path, written.bytes, written.sha256) == ("a/b/c.bin", 5, hashlib.sha256(b"12345").hexdigest())
    assert files.read("a/b/c.bin") == b"12345"
    assert files.sizes("") == {"a/b/c.bin": 5, "top.bin": 1}
    assert files.sizes("a") == {"a/b/c.bin": 5}
    assert files.sizes("top.bin") == {"top.bin": 1}
    assert files.sizes("nothing") == {}
    assert files.names() == ["a", "top.bin"]
    assert files.exists("top.bin")
    files.delete("top.bin")
    files.delete("top.bin")
    assert not files.exists("top.bin")
    with pytest.raises(FileNotFoundError):
        files.read("top.bin")


def test_a_file_is_replaced_as_a_whole(files: Files) -> None:
    files.write("x", b"long content")
    files.write("x", b"short")
    assert files.read("x") == b"short"


def test_files_travel_to_another_process(files: Files) -> None:
    again = pickle.loads(pickle.dumps(files))
    assert again.url == files.url
    assert again.path("x") == files.path("x")


def test_a_write_that_does_not_end_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(str(tmp_path))
    files.write("part.bin", b"old")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        files.write("part.bin", b"new")
    assert files.read("part.bin") == b"old"
    assert len(files.names()) == 2
    monkeypatch.undo()
    files.sweep()
    assert files.names() == ["part.bin"]


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    Files(str(tmp_path)).write("x", b"1")
    assert order == ["fsync", "replace"]


def test_a_relative_place_is_the_same_wherever_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = Files("runs/x/")
    files.write("a", b"1")
    assert (tmp_path / "runs" / "x" / "a").read_bytes() == b"1"
    assert files.sizes("") == {"a": 1}

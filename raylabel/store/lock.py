"""One run at a time in a run directory: a lock that a dead owner does not keep.

On a local disk the lock is the kernel's (`flock`), which ends with the process. On an object store it is an object that
the owner refreshes; one whose time is older than `STALE` seconds, or lies in the future, is taken over if it is not seen to
be refreshed: clocks differ and jump. An owner that was away for longer than that finds another's token, leaves the object
alone and ends its run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from raylabel.errors import BadInput, RunFailed
from raylabel.store.files import Files

NAME = "_lock"
BEAT, STALE = 10.0, 60.0
WATCH = 2.5 * BEAT
"""Seconds in which a live owner is seen to refresh its object, whatever its clock says."""
SETTLE = 1.0
"""Seconds in which two that start at once see each other's object."""


class Held:
    """A lock that is held. `lost` once another process took it over."""

    lost = False

    def check(self) -> None:
        """RunFailed if the lock was lost: two runs in one directory would delete each other's files."""
        if self.lost:
            raise RunFailed("this run was away for so long that another one took over its run directory")


@contextlib.contextmanager
def locked(files: Files) -> Iterator[Held]:
    """Holds the directory's lock; BadInput if another live process has it."""
    with _local(files) if files.local else _remote(files) as held:
        yield held


@contextlib.contextmanager
def _local(files: Files) -> Iterator[Held]:
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(files.root, exist_ok=True)
            file = stack.enter_context(open(files.path(NAME), "a+", encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"run.out: no run directory can be made at {files.url} ({error.strerror})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise _busy(files, file.read()) from None
        file.seek(0)
        file.truncate()
        file.write(_owner(""))
        file.flush()
        yield Held()


@contextlib.contextmanager
def _remote(files: Files) -> Iterator[Held]:
    token = uuid.uuid4().hex
    owner = _read(files)
    if owner:
        if 0 <= time.time() - float(owner.get("beat", 0)) < STALE:
            raise _busy(files, json.dumps(owner))
        time.sleep(WATCH)
        if _read(files) not in (owner, {}):
            raise _busy(files, json.dumps(owner))
    files.write(NAME, _owner(token).encode())
    # Two that start at once both write; the later write wins and the other one sees a token that is not its own.
    time.sleep(SETTLE)
    owner = _read(files)
    if owner.get("token") != token:
        raise _busy(files, json.dumps(owner))
    stop, held = threading.Event(), Held()

    def beat() -> None:
        while not stop.wait(BEAT):
            # A store that does not answer now is asked again at the next beat.
            with contextlib.suppress(OSError):
                if _read(files).get("token", token) != token:
                    held.lost = True
                    return
                files.write(NAME, _owner(token).encode())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        stop.set()
        thread.join()
        # A store that does not answer keeps an object that nobody refreshes.
        with contextlib.suppress(OSError):
            if _read(files).get("token") == token:
                files.delete(NAME)


def _read(files: Files) -> dict[str, Any]:
    """The owner that the lock object names; {} where there is none or it is not readable."""
    try:
        found = json.loads(files.read(NAME))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _owner(token: str) -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "beat": time.time(), "token": token})


def _busy(files: Files, text: str) -> BadInput:
    try:
        owner = json.loads(text)
        who = f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError):
        who = "another process"
    return BadInput(f"{files.url}: {who} is running here; wait for it, stop it, or give another --out")

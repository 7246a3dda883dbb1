"""`raylabel run` in processes that can be killed, a fork away from one that has imported what a run needs.

The forked one inherits nothing of the tests' own process, which holds threads and a cluster.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# What a run imports by and by: seconds for each process that does so by itself.
IMPORTED = (
    "raylabel.api", "raylabel.engine.pipeline", "raylabel.models.judge", "raylabel.models.subject", "raylabel.report.terminal",
    "raylabel.stages.kernel", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
)  # fmt: skip
CONTEXT.set_forkserver_preload(list(IMPORTED))


def warm() -> None:
    """Imports it here, for forks of this very process."""
    for name in IMPORTED:
        importlib.import_module(name)


class Driver:
    """`raylabel run` in a process group of its own, with the lines it writes to stderr as they come."""

    def __init__(self, config: Path, out: Path, address: str) -> None:
        ours, theirs = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_run, args=(str(config), str(out), address, theirs))
        self.process.start()
        theirs.close()
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.said: list[str] = []
        threading.Thread(target=self._read, args=(ours,), daemon=True).start()

    def _read(self, pipe: Connection) -> None:
        with os.fdopen(os.dup(pipe.fileno()), encoding="utf-8") as lines:
            pipe.close()
            for line in lines:
                self.said.append(line)
                self.lines.put(line)
        self.lines.put(None)

    def after(self, units: int) -> None:
        """Returns when this many units were committed, or the process has ended."""
        while units > 0:
            line = self.lines.get(timeout=240)
            if line is None:
                return
            units -= "/" in line and line.rstrip().endswith(" s")

    def send(self, number: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> int:
        """Its exit code, after SIGKILL."""
        self.send(signal.SIGKILL)
        return self.wait(60)

    def wait(self, seconds: float) -> int:
        """Its exit code; TimeoutError where it goes on for longer."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise TimeoutError(f"still running after {seconds:g} s")
        return self.process.exitcode

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


def _run(config: str, out: str, address: str, errors: Connection) -> None:
    os.setsid()
    os.dup2(errors.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from raylabel.cli import run_command

    sys.exit(run_command(["run", config, "--out", out, "--address", address]))

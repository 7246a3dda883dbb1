"""Runs a configuration in child processes that kill themselves in the middle of writes, until one comes through.

`python -m tests.store.crash CONFIG OUT SEED` prints how many children were killed. The parent imports what is heavy and
runs nothing itself, so that a child is a fork away.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from typing import Any

from raylabel.cli import run_command
from raylabel.store import files
from raylabel.store.files import Files
from tests.store.drivers import warm


def arm(writes: int, moment: str) -> None:
    """Makes this process kill itself at its n-th write: before it, in the middle of the bytes, before the rename, after."""
    write, replace, left = Files.write, os.replace, [writes]

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(self: Files, name: str, data: bytes) -> Any:
        left[0] -= 1
        if left[0] == 0 and moment == "before":
            die()
        if left[0] == 0 and moment == "half":
            folder, base = os.path.split(self.path(name))
            os.makedirs(folder, exist_ok=True)
            with open(f"{folder}/{files.TEMPORARY}{'0' * 12}-{base}", "wb") as file:
                file.write(data[: len(data) // 2])
            die()
        os.replace = die if left[0] == 0 and moment == "rename" else replace  # type: ignore[assignment]
        written = write(self, name, data)
        if left[0] == 0:
            die()
        return written

    Files.write = counted  # type: ignore[method-assign, assignment]


def main(config: str, out: str, seed: int) -> int:
    warm()
    draw, kills = random.Random(seed), 0
    while True:
        writes, moment = draw.randint(3, 28), draw.choice(["before", "half", "rename", "after"])
        child = os.fork()
        if child == 0:
            code = 1
            try:
                arm(writes, moment)
                code = run_command(["run", config, "--out", out, "--address", "inline"])
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            print(kills)
            return os.WEXITSTATUS(status)
        kills += 1
        # A child that is killed in the first writes of its own makes no way: the counter must not stay there for ever.
        if kills > 400:
            return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))

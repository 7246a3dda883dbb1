"""`python -m tests.benchmarks.soak [--faults N] [--seed S] [--ray SHARE]`: random faults over run after run, and their tables.

A run of a tiny model over a small text is started again and again; each time something is done to it at a random moment: its
driver is killed before, in the middle of, between and after the steps of a write, gets SIGTERM, or finds the disk full, and
its clock may jump by an hour; on Ray the driver or one of its workers is killed. Once a run ends by itself its tables must be
those of a run that nobody disturbed, nothing may be left behind, and every exit code must be one that is documented. Prints a
line for every run and the counts at the end; exit code 1 at the first difference.
"""

from __future__ import annotations

import argparse
import collections
import errno
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from raylabel.cli import run_command
from raylabel.store.rundir import RunDir
from tests.models.tiny import save
from tests.rundirs import assert_tidy, config_file, differing
from tests.runs import tiny_config, write_corpus
from tests.store.crash import arm
from tests.store.drivers import Driver, warm

MOMENTS = ("before", "half", "rename", "after")
CODES = {**dict.fromkeys(MOMENTS, -signal.SIGKILL), "term": 143, "full": 1, "kill": -signal.SIGKILL, "worker": 0}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", type=float, default=0.1, help="share of the starts that use Ray")
    options = parser.parse_args()
    warm()
    draw, counts = random.Random(options.seed), collections.Counter[str]()
    started, runs = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="raylabel-soak-") as folder:
        here = Path(folder)
        model, corpus = save("gpt2", here / "model"), write_corpus(here / "text.jsonl", 120)
        given = config_file(tiny_config(model, corpus, here / "calm", subject={"neurons": [0, 8]}), here / "config.yaml")
        if forked(given, here / "calm", "", draw):
            raise RuntimeError("a run that nobody disturbs does not end well")
        while counts.total() < options.faults:
            out = here / f"run-{runs}"
            disturbed(given, out, draw, counts, options)
            runs += 1
            same = in_a_copy(lambda out=out: compared(here / "calm", out)) == 0  # type: ignore[misc]
            said = "tables equal, nothing left behind" if same else f"DIFFERS: {out}"
            print(f"run {runs}: {counts.total()} faults so far, {time.monotonic() - started:.0f} s, {said}", flush=True)
            if not same:
                return 1
    print(f"{counts.total()} faults ({dict(counts)}): every table of {runs} runs equal to those of an undisturbed one")
    return 0


def disturbed(
    config: Path, out: Path, draw: random.Random, counts: collections.Counter[str], options: argparse.Namespace
) -> None:
    """Starts a run again and again until it ends by itself; RuntimeError for an exit code that is not documented."""
    while True:
        if draw.random() < options.ray:
            kind = draw.choice(["kill", "term", "worker"])
            code, hit = on_ray(config, out, kind, draw)
        else:
            kind = draw.choice([*MOMENTS, "term", "full"])
            code = forked(config, out, kind, draw)
            hit = code != 0
        counts[kind] += hit
        if code not in (0, CODES[kind]):
            raise RuntimeError(f"{kind}: exit code {code}")
        if code == 0:
            return


def forked(config: Path, out: Path, kind: str, draw: random.Random) -> int:
    """The exit code of a run in this process's copy, to which something of a kind is done; nothing where it is empty."""
    writes, seconds, jump = draw.randint(3, 16), draw.uniform(0.1, 3.0), draw.choice([0, 0, 3600, -3600])

    def run() -> int:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        clock, flush, left = time.time, os.fsync, [writes]
        time.time = lambda: clock() + jump

        def full(handle: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(handle)

        if kind in MOMENTS:
            arm(writes, kind)
        elif kind == "full":
            os.fsync = full
        elif kind == "term":
            strike_at = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGTERM))
            strike_at.daemon = True
            strike_at.start()
        return run_command(["run", str(config), "--out", str(out), "--address", "inline"])

    return in_a_copy(run)


def in_a_copy(work: Callable[[], int]) -> int:
    """The exit code of a copy of this process, which itself starts no threads: what is heavy is imported once."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    code = 99
    try:
        code = work()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def compared(calm: Path, out: Path) -> int:
    """0 where two runs have the same rows, no failures and nothing left behind."""
    run = RunDir(str(out))
    assert_tidy(run)
    wrong = differing(RunDir(str(calm)), run)
    if wrong:
        print(wrong, flush=True)
    return 1 if wrong or run.table("failures").num_rows else 0


def on_ray(config: Path, out: Path, kind: str, draw: random.Random) -> tuple[int, bool]:
    """(exit code, whether it was hit) of a run on Ray in a process of its own."""
    driver = Driver(config, out, "local")
    driver.after(draw.randint(0, 6))
    time.sleep(draw.expovariate(8.0))
    hit = driver.process.is_alive() and strike(driver, kind, draw)
    return driver.wait(900), hit


def strike(driver: Driver, kind: str, draw: random.Random) -> bool:
    """Does it; False where there was nothing to strike."""
    if kind == "term" and not driver.said:
        # A process that has not begun to run has no handler yet.
        return False
    if kind != "worker":
        driver.send(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        return True
    with suppress(psutil.Error):
        below = psutil.Process(driver.pid).children(recursive=True)
        workers = [p for p in below if " ".join(p.cmdline()).startswith(("ray::_Actor", "ray::MapWorker"))]
        if workers:
            os.kill(draw.choice(workers).pid, signal.SIGKILL)
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())

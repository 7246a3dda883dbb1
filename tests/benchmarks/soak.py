"""`python -m tests.benchmarks.soak [--kills N] [--seed S] [--ray SHARE]`: random faults over run after run, and their tables.

A run of a tiny model over a small text is started again and again; each time its driver is killed (SIGKILL or SIGTERM), or one
of its Ray workers is, after a random number of units, until it ends by itself. Then its tables must be those of a run that
nobody disturbed, nothing may be left behind, and every exit code must be one that is documented. Prints a line for every run
and the counts at the end; exit code 1 at the first difference.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from raylabel.engine.pipeline import run_pipeline
from raylabel.store.rundir import RunDir
from tests.models.tiny import save
from tests.rundirs import assert_tidy, config_file, differing
from tests.runs import tiny_config, write_corpus
from tests.store.test_kill import Driver

CODES = {"kill": (-signal.SIGKILL,), "term": (143, 0), "worker": (0,)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", type=float, default=0.1, help="share of the starts that use Ray")
    options = parser.parse_args()
    draw, counts = random.Random(options.seed), collections.Counter[str]()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="raylabel-soak-") as folder:
        here = Path(folder)
        model, corpus = save("gpt2", here / "model"), write_corpus(here / "text.jsonl", 120)
        calm = tiny_config(model, corpus, here / "calm", subject={"neurons": [0, 8]})
        run_pipeline(calm)
        given = config_file(calm, here / "config.yaml")
        while faults(counts) < options.kills:
            out = here / f"run-{counts['runs']}"
            disturbed(given, out, draw, counts, options)
            run = RunDir(str(out))
            wrong = differing(RunDir(calm.run.out), run)
            assert_tidy(run)
            counts["runs"] += 1
            print(f"run {counts['runs']}: {faults(counts)} faults so far, {time.monotonic() - started:.0f} s, "
                  f"{'tables equal' if not wrong else f'DIFFER: {wrong}'}", flush=True)  # fmt: skip
            if wrong or run.table("failures").num_rows:
                return 1
    print(f"{dict(counts)}: every table of {counts['runs']} runs equal to an undisturbed one")
    return 0


def faults(counts: collections.Counter[str]) -> int:
    """How many there were."""
    return sum(counts[kind] for kind in CODES)


def disturbed(
    config: Path, out: Path, draw: random.Random, counts: collections.Counter[str], options: argparse.Namespace
) -> None:
    """Starts a run again and again until it ends by itself; RuntimeError for an exit code that is not documented."""
    while True:
        on_ray = draw.random() < options.ray
        kind = draw.choice(["kill", "term", "worker"] if on_ray else ["kill", "term"])
        driver = Driver(config, out, "local" if on_ray else "inline")
        driver.after(draw.randint(0, 6))
        time.sleep(draw.expovariate(8.0))
        if driver.process.poll() is None and faults(counts) < options.kills:
            hit = strike(driver, kind, draw)
            counts[kind] += hit
        else:
            hit = False
        code = driver.process.wait(600)
        if code not in (CODES[kind] if hit else (0,)) and code != 0:
            raise RuntimeError(f"{kind}: exit code {code}\n{''.join(driver.said)[-3000:]}")
        if code == 0:
            return


def strike(driver: Driver, kind: str, draw: random.Random) -> bool:
    """Does it; False where there was nothing to strike."""
    if kind == "term" and not driver.said:
        # A process that has not begun to run has no handler yet.
        return False
    if kind != "worker":
        driver.process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        return True
    with suppress(psutil.Error):
        below = psutil.Process(driver.process.pid).children(recursive=True)
        workers = [p for p in below if " ".join(p.cmdline()).startswith(("ray::_Actor", "ray::MapWorker"))]
        if workers:
            os.kill(draw.choice(workers).pid, signal.SIGKILL)
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())

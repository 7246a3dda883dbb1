"""How things are timed: two calls in turn, the first pair thrown away, the ratio taken pair by pair.

Both wall time and the CPU time of the process (all its threads) are taken. Wall time is reported where the machine is
idle, which is looked at before every pair while nothing of ours runs, and on a GPU, which is waited for; else CPU time.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOOK = 0.3
"""Seconds of a look at what else runs."""
IDLE = 0.1
"""Cores that others may use on a machine that counts as idle."""


@dataclass(frozen=True)
class Settings:
    """What all benchmarks are told.

    Attributes:
        quick: tiny sizes, to see that it works.
        threads: of every side of every comparison.
        device: cpu or cuda.
        folder: for models and runs; goes when the command ends.
        peers: environments of other systems; stays.
    """

    quick: bool
    threads: int
    device: str
    folder: Path
    peers: Path

    @property
    def on_gpu(self) -> bool:
        """Whether the models run on a GPU."""
        return self.device != "cpu"


@dataclass(frozen=True)
class Cost:
    """Seconds; `peak` is the growth of resident memory in bytes, where it was asked for."""

    wall: float
    cpu: float
    peak: int = 0


@dataclass
class Pairs:
    """Costs of the two sides, pair by pair, and the cores that others used before each pair."""

    device: str
    first: list[Cost] = field(default_factory=list)
    second: list[Cost] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def clock(self) -> str:
        """The time that is reported."""
        return "wall" if self.device != "cpu" or statistics.fmean(self.others) < IDLE else "cpu"

    @property
    def note(self) -> str:
        """The clock in words."""
        if self.device != "cpu":
            return "wall time, device waited for"
        return "wall time, machine idle" if self.clock == "wall" else "CPU time, machine shared"

    def ratios(self, clock: str | None = None) -> list[float]:
        """Second by first, pair by pair."""
        name = clock or self.clock
        return [getattr(b, name) / getattr(a, name) for a, b in zip(self.first, self.second, strict=True)]

    def figures(self) -> dict[str, Any]:
        """What a Row takes: value, low, high, n, and everything else in `more`."""
        found = self.ratios()
        more: dict[str, Any] = {"clock": self.clock, "cores used by others": statistics.fmean(self.others)}
        for clock in ("wall", "cpu"):
            more[f"ratios, {clock}"] = self.ratios(clock)
            more[f"seconds, {clock}"] = [[getattr(cost, clock) for cost in side] for side in (self.first, self.second)]
        return {**spread(found), "more": more}


def spread(values: list[float]) -> dict[str, Any]:
    """Median and extremes as a Row takes them."""
    return {"value": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def paired(
    first: Callable[[int], Any], second: Callable[[int], Any], rounds: int, device: str = "cpu"
) -> Pairs:
    """`first(i)` and `second(i)` in turn for i = 0, 1, … `rounds`; round 0 does not count.

    A call that gives a Cost has timed itself; others are timed here.
    """
    pairs = Pairs(device)
    for i in range(rounds + 1):
        others = cores_used_by_others()
        a, b = timed(first, i, device), timed(second, i, device)
        if i:
            pairs.first.append(a)
            pairs.second.append(b)
            pairs.others.append(others)
    return pairs


def timed(call: Callable[[int], Any], i: int, device: str = "cpu") -> Cost:
    """The cost of a call, the device's work included."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = call(i)
    _wait(device)
    return result if isinstance(result, Cost) else Cost(time.perf_counter() - wall, time.process_time() - cpu)


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def cores_used_by_others(seconds: float = LOOK) -> float:
    """Cores in use while this process sleeps; the load average where the kernel does not tell."""
    try:
        before = _busy()
        time.sleep(seconds)
        return (_busy() - before) / seconds
    except (OSError, ValueError, IndexError):
        return os.getloadavg()[0]


def _busy() -> float:
    """Seconds that all cores together were busy since the start, time stolen by other machines included."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    ticks = [int(x) for x in fields]
    idle = ticks[3] + ticks[4]
    return (sum(ticks[:8]) - idle) / os.sysconf("SC_CLK_TCK")


class Memory:
    """Growth of this process's resident memory above what it was at the start of a `with`, at its peak: `peak` bytes.

    What an earlier call freed may still be resident: a warm-up belongs inside.
    """

    def __enter__(self) -> Memory:
        # Sets the high-water mark back to what is held now.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._start = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = max(0, _status("VmHWM") - self._start)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def environment(threads: int) -> dict[str, str]:
    """The environment of a process that has so many threads."""
    count = str(threads)
    fixed = {f"{name}_NUM_THREADS": count for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    return {**os.environ, **fixed, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}


def child(module: str, task: dict[str, Any], threads: int, python: str = sys.executable) -> dict[str, Any]:
    """What a module run with a task as its one argument prints last, in a process of its own."""
    done = subprocess.run(
        [python, "-m", module, json.dumps(task)], cwd=ROOT, env=environment(threads), capture_output=True,
        text=True, errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"{module} {task.get('do', '')}: exit status {done.returncode}: {said}"[:500])
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def cost_of(found: dict[str, Any]) -> Cost:
    """The cost that a child reports."""
    return Cost(found["wall"], found["cpu"], int(found.get("peak", 0)))


def memory_available() -> int:
    """Bytes that can be taken without harm."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpu": model, "cores": cores, "threads": threads, "torch": torch.__version__, "gpu": gpu}


def in_words(found: dict[str, Any], date: str) -> str:
    """Machine and date on a line."""
    gpu = f", {found['gpu']}" if found["gpu"] else ""
    return f"{date}, {found['cpu']}, {found['cores']} cores, {found['threads']} threads, torch {found['torch']}{gpu}"

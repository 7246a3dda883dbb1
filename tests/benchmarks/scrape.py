"""Scraping: the rate it keeps against the rate it was given, what any window of time held at most, and memory.

The site is a process of its own on loopback and notes when it is asked. Among its pages are those that hang, come cut short,
answer 404, 429 and 500, redirect, and hold markup; each must arrive or be listed with its reason, or the benchmark fails.
Rude pages are among the first nine tenths: what hangs at the very end keeps nothing waiting. Seconds of `Retry-After` are
taken off, as nothing may be asked for in them.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from threading import Event, Thread
from typing import Any

import psutil

from raylabel.config import RunConfig, build_config
from raylabel.engine.pipeline import open_pool
from raylabel.limits import LATE, PACE, set_provider
from raylabel.sources import neuroscope
from raylabel.sources.records import Bad
from raylabel.stages.base import Step
from raylabel.stages.read import DownloadWorker
from raylabel.store.plan import make_plan
from raylabel.store.rundir import RunDir
from tests.benchmarks.measuring import Settings
from tests.benchmarks.report import Row
from tests.sources.neuroscope_pages import Shown, build
from tests.sources.rude_site import Site

MODEL, TEXTS, TOKENS = "bench", 20, 128
ARRIVES = ("ok", "500 once", "429 once", "hang once", "truncate once", "moved")
FAILS = {
    "404": "404", "500": "500", "hang": "no answer", "truncate": "cut short", "garbage": "unpacked", "loop": "redirects",
    "elsewhere": "away from the site", "foreign": "the page is about", "hostile": "a script that is no widget",
    "large": "bytes",
}  # fmt: skip
RUDE = 0.05
LONG = 20
"""Seconds of a window in which lateness counts for nothing any more."""


@cache
def _template() -> bytes:
    draw = random.Random(0)
    words = [" the", " quick", ",", " fox", "\n", '"', "</script>", " é", " jumps", "😀"]
    texts = []
    for number in range(TEXTS):
        tokens = ["<|endoftext|>", *(draw.choice(words) for _ in range(TOKENS - 1))]
        texts.append(Shown(tokens, [0.0, *(draw.gauss(1, 1) for _ in range(TOKENS - 1))], number))
    return build(MODEL, 0, 0, texts)


def page(layer: int, neuron: int) -> bytes:
    """A page of full size; they differ in their neuron."""
    return _template().replace(b"Neuron 0 in Layer 0", f"Neuron {neuron} in Layer {layer}".encode())


def behaviours(pages: int) -> dict[int, str]:
    """What each rude page does: RUDE of them, among the first nine tenths; few make everyone wait."""
    draw = random.Random(1)
    chosen = draw.sample(range(int(0.9 * pages)), int(RUDE * pages))
    kinds = [how for how in (*ARRIVES[1:], *FAILS) if how != "429 once"]
    waits = max(1, pages // 1000)
    return {n: "429 once" if i < waits else kinds[i % len(kinds)] for i, n in enumerate(chosen)}


def _serve(line: Connection, pages: int) -> None:
    with Site(page, behaviours(pages)) as site:
        line.send(site.url)
        line.recv()
        line.send(site.times)


@contextmanager
def served(pages: int) -> Iterator[tuple[str, list[float]]]:
    """(URL, instants of the requests: filled in at the end) of a site in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, pages), daemon=True)
    process.start()
    times: list[float] = []
    try:
        yield ours.recv(), times
        ours.send("end")
        times += ours.recv()
    finally:
        process.terminate()
        process.join(10)


class Watched:
    """The largest resident memory of this process in each tenth of a second."""

    def __enter__(self) -> Watched:
        self.sizes: list[tuple[float, int]] = []
        self._end, process = Event(), psutil.Process()

        def watch() -> None:
            while not self._end.wait(0.1):
                self.sizes.append((time.monotonic(), process.memory_info().rss))

        self._thread = Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def config(settings: Settings, name: str, url: str, pages: int, rate: float) -> RunConfig:
    """A run over the site."""
    return build_config({
        "subject": {"model": "none", "layers": [0], "neurons": [0, pages]},
        "exemplars": {"source": "neuroscope", "neuroscope": {
            "model": MODEL, "url": url, "requests_per_second": rate, "allow_private": True, "timeout": 6, "attempts": 3,
            "max_bytes": 2_000_000, "connections": 16,
        }},
        "run": {"out": str(settings.folder / name)},
    })  # fmt: skip


def outcome(wanted: RunConfig, pages: int) -> Counter[str]:
    """What became of the pages by behaviour; raises where one is lost, or its reason is another."""
    rude, found = behaviours(pages), Counter[str]()
    seen = 0
    for item in (item for piece in neuroscope.pieces(wanted) for item in neuroscope.records(wanted, piece)):
        seen += 1
        how = rude.get(item.neuron or 0, "ok")
        why = FAILS.get(how)
        if (why is not None) != isinstance(item, Bad) or (isinstance(item, Bad) and str(why) not in item.reason):
            raise AssertionError(f"page {item.neuron} ({how}): {item.reason if isinstance(item, Bad) else 'arrived'}")
        found[how] += 1
    if seen != pages:
        raise AssertionError(f"{pages - seen} pages are lost")
    return found


def fullest(times: list[float], seconds: float) -> int:
    """The most requests that any window of so many seconds held."""
    times, most, first = sorted(times), 0, 0
    for last in range(len(times)):
        while times[last] - times[first] > seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def rows(what: str, times: list[float], paused: float, rate: float, how: str, more: dict[str, Any]) -> Iterator[Row]:
    """The rate, and the fullest windows against what `raylabel.limits` promises of them."""
    kept = (len(times) - 1) / (max(times) - min(times) - paused) / rate
    yield Row(f"{what}: rate kept", "the rate it was given", kept, kept, kept, 1, "×", how, goal=0.95, more=more)
    promised = {1: ("what is promised", 1 + PACE * rate * (1 + LATE)), LONG: ("1 + the rate", 1 + rate * LONG)}
    for seconds, (against, most) in promised.items():
        name = "second" if seconds == 1 else f"{seconds} seconds"
        held = fullest(times, seconds) / most
        yield Row(f"{what}: fullest {name}", against, held, held, held, 1, "×", how, goal=1.0, at_most=True)


def scrape(settings: Settings) -> Iterator[Row]:
    """One worker in this process, then two on Ray."""
    pages, rate = (300, 100.0) if settings.quick else (5000, 20.0)
    how = f"{pages} pages of {len(page(0, 0)) // 1000} kB, {RUDE:.0%} rude, {rate:g} a second"
    set_provider(None)
    with served(pages) as (url, times):
        wanted = config(settings, "one", url, pages, rate)
        with Watched() as watched:
            notes = neuroscope.fetch_pages(wanted, [(0, n) for n in range(pages)])
    more = {"outcome": dict(outcome(wanted, pages)), **notes}
    yield from rows("scrape, one worker", times, notes["paused"], rate, how, more)
    yield _memory(watched.sizes, times, how)
    with served(pages) as (url, times):
        wanted = config(settings, "two", url, pages, rate)
        notes = _on_ray(wanted)
    more = {"outcome": dict(outcome(wanted, pages)), **notes}
    yield from rows("scrape, two workers on Ray", times, notes["paused"], rate, how, more)


def _memory(sizes: list[tuple[float, int]], times: list[float], how: str) -> Row:
    """What memory grows by a page in the second half: in the first the allocator's pools, one a thread, fill up."""
    times = sorted(times)
    start, end = times[len(times) // 2], times[-1]
    early = max(size for at, size in sizes if start <= at < start + (end - start) / 8)
    late = max(size for at, size in sizes if end - (end - start) / 8 <= at <= end)
    grown = (late - early) / (0.5 * len(times))
    return Row("scrape: memory a page", "", grown, grown, grown, 1, "B", f"{how}; resident", goal=0, at_most=True, within=2000)


def _on_ray(wanted: RunConfig) -> dict[str, Any]:
    """The steps of the stage that fetch, in two workers; the sum of their notes."""
    run = RunDir(wanted.run.out)
    run.start(wanted.model_dump(mode="json"))
    keys = neuroscope.downloads(wanted)
    plan = make_plan("fetch", 1, {}, [], {"download": keys})
    run.fix_plan(plan)
    total: Counter[str] = Counter()
    pool = open_pool("local", 2)
    try:
        step = Step("download", keys, DownloadWorker, limited=True)
        pool.run(step, [(u, 1) for u in plan.units], run.files, "parquet", lambda entry: total.update(entry["notes"]))
    finally:
        pool.close()
    return dict(total)

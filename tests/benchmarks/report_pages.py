"""How long the report's table of 500,000 units takes to show its first page, to load whole, to search and to sort.

Units are made up; their columns, files and pages are those of any report. Times are the browser's own, from the start of
the navigation, of a headless Chromium that reads the pages from disk.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from raylabel.config import build_config
from raylabel.report.page.overview import overview
from raylabel.report.page.table import write_table
from raylabel.report.page.write import write_pages
from raylabel.store.rundir import RunDir
from raylabel.tables import schema
from tests.benchmarks.measuring import Settings
from tests.benchmarks.report import Row
from tests.report.dressed import put_table
from tests.report.page.browser import BROWSER, Watched, browser, wait

ROWS, QUICK, TIMES = 500_000, 20_000, 3
LAYERS = 32
MATS, PHRASES = 20, 8
GOAL = 1.0
"""Seconds after which a person would notice the wait (Nielsen 1993)."""


def report_pages(settings: Settings) -> Iterator[Row]:
    """First table, whole table, a search in labels and words, a sort."""
    if BROWSER is None:
        raise RuntimeError("no Chromium on this machine")
    rows = QUICK if settings.quick else ROWS
    folder = settings.folder / "report-pages"
    size = make(folder, rows)
    found: dict[str, list[float]] = {"first table": [], "whole table": [], "search": [], "sort": []}
    with browser() as chromium:
        for _ in range(TIMES):
            watched = Watched(chromium, folder / "report")
            page = watched.page
            page.goto((folder / "report" / "units.html").as_uri(), wait_until="commit")
            for what, ready in (("first table", "first"), ("whole table", "all")):
                wanted = f"document.body?.dataset.ready === 'all' || document.body?.dataset.ready === '{ready}'"
                wait(page, wanted, 600)
                found[what].append(page.evaluate("performance.now()") / 1000)
            # The pause in which typing is waited for is part of the search.
            found["search"].append(timed(page, "find.value = 'w0123'; find.dispatchEvent(new Event('input'))", "!sayAll()"))
            timed(page, "find.value = ''; find.dispatchEvent(new Event('input'))", "sayAll()")
            found["sort"].append(
                timed(page, "document.querySelectorAll('th button')[5].click()", "location.hash.includes('sort')")
            )
            assert watched.complaints == []
            watched.context.close()
    how = f"{rows:,} units, {size / 1e6:.0f} MB of columns beside the page, headless Chromium, from disk; machine shared"
    for what, values in found.items():
        goal = GOAL if what in ("first table", "search") else None
        yield Row(
            f"report: {what}",
            "nothing",
            statistics.median(values),
            min(values),
            max(values),
            len(values),
            "s",
            how,
            goal,
            at_most=True,
        )


SAY_ALL = "document.getElementById('count').innerText.startsWith(raylabel.index.rows.toLocaleString('en') + ' of')"


def timed(page: object, action: str, done: str) -> float:
    """Seconds from an action until a condition holds, by the page's clock, looked at between frames."""
    script = f"""() => new Promise((resolve) => {{
      const find = document.getElementById('find'), sayAll = () => {SAY_ALL}, start = performance.now();
      {action};
      const look = () => ({done}) ? resolve((performance.now() - start) / 1000) : setTimeout(look, 5);
      look();
    }})"""
    return float(page.evaluate(script))  # type: ignore[attr-defined]


def make(folder: Path, rows: int) -> int:
    """A run directory of made-up results and its report, without pages of units; bytes of the table's columns."""
    run = RunDir(str(folder))
    folder.mkdir(parents=True)
    config = build_config(
        {"subject": {"model": "made-up"}, "exemplars": {"corpus": {"path": "made-up"}}, "run": {"out": str(folder)}}
    )
    run.start(config.model_dump(mode="json"))
    put_table(run, "results", results(rows))
    started = time.perf_counter()
    whole = run.table("results")
    data = folder / "report" / "data"
    data.mkdir(parents=True)
    index = write_table(run, whole, data)
    index |= {"block": 32, "links": [], "nearest": {}, "last": {}}
    write_pages(folder / "report", {**overview(run, whole), "index": index})
    print(f"written in {time.perf_counter() - started:.1f} s")
    return int(index["bytes"])


def results(rows: int) -> pa.Table:
    """Made-up results: words from a vocabulary of 10,000, a third of the numbers missing."""
    draw = np.random.default_rng(0)
    vocabulary = pa.array([f"w{i:04d}" for i in range(10_000)])
    phrases = pa.array([f"the w{i:04d} of the w{i * 7 % 10_000:04d} and so on" for i in range(10_000)])

    def lists(of: pa.Array, n: int) -> pa.Array:
        return pa.ListArray.from_arrays(
            np.arange(0, rows * n + 1, n, dtype=np.int32), of.take(pa.array(draw.integers(0, 10_000, rows * n)))
        )

    def some(values: list[str | None]) -> pa.Array:
        return pa.array(values).take(pa.array(draw.integers(0, len(values), rows)))

    mats = lists(vocabulary, MATS)
    columns = {
        "layer": pa.array(np.arange(rows) * LAYERS // rows, pa.int32()),
        "neuron": pa.array(np.arange(rows) % -(-rows // LAYERS), pa.int32()),
        "polarity": pa.array(np.ones(rows), pa.int8()),
        "label": some([f"words such as w{i:04d} and w{i * 3 % 10_000:04d}" for i in range(10_000)]),
        "mats": mats,
        "phrases": lists(phrases, PHRASES),
        "kind": some(["meaning", "word", None]),
        "evidence": some(["concept", "token", "context", "none", None]),
        "status": some(["ok"]),
        "site": some(["blocks.0.mlp.hook_post"]),
        "flagged": pa.array(draw.random(rows) < 0.6),
        "verified": pa.array(draw.random(rows) < 0.3),
    }
    for name in (
        "normalised_activation",
        "q_value",
        "decoy_rate",
        "family_similarity",
        "retention",
        "specificity",
        "score",
        "max",
    ):
        columns[name] = pa.array(draw.random(rows).astype(np.float32), mask=draw.random(rows) < 1 / 3)
    for field in schema("results"):
        columns.setdefault(field.name, pa.nulls(rows, field.type))
    return pa.table(columns)

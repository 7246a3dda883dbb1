"""What the method finds of what was planted, and what it takes for meaning that has none, at the default settings.

The built-in model over its corpus, and a small trained model of stories where it lies beside the repository. Only a part
of each model's neurons is verified: the controls are what is counted here. Intervals are exact binomial ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from raylabel.config import build_config
from raylabel.engine.pipeline import run_pipeline
from raylabel.report.summary import Share
from raylabel.stages.identify import q_values
from raylabel.stages.planting import DIFFICULTIES
from raylabel.stages.results import difficulties
from raylabel.store.rundir import RunDir
from tests.benchmarks.measuring import Settings
from tests.benchmarks.report import Row
from tests.shared import STORIES, STORIES_MODEL

LEVELS = (0.01, 0.05, 0.1)
RECALL = {"forms": 0.95, "clean": 0.80}
EVIDENCE = 0.90
STAGES = ["tokenize", "scan", "identify", "verify", "results"]
JUDGED = ("forms", "clean", "cue")
"""Difficulties of which the evidence must be right."""


def controls(settings: Settings) -> Iterator[Row]:
    """Both models."""
    sizes = {"decoys": 8, "nulls": 8, "planted": 9} if settings.quick else {"decoys": 128, "nulls": 64, "planted": 144}
    tokens = 40_000 if settings.quick else 350_000
    subjects: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("demo model", {"model": "demo", "context": 64}, {"path": "stdlib", "tokens": tokens})
    ]
    if STORIES_MODEL.is_dir():
        sizes_of_stories = {"path": str(STORIES), "tokens": tokens}
        subjects.append(("TinyStories-656K", {"model": str(STORIES_MODEL), "polarity": "positive"}, sizes_of_stories))
    for name, subject, corpus in subjects:
        out = settings.folder / f"controls-{name}"
        tree = {
            "subject": {**subject, "device": settings.device, "neurons": [0, 16 if settings.quick else 96]},
            "exemplars": {"corpus": corpus}, "controls": sizes, "run": {"out": str(out), "address": "inline", "stages": STAGES},
        }  # fmt: skip
        run_pipeline(build_config(tree))
        yield from _rows(RunDir(str(out)), name)
        shutil.rmtree(out)


def _rows(run: RunDir, name: str) -> Iterator[Row]:
    hard = difficulties(run)
    results = run.controls.table("results").to_pylist()
    of = {d: [r for r in results if r["control"] == "planted" and hard[r["layer"], r["neuron"]] == d] for d in DIFFICULTIES}
    sizes = f"{len(results)} controls in all, default settings, {run.table('samples').num_rows:,} samples"
    for difficulty, rows in of.items():
        if rows:
            yield _share(
                f"planted units found, {difficulty}: {name}", "all of them", (r["verified"] for r in rows), sizes,
                RECALL.get(difficulty),
            )  # fmt: skip
    for control, goal in (("null", 0.05), ("decoy", None)):
        rows = [r for r in results if r["control"] == control]
        yield _share(f"{control}s verified: {name}", "none of them", (r["verified"] for r in rows), sizes, goal, at_most=True)
    for difficulty in JUDGED:
        # Evidence is about units that were measured.
        rows = [r for r in of[difficulty] if r["flagged"]]
        if rows:
            right = DIFFICULTIES[difficulty]
            what = f"evidence `{right}` of planted units, {difficulty}: {name}"
            yield _share(what, "those flagged", (r["evidence"] == right for r in rows), sizes, EVIDENCE)
    yield from _discoveries(run, name)


def _discoveries(run: RunDir, name: str) -> Iterator[Row]:
    """The share of nulls among what Benjamini-Hochberg finds in nulls and planted units together."""
    found = run.controls.table("candidates").to_pylist()
    rows = [(r["p_value"], r["control"] == "null") for r in found if r["control"] != "decoy" and r["p_value"] is not None]
    p, null = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], bool)
    q = q_values(p, np.sort(p))
    for level in LEVELS:
        false = null[q <= level]
        low, high = Share(int(false.sum()), len(false)).interval[1:]
        inside = low is None or low <= level
        yield Row(
            f"nulls among discoveries at q = {level}: {name}", f"{level:.0%} at most",
            100 * float(false.mean()) if len(false) else 0.0, 100 * (low or 0.0), 100 * (high or 0.0), len(false), "%",
            f"{null.sum()} nulls and {(~null).sum()} planted units with a p-value; the interval "
            f"{'reaches' if inside else 'does not reach'} the level", 100 * level, at_most=True,
        )  # fmt: skip


def _share(what: str, against: str, hits: Iterable[bool], how: str, goal: float | None, at_most: bool = False) -> Row:
    flags = [bool(hit) for hit in hits]
    value, low, high = Share(sum(flags), len(flags)).interval
    figures = [100 * (x or 0.0) for x in (value, low, high)]
    return Row(what, against, *figures, len(flags), "%", how, None if goal is None else 100 * goal, at_most)


if __name__ == "__main__":
    import sys

    for row in _rows(RunDir(sys.argv[1]), sys.argv[1]):
        print(json.dumps(row.cells("")))

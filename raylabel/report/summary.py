"""How a run came out in a few figures: units beside decoys, each share with its interval."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raylabel.stages.results import interval
from raylabel.store.rundir import RunDir

MEASURES = {
    "kind meaning": pc.equal(pc.field("kind"), "meaning"),
    "kind word": pc.equal(pc.field("kind"), "word"),
    "evidence concept": pc.equal(pc.field("evidence"), "concept"),
    "flagged": pc.field("flagged"),
    "verified": pc.field("verified"),
}


KNOWN = 0.5
"""A judge that knows fewer of the words it is asked about is out of its depth."""


@dataclass(frozen=True)
class Share:
    """k of n units, with an exact 95 % binomial interval."""

    k: int
    n: int

    @property
    def interval(self) -> tuple[float | None, float | None, float | None]:
        """(share, low, high); nulls where there are no units."""
        return interval(self.k, self.n)

    def __str__(self) -> str:
        share, low, high = self.interval
        if share is None or low is None or high is None:
            return "none"
        return f"{share:6.1%} [{low:.1%}, {high:.1%}] of {self.n}"


def shares(run: RunDir) -> dict[str, tuple[Share, Share]]:
    """Measure -> (the model's units, its decoys)."""
    units = run.table("results")
    decoys = run.controls.table("results", filter=pc.field("control") == "decoy")
    return {name: (_share(units, which), _share(decoys, which)) for name, which in MEASURES.items()}


def concepts(run: RunDir) -> dict[str, Any] | None:
    """Units searched and claimed, how the judge did, and at how many units it is out of its depth; None without concepts."""
    if not run.complete("concepts"):
        return None
    told = json.loads(run.files.read("judge.json"))
    if told["judge"] is None:
        return None
    table = run.table("concepts", columns=["claimed", "known", "status"]).filter(pc.field("status") != "too_few")
    deep = table.filter(pc.field("known") < KNOWN).num_rows
    return {**told, "searched": table.num_rows, "claimed": pc.sum(table["claimed"]).as_py() or 0, "deep": deep}


def exceeds(units: Share, decoys: Share) -> bool:
    """Whether the units' share lies above the decoys' beyond both intervals."""
    low, high = units.interval[1], decoys.interval[2]
    return low is not None and high is not None and low > high


def _share(table: pa.Table, which: pc.Expression) -> Share:
    return Share(table.filter(which).num_rows, table.num_rows)

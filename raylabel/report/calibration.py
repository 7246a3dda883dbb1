"""How the controls fared, and which settings keep those that mean nothing out.

`recall` sums the table `calibration` over layers: planted units by what makes them hard, and the controls that mean
nothing. `sweep` asks of every combination of three thresholds how many controls would be verified under it: the
false-positive rate of nulls and of decoys, and the recall of planted units.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from raylabel.report.summary import Share
from raylabel.stages.planting import DIFFICULTIES
from raylabel.store.rundir import RunDir

Q = (0.01, 0.05, 0.1, 0.2)
DECOY_RATE = (1.0, 0.2, 0.05, 0.01)
NORMALISED = (0.1, 0.25, 0.5)
LEVEL = 0.05
MEANINGLESS = ("decoy", "null")


@dataclass(frozen=True)
class Setting:
    """What would be verified with other thresholds; shares are None where there is no such control.

    Attributes:
        q: of kind `meaning`; kind `word` has none. decoy_rate, normalised: of all.
        recall: of planted units. nulls, decoys: false positives.
    """

    q: float
    decoy_rate: float
    normalised: float
    recall: Share | None
    nulls: Share | None
    decoys: Share | None

    @property
    def reaches(self) -> bool:
        """Whether nulls and decoys, those there are, pass at LEVEL at most."""
        rates = [s.interval[0] for s in (self.nulls, self.decoys) if s is not None]
        return bool(rates) and all(rate is not None and rate <= LEVEL for rate in rates)


def recovery(run: RunDir) -> dict[str, tuple[Share, Share | None]]:
    """Kind of control, as in `recall` -> (concepts claimed, planted lists recovered); {} for a run without concepts."""
    sums: dict[str, list[Any]] = {}
    for row in run.table("calibration").to_pylist():
        if row["claimed"] is not None:
            own = sums.setdefault(_kind(row), [0, 0, None])
            own[0] += row["n"]
            own[1] += row["claimed"]
            if row["recovered"] is not None:
                own[2] = (own[2] or 0) + row["recovered"]
    return {
        name: (Share(claimed, n), None if known is None else Share(known, n))
        for name, (n, claimed, known) in sorted(sums.items(), key=_rank)
    }


def _kind(row: dict[str, Any]) -> str:
    return row["control"] if row["difficulty"] is None else f"planted: {row['difficulty']}"


def _rank(item: tuple[str, Any]) -> int:
    order = [*MEANINGLESS, *(f"planted: {name}" for name in DIFFICULTIES)]
    return order.index(item[0]) if item[0] in order else len(order)


def recall(run: RunDir) -> dict[str, tuple[Share, Share]]:
    """Kind of control, planted ones by difficulty -> (flagged, verified) over all layers."""
    sums: dict[str, np.ndarray] = {}
    for row in run.table("calibration").to_pylist():
        name = _kind(row)
        counts = np.array([row["n"], row["flagged"], row["verified"]])
        sums[name] = sums.get(name, 0) + counts
    found = sorted(sums.items(), key=_rank)
    return {name: (Share(int(k), int(n)), Share(int(v), int(n))) for name, (n, k, v) in found}


def sweep(run: RunDir) -> list[Setting]:
    """Every combination of thresholds, the one with the highest recall first."""
    results = run.controls.table("results")
    columns = {name: results.column(name).to_pylist() for name in ("control", "kind", "evidence", "status")}
    numbers = {name: _floats(results, name) for name in ("q_value", "decoy_rate", "normalised_activation")}
    kind, control = np.array(columns["kind"], object), np.array(columns["control"], object)
    # A unit without evidence was not measured, or nothing that was tried mattered: no threshold mends that.
    shown = np.array([e not in (None, "none") for e in columns["evidence"]]) & (np.array(columns["status"], object) == "ok")
    settings = []
    fdr = run.config["identify"]["fdr"]
    # What was not flagged was not verified: nothing is known of it at a larger q.
    levels = [q for q in Q if fdr is None or q < fdr] + ([fdr] if fdr is not None else [])
    for q, rate, least in product(levels, DECOY_RATE, NORMALISED):
        # In the tables' own precision: what was decided with a threshold must not fall on its other side here.
        alike = np.where(kind == "meaning", numbers["q_value"] <= np.float32(q), kind == "word")
        # Decoys have no decoy rate of their own: they are the measure.
        rare = np.isnan(numbers["decoy_rate"]) | (numbers["decoy_rate"] <= np.float32(rate))
        passed = shown & alike & rare & (np.nan_to_num(numbers["normalised_activation"], nan=-np.inf) >= np.float32(least))
        shares: dict[str, Share | None] = {}
        for name in ("planted", "null", "decoy"):
            mine = control == name
            shares[name] = Share(int(passed[mine].sum()), int(mine.sum())) if mine.any() else None
        settings.append(Setting(q, rate, least, shares["planted"], shares["null"], shares["decoy"]))
    return sorted(settings, key=lambda s: (-(s.recall.k if s.recall else 0), s.q, s.decoy_rate, -s.normalised))


def _floats(table: Any, name: str) -> np.ndarray:
    found: np.ndarray = table.column(name).to_numpy(zero_copy_only=False).astype(np.float32)
    return found

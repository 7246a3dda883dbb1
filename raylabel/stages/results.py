"""results: one row per unit and polarity, whatever became of it, and `calibration`: how the controls fared.

Until a labeller has run, the label is made of the MAT words and `label_source` says so.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest

from raylabel.config import RunConfig
from raylabel.stages.base import Stage, Step, blame_neurons
from raylabel.stages.failures import failure_rows
from raylabel.stages.units import polarities, wanted_units
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Output, Shard
from raylabel.tables import from_rows

LABEL_WORDS = 4
SOURCE = "MAT words"
CONFIDENCE = 0.95
_FROM_CANDIDATES = (
    "family_similarity", "phrase_similarity", "q_value", "decoy_rate", "kind", "flagged", "status", "mats", "phrases",
)  # fmt: skip
_FROM_VERIFICATIONS = (
    "average_activation", "normalised_activation", "retention", "specificity", "evidence", "verified",
)  # fmt: skip
Row = dict[str, Any]


def label(words: list[str], families: list[int], kind: str | None) -> tuple[str, str]:
    """(label, description) made of MAT words: one word a family, the most frequent families first."""
    shown: dict[int, str] = {}
    for word, family in zip(words, families, strict=True):
        shown.setdefault(family, word)
    counts = Counter(families)
    order = sorted(shown, key=lambda family: (-counts[family], family))[:LABEL_WORDS]
    named = [visible(shown[family]) for family in order]
    text = ", ".join(named)
    how = {"word": "one word or its forms", "meaning": "words that mean alike"}.get(kind or "", "words without a shared sense")
    return text, f"from the {SOURCE}, no labeller has run: {how}: {text}"


def visible(text: str) -> str:
    """White space made visible."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") if not text.strip() else text


def interval(k: int, n: int) -> tuple[float | None, float | None, float | None]:
    """Share k/n and its exact binomial interval (Clopper and Pearson 1934); nulls for n = 0."""
    if n == 0:
        return None, None, None
    found = binomtest(k, n).proportion_ci(CONFIDENCE)
    return k / n, float(found.low), float(found.high)


def join(
    neurons: list[int], signs: tuple[int, ...], candidates: list[Row], verifications: list[Row], statistics: list[Row],
    failed: dict[tuple[int, int | None], str], site: str,
) -> list[Row]:  # fmt: skip
    """Rows of `results` for all wanted neurons of a layer, from the rows of the other tables.

    Args:
        failed: (neuron, polarity) -> reason, for what is in `failures`; polarity None stands for both.
    """
    found = [{(r["neuron"], r["polarity"]): r for r in rows} for rows in (candidates, verifications, statistics)]
    rows = []
    for neuron in neurons:
        for sign in signs:
            candidate, verification, numbers = (table.get((neuron, sign)) for table in found)
            row: Row = {"neuron": neuron, "polarity": sign, "site": site, "flagged": False, "verified": False}
            why = failed.get((neuron, None)) or failed.get((neuron, sign))
            row["status"] = "too_few"
            if candidate is not None:
                row |= {name: candidate[name] for name in _FROM_CANDIDATES}
                if candidate["mat_words"]:
                    text, description = label(candidate["mat_words"], candidate["families"], candidate["kind"])
                    row |= {"label": text, "description": description, "label_source": SOURCE}
            if verification is not None:
                row |= {name: verification[name] for name in _FROM_VERIFICATIONS}
            if numbers is not None:
                row["max"] = numbers["max"]
            if why is not None:
                row |= {"status": "failed", "flagged": False, "verified": False, "description": why}
            rows.append(row)
    return rows


class ResultsWorker:
    """`results` of a layer."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.facts = self.run.resolved

    def __call__(self, unit: Unit) -> Output:
        layer = unit.key["layer"]
        neurons = wanted_units(self.config, self.facts)[layer]
        site = self.facts["sites"][layer]
        failures = [f for f in failure_rows(self.run) if f.get("layer") == layer]
        mine, theirs = (
            {(f["neuron"], f.get("polarity")): f["reason"] for f in failures if f.get("control") == control}
            for control in (None, "decoy")
        )
        rows = join(neurons, polarities(self.config, self.facts), *self._tables(self.run, layer), mine, site)
        shards = [Shard("results", from_rows(rows, "results"), layer)]
        decoys = list(range(self.config.controls.decoys))
        if decoys:
            rows = join(decoys, (1,), *self._tables(self.run.controls, layer), theirs, site)
            rows = [{**row, "control": "decoy"} for row in rows]
            shards.append(Shard("results", from_rows(rows, "results", controls=True), layer, controls=True))
        return Output(shards)

    def _tables(self, run: RunDir, layer: int) -> tuple[list[Row], list[Row], list[Row]]:
        statistics = run.table("statistics", layer, columns=["neuron", "polarity", "max"])
        return (
            run.table("candidates", layer).to_pylist(), run.table("verifications", layer).to_pylist(),
            statistics.to_pylist(),
        )  # fmt: skip


class CalibrationWorker:
    """`calibration`: the controls' rates of being flagged, verified and labelled, a layer each."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)

    def __call__(self, unit: Unit) -> Output:
        return Output([Shard("calibration", calibration(self.run.controls.table("results")))])


def calibration(results: pa.Table) -> pa.Table:
    """Rows of `calibration` from the controls' `results`."""
    rows = []
    for layer in sorted(set(results.column("layer").to_pylist())):
        here = results.filter(pc.field("layer") == layer)
        for control in sorted(set(here.column("control").to_pylist())):
            units = here.filter(pc.field("control") == control)
            row: Row = {"control": control, "layer": layer, "n": units.num_rows}
            hits = {
                "flagged": pc.sum(units.column("flagged")).as_py() or 0,
                "verified": pc.sum(units.column("verified")).as_py() or 0,
                "labelled": pc.sum(pc.invert(pc.is_null(units.column("score")))).as_py() or 0,
            }
            for name, k in hits.items():
                row[name] = k
                row |= dict(zip((f"{name}_rate", f"{name}_low", f"{name}_high"), interval(k, units.num_rows), strict=True))
            rows.append(row)
    return from_rows(rows, "calibration")


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    units = wanted_units(config, run.resolved)
    keys = [{"layer": layer, "first": neurons[0], "last": neurons[-1] + 1} for layer, neurons in units.items()]
    return [
        Step("rows", keys, ResultsWorker, blame=blame_neurons),
        Step("calibration", [{}], CalibrationWorker),
    ]


RESULTS = Stage(
    name="results", version=1, needs=("scan", "identify", "verify"), tables=("results", "calibration"), steps=_steps,
    facts=("units",), reads=("subject.polarity", "run.format"),
)  # fmt: skip

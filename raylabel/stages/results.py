"""results: one row per unit and polarity, whatever became of it, and `calibration`: how the controls fared.

What the run has of concepts, labels and scores comes in; without a labeller the label is made of the MAT words, and
`label_source` says so.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import binomtest

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sources.records import without_model
from raylabel.stages.base import Stage, Step, blame_neurons
from raylabel.stages.failures import failure_rows
from raylabel.stages.planting import from_json
from raylabel.stages.textual import PLANTED
from raylabel.stages.units import polarities, wanted_units
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Output, Shard
from raylabel.tables import from_rows
from raylabel.words.families import stem
from raylabel.words.lists import load_lists
from raylabel.words.segment import words

LABEL_WORDS = 4
SOURCE = "MAT words"
CONFIDENCE = 0.95
AGREEMENT = "agreement"
"""The scorer whose rows hold how far a label and the concept found without it agree."""
WORDING = ("describe", "score")
"""Stages whose failures leave what was measured as it is: the unit has no label in words, or no score, but is not failed."""
RECOVERED = 5
"""Words of a concept among which the planted list may be."""
OPTIONAL = ("concepts", "labels", "scores")
_FROM_CANDIDATES = (
    "family_similarity", "phrase_similarity", "q_value", "decoy_rate", "kind", "flagged", "status", "mats", "phrases",
)  # fmt: skip
_FROM_VERIFICATIONS = (
    "average_activation", "normalised_activation", "retention", "specificity", "evidence", "verified",
)  # fmt: skip
Row = dict[str, Any]


def label(mats: list[str], families: list[int], kind: str | None) -> tuple[str, str]:
    """(label, description) made of MAT words: one word a family, the most frequent families first."""
    shown: dict[int, str] = {}
    for word, family in zip(mats, families, strict=True):
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
    neurons: list[int], signs: tuple[int, ...], tables: dict[str, list[Row]], failed: dict[tuple[int, int | None], str],
    site: str,
) -> list[Row]:  # fmt: skip
    """Rows of `results` for all wanted neurons of a layer, from the rows of the other tables.

    Args:
        tables: rows of `candidates`, `verifications`, `statistics` and, where the run has them, of `OPTIONAL`.
        failed: (neuron, polarity) -> reason, for what is in `failures`; polarity None stands for both.
    """
    names = ("candidates", "verifications", "statistics", "concepts", "labels")
    found = [{(r["neuron"], r["polarity"]): r for r in tables.get(name, [])} for name in names]
    scores: dict[tuple[int, int], list[Row]] = {}
    for one in tables.get("scores", []):
        scores.setdefault((one["neuron"], one["polarity"]), []).append(one)
    rows = []
    for neuron in neurons:
        for sign in signs:
            candidate, verification, numbers, concept, given = (table.get((neuron, sign)) for table in found)
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
            if concept is not None:
                row |= {"concept_words": concept["words"], "claimed": concept["claimed"]}
            if given is not None:
                row |= {"label": given["label"], "description": given["description"], "label_source": given["explainer"]}
            row |= scored(scores.get((neuron, sign), []), row.get("label_source"))
            if numbers is not None:
                row["max"] = numbers["max"]
            if why is not None:
                row |= {"status": "failed", "flagged": False, "verified": False, "description": why}
            rows.append(row)
    return rows


def scored(scores: list[Row], source: str | None) -> Row:
    """`score`, the mean of the corrected values of a unit's label over scorers, with the mean interval, and `agreement`.

    Null where there is none; the interval where a scorer has none.
    """
    mine = [s for s in scores if s["label_source"] == source and s["scorer"] != AGREEMENT and s["corrected"] is not None]
    row: Row = {}
    for name, column in (("score", "corrected"), ("score_low", "low"), ("score_high", "high")):
        values = [s[column] for s in mine if s.get(column) is not None]
        row[name] = sum(values) / len(values) if values and len(values) == len(mine) else None
    agreement = [s["corrected"] for s in scores if s["label_source"] == source and s["scorer"] == AGREEMENT]
    return {**row, "agreement": agreement[0] if agreement else None}


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
        failures = [f for f in failure_rows(self.run) if f.get("layer") == layer and f["stage"] not in WORDING]
        wanted = self.config.controls
        kinds = {"decoy": wanted.decoys, "null": wanted.nulls, "planted": wanted.planted}
        failed = {
            kind: {(f["neuron"], f.get("polarity")): f["reason"] for f in failures if f.get("control") == kind}
            for kind in (None, *kinds)
        }
        signs = polarities(self.config, self.facts)
        rows = join(neurons, signs, self._tables(self.run, layer, None), failed[None], site)
        if without_model(self.config):
            rows = [{**row, "verified": None} for row in rows]
        shards = [Shard("results", from_rows(rows, "results"), layer)]
        rows = []
        for kind, n in kinds.items():
            found = join(list(range(n)), (1,), self._tables(self.run.controls, layer, kind), failed[kind], site) if n else []
            rows += [{**row, "control": kind} for row in found]
        if rows:
            rows.sort(key=lambda row: row["neuron"])
            shards.append(Shard("results", from_rows(rows, "results", controls=True), layer, controls=True))
        return Output(shards)

    def _tables(self, run: RunDir, layer: int, kind: str | None) -> dict[str, list[Row]]:
        """Rows of a layer's tables, of one kind of control or of the model's own units."""
        condition = None if kind is None else pc.field("control") == kind
        names = ["candidates", "verifications", *(name for name in OPTIONAL if self.run.complete(name))]
        tables = {name: run.table(name, layer, filter=condition).to_pylist() for name in names}
        columns = ["neuron", "polarity", "max"]
        tables["statistics"] = run.table("statistics", layer, filter=condition, columns=columns).to_pylist()
        return tables


class CalibrationWorker:
    """`calibration`: the controls' rates of being flagged, verified and labelled, a layer and a difficulty each.

    A unit counts as labelled where its label's score lies above 0 with its whole interval.
    """

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)

    def __call__(self, unit: Unit) -> Output:
        truth = recoverable(self.run) if self.run.complete("concepts") else None
        return Output([Shard("calibration", calibration(self.run.controls.table("results"), difficulties(self.run), truth))])


def difficulties(run: RunDir) -> dict[tuple[int, int], str]:
    """(layer, neuron) of each planted unit -> what makes it hard."""
    if not run.config["controls"]["planted"]:
        return {}
    plants = from_json(json.loads(run.files.read("planted.json")))
    return {(layer, p.neuron): p.difficulty for layer, found in plants.items() for p in found if p.control == PLANTED}


def recoverable(run: RunDir) -> dict[tuple[int, int], set[str]]:
    """(layer, neuron) of each planted unit -> stems of what its concept may be called.

    These are the words it fires on at full strength, and the names and all words of the lists that they are from.
    """
    if not run.config["controls"]["planted"]:
        return {}
    try:
        lists = load_lists(run.config["controls"]["lists"])
    except BadInput:
        # The file may be gone; what was planted from it is still there.
        lists = {}
    found: dict[tuple[int, int], set[str]] = {}
    for layer, plants in from_json(json.loads(run.files.read("planted.json"))).items():
        for p in plants:
            if p.control == PLANTED:
                full = [name for name in p.lists if not p.weak or name == p.lists[0]]
                named = [word for name in full for word in words(name)]
                mates = [word for name in full for word in lists.get(name, [])]
                found[layer, p.neuron] = {stem(word) for word in (*p.words, *named, *mates)}
    return found


def calibration(
    results: pa.Table, difficulty: dict[tuple[int, int], str], truth: dict[tuple[int, int], set[str]] | None = None
) -> pa.Table:
    """Rows of `calibration` from the controls' `results`.

    Args:
        difficulty: of planted units by (layer, neuron).
        truth: of `recoverable`; None for a run without concepts. A planted unit is recovered if one of the first RECOVERED
            words of its concept is among them.
    """
    keys = zip(*(results.column(name).to_pylist() for name in ("layer", "neuron", "control")), strict=True)
    hard = [difficulty.get((layer, neuron)) if control == PLANTED else None for layer, neuron, control in keys]
    results = results.append_column("difficulty", pa.array(hard, pa.string()))
    rows = []
    for layer in sorted(set(results.column("layer").to_pylist())):
        here = results.filter(pc.field("layer") == layer)
        pairs = set(zip(here.column("control").to_pylist(), here.column("difficulty").to_pylist(), strict=True))
        for control, kind in sorted(pairs, key=lambda pair: (pair[0], pair[1] or "")):
            same = pc.is_null(pc.field("difficulty")) if kind is None else pc.field("difficulty") == kind
            units = here.filter((pc.field("control") == control) & same)
            row: Row = {"control": control, "difficulty": kind, "layer": layer, "n": units.num_rows}
            hits = {
                "flagged": pc.sum(units.column("flagged")).as_py() or 0,
                "verified": pc.sum(units.column("verified")).as_py() or 0,
                "labelled": pc.sum(pc.greater(units.column("score_low"), 0)).as_py() or 0,
            }
            for name, k in hits.items():
                row[name] = k
                row |= dict(zip((f"{name}_rate", f"{name}_low", f"{name}_high"), interval(k, units.num_rows), strict=True))
            if truth is not None:
                row |= _concepts(units, truth)
            rows.append(row)
    return from_rows(rows, "calibration")


def _concepts(units: pa.Table, truth: dict[tuple[int, int], set[str]]) -> Row:
    """How many units' concepts were claimed, and recovered where there is something to recover."""
    columns = (units.column(name).to_pylist() for name in ("layer", "neuron", "control", "concept_words"))
    hits = {"claimed": pc.sum(units.column("claimed")).as_py() or 0}
    known = [
        any(stem(word) in truth[layer, neuron] for word in (found or [])[:RECOVERED])
        for layer, neuron, control, found in zip(*columns, strict=True)
        if control == PLANTED and truth.get((layer, neuron))
    ]
    if known:
        hits["recovered"] = sum(known)
    row: Row = {}
    for name, k in hits.items():
        row[name] = k
        row |= dict(zip((f"{name}_rate", f"{name}_low", f"{name}_high"), interval(k, units.num_rows), strict=True))
    return row


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    units = wanted_units(config, run.resolved)
    keys = [{"layer": layer, "first": neurons[0], "last": neurons[-1] + 1} for layer, neurons in units.items()]
    return [
        Step("rows", keys, ResultsWorker, blame=blame_neurons),
        Step("calibration", [{}], CalibrationWorker),
    ]


RESULTS = Stage(
    name="results", version=4, needs=("scan", "identify", "verify"), tables=("results", "calibration"), steps=_steps,
    uses=("optimize", "describe", "score"), facts=("units",), reads=("subject.polarity", "run.format"),
)  # fmt: skip

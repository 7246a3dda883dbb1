"""The stage score: every label of a range of neurons, or of controls, tested on the score split.

Labels are those of `describe`, and the words of `concepts`, where the run has them; without a labeller, the MAT words. Each
label's test is the same for the other units' labels it is compared with. The judge and the word vectors answer here, a
language model through the client. What a scorer cannot test has null values and `n` = 0; what failed is a failure.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raylabel.config import RunConfig
from raylabel.errors import BadInput, RunFailed
from raylabel.stages.base import Stage, Step, blame_neurons, halve_neurons, with_controls
from raylabel.stages.identify_stage import open_background
from raylabel.stages.results import SOURCE, label
from raylabel.stages.score import SHUFFLED, Labelled, Leak, Trial, Unit, around, other_labels, refuse_leak, trial
from raylabel.stages.score_llm import ASKED, ask_all
from raylabel.stages.score_local import answers, likeness
from raylabel.stages.score_meanings import apart, several
from raylabel.stages.score_measure import PEAKS, Negatives, Wish
from raylabel.stages.score_rows import CONCEPT, UNASSISTED, agreement_row, of_windows, of_words, row_of, sort_rows
from raylabel.stages.units import wanted_units
from raylabel.store.plan import Unit as WorkUnit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Output, Shard
from raylabel.tables import from_rows

NEURONS = 64
"""Neurons of a work unit."""
Row = dict[str, Any]
Labels = dict[str, dict[Unit, str]]
"""By label source and unit."""


class Scorer:
    """The scorers of a run, each opened when it is first needed."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self.run, self.config = run, config
        self.facts = run.resolved
        self.tally: Row = {}
        """What the last call of `rows` asked of a language model, and what that took."""

    @cached_property
    def judge(self) -> Any:
        """The judge, if it beats chance."""
        from raylabel.models.judge import load_judge

        wanted = self.config.optimize
        device = self.facts["device"].split(":")[0]
        found = load_judge(wanted.judge, template=wanted.template, device=device)
        found.check().require(wanted.judge)
        return found

    @cached_property
    def background(self) -> Any:
        """Word vectors of the run's text."""
        return open_background(self.run, self.config)

    @cached_property
    def negatives(self) -> Negatives | None:
        """What measures silent windows; None where the exemplars are not the subject's own over a corpus."""
        return Negatives(self.run, self.config, self.background) if self.config.exemplars.source == "corpus" else None

    def trials(self, run: RunDir, layer: int, neurons: tuple[int, int], units: set[Unit]) -> dict[Unit, Trial]:
        """The tests of units in a range of a layer; `run` is the run or its controls. Units that never fire have none."""
        special = set(self.facts["special_ids"])
        columns = ["neuron", "polarity", "max", *(["control"] if run.in_controls else [])]
        numbers = run.table("statistics", layer, neurons, columns=columns).to_pylist()
        largest = {unit_of(row): row["max"] for row in numbers}
        exemplars: dict[Unit, list[Row]] = {}
        wanted = pc.field("neuron").isin(sorted({unit[1] for unit in units}))
        for row in run.table("exemplars", layer, neurons, filter=wanted).to_pylist():
            exemplars.setdefault(unit_of(row), []).append(row)
        alive = [u for u in sorted(units, key=order) if u in exemplars and (largest.get(u) or 0.0) > 0]
        measured = {} if self.negatives is None else self.negatives(layer, [wish(u, exemplars[u], largest[u]) for u in alive])
        options = {"size": self.config.score.window, "negatives": self.config.score.negatives, "seed": self.config.run.seed}
        return {
            unit: trial(unit, exemplars[unit], largest[unit], special=special, measured=measured.get(unit, ()), **options)
            for unit in alive
        }

    def rows(self, layer: int, items: list[Labelled]) -> tuple[list[Row], list[Row]]:
        """(rows of `scores`, failures) of labelled units of a layer."""
        seed, rows, failures = self.config.run.seed, list[Row](), list[Row]()
        self.tally = {}
        if not items:
            return rows, failures
        wanted = self.config.score.scorers
        if "judge" in wanted:
            found = answers(self.judge, [(item.trial, item.labels) for item in items])
            rows += [
                row_of(item, "judge", of_words(item, given), seed, layer) for item, (given, _) in zip(items, found, strict=True)
            ]
            rows += self._agreements(layer, items, [odds for _, odds in found])
        if "embedding" in wanted:
            for item in items:
                got = likeness(self.background, item.trial.whole(), item.labels)
                rows.append(row_of(item, "embedding", of_windows(item, got, graded=True), seed, layer))
        if set(wanted) & set(ASKED):
            answered, self.tally = ask_all(self.run, self.config, items)
            for item, scorer, answer in answered:
                if isinstance(answer, str):
                    failures.append(failure(layer, item, f"{scorer} of {item.source!r}: {answer}"))
                else:
                    rows.append(row_of(item, scorer, answer, seed, layer))
        return rows, failures

    def _agreements(self, layer: int, items: list[Labelled], odds: list[np.ndarray]) -> list[Row]:
        concepts = {item.trial.unit: got[0] for item, got in zip(items, odds, strict=True) if item.source == CONCEPT}
        found = [
            agreement_row(item, got[: 1 + len(item.others)], concepts[item.trial.unit], self.config.run.seed, layer)
            for item, got in zip(items, odds, strict=True)
            if item.source not in (CONCEPT, *UNASSISTED) and item.trial.unit in concepts
        ]
        return [row for row in found if row is not None]


def wish(unit: Unit, rows: list[Row], largest: float) -> Wish:
    """What hard negatives of a unit hold."""
    top = [r for r in rows if r["split"] == "explain" and r["sampling"] == "top"]
    top = sorted(top, key=lambda r: r["rank"])
    ids = [r["token_ids"][r["position"]] for r in top]
    words = [around(r, len(r["tokens"]), (), 0).word for r in top]
    return Wish(unit, largest, list(dict.fromkeys(ids))[:PEAKS], list(dict.fromkeys(words))[:PEAKS])


def unit_of(row: Row) -> Unit:
    """The unit that a row of a table is about."""
    return row.get("control"), row["neuron"], row["polarity"]


def failure(layer: int, item: Labelled, why: str) -> Row:
    """A row for `failures`."""
    control, neuron, polarity = item.trial.unit
    row: Row = {"layer": layer, "neuron": neuron, "polarity": polarity, "reason": why}
    return {**row, "control": control} if control is not None else row


def order(unit: Unit) -> tuple[Any, ...]:
    """Units in the order of the tables."""
    return unit[1], unit[0] or "", -unit[2]


def labels_of(run: RunDir, layer: int) -> Labels:
    """All labels of a layer's units, or of its controls. Empty ones are none."""
    found: Labels = {}
    for table, column in (("labels", "label"), ("concepts", "label")):
        if not RunDir(run.files.url).complete(table):
            continue
        for row in run.table(table, layer).to_pylist():
            text = (row[column] or "").strip()
            source = row["explainer"] if table == "labels" else CONCEPT
            if text:
                found.setdefault(source, {})[unit_of(row)] = text
    if set(found) - {CONCEPT}:
        return found
    named = {}
    for row in run.table("candidates", layer, filter=pc.field("flagged")).to_pylist():
        if row["mat_words"]:
            named[unit_of(row)] = label(row["mat_words"], row["families"], row["kind"])[0]
    return {**found, SOURCE: named} if named else found


def others_of(unit: Unit, source: str, labels: Labels, seed: int) -> list[str]:
    """Other units' labels of the same source, and of the other ones where it has too few."""
    found = other_labels(unit, labels[source], seed)
    for name in sorted(labels):
        if len(found) < SHUFFLED and name not in (source, CONCEPT):
            more = other_labels(unit, {**labels[name], unit: labels[source][unit]}, seed)
            found = list(dict.fromkeys([*found, *(text for text in more if text != labels[source][unit])]))
    return found[:SHUFFLED]


def wanted(run: RunDir, layer: int, neurons: tuple[int, int], which: str, units: set[Unit]) -> set[Unit]:
    """The units among `units` whose labels are tested."""
    if which == "all":
        return units
    table, column = {"flagged": ("candidates", "flagged"), "verified": ("verifications", "verified")}[which]
    columns = ["neuron", "polarity", *(["control"] if run.in_controls else [])]
    return {unit_of(row) for row in run.table(table, layer, neurons, filter=pc.field(column), columns=columns).to_pylist()}


class ScoreWorker:
    """`scores` of a range of neurons of a layer, or of its controls."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.scorer = Scorer(self.run, self.config)

    def __call__(self, unit: WorkUnit) -> Output:
        layer, controls = unit.key["layer"], unit.key["controls"]
        neurons = unit.key["first"], unit.key["last"]
        run = self.run.controls if controls else self.run
        labels = labels_of(run, layer)
        inside = {u for named in labels.values() for u in named if neurons[0] <= u[1] < neurons[1]}
        inside &= wanted(run, layer, neurons, self.config.score.units, inside)
        trials = self.scorer.trials(run, layer, neurons, inside)
        seed = self.config.run.seed
        items = [
            Labelled(found, source, labels[source][u], others_of(u, source, labels, seed))
            for u, found in trials.items() for source in sorted(labels) if u in labels[source]
        ]  # fmt: skip
        self._part(run, layer, neurons, items)
        rows, failures = self.scorer.rows(layer, items)
        table = from_rows(sort_rows(rows), "scores", bool(controls))
        return Output([Shard("scores", table, layer, bool(controls))], failures=failures, notes=self.scorer.tally)

    def _part(self, run: RunDir, layer: int, neurons: tuple[int, int], items: list[Labelled]) -> None:
        """Sets the meanings of those labels that have several."""
        given = several(run, layer)
        wanted = {item.trial.unit for item in items if (item.source, item.trial.unit) in given}
        if not wanted:
            return
        numbers = pc.field("neuron").isin(sorted({unit[1] for unit in wanted}))
        tables = {name: run.table(name, layer, neurons, filter=numbers).to_pylist() for name in ("exemplars", "candidates")}
        rows: dict[Unit, list[Row]] = {}
        for row in tables["exemplars"]:
            rows.setdefault(unit_of(row), []).append(row)
        candidates = {unit_of(row): row for row in tables["candidates"]}
        background, special = self.scorer.background, set(self.run.resolved["special_ids"])
        for item in items:
            unit = item.trial.unit
            if (item.source, unit) in given and unit in candidates:
                found = apart(
                    given[item.source, unit], rows[unit], candidates[unit], item.trial, special, self.config.identify.window,
                    lambda words, phrases: (background.words(words), background.phrases(phrases)),
                )  # fmt: skip
                if found is not None:
                    item.meanings, item.belongs = found.labels, found.belongs


def refuse_leaks(run: RunDir) -> None:
    """RunFailed if a document has samples in both splits: a label would be tested on what it was made from."""
    table = run.table("samples", columns=["document", "split"])
    explain = pc.equal(table["split"], "explain")
    documents = [pc.unique(table["document"].filter(mask)).to_pylist() for mask in (explain, pc.invert(explain))]
    try:
        refuse_leak(*documents)
    except Leak as error:
        raise RunFailed(f"score: {error}") from None


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    refuse_leaks(run)
    asking = [name for name in config.score.scorers if name in ASKED]
    if asking and not config.describe.model:
        raise BadInput(
            f"score.scorers: {asking[0]} asks a language model; set describe.model and describe.base_url, or leave it out"
        )
    keys = with_controls(wanted_units(config, run.resolved), config.controls, NEURONS)
    return [Step("tests", keys, ScoreWorker, divide=halve_neurons, blame=blame_neurons, model=True, limited=True)]


SCORE = Stage(
    name="score", version=2, needs=("scan", "identify", "verify", "tokenize"), tables=("scores",), steps=_steps,
    uses=("describe", "optimize"),
    reads=("score", "optimize.judge", "optimize.template", "describe.model", "run.seed", "run.format"),
)  # fmt: skip

"""audit: somebody else's labels, tested on what a run held back, beside the run's own.

The tests are those of the stage `score`: the same windows, none of which the run's own labels were made from, the same
scorers, other units' labels out of the same hand, and the lookup table. Nothing is written to the run directory but what
the client keeps in its cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sources.labels import Given, Unreadable
from raylabel.stages.results import AGREEMENT
from raylabel.stages.score import Labelled, Unit
from raylabel.stages.score_rows import CONCEPT, MEASURES, UNASSISTED
from raylabel.stages.score_stage import Scorer, labels_of, others_of, refuse_leaks
from raylabel.store.rundir import RunDir

Row = dict[str, Any]
SHOWN = (
    "value", "shuffled", "corrected", "low", "high", "lookup", "n", "n_failed", "corrected_hard", "low_hard", "high_hard",
    "n_hard",
)  # fmt: skip


def audit(run: RunDir, labels: Iterable[Given], scorers: list[str] | None = None) -> tuple[list[Row], list[Unreadable]]:
    """(a row a label and scorer, worst first; labels that could not be tested, with the reason).

    A row has `layer`, `neuron`, `polarity`, `label`, `scorer`, what `scores` says of it, `our_label` and `our_*`, the same of
    the run's own label. BadInput for a run without exemplars, or where none of the labels is about its units.

    Args:
        scorers: in place of the run's.
    """
    for table in ("samples", "exemplars", "statistics", "candidates"):
        if not run.complete(table):
            run.info  # noqa: B018  (a folder that is no run is the likelier mistake)
            raise BadInput(f"{run.files.url}: no {table} yet; run `raylabel run` again to finish it")
    refuse_leaks(run)
    config = RunConfig.model_validate(run.config)
    if scorers is not None:
        config = config.model_copy(update={"score": config.score.model_copy(update={"scorers": scorers})})
    scorer = Scorer(run, config)
    rows: list[Row] = []
    wrong: list[Unreadable] = []
    given: dict[int, list[Given]] = {}
    for one in labels:
        given.setdefault(one.layer, []).append(one)
    known = set(run.table("statistics", columns=["layer"])["layer"].to_pylist())
    for layer, found in sorted(given.items()):
        if layer not in known:
            wrong += [Unreadable(one.place, f"the run has no layer {layer}") for one in found]
            continue
        some, failed = _layer(scorer, layer, found)
        rows, wrong = rows + some, wrong + failed
    if not rows:
        first = f" ({wrong[0].place}: {wrong[0].reason})" if wrong else ""
        raise BadInput(f"--labels: none of them is about a unit of {run.files.url} that can be tested{first}")

    def worth(row: Row) -> tuple[Any, ...]:
        corrected = row["corrected"]
        return corrected is None, corrected or 0.0, row["layer"], row["neuron"], row["scorer"], row["label"]

    return sorted(rows, key=worth), wrong


def chosen(text: str | None) -> list[str] | None:
    """The scorers of a list separated by commas; BadInput names one that does not exist."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in MEASURES:
            raise BadInput(f"--scorers {name}: no such scorer; scorers are {', '.join(MEASURES)}")
    return names


def run_labels(run: RunDir, layer: int) -> dict[Unit, str]:
    """The label that each of a layer's units has in the run: an explainer's before the built-in one."""
    found: dict[Unit, str] = {}
    labels = {source: named for source, named in labels_of(run, layer).items() if source != CONCEPT}
    for source in sorted(labels, key=lambda name: name in UNASSISTED):
        found = {**labels[source], **found}
    return found


def _layer(scorer: Scorer, layer: int, given: list[Given]) -> tuple[list[Row], list[Unreadable]]:
    own = {source: named for source, named in labels_of(scorer.run, layer).items() if source != CONCEPT}
    ours = run_labels(scorer.run, layer)
    units = {(None, one.neuron, one.polarity) for one in given}
    neurons = min(u[1] for u in units), max(u[1] for u in units) + 1
    trials = scorer.trials(scorer.run, layer, neurons, set(units))
    theirs: dict[tuple[str | None, int, int], str] = {(None, one.neuron, one.polarity): one.label for one in reversed(given)}
    seed = scorer.config.run.seed
    items: list[Labelled] = []
    kept: list[Given] = []
    wrong: list[Unreadable] = []
    for one in given:
        unit = (None, one.neuron, one.polarity)
        if unit not in trials:
            missing = f"the run has no exemplars of layer {layer}, neuron {one.neuron}, polarity {one.polarity:+d}"
            wrong.append(Unreadable(one.place, missing))
            continue
        # A few foreign labels of a layer are compared with the run's own of other units too.
        others = others_of(unit, "theirs", {"theirs": {**theirs, unit: one.label}, **own}, seed)
        kept.append(one)
        # The row's source says which label it is: several may be about one unit.
        items.append(Labelled(trials[unit], f"audit {len(kept) - 1}", one.label, others))
    beside = [
        Labelled(trials[unit], "ours", ours[unit], others_of(unit, "ours", {"ours": ours}, seed))
        for unit in sorted({item.trial.unit for item in items}, key=lambda u: (u[1], u[2])) if unit in ours
    ]  # fmt: skip
    scores, failures = scorer.rows(layer, [*items, *beside])
    for failure in failures:
        wrong.append(Unreadable(f"layer {layer}, neuron {failure['neuron']}", failure["reason"]))
    mine = {(r["neuron"], r["polarity"], r["scorer"]): r for r in scores if r["label_source"] == "ours"}
    rows = []
    for r in scores:
        if r["label_source"] == "ours" or r["scorer"] == AGREEMENT:
            continue
        one = kept[int(r["label_source"].split()[1])]
        our = mine.get((r["neuron"], r["polarity"], r["scorer"]), {})
        row = {"layer": layer, "neuron": one.neuron, "polarity": one.polarity, "label": one.label, "scorer": r["scorer"]}
        row |= {name: r.get(name) for name in SHOWN}
        row |= {"our_label": ours.get((None, one.neuron, one.polarity))}
        row |= {f"our_{name}": our.get(name) for name in ("value", "corrected", "low", "high")}
        rows.append({**row, "place": one.place})
    return rows, wrong

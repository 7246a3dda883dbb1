"""score, from predictions to rows: each scorer's test of each label, against other units' labels and a lookup table.

A Prediction is what a scorer says of one labelled unit: the windows it saw, float [labels, windows] (own label first),
and what the lookup table says of the same windows. `rows_of` makes of it one row of `scores`: random negatives in `value`
to `lookup`, hard ones in the columns `*_hard`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylabel.stages.intervals import draw_seed
from raylabel.stages.results import AGREEMENT, SOURCE
from raylabel.stages.score import Labelled, Window
from raylabel.stages.score_values import Value, agreement, balanced, correlated, ranked

CONCEPT = "concept"
"""The label source of concepts' words."""
UNASSISTED = ("built-in", SOURCE)
"""Label sources that no language model wrote: they share their words with the concept, and agree with it for nothing."""
MEASURES: dict[str, Callable[..., Value]] = {
    "judge": balanced, "detection": balanced, "fuzzing": balanced, "embedding": ranked, "simulation": correlated,
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """What a scorer says of a labelled unit.

    Attributes:
        windows: that it saw.
        answers: [labels, windows], the labels being `Labelled.labels`; NaN for no answer; of a simulation [labels, tokens of all
            windows].
        lookup: [windows], or [tokens]: the lookup table's answers.
        truth: whether each answer should be a yes; None: where the unit is active. Of a simulation, the activations.
    """

    windows: list[Window]
    answers: np.ndarray
    lookup: np.ndarray
    truth: np.ndarray | None = None


def row_of(item: Labelled, scorer: str, found: Prediction, seed: int, layer: int) -> dict[str, Any]:
    """One row of `scores`."""
    draw = draw_seed(seed, layer, item.trial.unit)
    control, neuron, polarity = item.trial.unit
    row: dict[str, Any] = {"neuron": neuron, "polarity": polarity, "label_source": item.source, "scorer": scorer}
    if control is not None:
        row["control"] = control
    windows = found.windows
    counts = np.array([len(w.ids) if scorer == "simulation" else 1 for w in windows], np.int64)
    documents = np.repeat([w.document for w in windows], counts).astype(np.int64)
    yes = np.array([w.active for w in windows], bool) if found.truth is None else found.truth
    hard = np.repeat(np.array([w.hard for w in windows], bool), counts)
    whole = found.answers[: 1 + len(item.others)]
    for suffix, kept in (("", ~hard), ("_hard", hard | (yes if scorer != "simulation" else False))):
        if suffix and not hard.any():
            continue
        parts = whole[:, kept], yes[kept], documents[kept]
        got = MEASURES[scorer](*parts, draw)
        table = MEASURES[scorer](found.lookup[None, kept], *parts[1:], draw)
        row |= {f"{name}{suffix}": number(getattr(got, name)) for name in ("value", "shuffled", "corrected", "low", "high")}
        row |= {f"lookup{suffix}": number(table.value), f"n{suffix}": got.n}
        if not suffix:
            row["n_failed"] = got.n_failed
    if item.meanings:
        # Which meaning a window has; -1 for the silent ones, which all meanings have in common.
        of = np.repeat([item.belongs.get(w.sample, -2) if w.active else -1 for w in windows], counts).astype(np.int64)
        row["meanings"] = []
        for k, (name, own) in enumerate(zip(item.meanings, found.answers[1 + len(item.others) :], strict=True)):
            kept, got = ~hard & ((of == k) | (of == -1)), Value()
            if (of == k).any():
                got = MEASURES[scorer](np.stack([own, *whole[1:]])[:, kept], yes[kept], documents[kept], draw)
            part = {"label": name, "n": got.n, **{c: number(getattr(got, c)) for c in ("corrected", "low", "high")}}
            row["meanings"].append(part)
    return row


def agreement_row(
    item: Labelled, label: np.ndarray, concept: np.ndarray, seed: int, layer: int
) -> dict[str, Any] | None:  # fmt: skip
    """The row `agreement` of a unit; None where the label or the concept has no log-odds.

    Args:
        label: [labels, windows] log-odds of the trial's windows under the own label and the others.
        concept: [windows] under the concept.
    """
    windows = item.trial.windows
    readable = ~np.isnan(label).any(axis=1)
    if len(windows) < 2 or not readable[0] or np.isnan(concept).any():
        return None
    documents = np.array([w.document for w in windows])
    got = agreement(label[0], label[1:][readable[1:]], concept, documents, draw_seed(seed, layer, item.trial.unit))
    control, neuron, polarity = item.trial.unit
    row: dict[str, Any] = {"neuron": neuron, "polarity": polarity, "label_source": item.source, "scorer": AGREEMENT}
    row |= {name: number(getattr(got, name)) for name in ("value", "shuffled", "corrected", "low", "high")}
    row |= {"n": got.n, "n_failed": got.n_failed}
    return {**row, "control": control} if control is not None else row


def number(value: float) -> float | None:
    """None for NaN."""
    return None if math.isnan(value) else float(value)


def of_words(item: Labelled, answers: np.ndarray) -> Prediction:
    """A prediction about the words at the windows' focus."""
    windows, table = item.trial.windows, item.trial.lookup
    return Prediction(windows, answers, np.array([float(table.word(w) >= table.at_word) for w in windows]))


def of_windows(item: Labelled, answers: np.ndarray, graded: bool = False) -> Prediction:
    """A prediction about whole windows: yes or no, or `graded` scores."""
    windows, table = item.trial.whole(), item.trial.lookup
    scores = np.array([table.window(w) for w in windows])
    return Prediction(windows, answers, scores if graded else (scores >= table.at_window).astype(np.float64))


def sort_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By unit, label source and scorer."""
    return sorted(
        rows, key=lambda r: (r["neuron"], r.get("control") or "", -r["polarity"], r["label_source"], r["scorer"])
    )  # fmt: skip

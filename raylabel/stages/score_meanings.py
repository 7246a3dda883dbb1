"""score, several meanings: each meaning of a label is also tested by itself.

The groups that `describe` found among the top exemplars of the explain split stand for the meanings, in this order. An active
window of the score split belongs to the group that its word and phrase are nearest to, by the same vectors and weights; the
meanings' own words have no say in it. A meaning is tested on the active windows that belong to it and on all silent
ones, against the same other units' labels as the whole label; the same questions answer both. A label whose meanings were not
made from the groups (an explainer may find others) is tested as a whole only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raylabel.stages.describe import Vectors, seen
from raylabel.stages.score import Trial, Unit
from raylabel.store.rundir import RunDir
from raylabel.words.meanings import WEIGHTS
from raylabel.words.segment import phrase, without_special

SAME = 1e-3
"""Shares that differ by less are one share."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Meanings:
    """The labels of a unit's meanings, and the meaning of each sample whose active window belongs to one."""

    labels: list[str]
    belongs: dict[int, int]


def several(run: RunDir, layer: int) -> dict[tuple[str, Unit], list[Row]]:
    """(explainer, unit) -> its meanings, of labels with more than one."""
    if not RunDir(run.files.url).complete("labels"):
        return {}
    rows = run.table("labels", layer, filter=pc.list_value_length(pc.field("meanings")) > 1).to_pylist()
    return {(r["explainer"], (r.get("control"), r["neuron"], r["polarity"])): r["meanings"] for r in rows}


def apart(
    given: Sequence[Row], rows: Sequence[Row], candidate: Row, trial: Trial, special: set[int], window: int, vectors: Vectors
) -> Meanings | None:
    """What is known of a unit's meanings in its trial; None where they are not those of the groups.

    Args:
        given: `meanings` of a row of `labels`. rows: the unit's exemplars.
        window: tokens of a phrase, each way. vectors: of words and phrases.
    """
    found = seen(rows, candidate, special, window, vectors)
    if found is None:
        return None
    shares = np.bincount(found.group) / len(found.group)
    if len(shares) != len(given) or np.abs(shares - [m["share"] for m in given]).max() > SAME:
        return None
    phrases = [phrase(r["tokens"], r["position"], window).text for r in found.top]
    centres = [_centres(v, found.group) for v in vectors([p.word for p in found.peaks], phrases)]
    active = {w.sample: w for w in trial.windows if w.active}
    texts: dict[int, str] = {}
    for row in rows:
        if row["split"] == "score" and row["sampling"] != "random" and row["sample"] in active:
            tokens = without_special(row["tokens"], row["token_ids"], special)
            texts.setdefault(row["sample"], phrase(tokens, row["position"], window).text)
    samples = sorted(texts)
    near = vectors([active[sample].word for sample in samples], [texts[sample] for sample in samples])
    alike = sum(weight * (v.astype(np.float64) @ c.T) for weight, v, c in zip(WEIGHTS, near, centres, strict=True))
    known = [bool(v.any()) for v in near[0]]
    belongs = {s: int(np.argmax(a)) for s, a, k in zip(samples, np.asarray(alike), known, strict=True) if k}
    return Meanings([m["label"] for m in given], belongs)


def _centres(vectors: np.ndarray, group: np.ndarray) -> np.ndarray:
    """float64 [groups, dim]: unit vectors of the groups' means."""
    means = np.stack([vectors[group == g].astype(np.float64).mean(axis=0) for g in range(int(group.max()) + 1)])
    length = np.linalg.norm(means, axis=1, keepdims=True)
    return np.divide(means, length, out=np.zeros_like(means), where=length > 1e-9)

"""From the merged state of a group of units to the rows of `statistics`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raylabel.stages import kept

TOP_MEAN = 20
DENSE = 0.1
"""A unit that fires on more than this share of tokens is `dense`, as the literature on latents has it."""


@dataclass(frozen=True)
class Merged:
    """The state of W units over all samples; a column is a unit at one sign, all units at a sign in turn.

    Attributes:
        tokens: positions that counted.
        high, low: [W] float32. fires: [2, W] positions above and below zero. bad: [W] gave NaN or infinity.
        histogram: [W, bins]. powers: [4, W] sums of (activation - shift) ** 1..4, float64.
        lists: arrays of `kept.FIELDS` by list.
        drawn: [R] numbers of the samples kept for all units; drawn_fields: their arrays [C, R, ..].
    """

    tokens: int
    high: np.ndarray
    low: np.ndarray
    fires: np.ndarray
    bad: np.ndarray
    histogram: np.ndarray
    powers: np.ndarray
    lists: dict[str, dict[str, np.ndarray]]
    drawn: np.ndarray
    drawn_fields: dict[str, np.ndarray]

    def random(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The list of these samples, in their order; a sample without a position that counts is empty."""
        place = {number: i for i, number in enumerate(self.drawn.tolist())}
        at = np.array([place[number] for number in numbers.tolist()], dtype=np.int64)
        found = {name: values[:, at] for name, values in self.drawn_fields.items()}
        return found | {"order": np.where(np.isfinite(found["value"]), kept.LOW - numbers, kept.EMPTY)}


def statistics(
    state: Merged, columns: dict[str, np.ndarray], shift: np.ndarray, site: str, effects: dict[str, Any] | None, names: list[str]
) -> list[dict[str, Any]]:
    """Rows of `statistics` for the columns whose unit is not broken.

    Args:
        columns: arrays `neuron`, `polarity` and `row`, the unit among the state's.
        shift: [W] what was taken off before the powers were summed.
        effects: `up`, `down` value arrays [W, k] and `up_ids`, `down_ids` of the direct effect at polarity +1; None for units
            that write nothing.
        names: the tokens' strings.
    """
    n = max(state.tokens, 1)
    with np.errstate(all="ignore"):
        s1, s2, s3, s4 = state.powers / n
        variance = s2 - s1**2
        third = s3 - 3 * s1 * s2 + 2 * s1**3
        fourth = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
        skewness, kurtosis = third / variance**1.5, fourth / variance**2
    best = state.lists["explain.top"]
    top = np.where(best["order"] != kept.EMPTY, best["value"], np.nan)[:, :TOP_MEAN].astype(np.float64)
    rows = []
    for c, (neuron, polarity, r) in enumerate(zip(*(columns[k].tolist() for k in ("neuron", "polarity", "row")), strict=True)):
        if state.bad[r]:
            continue
        positive = polarity > 0
        counts = state.histogram[r] if positive else state.histogram[r][::-1]
        high, low = (state.high[r], state.low[r]) if positive else (-state.low[r], -state.high[r])
        fires = int(state.fires[0 if positive else 1, r])
        tops = top[c][~np.isnan(top[c])]
        up, down = _effects(effects, r, positive, names)
        spreads, sign = bool(variance[r] > 0), 1 if positive else -1
        rows.append({
            "neuron": neuron, "polarity": polarity, "site": site,
            "tokens_seen": state.tokens, "fires": fires, "mean": sign * (s1[r] + float(shift[r])),
            "variance": max(variance[r], 0.0), "skewness": _finite(sign * skewness[r]) if spreads else None,
            "kurtosis": _finite(kurtosis[r]) if spreads else None, "max": _finite(high), "min": _finite(low),
            "histogram": counts.tolist(), "top_mean": tops.mean() if len(tops) else None,
            "logits_up": up, "logits_down": down, "dead": fires == 0, "dense": fires > DENSE * n,
        })  # fmt: skip
    return rows


def _effects(effects: dict[str, Any] | None, row: int, positive: bool, names: list[str]) -> tuple[Any, Any]:
    if effects is None:
        return None, None

    def pairs(which: str) -> list[dict[str, Any]]:
        values, ids = effects[which][row].tolist(), effects[f"{which}_ids"][row].tolist()
        return [{"token": names[i], "value": v if positive else -v} for v, i in zip(values, ids, strict=True)]

    return (pairs("up"), pairs("down")) if positive else (pairs("down"), pairs("up"))


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None

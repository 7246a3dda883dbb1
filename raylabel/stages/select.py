"""From the merged state of a layer to its winners (which sample stands in which row of `exemplars`) and `statistics`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from raylabel.stages.running import NOTHING, hash_keys
from raylabel.stages.state import LayerState
from raylabel.tables import SPLITS

SAMPLINGS = ("top", "quantile", "random")
TOP_MEAN = 20
DENSE = 0.1
"""A unit that fires on more than this share of tokens is `dense`, as the literature on latents has it."""
RANDOM_SALT, FIRING_SALT = 1, 2
FIRING_FACTOR = 4
"""Firing samples kept for each quantile exemplar wanted."""

WINNERS = pa.schema([
    ("decoy", pa.bool_()), ("neuron", pa.int32()), ("polarity", pa.int8()), ("sampling", pa.int8()),
    ("split", pa.int8()), ("rank", pa.int16()), ("sample", pa.int64()), ("row", pa.int32()),
])  # fmt: skip
"""`row` is the unit's place among a layer's units and decoys; `sampling` and `split` index their names."""


def columns_of(neurons: list[int], polarities: tuple[int, ...], n_decoys: int) -> dict[str, np.ndarray]:
    """What each column of a state stands for: arrays decoy, neuron, polarity, row."""
    n = len(neurons)
    blocks = [(False, neurons, p, range(n)) for p in polarities]
    blocks.append((True, list(range(n_decoys)), 1, range(n, n + n_decoys)))
    return {
        "decoy": np.concatenate([np.full(len(b[1]), b[0]) for b in blocks]),
        "neuron": np.concatenate([np.array(b[1], dtype=np.int32) for b in blocks]),
        "polarity": np.concatenate([np.full(len(b[1]), b[2], dtype=np.int8) for b in blocks]),
        "row": np.concatenate([np.array(b[3], dtype=np.int32) for b in blocks]),
    }


def random_samples(numbers: np.ndarray, explain: np.ndarray, n: int, seed: int) -> dict[str, np.ndarray]:
    """`n` samples of each split, the same for every unit of the run."""
    keys = hash_keys(numbers, seed, RANDOM_SALT)
    found = {}
    for split, inside in zip(SPLITS, (explain, ~explain), strict=True):
        found[split] = numbers[inside][np.argsort(keys[inside])][:n]
    return found


def winners(state: LayerState, columns: dict[str, np.ndarray], random: dict[str, np.ndarray], quantile: int) -> pa.Table:
    """The winners of a layer, sorted by sample."""
    bad = state.bad.cpu().numpy()
    good = ~bad[columns["row"]]
    parts: list[dict[str, np.ndarray]] = []
    for s, split in enumerate(SPLITS):
        best = state.best[split].arrays()
        found = {
            "top": np.where(best["samples"] != NOTHING, best["samples"], -1),
            "quantile": spread(best["keys"], best["firing"], quantile),
            "random": np.tile(random[split], (len(good), 1)),
        }
        for k, sampling in enumerate(SAMPLINGS):
            samples = found[sampling]
            column, rank = np.nonzero((samples >= 0) & good[:, None])
            part = {name: values[column] for name, values in columns.items()}
            part |= {"sampling": np.full(len(column), k), "split": np.full(len(column), s), "rank": rank}
            parts.append(part | {"sample": samples[column, rank]})
    whole = {name: np.concatenate([p[name] for p in parts]) for name in WINNERS.names}
    order = np.argsort(whole["sample"], kind="stable")
    return pa.table({name: whole[name][order] for name in WINNERS.names}, schema=WINNERS)


def spread(keys: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """[C, n] sample numbers at the middles of n equal strata of the firing samples [C, m], weakest first; -1 is empty."""
    samples = np.where(keys != NOTHING, keys & 0xFFFFFFFF, -1)
    count = (samples >= 0).sum(1)
    by_sample = np.argsort(samples, axis=1, kind="stable")
    samples, values = np.take_along_axis(samples, by_sample, 1), np.take_along_axis(values, by_sample, 1)
    order = np.argsort(np.where(samples >= 0, values, np.inf), axis=1, kind="stable")
    samples = np.take_along_axis(samples, order, 1)
    place = np.arange(n)[None, :]
    middle = ((2 * place + 1) * count[:, None]) // (2 * max(n, 1))
    index = np.where(count[:, None] > n, middle, place)
    inside = (index < count[:, None]) & (index < samples.shape[1])
    if samples.shape[1] == 0:
        return np.full((len(samples), n), -1)
    picked = np.take_along_axis(samples, np.minimum(index, samples.shape[1] - 1), 1)
    return np.where(inside, picked, -1)


def statistics(
    state: LayerState, columns: dict[str, np.ndarray], site: str, effects: dict[str, Any], names: list[str]
) -> list[dict[str, Any]]:
    """Rows of `statistics` for the columns of a layer whose unit is not broken, with a key `decoy`.

    Args:
        effects: `up`, `down` value arrays [rows, k] and `up_ids`, `down_ids` of the direct effect at polarity +1.
        names: the tokens' strings.
    """
    n = max(state.tokens, 1)
    s1, s2, s3, s4 = (state.moments.total().cpu().numpy() / n)[:4]
    with np.errstate(all="ignore"):
        variance = s2 - s1**2
        third = s3 - 3 * s1 * s2 + 2 * s1**3
        fourth = s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4
        skewness, kurtosis = third / variance**1.5, fourth / variance**2
    shift = state.setup.shift.double().cpu().numpy()
    arrays = state.arrays()
    top = arrays["explain.values"][:, :TOP_MEAN].astype(np.float64)
    rows = []
    for c in range(len(columns["row"])):
        r, p = int(columns["row"][c]), int(columns["polarity"][c])
        if arrays["bad"][r]:
            continue
        counts = arrays["histogram"][r] if p > 0 else arrays["histogram"][r][::-1]
        high, low = (arrays["max"][r], arrays["min"][r]) if p > 0 else (-arrays["min"][r], -arrays["max"][r])
        fires = int(arrays["fires"][0 if p > 0 else 1, r])
        tops = top[c][top[c] > -np.inf]
        up, down = _effects(effects, r, p, names)
        spreads = bool(variance[r] > 0)
        rows.append({
            "decoy": bool(columns["decoy"][c]), "neuron": int(columns["neuron"][c]), "polarity": p, "site": site,
            "tokens_seen": state.tokens, "fires": fires, "mean": p * (s1[r] + shift[r]), "variance": max(variance[r], 0.0),
            "skewness": p * skewness[r] if spreads else None, "kurtosis": kurtosis[r] if spreads else None,
            "max": _finite(high), "min": _finite(low), "histogram": counts.tolist(),
            "top_mean": tops.mean() if len(tops) else None, "logits_up": up, "logits_down": down,
            "dead": fires == 0, "dense": fires > DENSE * n,
        })  # fmt: skip
    return rows


def _effects(effects: dict[str, Any], row: int, polarity: int, names: list[str]) -> tuple[list[Any], list[Any]]:
    def pairs(which: str) -> list[dict[str, Any]]:
        values, ids = effects[which][row], effects[f"{which}_ids"][row]
        return [{"token": names[i], "value": polarity * v} for v, i in zip(values.tolist(), ids.tolist(), strict=True)]

    return (pairs("up"), pairs("down")) if polarity > 0 else (pairs("down"), pairs("up"))


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None

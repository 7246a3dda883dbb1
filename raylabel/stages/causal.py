"""verify, the last of three steps: what the variants' activations say about each unit. No model.

`summarise` takes rows as `measure.measure` gives them and returns the tables `variants` and `verifications`; `close`
fills in what needs the whole layer; `divide` parts a model's own units from its controls. With an exemplar's
activation a_o, a variant's a_v (both maxima over a phrase) and the unit's background b (the median of such maxima over
the phrases in random exemplars):

    retention   = Σ(a_v − b) / Σ(a_o − b)            over the variants of exemplars that stand out from b
    drop        = 1 − retention
    specificity = retention of neighbours − retention of random words, at the MAT word, over substitutes
                  that do not hold the MAT's own token, `verify.WIDER` times as many as all else rests on

`evidence` is `concept` where specificity is certain, not small and not one word's alone; else `token` where the MAT
word matters, whichever kind of word replaces it, and no word before it does; else `context` where a word before it does;
else `none`.

A variant that was not measured, or whose exemplar is not reproduced, is in no sum and no count: it is not a zero.
Intervals come from a bootstrap over documents (`intervals`), since exemplars of one document are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.sections import VerifyConfig
from raylabel.stages.intervals import NOWHERE, Interval, bootstrap, draw_seed
from raylabel.stages.measure import COARSE, EXACT, LEAST_REPRODUCED, reproduced, unit_of
from raylabel.stages.verify import KINDS, MOST_WORDS_BACK, NEIGHBOUR, Unit, unit_numbers
from raylabel.tables import conform, from_rows, schema
from raylabel.words.families import stem

STANDS_OUT = 0.05
"""An exemplar counts if a_o − b is this share of max − b, and a unit if max − b is this share of max: below, retention
divides by next to nothing."""
LEAST_EXEMPLARS = 5
"""Fewer give no retention."""
MATTERS = 0.25
"""A word matters if replacing it costs a quarter of what the exemplar has above the background: between what the words
before it cost the median unit of a small trained model (0.13 on the mean over offsets) and what the MAT word does (0.77)."""
SPECIFIC = 0.03
"""Neighbours must retain this much more than random words, and more all the same without any one stem of the MAT words: a
unit with one MAT word has the same few neighbours in every exemplar, and what they share by accident looks certain to a
bootstrap over documents."""
MOST_PROMOTED = 10
PERCENTILE = 99


def summarise(
    rows: pa.Table,
    random: pa.Table,
    statistics: pa.Table,
    *,
    layer: int,
    seed: int,
    window: int = 5,
    coarse: bool = False,
    rounding: float = 0.0,
    notes: Mapping[Unit, str] | None = None,
) -> tuple[pa.Table, pa.Table]:
    """The tables `variants` and `verifications`, each with a column `control`, sorted by unit.

    `normalised_activation` and `verified` are left to `close`.

    Args:
        rows: a plan's rows with `activation`, in the plan's order.
        random: `exemplars` rows; the explain split's random ones give the background, others are ignored.
        statistics: `statistics` rows; give each unit's maximum, and its mean as background where no random
            exemplars were recorded.
        window: tokens of a phrase on each side of its MAT.
        coarse: whether the model ran in half precision.
        rounding: half a unit of the last digit that the recordings hold.
        notes: of units that are not reproduced, what would have been (`measure.diagnose`).
    """
    rows = rows.combine_chunks()
    unit = unit_numbers(rows)
    n = int(unit.max(initial=-1)) + 1
    first = np.searchsorted(unit, np.arange(n))
    units = [unit_of(rows, int(i)) for i in first]
    original = pc.equal(rows["kind"], "original").to_numpy(zero_copy_only=False)
    good = reproduced(rows, coarse, rounding) if n else np.zeros(0, bool)
    exemplars = np.bincount(unit[original], minlength=n)
    share = np.bincount(unit[original], good[original], minlength=n) / np.maximum(exemplars, 1)

    measured = pc.fill_null(rows["activation"].cast(pa.float64()), float("nan")).to_numpy()
    exemplar = np.cumsum(original) - 1
    before = measured[original][exemplar] if n else measured
    used = ~original & good & (share >= LEAST_REPRODUCED)[unit] & np.isfinite(measured)
    kept = np.nonzero(used)[0]

    background, largest = _background(random, statistics, units, 2 * window + 1), _lookup(statistics, "max", units)
    noise = (COARSE if coarse else EXACT) * np.abs(largest)
    kind = pc.index_in(rows["kind"], pa.array(KINDS)).to_numpy()[kept]
    variants = _Variants(
        unit=unit[kept],
        exemplar=exemplar[kept],
        document=_number(unit[kept], rows["document"].to_numpy()[kept]),
        stem=_number(unit[kept], _stems(rows["word"].take(pa.array(kept)))),
        neighbour=kind == KINDS.index(NEIGHBOUR),
        offset=pc.fill_null(rows["offset"], 0).to_numpy()[kept].astype(np.int64),
        keeps=rows["keeps_token"].to_numpy(zero_copy_only=False)[kept].astype(bool),
        extra=rows["extra"].to_numpy(zero_copy_only=False)[kept].astype(bool),
        gain=measured[kept] - background[unit[kept]],
        base=before[kept] - background[unit[kept]],
    )
    reach = largest - background
    reach[reach < STANDS_OUT * np.abs(largest)] = np.nan
    counted = (variants.base > 0) & (variants.base >= STANDS_OUT * reach[variants.unit])
    numbers = _Numbers(variants, counted, n)
    promoted = _promoted(rows["substitute"], kept, unit, measured, before + noise[unit], n)
    near = variants.neighbour & ~variants.extra
    average = _mean(measured[kept][near], variants.unit[near], n)
    count = np.bincount(variants.unit[~variants.extra], minlength=n)

    lines: list[dict[str, Any]] = []
    for u, key in enumerate(units):
        line: dict[str, Any] = {
            "control": key[0], "neuron": key[1], "polarity": key[2], "n_variants": int(count[u]),
            "average_activation": _null(average[u]), "background": _null(background[u]), "reproduced": float(share[u]),
            "promoted": promoted[u],
        }  # fmt: skip
        line |= _verdict(numbers, u, draw_seed(seed, layer, key))
        if share[u] < LEAST_REPRODUCED:
            failed = round((1 - share[u]) * exemplars[u])
            line["note"] = f"{failed} of {exemplars[u]} exemplars are not reproduced"
            if notes and key in notes:
                line["note"] += f": {notes[key]}"
        lines.append(line)
    shown = kept[~variants.extra]
    table = rows.take(pa.array(shown)).append_column("activation_original", pa.array(before[shown]))
    table = table.rename_columns(["substitute_kind" if name == "kind" else name for name in table.column_names])
    variants_table = conform(table.select(schema("variants", True).names), "variants", True)
    return variants_table, from_rows(lines, "verifications", True)


def _number(unit: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Numbers of the pairs (unit, document), in the order of the units."""
    documents, code = np.unique(document, return_inverse=True)
    return np.asarray(unit * len(documents) + code)


class _Variants(NamedTuple):
    """One entry a variant: its unit, exemplar, document and replaced word's stem (numbers of one unit alone), what it is,
    a_v − b and a_o − b."""

    unit: np.ndarray
    exemplar: np.ndarray
    document: np.ndarray
    stem: np.ndarray
    neighbour: np.ndarray
    offset: np.ndarray
    keeps: np.ndarray
    extra: np.ndarray
    gain: np.ndarray
    base: np.ndarray


def _stems(words: pa.ChunkedArray) -> np.ndarray:
    """A number for the stem of each word."""
    coded = words.combine_chunks().dictionary_encode()
    number: dict[str, int] = {}
    of = np.array([number.setdefault(stem(word), len(number)) for word in coded.dictionary.to_pylist()], np.int64)
    return of[coded.indices.to_numpy()]


class _Sums:
    """Σ(a_v − b) and Σ(a_o − b) over some variants, by document and by unit; a unit's ratio is its retention."""

    def __init__(self, variants: _Variants, chosen: np.ndarray, n: int) -> None:
        unit = variants.unit[chosen]
        _, first, at = np.unique(variants.document[chosen], return_index=True, return_inverse=True)
        self.begin = np.searchsorted(unit[first], np.arange(n + 1))
        self.gain = np.bincount(at, variants.gain[chosen], minlength=len(first))
        self.base = np.bincount(at, variants.base[chosen], minlength=len(first))
        exemplar = np.unique(variants.exemplar[chosen], return_index=True)[1]
        self.exemplars = np.bincount(unit[exemplar], minlength=n)
        gain, base = (np.bincount(unit[first], x, minlength=n) for x in (self.gain, self.base))
        with np.errstate(invalid="ignore", divide="ignore"):
            self.any = gain / base
        self.retention = np.where(self.exemplars >= LEAST_EXEMPLARS, self.any, np.nan)

    def documents(self, unit: int) -> slice:
        """Where a unit's documents stand in `gain` and `base`."""
        return slice(int(self.begin[unit]), int(self.begin[unit + 1]))


class _Numbers:
    """Everything that is summed over variants, for all units at once."""

    def __init__(self, variants: _Variants, counted: np.ndarray, n: int) -> None:
        near, mat = variants.neighbour, variants.offset == 0
        fresh = counted & mat & ~variants.keeps
        # Both kinds over the same exemplars, so that only the substitutes differ.
        both = np.intersect1d(variants.exemplar[fresh & near], variants.exemplar[fresh & ~near])
        paired = fresh & np.isin(variants.exemplar, both)

        def sums(chosen: np.ndarray) -> _Sums:
            return _Sums(variants, chosen, n)

        self.paired = [sums(paired & near), sums(paired & ~near)]
        self.without_one = _without_one(variants, paired, n)
        counted = counted & ~variants.extra
        fresh = fresh & ~variants.extra
        self.all, self.mat, self.context = sums(counted & near), sums(counted & near & mat), sums(counted & near & ~mat)
        self.by_offset = [sums(counted & near & (variants.offset == o)) for o in range(-MOST_WORDS_BACK, 1)]
        self.random, self.random_mat = sums(counted & ~near), sums(counted & ~near & mat)
        self.random_context = sums(counted & ~near & ~mat)
        self.random_by_offset = [sums(counted & ~near & (variants.offset == o)) for o in range(-MOST_WORDS_BACK, 1)]
        self.fresh, self.fresh_both = [sums(fresh & near), sums(fresh & ~near)], sums(fresh)
        self.at_context = [sums(counted & (variants.offset == o)) for o in range(-MOST_WORDS_BACK, 0)]


def _without_one(variants: _Variants, paired: np.ndarray, n: int) -> np.ndarray:
    """[n] the least specificity of each unit when one stem of its MAT words is left out; NaN where there is but one."""
    stems, at = np.unique(variants.stem[paired], return_inverse=True)
    owner = np.zeros(len(stems), np.int64)
    owner[at] = variants.unit[paired]
    near, least = variants.neighbour[paired], np.full(n, np.nan)
    rest = []
    for chosen in (near, ~near):
        for values in (variants.gain[paired], variants.base[paired]):
            own = np.bincount(at[chosen], values[chosen], minlength=len(stems))
            rest.append(np.bincount(owner, own, minlength=n)[owner] - own)
    alone = np.bincount(owner, minlength=n)[owner] < 2
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.where(alone, np.nan, rest[0] / rest[1] - rest[2] / rest[3])
    np.fmin.at(least, owner, left)
    return least


def _verdict(numbers: _Numbers, unit: int, seed: int) -> dict[str, Any]:
    """The retentions of a unit, its evidence, and the numbers with intervals that the evidence rests on."""
    specificity = _specificity(numbers.paired[0], numbers.paired[1], unit, seed)
    mat = _drop(numbers.fresh_both, unit, seed)
    drops = np.array([1 - sums.retention[unit] for sums in numbers.at_context])
    costliest = int(np.nanargmax(drops)) if np.isfinite(drops).any() else None
    before = NOWHERE if costliest is None else _drop(numbers.at_context[costliest], unit, seed)
    # A kind of substitute that never frees itself of the token is silent; one kind at least must speak.
    costs = [1 - sums.retention[unit] for sums in numbers.fresh]
    costs = [cost for cost in costs if np.isfinite(cost)]
    matters = bool(costs) and min(costs) >= MATTERS
    context = any(_drop(numbers.at_context[o], unit, seed).low > 0 for o, drop in enumerate(drops) if drop >= MATTERS)
    evidence = "none"
    if specificity.low > 0 and specificity.value >= SPECIFIC and numbers.without_one[unit] > 0:
        evidence = "concept"
    elif matters and not context:
        evidence = "token"
    elif context:
        evidence = "context"
    return {
        "retention": _null(numbers.all.retention[unit]),
        "retention_mat": _null(numbers.mat.retention[unit]),
        "retention_context": _null(numbers.context.retention[unit]),
        "retention_by_offset": [_null(sums.any[unit]) for sums in numbers.by_offset],
        "retention_random": _null(numbers.random.retention[unit]),
        "retention_random_mat": _null(numbers.random_mat.retention[unit]),
        "retention_random_context": _null(numbers.random_context.retention[unit]),
        "retention_random_by_offset": [_null(sums.any[unit]) for sums in numbers.random_by_offset],
        **_columns("specificity", specificity),
        **_columns("drop_mat", mat),
        **_columns("drop_context", before),
        "drop_context_offset": None if costliest is None else costliest - MOST_WORDS_BACK,
        "evidence": evidence,
    }


def _columns(name: str, interval: Interval) -> dict[str, float | None]:
    return {name: _null(interval.value), f"{name}_low": _null(interval.low), f"{name}_high": _null(interval.high)}


def _specificity(near: _Sums, random: _Sums, unit: int, seed: int) -> Interval:
    at, other = near.documents(unit), random.documents(unit)
    value = float(near.retention[unit] - random.retention[unit])
    return bootstrap(value, (near.gain[at], near.base[at]), (random.gain[other], random.base[other]), seed)


def _drop(sums: _Sums, unit: int, seed: int) -> Interval:
    at = sums.documents(unit)
    ones = np.ones(at.stop - at.start)
    return bootstrap(1 - float(sums.retention[unit]), (ones, ones), (sums.gain[at], sums.base[at]), seed)


def close(
    units: pa.Table, controls: pa.Table, top_means: np.ndarray, flagged: Mapping[Unit, bool], config: VerifyConfig
) -> tuple[pa.Table, pa.Table]:
    """A layer's `verifications` with `normalised_activation` and `verified`: the model's own units, and its controls.

    Controls are measured against the model's normaliser and take no part in it.

    Args:
        units, controls: `verifications` without and with a column `control`.
        top_means: `top_mean` of all of the model's units in the layer, nulls as NaN.
        flagged: of the candidates.
    """
    if config.normaliser == "p99":
        known = top_means[np.isfinite(top_means)]
        scale = float(np.percentile(known, PERCENTILE)) if len(known) else np.nan
    else:
        scale = pc.max(units["average_activation"]).as_py()
        scale = np.nan if scale is None else float(scale)
    return _close(units, scale, flagged, config, False), _close(controls, scale, flagged, config, True)


def _close(
    table: pa.Table, scale: float, flagged: Mapping[Unit, bool], config: VerifyConfig, controls: bool
) -> pa.Table:
    average = pc.fill_null(table["average_activation"].cast(pa.float64()), float("nan")).to_numpy()
    normalised = np.minimum(average / scale, 1.0) if scale > 0 else np.full(len(average), np.nan)
    names = table["control"].to_pylist() if controls else [None] * table.num_rows
    keys = zip(names, table["neuron"].to_pylist(), table["polarity"].to_pylist(), strict=True)
    asked = np.array([bool(flagged.get(key)) for key in keys], dtype=bool)
    again = table["reproduced"].to_numpy() >= LEAST_REPRODUCED
    shown = pc.not_equal(table["evidence"], "none").to_numpy(zero_copy_only=False)
    verified = asked & again & shown & (np.nan_to_num(normalised, nan=-np.inf) >= config.normalised)
    columns = {name: table[name] for name in table.column_names}
    columns["normalised_activation"] = pa.array(normalised, mask=np.isnan(normalised))
    columns["verified"] = pa.array(verified)
    return conform(pa.table(columns), "verifications", controls)


def divide(table: pa.Table, name: str) -> tuple[pa.Table, pa.Table]:
    """(the model's own rows, the controls' rows) of a table with a column `control`, each as its schema wants it."""
    own = pc.is_null(table["control"])
    return conform(table.filter(own).drop_columns("control"), name), conform(table.filter(pc.invert(own)), name, True)


def _background(random: pa.Table, statistics: pa.Table, units: list[Unit], length: int) -> np.ndarray:
    """[units] median of the maxima of all phrases of `length` tokens in a unit's random explain exemplars.

    A whole sample's maximum would be no background: beside a frequent word's unit nothing would stand out from it.
    Exemplars that hold no activations but their own count with that; a unit without exemplars has its mean.
    """
    kept = random.filter(pc.and_(pc.equal(random["sampling"], "random"), pc.equal(random["split"], "explain")))
    single = kept["activation"].cast(pa.float64()).to_pylist()
    values: dict[Unit, list[np.ndarray]] = {}
    for key, own, series in zip(_keys(kept), single, phrase_maxima(kept["activations"], length), strict=True):
        values.setdefault(key, []).append(series if len(series) else np.array([own]))
    median = np.array([np.nanmedian(np.concatenate(values[u])) if u in values else np.nan for u in units], dtype=np.float64)
    return np.where(np.isnan(median), _lookup(statistics, "mean", units), median)


def phrase_maxima(series: pa.ChunkedArray, length: int) -> list[np.ndarray]:
    """The maximum of every stretch of `length` values in each list; of the whole list where it is shorter."""
    sizes = pc.fill_null(pc.list_value_length(series), 0).to_numpy().astype(np.int64)
    flat = pc.list_flatten(series).to_numpy().astype(np.float64)
    ends = np.cumsum(sizes)
    left = np.repeat(ends, sizes) - np.arange(len(flat))
    best = flat.copy()
    for step in range(1, min(length, int(sizes.max(initial=0)))):
        ahead = np.append(flat[step:], np.full(step, np.nan))
        best = np.fmax(best, np.where(left > step, ahead, np.nan))
    return [best[end - size : end - size + max(size - length + 1, min(size, 1))] for end, size in zip(ends, sizes, strict=True)]


def _lookup(table: pa.Table, column: str, units: list[Unit]) -> np.ndarray:
    values = dict(zip(_keys(table), table[column].to_pylist(), strict=True))
    return np.array([np.nan if values.get(u) is None else values[u] for u in units], dtype=np.float64)


def _keys(table: pa.Table) -> list[Unit]:
    controls = table["control"].to_pylist() if "control" in table.column_names else [None] * table.num_rows
    return list(zip(controls, table["neuron"].to_pylist(), table["polarity"].to_pylist(), strict=True))


def _mean(values: np.ndarray, unit: np.ndarray, n: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.bincount(unit, values, minlength=n) / np.bincount(unit, minlength=n)


def _promoted(
    substitutes: pa.ChunkedArray, kept: np.ndarray, unit: np.ndarray, measured: np.ndarray, bar: np.ndarray, n: int
) -> list[list[str]]:
    """The substitutes of variants above their `bar` (the original, and what a reproduction may be off), best first."""
    raised = kept[measured[kept] > bar[kept]]
    order = raised[np.lexsort((raised, -measured[raised], unit[raised]))]
    found: list[list[str]] = [[] for _ in range(n)]
    for u, word in zip(unit[order].tolist(), substitutes.take(pa.array(order)).to_pylist(), strict=True):
        if len(found[u]) < MOST_PROMOTED and word not in found[u]:
            found[u].append(word)
    return found


def _null(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None

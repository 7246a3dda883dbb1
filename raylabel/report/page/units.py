"""What the page of a unit shows, for all units: data/unit-L/NNNNN.js holds the units of BLOCK neurons of a layer.

`unit_blocks` reads a layer's tables a stretch of neurons at a time and gives JSON trees. Activations of exemplars are
in hundredths of the unit's largest shown one; tokens are foreign text with what prints nothing made visible.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.report.page.near import Near
from raylabel.report.texts import name_of, rounded, shown
from raylabel.stages.results import visible
from raylabel.store.rundir import RunDir
from raylabel.tables import HISTOGRAM_EDGES

BLOCK = 32
"""Neurons of a file."""
STRETCH = 512
"""Neurons read at a time; a multiple of BLOCK."""
SHOWN = {
    ("top", "explain"): 12,
    ("top", "score"): 6,
    ("quantile", "explain"): 10,
    ("quantile", "score"): 5,
    ("random", "explain"): 5,
}
SWAPPED, SUBSTITUTES = 12, 6
"""Words whose swaps are shown, and substitutes of each kind."""
NUMBERS = {
    "results": (
        "average_activation",
        "normalised_activation",
        "family_similarity",
        "phrase_similarity",
        "q_value",
        "decoy_rate",
        "retention",
        "specificity",
        "agreement",
        "score",
        "max",
    ),
    "candidates": ("token_similarity", "knn_similarity", "p_value", "n_exemplars", "n_families", "top_families"),
    "statistics": ("tokens_seen", "fires", "mean", "variance", "skewness", "kurtosis", "min", "top_mean"),
    "concepts": ("auroc", "auroc_low", "auroc_high", "auroc_unseen", "cross_entropy", "q_value", "evaluations"),
    "verifications": (
        "n_variants",
        "retention",
        "retention_mat",
        "retention_context",
        "retention_random",
        "retention_random_mat",
        "retention_random_context",
        "specificity",
        "specificity_low",
        "specificity_high",
        "drop_mat",
        "drop_mat_low",
        "drop_mat_high",
        "drop_context",
        "drop_context_low",
        "drop_context_high",
        "drop_context_offset",
        "background",
        "reproduced",
    ),
    "scores": ("value", "shuffled", "corrected", "low", "high", "lookup", "n", "n_failed"),
}
Key = tuple[int, int]
Tree = dict[str, Any]


def unit_blocks(
    run: RunDir,
    layer: int,
    results: pa.Table,
    nearest: dict[str, Near],
    units: np.ndarray,
    labels: list[str],
) -> Iterator[tuple[int, list[Tree]]]:
    """(block, its units' trees) of a layer.

    Args:
        results: rows of the layer. nearest: kind -> units near each of all `units` [N, 3], whose labels are `labels`.
    """
    rows = {(r["neuron"], r["polarity"]): r for r in results.to_pylist()}
    last = max((neuron for neuron, _ in rows), default=-1)
    here = np.flatnonzero(units[:, 0] == layer)
    at = {(int(units[i, 1]), int(units[i, 2])): int(i) for i in here}
    for first in range(0, last + 1, STRETCH):
        found = _tables(run, layer, first, first + STRETCH)
        for start in range(first, min(first + STRETCH, last + 1), BLOCK):
            keys = [key for key in sorted(rows, key=lambda k: (k[0], -k[1])) if start <= key[0] < start + BLOCK]
            trees = []
            for key in keys:
                tree = _unit(layer, key, rows[key], {name: table.get(key) for name, table in found.items()})
                near = {kind: _near(one, at[key], units, labels) for kind, one in nearest.items()}
                trees.append({**tree, "near": {kind: one for kind, one in near.items() if one}})
            if trees:
                yield start // BLOCK, trees


def _tables(run: RunDir, layer: int, first: int, last: int) -> dict[str, dict[Key, Any]]:
    """Rows of a stretch of neurons by (neuron, polarity); of tables that the run has not, none."""
    span = (first, last)
    found: dict[str, dict[Key, Any]] = {}
    for name in ("candidates", "statistics", "verifications", "concepts", "labels"):
        drop = {"mats", "phrases", "mat_words", "families"} if name == "candidates" else set()
        dataset = run.dataset(name, layer)
        columns = [c for c in dataset.schema.names if c not in drop]
        table = run.table(name, layer, span, columns=columns) if run.complete(name) else dataset.schema.empty_table()
        found[name] = {(r["neuron"], r["polarity"]): r for r in table.to_pylist()}
    found["scores"] = {}
    for row in run.table("scores", layer, span).to_pylist() if run.complete("scores") else []:
        found["scores"].setdefault((row["neuron"], row["polarity"]), []).append(row)
    found["exemplars"] = exemplars(run, layer, span)
    found["swaps"] = swaps(run, layer, span)
    return found


def _unit(layer: int, key: Key, result: Tree, rows: dict[str, Any]) -> Tree:
    statistics, verdict, concept, given = (rows[name] or {} for name in ("statistics", "verifications", "concepts", "labels"))
    tree: Tree = {
        "layer": layer,
        "neuron": key[0],
        "polarity": key[1],
        "name": name_of(layer, *key),
        "site": shown(result["site"]),
        **{name: shown(result[name]) for name in ("label", "description", "label_source", "kind", "evidence", "status")},
        "flagged": bool(result["flagged"]),
        "verified": bool(result["verified"]),
        "meanings": [[shown(m["label"]), rounded(m["share"])] for m in given.get("meanings") or []],
        "results": _numbers("results", result),
        "candidate": _numbers("candidates", rows["candidates"]),
        "exemplars": rows["exemplars"] or [],
    }
    if statistics:
        tree["statistics"] = {
            **_numbers("statistics", statistics),
            "dead": bool(statistics["dead"]),
            "dense": bool(statistics["dense"]),
            "histogram": histogram(statistics["histogram"]),
        }
        for name in ("logits_up", "logits_down"):
            tree[name] = [[shown(visible(p["token"])), rounded(p["value"])] for p in statistics[name] or []]
    if verdict:
        tree["causal"] = {
            **_numbers("verifications", verdict),
            "note": shown(verdict["note"]),
            **{
                name: [rounded(v, 3) for v in verdict[name] or []]
                for name in ("retention_by_offset", "retention_random_by_offset")
            },
            "promoted": [shown(word) for word in (verdict["promoted"] or [])[:12]],
        }
    if rows["swaps"]:
        tree["swaps"] = rows["swaps"]
    if concept:
        weights = concept["weights"] or [None] * len(concept["words"] or [])
        tree["concept"] = {
            **_numbers("concepts", concept),
            "label": shown(concept["label"]),
            "proposer": shown(concept["proposer"]),
            "claimed": concept["claimed"],
            "words": [[shown(visible(w)), rounded(x)] for w, x in zip(concept["words"] or [], weights, strict=False)],
        }
    if rows["scores"]:
        tree["scores"] = [
            {"source": shown(source), "scorer": shown(r["scorer"]), **_numbers("scores", part)}
            for r in rows["scores"]
            # Meanings of their own stand below the whole label.
            for source, part in [
                (r["label_source"], r), *((f"{r['label_source']}: {m['label']}", m) for m in r.get("meanings") or [])
            ]
        ]
    return tree


def _numbers(table: str, row: Tree | None) -> Tree:
    return {name: rounded((row or {}).get(name), 5) for name in NUMBERS[table]}


def histogram(counts: list[int] | None) -> list[list[Any]]:
    """[[lower edge, count], …] over the bins from the first to the last that is not empty; a null edge is infinite."""
    filled = [i for i, n in enumerate(counts or []) if n]
    if not filled or counts is None:
        return []
    span = range(filled[0], filled[-1] + 2)
    return [[rounded(HISTOGRAM_EDGES[i], 6), counts[i] if i <= filled[-1] else 0] for i in span if i < len(HISTOGRAM_EDGES)]


def exemplars(run: RunDir, layer: int, span: tuple[int, int]) -> dict[Key, list[Tree]]:
    """The exemplars that are shown, by unit."""
    if not run.complete("exemplars"):
        return {}
    chosen = None
    for (sampling, split), n in SHOWN.items():
        one = (pc.field("sampling") == sampling) & (pc.field("split") == split) & (pc.field("rank") < n)
        chosen = one if chosen is None else chosen | one
    names = ["neuron", "polarity", "sampling", "split", "rank", "activation", "sample", "position", "document"]
    table = run.table("exemplars", layer, span, filter=chosen, columns=[*names, "tokens", "activations"]).combine_chunks()
    if not table.num_rows:
        return {}
    lists = [table.column(name).chunk(0) for name in ("tokens", "activations")]
    offsets = [array.offsets.to_numpy() for array in lists]
    texts = lists[0].values.to_pylist()
    values = pc.fill_null(lists[1].values, 0.0).to_numpy(zero_copy_only=False)
    rows = table.select(names).to_pylist()
    keys = [(r["neuron"], r["polarity"]) for r in rows]
    peaks: dict[Key, float] = {}
    for key, row in zip(keys, rows, strict=True):
        peaks[key] = max(peaks.get(key, 0.0), row["activation"] or 0.0)
    found: dict[Key, list[Tree]] = {}
    for i, (key, row) in enumerate(zip(keys, rows, strict=True)):
        a, b = offsets[0][i], offsets[0][i + 1]
        share = np.rint(100 * values[offsets[1][i] : offsets[1][i + 1]] / max(peaks[key], 1e-30))
        found.setdefault(key, []).append(
            {
                "how": row["sampling"],
                "split": row["split"],
                "rank": row["rank"],
                "activation": rounded(row["activation"]),
                "sample": row["sample"],
                "document": row["document"],
                "at": row["position"],
                "tokens": [shown(text) for text in texts[a:b]],
                "shares": np.clip(np.nan_to_num(share), 0, 100).astype(int).tolist(),
            }
        )
    return found


def swaps(run: RunDir, layer: int, span: tuple[int, int]) -> dict[Key, list[Any]]:
    """Per unit [[offset, word, neighbours, random words], …] with [[substitute, share of the activation kept], …] each."""
    if not run.complete("variants"):
        return {}
    names = ["neuron", "polarity", "offset", "word", "substitute", "substitute_kind", "activation", "activation_original"]
    table = run.table("variants", layer, span, columns=names)
    grouped: dict[Key, dict[tuple[int, str], tuple[dict[str, list[float]], dict[str, list[float]]]]] = {}
    for neuron, polarity, offset, word, substitute, kind, activation, original in zip(
        *(table.column(name).to_pylist() for name in names), strict=True
    ):
        if original and activation is not None:
            sides = grouped.setdefault((neuron, polarity), {}).setdefault((offset, word), ({}, {}))
            sides[0 if kind == "neighbour" else 1].setdefault(substitute, []).append(activation / original)
    found: dict[Key, list[Any]] = {}
    for key, words in grouped.items():
        order = sorted(words, key=lambda w: (-w[0], -sum(len(v) for side in words[w] for v in side.values()), w[1]))
        found[key] = [
            [offset, shown(visible(word)), *(_kept(side) for side in words[offset, word])] for offset, word in _spread(order)
        ]
    return found


def _spread(order: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The words shown: most from the peak, and the most frequent ones of each offset before it."""
    peak = [w for w in order if w[0] == 0][: SWAPPED // 2]
    before = [w for w in order if w[0] != 0]
    counts: dict[int, int] = {}
    kept = []
    for word in before:
        counts[word[0]] = counts.get(word[0], 0) + 1
        if counts[word[0]] <= 2:
            kept.append(word)
    return [*peak, *kept]


def _kept(side: dict[str, list[float]]) -> list[list[Any]]:
    means = sorted(((sum(v) / len(v), name) for name, v in side.items()), reverse=True)
    # Both ends: the substitutes that keep most and those that keep least.
    picked = means if len(means) <= SUBSTITUTES else means[: SUBSTITUTES // 2] + means[-(SUBSTITUTES // 2) :]
    return [[shown(visible(name)), rounded(kept, 3)] for kept, name in picked]


def _near(near: Near, i: int, units: np.ndarray, labels: list[str]) -> list[list[Any]]:
    found = []
    for column, other in enumerate(near.index[i].tolist()):
        if other >= 0:
            place = [int(v) for v in units[other]]
            more = [] if near.second is None else [rounded(near.second[i, column], 3)]
            found.append([*place, labels[other], rounded(near.value[i, column], 3), *more])
    return found

"""The overview's plots that are drawn from tables unit by unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from raylabel.report.page.plots import Axis, Plot, heat
from raylabel.report.page.table import flags, numbers
from raylabel.store.rundir import RunDir
from raylabel.tables import HISTOGRAM_EDGES, MAGNITUDES

POINTS = 4000
"""Units drawn at most in a cloud of points; of more, as many are drawn at random."""
Z = 1.96
KINDS = ("decoy", "null", "planted")
Tree = dict[str, Any]


def cloud(run: RunDir, results: pa.Table, controls: pa.Table | None) -> Tree | None:
    """Similarity against normalised activation, units beside decoys, each with the settings' thresholds."""
    identify, verify = run.config["identify"], run.config["verify"]
    name = "phrase_similarity" if identify["similarity"] is not None else "family_similarity"
    groups = {"units": results}
    if controls is not None:
        groups["decoys"] = controls.filter(pc.field("control") == "decoy")
    data = {}
    for group, table in groups.items():
        x, y, good = numbers(table, name), numbers(table, "normalised_activation"), flags(table, "verified")
        whole = np.isfinite(x) & np.isfinite(y)
        data[group] = (x[whole], y[whole], good[whole], table.num_rows)
    if not len(data["units"][0]):
        return None
    every = np.concatenate([d[0] for d in data.values()])
    low, high = min(0.0, float(every.min())), max(float(every.max()), identify["similarity"] or 0.0, 0.1)
    plots = []
    for group, (x, y, good, total) in data.items():
        title = f"{name.replace('_', ' ')} of {len(x):,} of {total:,} {group}"
        plot = Plot(
            Axis(low, high, title), Axis(0, 1, "normalised activation"), f"Scatter of {title} against normalised activation."
        )
        draw = np.random.default_rng(0).permutation(len(x))[:POINTS]
        points = {
            css: [(float(x[i]), float(y[i])) for i in draw if good[i] == verified]
            for css, verified in (("quiet", False), ("good", True))
        }
        marks = [plot.dots(points["quiet"], "quiet", 1.6), plot.dots(points["good"], "good", 2)]
        marks.append(plot.threshold(verify["normalised"], f"verified from {verify['normalised']:g}"))
        if identify["similarity"] is not None:
            marks.append(plot.threshold(identify["similarity"], f"flagged from {identify['similarity']:g}", vertical=True))
        plots.append(plot.svg(marks))
    more = max(len(d[0]) for d in data.values()) > POINTS
    flagged = (
        ""
        if identify["similarity"] is not None
        else (
            f"No similarity is asked of a flagged unit: it is flagged by its q-value (≤ {identify['fdr']}) or as a word detector."
        )
    )
    return {"plots": plots, "drawn": POINTS if more else None, "flagged": flagged}


def retention(run: RunDir, results: pa.Table) -> Tree | None:
    """Mean retention by offset over verified units, neighbours beside random words, with intervals over units."""
    if not run.complete("verifications"):
        return None
    columns = ["verified", "retention_by_offset", "retention_random_by_offset"]
    table = run.table("verifications", columns=columns)
    table = table.filter(pc.field("verified"))
    if not table.num_rows:
        return None
    plot = Plot(
        Axis(
            -5.3,
            0.3,
            "word swapped, counted from the word at the peak",
            (-5, -4, -3, -2, -1, 0),
            ("−5", "−4", "−3", "−2", "−1", "peak"),
        ),
        Axis(0, 1.1, "share of the activation kept", (0, 0.25, 0.5, 0.75, 1)),
        "Mean retention by offset of the swapped word, neighbours and random words.",
    )
    marks, rows = [], []
    for name, css, title in (
        ("retention_by_offset", "good", "neighbours"),
        ("retention_random_by_offset", "other", "random words"),
    ):
        lists = [v for v in table.column(name).to_pylist() if v]
        if not lists:
            continue
        values = np.array([[np.nan if x is None else x for x in v] for v in lists], np.float64)
        n = np.isfinite(values).sum(0)
        # Not nanmean, which warns where no unit has a value.
        mean = np.nansum(values, 0) / np.maximum(n, 1)
        error = Z * np.sqrt(np.nansum((values - mean) ** 2, 0) / np.maximum(n - 1, 1) / np.maximum(n, 1))
        at = range(-5, 1)
        middle = [(x, float(m) if k else None) for x, m, k in zip(at, mean, n, strict=True)]
        marks.append(
            plot.band(
                [
                    (x, None if m is None else m - e, None if m is None else m + e)
                    for (x, m), e in zip(middle, error.tolist(), strict=True)
                ],
                css,
            )
        )
        marks.append(plot.line(middle, css))
        rows.append((title, [m for _, m in middle]))
    return {"plot": plot.svg(marks), "rows": rows, "n": table.num_rows}


def histograms(run: RunDir) -> Markup | None:
    """A row a layer: how its units' activations are spread, positive ones, on a scale of half octaves."""
    if not run.complete("statistics"):
        return None
    table = run.table("statistics", columns=["layer", "histogram"])
    names, rows = [], []
    width = len(HISTOGRAM_EDGES) - 1
    for layer in sorted(set(table.column("layer").to_pylist())):
        lists = table.filter(pc.field("layer") == layer).column("histogram").combine_chunks().drop_null()
        flat = lists.flatten().to_numpy()
        if len(flat) == 0 or len(flat) % width:
            continue
        names.append(f"layer {layer}")
        rows.append(flat.reshape(-1, width).sum(0).astype(np.float64))
    if not rows:
        return None
    middle = len(MAGNITUDES)
    counts = np.stack(rows)[:, middle:]
    filled = np.flatnonzero(counts.sum(0))
    if not len(filled):
        return None
    first, last = int(filled[0]), int(filled[-1]) + 1
    share = counts[:, first:last] / np.maximum(np.stack(rows).sum(1, keepdims=True), 1)
    # From one in ten million upward: a linear scale would show the middle only.
    cells = np.clip((np.log10(np.maximum(share, 1e-300)) + 7) / 7, 0, 1)
    ticks = [(i - first + 1, f"{MAGNITUDES[i]:.2g}") for i in range(first, last) if i % 4 == 0 and i < len(MAGNITUDES)]
    return heat(
        names,
        ticks,
        cells.tolist(),
        "activation, in the model's units (half octaves)",
        "Share of tokens by size of the activation, a row a layer, on a logarithmic scale.",
    )


def curves(results: pa.Table, controls: pa.Table | None) -> Tree | None:
    """How many units and controls pass as a threshold moves: the q-value, and the normalised activation."""
    groups = {"units": results}
    for kind in KINDS if controls is not None else ():
        assert controls is not None
        mine = controls.filter(pc.field("control") == kind)
        if mine.num_rows:
            groups[f"{kind}s" if kind != "planted" else "planted"] = mine
    if len(groups) == 1:
        return None
    css = {"units": "good", "decoys": "other", "nulls": "third", "planted": "fourth"}
    grid = np.linspace(0, 1, 51)
    q_grid = np.linspace(0, 0.25, 51)
    one = Plot(
        Axis(0, 0.25, "q-value at most"),
        Axis(0, 1, "share of kind meaning", percent=True),
        "Share that would be of kind meaning by q-value threshold.",
    )
    two = Plot(
        Axis(0, 1, "normalised activation at least"),
        Axis(0, 1, "share that would be verified", percent=True),
        "Share that would be verified by threshold of the normalised activation.",
    )
    first, second = [], []
    for name, table in groups.items():
        q, normalised = numbers(table, "q_value"), numbers(table, "normalised_activation")
        evidence = np.asarray(table.column("evidence").to_pylist(), object)
        shown_ = flags(table, "flagged") & np.isin(evidence, ("concept", "token", "context"))
        n = table.num_rows
        first.append(one.line([(float(t), float((q <= t).sum()) / n) for t in q_grid], css[name]))
        second.append(two.line([(float(t), float((shown_ & (normalised >= t)).sum()) / n) for t in grid], css[name]))
    return {"plots": [one.svg(first), two.svg(second)], "names": [(name, css[name], t.num_rows) for name, t in groups.items()]}

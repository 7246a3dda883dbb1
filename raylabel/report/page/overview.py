"""What the overview shows, from the tables of a run: plain values and plots for its template.

Every section is there only where the run has what it is about; a run without labels or scores says so in words.
"""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from raylabel.report import calibration, summary
from raylabel.report.page.plots import Axis, Plot, heat
from raylabel.report.page.table import flags, numbers
from raylabel.report.texts import shown
from raylabel.report.status import stage_rows
from raylabel.store.rundir import RunDir
from raylabel.tables import HISTOGRAM_EDGES, MAGNITUDES

POINTS = 4000
"""Units drawn at most in a cloud of points; of more, as many are drawn at random."""
LISTED = 200
"""Failures listed at most."""
Z = 1.96
KINDS = ("decoy", "null", "planted")
Tree = dict[str, Any]


def overview(run: RunDir, results: pa.Table) -> Tree:
    """Everything the template asks for."""
    controls = run.controls.table("results") if run.controls.paths("results") else None
    return {
        **_head(run), "figures": _figures(run, results, controls), "layers": _layers(run, results),
        "cloud": _cloud(run, results, controls), "retention": _retention(run, results), "histograms": _histograms(run),
        "beside": _beside(run, controls), "curves": _curves(results, controls), "calibration": _calibration(run),
        "scores": _scores(run), "stages": _stages(run), "failures": _failures(run), "controls": _count(controls),
    }  # fmt: skip


def _head(run: RunDir) -> Tree:
    config, info, facts = run.config, run.info, run.resolved
    source = config["exemplars"]["source"]
    part = config["exemplars"][source]
    where = part.get("path") or part.get("model") or ""
    sources = ", ".join(part.get("sources") or [])
    created = datetime.datetime.fromtimestamp(info["created"], datetime.UTC)
    site = facts.get("site") or config["subject"]["site"]
    return {
        "model": shown(facts.get("name") or config["subject"]["model"]), "revision": shown(facts.get("revision") or ""),
        "site": shown(config["subject"]["latents"] or site), "source": shown(f"{source}: {where} {sources}".strip(" :")),
        "created": created.strftime("%Y-%m-%d %H:%M UTC"), "preset": config.get("preset", "default"),
        "versions": ", ".join(f"{shown(k)} {shown(str(v))}" for k, v in info["configs"][-1]["versions"].items()),
        "tokens": _tokens(run),
    }  # fmt: skip


def _tokens(run: RunDir) -> int | None:
    if not run.complete("statistics"):
        return None
    found = pc.max(run.table("statistics", columns=["tokens_seen"]).column("tokens_seen")).as_py()
    return None if found is None else int(found)


def _figures(run: RunDir, results: pa.Table, controls: pa.Table | None) -> list[Tree]:
    """The few numbers at the top: value, name, and what to hold it against."""
    n, verified = results.num_rows, int(flags(results, "verified").sum())
    failures = run.table("failures").num_rows if run.paths("failures") else 0
    decoys = None if controls is None else controls.filter(pc.field("control") == "decoy")
    beside = ""
    if decoys is not None and decoys.num_rows:
        beside = f"of decoys {flags(decoys, 'verified').mean():.1%}"
    both = len(np.unique(results.column("polarity").to_numpy())) > 1
    figures = [
        {"value": f"{n:,}", "name": "units and polarities" if both else "units", "note": ""},
        {"value": f"{verified:,}", "name": "verified", "note": f"{verified / n:.1%} of units; {beside}".strip("; ") if n else ""},
    ]
    if run.complete("concepts"):
        claimed, tried = int(flags(results, "claimed").sum()), run.table("concepts", columns=["neuron"]).num_rows
        figures.append({"value": f"{claimed:,}", "name": "concepts borne out", "note": f"of {tried:,} searched, on held-back text"})
    score = numbers(results, "score")
    if np.isfinite(score).any():
        k = int(np.isfinite(score).sum())
        figures.append({"value": f"{np.nanmean(score):.2f}", "name": "mean corrected score", "note": f"{k:,} labels scored"})
    figures.append({"value": f"{failures:,}", "name": "failures", "note": "listed below" if failures else "nothing was left out"})
    return figures


def _layers(run: RunDir, results: pa.Table) -> list[Tree]:
    layers = results.column("layer").to_numpy()
    dead = dict.fromkeys(np.unique(layers), None)
    if run.complete("statistics"):
        statistics = run.table("statistics", columns=["layer", "dead"])
        at = statistics.column("layer").to_numpy()
        dead |= {layer: int(flags(statistics, "dead")[at == layer].sum()) for layer in dead}
    evidence = np.asarray(results.column("evidence").to_pylist(), object)
    kind = np.asarray(results.column("kind").to_pylist(), object)
    failed = np.asarray(results.column("status").to_pylist(), object) == "failed"
    claimed, flagged, verified = (flags(results, name) for name in ("claimed", "flagged", "verified"))
    rows = []
    for layer in np.unique(layers):
        mine = layers == layer
        n = int(mine.sum())
        shares = {e: float((verified & mine & (evidence == e)).sum()) / n for e in ("concept", "token", "context")}
        rows.append({
            "layer": int(layer), "units": n, "dead": dead[layer], "flagged": int((flagged & mine).sum()),
            "meaning": int((mine & (kind == "meaning")).sum()), "word": int((mine & (kind == "word")).sum()),
            "verified": int((verified & mine).sum()), "claimed": int((claimed & mine).sum()), "failed": int((failed & mine).sum()),
            "shares": shares,
        })  # fmt: skip
    return rows


def _cloud(run: RunDir, results: pa.Table, controls: pa.Table | None) -> Tree | None:
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
        plot = Plot(Axis(low, high, title), Axis(0, 1, "normalised activation"), f"Scatter of {title} against normalised activation.")
        draw = np.random.default_rng(0).permutation(len(x))[:POINTS]
        points = {css: [(float(x[i]), float(y[i])) for i in draw if good[i] == verified] for css, verified in
                  (("quiet", False), ("good", True))}  # fmt: skip
        marks = [plot.dots(points["quiet"], "quiet", 1.6), plot.dots(points["good"], "good", 2)]
        marks.append(plot.threshold(verify["normalised"], f"verified from {verify['normalised']:g}"))
        if identify["similarity"] is not None:
            marks.append(plot.threshold(identify["similarity"], f"flagged from {identify['similarity']:g}", vertical=True))
        plots.append(plot.svg(marks))
    more = max(len(d[0]) for d in data.values()) > POINTS
    flagged = "" if identify["similarity"] is not None else (
        f"No similarity is asked of a flagged unit: it is flagged by its q-value (≤ {identify['fdr']}) or as a word detector."
    )
    return {"plots": plots, "drawn": POINTS if more else None, "flagged": flagged}


def _retention(run: RunDir, results: pa.Table) -> Tree | None:
    """Mean retention by offset over verified units, neighbours beside random words, with intervals over units."""
    if not run.complete("verifications"):
        return None
    columns = ["verified", "retention_by_offset", "retention_random_by_offset"]
    table = run.table("verifications", columns=columns)
    table = table.filter(pc.field("verified"))
    if not table.num_rows:
        return None
    plot = Plot(
        Axis(-5.3, 0.3, "word swapped, counted from the word at the peak", (-5, -4, -3, -2, -1, 0),
             ("−5", "−4", "−3", "−2", "−1", "peak")),
        Axis(0, 1.1, "share of the activation kept", (0, 0.25, 0.5, 0.75, 1)),
        "Mean retention by offset of the swapped word, neighbours and random words.",
    )  # fmt: skip
    marks, rows = [], []
    for name, css, title in (("retention_by_offset", "good", "neighbours"), ("retention_random_by_offset", "other", "random words")):
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
        marks.append(plot.band([(x, None if m is None else m - e, None if m is None else m + e)
                                for (x, m), e in zip(middle, error.tolist(), strict=True)], css))  # fmt: skip
        marks.append(plot.line(middle, css))
        rows.append((title, [m for _, m in middle]))
    return {"plot": plot.svg(marks), "rows": rows, "n": table.num_rows}


def _histograms(run: RunDir) -> Markup | None:
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
    return heat(names, ticks, cells.tolist(), "activation, in the model's units (half octaves)",
                "Share of tokens by size of the activation, a row a layer, on a logarithmic scale.")  # fmt: skip


def _beside(run: RunDir, controls: pa.Table | None) -> Tree | None:
    """Units' shares beside decoys', with intervals."""
    if controls is None or not (controls.num_rows and "decoy" in set(controls.column("control").to_pylist())):
        return None
    found = summary.shares(run)
    plot = Plot(
        Axis(0, 1, "share, with 95 % interval", percent=True),
        Axis(-0.6, len(found) - 0.4, "", [float(i) for i in range(len(found))], list(reversed(found))),
        "Share of units and of decoys by measure.", left=118,
    )  # fmt: skip
    marks, rows = [], []
    for i, (name, (units, decoys)) in enumerate(reversed(found.items())):
        for share, css, offset in ((units, "good", 0.14), (decoys, "other", -0.14)):
            value, low, high = share.interval
            if value is not None and low is not None and high is not None:
                marks.append(plot.interval(i + offset, low, value, high, css))
        rows.append((name, str(units), str(decoys), summary.exceeds(units, decoys)))
    return {"plot": plot.svg(marks), "rows": list(reversed(rows))}


def _curves(results: pa.Table, controls: pa.Table | None) -> Tree | None:
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
    one = Plot(Axis(0, 0.25, "q-value at most"), Axis(0, 1, "share of kind meaning", percent=True),
               "Share that would be of kind meaning by q-value threshold.")  # fmt: skip
    two = Plot(Axis(0, 1, "normalised activation at least"), Axis(0, 1, "share that would be verified", percent=True),
               "Share that would be verified by threshold of the normalised activation.")  # fmt: skip
    first, second = [], []
    for name, table in groups.items():
        q, normalised = numbers(table, "q_value"), numbers(table, "normalised_activation")
        evidence = np.asarray(table.column("evidence").to_pylist(), object)
        shown_ = flags(table, "flagged") & np.isin(evidence, ("concept", "token", "context"))
        n = table.num_rows
        first.append(one.line([(float(t), float((q <= t).sum()) / n) for t in q_grid], css[name]))
        second.append(two.line([(float(t), float((shown_ & (normalised >= t)).sum()) / n) for t in grid], css[name]))
    return {"plots": [one.svg(first), two.svg(second)], "names": [(name, css[name], t.num_rows) for name, t in groups.items()]}


def _calibration(run: RunDir) -> list[Tree]:
    if not run.complete("calibration"):
        return []
    found = calibration.recall(run)
    return [{"name": name, "flagged": str(flagged), "verified": str(verified)} for name, (flagged, verified) in found.items()]


def _scores(run: RunDir) -> Tree | None:
    """Corrected scores by label source and scorer: mean over units with its interval, spread, and what else reaches."""
    if not run.complete("scores"):
        return None
    table = run.table("scores")
    sources, scorers = (np.asarray(table.column(n).to_pylist(), object) for n in ("label_source", "scorer"))
    values = {name: numbers(table, name) for name in ("value", "shuffled", "corrected", "lookup")}
    failed = np.nan_to_num(numbers(table, "n_failed"))
    rows = []
    for source, scorer in sorted(set(zip(sources, scorers, strict=True)), key=str):
        mine = (sources == source) & (scorers == scorer)
        corrected = values["corrected"][mine]
        corrected = corrected[np.isfinite(corrected)]
        n = len(corrected)
        row: Tree = {"source": shown(source), "scorer": shown(scorer), "n": n, "failed": int(failed[mine].sum())}
        for name in ("value", "shuffled", "lookup"):
            found = values[name][mine]
            row[name] = float(np.nanmean(found)) if np.isfinite(found).any() else None
        if n:
            mean, error = float(corrected.mean()), float(Z * corrected.std(ddof=1) / np.sqrt(n)) if n > 1 else None
            row |= {"mean": mean, "low": None if error is None else mean - error, "high": None if error is None else mean + error}
        rows.append(row)
    drawn = [r for r in rows if r["n"]]
    if not drawn:
        return {"plot": None, "rows": rows}
    names = [f"{r['scorer']} · {r['source']}" for r in reversed(drawn)]
    low = min(0.0, *(r["low"] if r["low"] is not None else r["mean"] for r in drawn))
    plot = Plot(
        Axis(low, 1, "corrected score: mean over units, 95 % interval"),
        Axis(-0.6, len(drawn) - 0.4, "", [float(i) for i in range(len(drawn))], [n[:24] for n in names]),
        "Mean corrected score by scorer and label source.", height=max(120, 40 * len(drawn) + 60), left=160,
    )  # fmt: skip
    marks = []
    for i, r in enumerate(reversed(drawn)):
        marks.append(plot.interval(i, r["low"] if r["low"] is not None else r["mean"], r["mean"],
                                   r["high"] if r["high"] is not None else r["mean"], "good"))  # fmt: skip
        if r["lookup"] is not None:
            marks.append(plot.dots([(r["lookup"], i)], "other", 3))
    return {"plot": plot.svg(marks), "rows": rows}


def _stages(run: RunDir) -> Tree:
    rows = [r for r in stage_rows(run) if r["state"] != "not started"]
    longest = max((r["seconds"] for r in rows), default=0) or 1
    tokens = {"prompt_tokens": 0, "completion_tokens": 0}
    if run.complete("labels"):
        table = run.table("labels", columns=list(tokens))
        tokens = {name: int(pc.sum(table.column(name)).as_py() or 0) for name in tokens}
    return {
        "rows": [{**r, "share": r["seconds"] / longest} for r in rows], "seconds": sum(r["seconds"] for r in rows),
        "money": sum(r["money"] for r in rows), **tokens,
    }  # fmt: skip


def _failures(run: RunDir) -> Tree:
    rows = run.table("failures").to_pylist() if run.paths("failures") else []
    counts = Counter((shown(r["stage"]), shown(r["reason"])) for r in rows)
    return {
        "n": len(rows), "kinds": [(stage, reason, n) for (stage, reason), n in counts.most_common(20)],
        "rows": [{**r, "reason": shown(r["reason"]), "unit": shown(r["unit"])} for r in rows[:LISTED]], "listed": LISTED,
    }  # fmt: skip


def _count(controls: pa.Table | None) -> dict[str, int]:
    return dict(Counter(controls.column("control").to_pylist())) if controls is not None else {}

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

from raylabel.report import calibration, summary
from raylabel.report.page import figures
from raylabel.report.page.plots import Axis, Plot
from raylabel.report.page.table import flags, numbers
from raylabel.report.status import stage_rows
from raylabel.report.texts import short, shown
from raylabel.store.rundir import RunDir

LISTED = 200
"""Failures listed at most."""
Z = 1.96
Tree = dict[str, Any]


def overview(run: RunDir, results: pa.Table) -> Tree:
    """Everything the template asks for."""
    controls = run.controls.table("results") if run.files.exists("controls/results/_SUCCESS") else None
    return {
        **_head(run),
        "figures": _figures(run, results, controls),
        "layers": _layers(run, results),
        "cloud": figures.cloud(run, results, controls),
        "retention": figures.retention(run, results),
        "histograms": figures.histograms(run),
        "beside": _beside(run, controls),
        "curves": figures.curves(results, controls),
        "calibration": _calibration(run),
        "scores": _scores(run),
        "stages": _stages(run),
        "failures": _failures(run),
        "controls": _count(controls),
    }


def _head(run: RunDir) -> Tree:
    config, info, facts = run.config, run.info, run.resolved
    source = config["exemplars"]["source"]
    part = config["exemplars"][source]
    where = short(part.get("path") or part.get("model") or "")
    sources = ", ".join(part.get("sources") or [])
    created = datetime.datetime.fromtimestamp(info["created"], datetime.UTC)
    site = facts.get("site") or config["subject"]["site"]
    return {
        "model": short(facts.get("name") or config["subject"]["model"]),
        "revision": shown(facts.get("revision") or ""),
        "site": short(config["subject"]["latents"] or site),
        "source": shown(f"{source}: {where} {sources}".strip(" :")),
        "created": created.strftime("%Y-%m-%d %H:%M UTC"),
        "preset": config.get("preset", "default"),
        "versions": ", ".join(f"{shown(k)} {shown(str(v))}" for k, v in info["configs"][-1]["versions"].items()),
        "tokens": _tokens(run),
    }


def _tokens(run: RunDir) -> int | None:
    if not run.complete("statistics"):
        return None
    found = pc.max(run.table("statistics", columns=["tokens_seen"]).column("tokens_seen")).as_py()
    return None if found is None else int(found)


def _figures(run: RunDir, results: pa.Table, controls: pa.Table | None) -> list[Tree]:
    """The few numbers at the top: value, name, and what to hold it against."""
    n, verified = results.num_rows, int(flags(results, "verified").sum())
    failures = run.table("failures").num_rows if run.complete("failures") else 0
    decoys = None if controls is None else controls.filter(pc.field("control") == "decoy")
    beside = ""
    if decoys is not None and decoys.num_rows:
        beside = f"of decoys {flags(decoys, 'verified').mean():.1%}"
    both = len(np.unique(results.column("polarity").to_numpy())) > 1
    shown_ = [
        {"value": f"{n:,}", "name": "units and polarities" if both else "units", "note": ""},
        {"value": f"{verified:,}", "name": "verified", "note": f"{verified / n:.1%} of units; {beside}".strip("; ") if n else ""},
    ]
    if run.complete("concepts"):
        claimed, tried = int(flags(results, "claimed").sum()), run.table("concepts", columns=["neuron"]).num_rows
        shown_.append(
            {"value": f"{claimed:,}", "name": "concepts borne out", "note": f"of {tried:,} searched, on held-back text"}
        )
    score = numbers(results, "score")
    if np.isfinite(score).any():
        k = int(np.isfinite(score).sum())
        shown_.append({"value": f"{np.nanmean(score):.2f}", "name": "mean corrected score", "note": f"{k:,} labels scored"})
    shown_.append({"value": f"{failures:,}", "name": "failures", "note": "listed below" if failures else "nothing was left out"})
    return shown_


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
        rows.append(
            {
                "layer": int(layer),
                "units": n,
                "dead": dead[layer],
                "flagged": int((flagged & mine).sum()),
                "meaning": int((mine & (kind == "meaning")).sum()),
                "word": int((mine & (kind == "word")).sum()),
                "verified": int((verified & mine).sum()),
                "claimed": int((claimed & mine).sum()),
                "failed": int((failed & mine).sum()),
                "shares": shares,
            }
        )
    return rows


def _beside(run: RunDir, controls: pa.Table | None) -> Tree | None:
    """Units' shares beside decoys', with intervals."""
    if controls is None or not (controls.num_rows and "decoy" in set(controls.column("control").to_pylist())):
        return None
    found = summary.shares(run)
    plot = Plot(
        Axis(0, 1, "share, with 95 % interval", percent=True),
        Axis(-0.6, len(found) - 0.4, "", [float(i) for i in range(len(found))], list(reversed(found))),
        "Share of units and of decoys by measure.",
        left=118,
    )
    marks, rows = [], []
    for i, (name, (units, decoys)) in enumerate(reversed(found.items())):
        for share, css, offset in ((units, "good", 0.14), (decoys, "other", -0.14)):
            value, low, high = share.interval
            if value is not None and low is not None and high is not None:
                marks.append(plot.interval(i + offset, low, value, high, css))
        rows.append((name, str(units), str(decoys), summary.exceeds(units, decoys)))
    return {"plot": plot.svg(marks), "rows": list(reversed(rows))}


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
        "Mean corrected score by scorer and label source.",
        height=max(120, 40 * len(drawn) + 60),
        left=160,
    )
    marks = []
    for i, r in enumerate(reversed(drawn)):
        marks.append(
            plot.interval(
                i,
                r["low"] if r["low"] is not None else r["mean"],
                r["mean"],
                r["high"] if r["high"] is not None else r["mean"],
                "good",
            )
        )
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
        "rows": [{**r, "share": r["seconds"] / longest} for r in rows],
        "seconds": sum(r["seconds"] for r in rows),
        "money": sum(r["money"] for r in rows),
        **tokens,
    }


def _failures(run: RunDir) -> Tree:
    rows = run.table("failures").to_pylist() if run.complete("failures") else []
    counts = Counter((shown(r["stage"]), shown(r["reason"])) for r in rows)
    return {
        "n": len(rows),
        "kinds": [(stage, reason, n) for (stage, reason), n in counts.most_common(20)],
        "rows": [{**r, "reason": shown(r["reason"]), "unit": shown(r["unit"])} for r in rows[:LISTED]],
        "listed": LISTED,
    }


def _count(controls: pa.Table | None) -> dict[str, int]:
    return dict(Counter(controls.column("control").to_pylist())) if controls is not None else {}

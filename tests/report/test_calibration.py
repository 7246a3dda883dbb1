"""What is said of the controls, against counting by hand."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from raylabel.report import terminal
from raylabel.report.calibration import DECOY_RATE, NORMALISED, recall, sweep
from raylabel.report.summary import Share
from raylabel.stages.results import calibration
from raylabel.tables import from_rows


def results(seed: int = 0, n: int = 300) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        control = rng.choice(["decoy", "null", "planted"])
        kind = rng.choice(["meaning", "word", None])
        evidence = rng.choice(["concept", "token", "none"]) if kind else None
        rows.append({
            "control": control, "neuron": i, "polarity": 1, "kind": kind, "evidence": evidence, "flagged": kind is not None,
            "status": rng.choice(["ok", "ok", "ok", "failed"]), "q_value": rng.choice([0.004, 0.03, 0.05, None]),
            "decoy_rate": None if control == "decoy" else rng.choice([0.0, 0.03, 0.1, 0.5]),
            "normalised_activation": rng.choice([0.05, 0.25, 0.6, None]), "verified": False,
        })  # fmt: skip
    return rows


def run_of(rows: list[dict[str, Any]], fdr: float | None = 0.05) -> Any:
    """As much of a run directory as the summary reads."""
    table = from_rows(rows, "results", controls=True).append_column("layer", pa.array([0] * len(rows), pa.int32()))
    hard = {(0, row["neuron"]): "cue" if row["neuron"] % 2 else "clean" for row in rows}
    tables = {"calibration": calibration(table, hard)}
    return SimpleNamespace(
        config={"identify": {"fdr": fdr}}, table=tables.__getitem__, controls=SimpleNamespace(table=lambda _name: table)
    )


def test_recall_by_difficulty() -> None:
    rows = results()
    found = recall(run_of(rows))
    assert list(found) == ["decoy", "null", "planted: clean", "planted: cue"]
    for name, (flagged, verified) in found.items():
        mine = [r for r in rows if r["control"] == name.split(":")[0] and (
            ":" not in name or name.endswith("cue") == bool(r["neuron"] % 2))]  # fmt: skip
        assert flagged == Share(sum(r["flagged"] for r in mine), len(mine)) and verified == Share(0, len(mine))


def test_the_sweep_counts_what_would_be_verified() -> None:
    rows = results()
    settings = sweep(run_of(rows))
    assert len(settings) == 2 * len(DECOY_RATE) * len(NORMALISED) and {s.q for s in settings} == {0.01, 0.05}
    assert [s.recall.k for s in settings if s.recall] == sorted((s.recall.k for s in settings if s.recall), reverse=True)
    for s in settings:
        for control, share in (("planted", s.recall), ("null", s.nulls), ("decoy", s.decoys)):
            mine = [r for r in rows if r["control"] == control]
            passed = [
                r for r in mine
                if r["status"] == "ok" and r["evidence"] in ("concept", "token")
                and (r["kind"] == "word" or (r["q_value"] is not None and r["q_value"] <= s.q))
                and (r["decoy_rate"] is None or r["decoy_rate"] <= s.decoy_rate)
                and (r["normalised_activation"] or 0) >= s.normalised
            ]  # fmt: skip
            assert share == Share(len(passed), len(mine))
        rates = [share.k / share.n for share in (s.nulls, s.decoys) if share]
        assert s.reaches == all(rate <= 0.05 for rate in rates)


def test_without_a_kind_of_control() -> None:
    rows = [r for r in results() if r["control"] == "planted"]
    settings = sweep(run_of(rows, fdr=None))
    assert all(s.nulls is None and s.decoys is None and not s.reaches for s in settings) and {s.q for s in settings} == {
        0.01, 0.05, 0.1, 0.2,
    }  # fmt: skip


def test_tables_on_a_terminal() -> None:
    run = run_of(results())
    console = terminal.console()
    with console.capture() as captured:
        console.print(terminal.calibration_table(recall(run)))
        console.print(terminal.sweep_table(sweep(run)))
    text = captured.get()
    assert "planted: cue" in text
    passing = {"status": "ok", "kind": "word", "evidence": "token", "decoy_rate": 0.0, "normalised_activation": 0.9}
    for change, title in ((passing, "no setting reaches 5 %"), ({"status": "failed"}, "at most 5 % of nulls")):
        rows = [r if r["control"] == "planted" else {**r, **change} for r in results()]
        with console.capture() as captured:
            console.print(terminal.sweep_table(sweep(run_of(rows))))
        assert title in captured.get()

"""How far a run has come, from its plans and manifests."""

from __future__ import annotations

from typing import Any

from raylabel.stages import PIPELINE
from raylabel.store.rundir import RunDir


def stage_rows(run: RunDir) -> list[dict[str, Any]]:
    """A row a stage: units done and pending, neurons failed, rows, seconds of work, tokens and money of an LLM, state."""
    run.info  # noqa: B018  (refuses what this version cannot read)
    rows = []
    for stage in PIPELINE:
        row: dict[str, Any] = {"stage": stage.name, "done": 0, "pending": 0, "failed": 0, "rows": 0, "seconds": 0.0,
                               "tokens": 0, "money": 0.0, "state": "not started"}  # fmt: skip
        plan = run.plan(stage.name)
        if plan is not None:
            entries = run.committed(plan)
            row["done"], row["pending"] = len(entries), len(plan.units) - len(entries)
            for entry in entries.values():
                row["failed"] += len(entry["failures"])
                row["rows"] += sum(file["rows"] for file in entry["files"])
                row["seconds"] += entry["ended"] - entry["started"]
                asked = entry.get("notes", {}).get("llm", {})
                row["tokens"] += asked.get("prompt_tokens", 0) + asked.get("completion_tokens", 0)
                row["money"] += asked.get("usd") or 0.0
            whole = not row["pending"] and all(run.complete(table) for table in stage.tables)
            row["state"] = "done" if whole else "unfinished"
        rows.append(row)
    return rows


def broken_files(run: RunDir) -> list[str]:
    """Committed files that are gone or not what was committed."""
    return [name for stage in PIPELINE for name in run.broken(stage.name)]

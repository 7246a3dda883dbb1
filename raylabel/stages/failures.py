"""The table `failures`: everything that could not be done, gathered from the manifests of all stages."""

from __future__ import annotations

import json
from typing import Any

from raylabel.store.rundir import RunDir
from raylabel.store.shards import encode
from raylabel.tables import from_rows


def failure_rows(run: RunDir) -> list[dict[str, Any]]:
    """One row for each thing that could not be done, in the order of stages and units."""
    rows = []
    for name in sorted(run.files.sizes("_plan")):
        stage = name.removeprefix("_plan/").removesuffix(".json")
        plan = run.plan(stage)
        entries = run.manifest(stage)
        for unit in plan.units if plan else []:
            entry = entries.get(unit.id)
            for row in entry["failures"] if entry else []:
                where = f"layer={row['layer']},neuron={row['neuron']}" if "neuron" in row else json.dumps(unit.key)
                rows.append({"stage": stage, "unit": where, "attempts": entry["attempt"] if entry else 0, **row})
    return rows


def write_failures(run: RunDir, format: str) -> int:
    """Writes the table anew and returns its number of rows."""
    rows = failure_rows(run)
    table = from_rows(rows, "failures")
    other = "arrow" if format == "parquet" else "parquet"
    name = f"failures/part-0.{format}"
    run.files.write(name, encode(table, "failures", format))
    run.files.write("failures/_SUCCESS", json.dumps({"rows": len(rows), "files": [name]}).encode())
    run.files.delete(f"failures/part-0.{other}")
    return len(rows)

"""Run directories as tests look at them: every table, every file, and what may lie there when a run is done."""

from __future__ import annotations

from pathlib import Path

import yaml

from raylabel.config import RunConfig
from raylabel.stages import PIPELINE
from raylabel.store.lock import locked
from raylabel.store.rundir import RunDir

TABLES = (
    "samples", "exemplars", "statistics", "candidates", "variants", "verifications", "concepts", "labels", "scores", "results",
    "calibration", "failures",
)  # fmt: skip


def config_file(config: RunConfig, path: Path) -> Path:
    """The configuration as a YAML file, with the values that were set and no others."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    return path


def differing(a: RunDir, b: RunDir, names: tuple[str, ...] = TABLES) -> list[str]:
    """Tables whose rows or their order differ between two runs, of the units and of the controls."""
    found = [name for name in names if not a.table(name).equals(b.table(name))]
    return found + [f"controls/{n}" for n in names if not a.controls.table(n).equals(b.controls.table(n))]


def files_of(run: RunDir) -> set[str]:
    """Every file below the run directory."""
    root = Path(run.files.root)
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def committed_files(run: RunDir, temporary: bool = False) -> set[str]:
    """The files of plan ∩ manifest."""
    found = set()
    for stage in PIPELINE:
        plan = run.plan(stage.name)
        entries = run.manifest(stage.name)
        for unit in plan.units if plan else []:
            files = entries[unit.id]["files"] if unit.id in entries else []
            found |= {file["path"] for file in files if temporary or not file.get("temporary")}
    return found


def assert_tidy(run: RunDir) -> None:
    """A plain glob equals the manifest, nothing temporary is left, and nobody holds the lock."""
    plans = {stage.name: run.plan(stage.name) for stage in PIPELINE}
    wanted = committed_files(run) | {"run.json", "_lock", "failures/_SUCCESS", "failures/part-0.parquet"}
    wanted |= {f"_plan/{name}.json" for name in plans}
    wanted |= {f"_manifest/{name}/{unit.id}.json" for name, plan in plans.items() if plan for unit in plan.units}
    for table in {table for stage in PIPELINE for table in stage.tables}:
        wanted.add(f"{table}/_SUCCESS")
        if any(name.startswith(f"controls/{table}/") for name in wanted):
            wanted.add(f"controls/{table}/_SUCCESS")
    found = files_of(run)
    assert found == wanted, f"not wanted {sorted(found - wanted)}, missing {sorted(wanted - found)}"
    with locked(run.files):
        pass

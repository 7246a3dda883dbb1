"""Run directories for the benchmarks, made by the project's own engine, and the steps of a stage one by one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from raylabel.config import RunConfig, build_config
from raylabel.engine.inline import InlinePool
from raylabel.engine.pipeline import plan_stage, run_pipeline
from raylabel.stages import PIPELINE
from raylabel.stages.base import Step
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir

WITHOUT_WINDOWS: dict[str, dict[str, Any]] = {"exemplars": {"quantile": 0, "random": 0}, "controls": {"decoys": 0}}
"""Top-k, both polarities and statistics, nothing else."""
NO_VECTORS: dict[str, dict[str, Any]] = {"identify": {"vectors": "none"}}
"""For runs that end with the scan: no word vectors are trained."""


def config(model: str, out: Path, device: str, context: int, tokens: int, *sections: dict[str, dict[str, Any]]) -> RunConfig:
    """A configuration of the standard library's text, both polarities, in this process; later sections win."""
    tree: dict[str, dict[str, Any]] = {
        "subject": {"model": model, "context": context, "device": device, "polarity": "both"},
        "exemplars": {"corpus": {"path": "stdlib", "tokens": tokens}},
        "controls": {"decoys": 256},
        "run": {"out": str(out), "address": "inline"},
    }
    for section in sections:
        for name, values in section.items():
            node = tree.setdefault(name, {})
            for key, value in values.items():
                node[key] = {**node[key], **value} if isinstance(value, dict) and key in node else value
    return build_config(tree)


def with_stages(wanted: RunConfig, *stages: str) -> RunConfig:
    """The configuration for some stages only."""
    return wanted.model_copy(update={"run": wanted.run.model_copy(update={"stages": list(stages)})})


def run_stages(wanted: RunConfig, *stages: str) -> RunDir:
    """Runs the stages and opens the run."""
    run_pipeline(with_stages(wanted, *stages))
    return RunDir(wanted.run.out)


def copied(wanted: RunConfig, out: Path) -> RunConfig:
    """The configuration for a copy of its run at another place."""
    shutil.copytree(wanted.run.out, out)
    return wanted.model_copy(update={"run": wanted.run.model_copy(update={"out": str(out)})})


def up_to(wanted: RunConfig, stage: str, step: str) -> tuple[RunDir, Step, list[Unit]]:
    """Runs the steps of a stage that come before one of them; gives that step and its units."""
    run = RunDir(wanted.run.out)
    # The workers read the configuration from the run directory.
    run.start(wanted.model_dump(mode="json"))
    found = next(s for s in PIPELINE if s.name == stage)
    plan, steps = plan_stage(found, run, wanted)
    run.reopen(found.tables)
    run.fix_plan(plan)
    for current in steps:
        units = [unit for unit in plan.units if unit.step == current.name]
        if current.name == step:
            return run, current, units
        InlinePool().run(current, [(unit, 1) for unit in units], run.files, wanted.run.format, lambda entry: None)
    raise LookupError(f"the stage {stage} has no step {step}")

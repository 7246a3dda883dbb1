"""Runs a configuration: stage after stage, each one planned when it starts, continued where it was left.

`run_pipeline` is the one way through, for the command line, the API and the jobs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylabel.config import RunConfig
from raylabel.engine.execute import UnitFailed, reason
from raylabel.engine.inline import InlinePool
from raylabel.errors import BadInput, RunFailed
from raylabel.sections import SubjectConfig
from raylabel.stages import STAGES, no_controls, pipeline, prepare, refuse_early, settled, skipped_stages
from raylabel.stages.base import Stage, settings
from raylabel.stages.failures import write_failures
from raylabel.store.files import store_error
from raylabel.store.lock import Held, locked
from raylabel.store.plan import Plan, digest, make_plan
from raylabel.store.rundir import RunDir

Say = Callable[[str], None]
JOB_COPY = "working_dir_files"
"""Folder into which Ray copies the working directory of a job."""
TOLERATED = 10
"""Failed neurons that never stop a run by themselves: a share of a small model is less than one neuron."""


@dataclass
class Report:
    """What a run did.

    Attributes:
        stages: seconds by stage that ran.
        failures: rows in the table `failures`.
    """

    stages: dict[str, float] = field(default_factory=dict)
    failures: int = 0


def open_pool(address: str, workers: int | None, subject: SubjectConfig | None = None) -> Any:
    """Where units run: in this process (`inline`) or on Ray, where `subject` says how many GPUs a worker needs."""
    if address == "inline":
        return InlinePool()
    if address == "local" and "ray" not in sys.modules:
        # Read when Ray is imported: whoever shares this machine must not be able to run code as its owner.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from raylabel.engine.cluster import RayPool

    return RayPool(address, workers, subject)


def run_pipeline(config: RunConfig, say: Say = lambda line: None) -> Report:
    """Runs the wanted stages of `config` in its run directory, skipping what is done.

    Raises BadInput for what the user can mend and RunFailed where the run cannot go on.
    """
    without = no_controls(config)
    config = settled(absolute(config))
    run = RunDir(config.run.out)
    report = Report()
    wanted = chosen(config)
    run.refuse_foreign()
    with locked(run.files) as held:
        run.start(config.model_dump(mode="json"))
        prepare(run, config)
        if without:
            say(f"controls: {without}")
        for name in skipped_stages(config):
            say(f"{name}: skipped, subject.model is none and there is nothing to measure with")
        if any(stage.name == "describe" for stage in wanted):
            refuse_early(run, config)
        pool = None
        try:
            for stage in wanted:
                started = time.time()
                check_needs(stage, wanted, run, config)
                pool = run_stage(stage, run, config, pool, say, held)
                report.stages[stage.name] = time.time() - started
        except Exception as error:
            if not store_error(error):
                raise
            raise RunFailed(f"{run.files.url} cannot be written or read: {reason(error)}; run the same command again") from error
        finally:
            if pool is not None:
                pool.close()
            ended = sys.exc_info()[1]
            try:
                report.failures = write_failures(run, config.run.format)
                run.files.sweep()
            except OSError as error:
                # What ended the run says more than that nothing can be written about it.
                if ended is None:
                    raise RunFailed(f"{run.files.url}: {reason(error)}; run the same command again") from error
    return report


def absolute(config: RunConfig) -> RunConfig:
    """The configuration with its local paths made absolute: workers may have another working directory."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    paths = (("run", "out"), ("subject", "model"), ("subject", "latents"), ("subject", "units"), ("identify", "vectors"),
             ("optimize", "judge"))  # fmt: skip
    for section, key in paths:
        _absolute(tree, section, key, always=section == "run")
    for source, key in (("corpus", "path"), ("recorded", "path"), ("neuronpedia", "url")):
        _absolute(tree.get("exemplars", {}), source, key)
    if "run" not in tree or "out" not in tree["run"]:
        tree.setdefault("run", {})["out"] = str(Path(config.run.out).absolute())
    return RunConfig.model_validate(tree)


def _absolute(tree: dict[str, Any], name: str, key: str, always: bool = False) -> None:
    section = tree.get(name, {})
    value = section.get(key)
    if isinstance(value, str) and "://" not in value and (always or Path(value).exists()):
        section[key] = str(Path(value).absolute())
        if JOB_COPY in Path(section[key]).parts:
            raise BadInput(
                f"{name}.{key}: {value} would lie in the job's own copy of the working directory, which other machines and "
                "later jobs do not see; give an object store's URL, a hub name, or a path that all machines share"
            )


def chosen(config: RunConfig) -> list[Stage]:
    """The stages to run, in order; BadInput names one that does not exist."""
    stages = pipeline(config)
    if config.run.stages == "all":
        return list(stages)
    known = {stage.name: stage for stage in stages}
    for name in config.run.stages:
        if name in skipped_stages(config):
            raise BadInput(f"run.stages: {name} measures with a model, and subject.model is none")
        if name not in known:
            raise BadInput(f"run.stages: no stage {name!r}; stages are {', '.join(known)}")
    return [stage for stage in stages if stage.name in config.run.stages]


def check_needs(stage: Stage, wanted: list[Stage], run: RunDir, config: RunConfig) -> None:
    """BadInput if a stage that this one needs and that is not run again was done with other settings."""
    for name in dict.fromkeys(needed.partition(".")[0] for needed in inputs_of(stage, config)):
        producer = next(s for s in pipeline(config) if s.name == name)
        before = run.plan(name)
        if producer in wanted or before is None:
            continue
        check_needs(producer, wanted, run, config)
        try:
            now = plan_stage(producer, run, config)[0].digest
        except BadInput:
            # What it was made from may be gone; what it made is still there.
            continue
        if now != before.digest:
            raise BadInput(
                f"run.stages: {stage.name} needs {name}, which was done with other settings or input in "
                f"{run.files.url}; run {name} too"
            )


def inputs_of(stage: Stage, config: RunConfig) -> list[str]:
    """What a stage reads of the stages there are."""
    known = {s.name for s in pipeline(config)}
    return [*stage.needs, *(name for name in stage.uses if name in known)]


def plan_stage(stage: Stage, run: RunDir, config: RunConfig) -> tuple[Plan, Any]:
    """The plan of a stage whose inputs are complete, and its steps."""
    inputs = []
    for needed in inputs_of(stage, config):
        name, _, step = needed.partition(".")
        plan = run.plan(name)
        if plan is None and needed in stage.uses:
            continue
        producer = next(s for s in pipeline(config) if s.name == name)
        if plan is None or not all(run.complete(table) for table in producer.tables):
            raise BadInput(f"run.stages: {stage.name} needs {name}, which is not complete in {run.files.url}")
        used = [u.id for u in plan.units if (u.step == step if step else u.step not in producer.aside)]
        inputs.append(digest([needed, used]))
    steps = stage.steps(run, config)
    values = settings(stage, config, run.resolved)
    keys = {s.name: s.keys for s in steps}
    return make_plan(stage.name, stage.version, values, inputs, keys, stage.aside), steps


def run_stage(stage: Stage, run: RunDir, config: RunConfig, pool: Any, say: Say, held: Held | None = None) -> Any:
    """Runs what is pending of a stage; opens the pool when there is something to run. Returns the pool."""
    plan, steps = plan_stage(stage, run, config)
    entries = run.manifest(stage.name)
    committed = run.committed(plan, entries)
    failed = set().union(*(failed_neurons(entry) for entry in committed.values()))
    check_failures(stage.name, len(failed), run, config)
    before = run.plan(stage.name)
    same = before is not None and before.to_json() == plan.to_json()
    if same and len(committed) == len(plan.units) and all(run.complete(t) for t in stage.tables):
        if not run.tidy(plan, stage.tables, committed):
            run.finish(plan, stage.tables, committed)
        say(f"{stage.name}: already done")
        if stage.after:
            stage.after(run, config)
        return pool
    started = time.time()
    if not same:
        stages = pipeline(config)
        for later in reversed(stages[stages.index(stage) :]):
            run.forget_plan(later.name, later.tables)
        for other in STAGES:
            # What another source, or a run with a model, has left behind.
            if other.name not in {s.name for s in stages}:
                run.forget_plan(other.name, tuple(set(other.tables) - {t for s in stages for t in s.tables}))
    run.reopen(stage.tables)
    run.fix_plan(plan)
    attempts = {i: int(entry["attempt"]) + 1 for i, entry in entries.items()}
    for step in steps:
        units = [(u, attempts.get(u.id, 1)) for u in plan.units if u.step == step.name and u.id not in committed]
        if not units:
            continue
        if pool is None:
            say(f"starting {config.run.address}")
            workers = None if config.run.workers == "auto" else config.run.workers
            pool = open_pool(config.run.address, workers, config.subject)
        finished = 0

        def done(entry: dict[str, Any], step: Any = step, total: int = len(units)) -> None:
            nonlocal finished
            if held is not None:
                held.check()
            finished += 1
            failed.update(failed_neurons(entry))
            say(f"{stage.name}: {step.name} {finished}/{total}, {time.time() - started:.1f} s")
            check_failures(stage.name, len(failed), run, config)

        try:
            pool.run(step, units, run.files, config.run.format, done)
        except BaseException as error:
            # The caller does not know of a pool that was opened here.
            pool.close()
            if not isinstance(error, UnitFailed | OSError):
                raise
            why = str(error) if isinstance(error, UnitFailed) else reason(error)
            raise RunFailed(f"{stage.name} cannot go on: {why}") from error
    committed_now = run.committed(plan)
    lost = len(plan.units) - len(committed_now)
    if lost:
        raise RunFailed(f"{stage.name}: files of {lost} units are gone or cut short; run the same command again")
    run.finish(plan, stage.tables, committed_now)
    if stage.after:
        stage.after(run, config)
        check_failures(stage.name, len(failed), run, config)
    return pool


def failed_neurons(entry: dict[str, Any]) -> set[tuple[int, int]]:
    """(layer, neuron) of the model's own units among a manifest entry's failures."""
    return {(f["layer"], f["neuron"]) for f in entry["failures"] if "neuron" in f and not f.get("control")}


def check_failures(stage: str, failed: int, run: RunDir, config: RunConfig) -> None:
    """Raises RunFailed when more neurons of a stage failed than `run.max_failures` allows."""
    total = int(run.resolved.get("n_units", 0))
    if not total:
        # A source's units are counted when they are read.
        return
    allowed = config.run.max_failures * total
    if failed > allowed and (failed > TOLERATED or config.run.max_failures == 0):
        raise RunFailed(
            f"{stage}: {failed} of {total} neurons failed, more than run.max_failures allows "
            f"({config.run.max_failures:g}); see the failures in {run.files.url}"
        )

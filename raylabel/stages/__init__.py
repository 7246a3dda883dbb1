"""The stages in the order of the pipeline. A stage is a file of pure functions and the worker that runs one work unit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.llm.client import open_client
from raylabel.sections import NO_MODEL
from raylabel.sources import neuroscope
from raylabel.sources.records import refuse_sourceless, without_model
from raylabel.stages.base import Stage, text_stage
from raylabel.stages.describe_stage import BUILT_IN, DESCRIBE
from raylabel.stages.identify_stage import IDENTIFY
from raylabel.stages.optimize_stage import OPTIMIZE, check_settings
from raylabel.stages.read import FETCH, READ
from raylabel.stages.results import RESULTS
from raylabel.stages.scan import SCAN
from raylabel.stages.score_stage import SCORE
from raylabel.stages.subject import refuse_contradiction
from raylabel.stages.tokenize import TOKENIZE
from raylabel.stages.verify_stage import VERIFY
from raylabel.store.rundir import RunDir

PIPELINE: tuple[Stage, ...] = (TOKENIZE, SCAN, IDENTIFY, VERIFY, OPTIMIZE, DESCRIBE, SCORE, RESULTS)
"""The stages of a run over a corpus."""
STAGES: tuple[Stage, ...] = (READ, FETCH, *PIPELINE)
"""All there are."""
MEASURING = ("verify",)
"""Stages after the first that nothing but a model can do, with what it is that they do: a run without one skips them."""


def pipeline(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a configuration, in order: with a source other than a corpus, one stage stands for tokenize and scan."""
    return _pipeline(text_stage(config), without_model(config))


@cache
def _pipeline(first: str, no_model: bool) -> tuple[Stage, ...]:
    if first == TOKENIZE.name:
        return PIPELINE
    skipped = MEASURING if no_model else ()
    later = [stage for stage in PIPELINE if stage.name not in ("tokenize", "scan", *skipped)]
    return next(stage for stage in STAGES if stage.name == first), *(_after(stage, first, skipped) for stage in later)


def _after(stage: Stage, first: str, skipped: tuple[str, ...]) -> Stage:
    """A stage with what it needs of tokenize and scan taken from `first`, and nothing from stages that are skipped."""
    needs = [needed.partition(".") for needed in stage.needs]
    kept = [(first if name in ("tokenize", "scan") else name, dot, step) for name, dot, step in needs if name not in skipped]
    return replace(stage, needs=tuple(dict.fromkeys("".join(parts) for parts in kept)))


def skipped_stages(config: RunConfig) -> list[str]:
    """Names of the stages that are left out for want of a model."""
    names = {stage.name for stage in pipeline(config)}
    return [name for name in MEASURING if name not in names]


def prepare(run: RunDir, config: RunConfig) -> None:
    """Refuses what no stage of this version can run."""
    if config.exemplars.source == "neuroscope":
        neuroscope.wanted(config)
    refuse_sourceless(config)
    check_settings(config.optimize)
    if without_model(config):
        if config.subject.latents is not None:
            raise BadInput(f"subject.latents: belongs to a model, but subject.model is {NO_MODEL}")
        return
    refuse_contradiction(config)


def settled(config: RunConfig) -> RunConfig:
    """The configuration without controls where there is no corpus to scan them on, at the site of the recordings.

    Without a model nothing is verified: what is asked of verified units is done for flagged ones.
    """
    if config.exemplars.source == "corpus":
        return config
    if config.exemplars.source == "neuroscope" and "site" not in config.subject.model_fields_set:
        site = neuroscope.site_of(config) or config.subject.site
        config = config.model_copy(update={"subject": config.subject.model_copy(update={"site": site})})
    none = config.controls.model_copy(update={"decoys": 0, "nulls": 0, "planted": 0})
    sections: dict[str, Any] = {"controls": none}
    if without_model(config):
        for name in ("optimize", "describe", "score"):
            section = getattr(config, name)
            if section.units == "verified":
                sections[name] = section.model_copy(update={"units": "flagged"})
    return config.model_copy(update=sections)


def no_controls(config: RunConfig) -> str | None:
    """Why a run has no controls, and which of those asked for are left out; None for a run over a corpus, which has them."""
    if config.exemplars.source == "corpus":
        return None
    wanted = config.controls
    asked = [(name, getattr(wanted, name)) for name in ("decoys", "nulls", "planted") if name in wanted.model_fields_set]
    named = ", ".join(f"{name}: {n}" for name, n in asked if n)
    left_out = f"{named} left out, " if named else ""
    return f"none: {left_out}exemplars.source is {config.exemplars.source} and there is no corpus to scan them on"


def refuse_early(run: RunDir, config: RunConfig) -> None:
    """Refuses at the start of a run what its explainer would stumble over at the end of it: no key, no model, no prices."""
    if config.describe.explainer != BUILT_IN and not run.complete("labels"):
        open_client(run, config)

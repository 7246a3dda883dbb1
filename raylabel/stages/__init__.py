"""The stages in the order of the pipeline. A stage is a file of pure functions and the worker that runs one work unit."""

from __future__ import annotations

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.llm.client import open_client
from raylabel.stages.base import Stage
from raylabel.stages.describe_stage import BUILT_IN, DESCRIBE
from raylabel.stages.identify_stage import IDENTIFY
from raylabel.stages.results import RESULTS
from raylabel.stages.scan import SCAN
from raylabel.stages.score_stage import SCORE
from raylabel.stages.subject import refuse_contradiction
from raylabel.stages.tokenize import TOKENIZE
from raylabel.stages.verify_stage import VERIFY
from raylabel.store.rundir import RunDir

PIPELINE: tuple[Stage, ...] = (TOKENIZE, SCAN, IDENTIFY, VERIFY, DESCRIBE, SCORE, RESULTS)


def prepare(run: RunDir, config: RunConfig) -> None:
    """Refuses what no stage of this version can run."""
    if config.exemplars.source != "corpus":
        raise BadInput(f"exemplars.source: {config.exemplars.source} is not part of this version; use corpus")
    refuse_contradiction(config)


def refuse_early(run: RunDir, config: RunConfig) -> None:
    """Refuses at the start of a run what its explainer would stumble over at the end of it: no key, no model, no prices."""
    if config.describe.explainer != BUILT_IN and not run.complete("labels"):
        open_client(run, config)

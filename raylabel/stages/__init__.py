"""The stages in the order of the pipeline. A stage is a file of pure functions and the worker that runs one work unit."""

from __future__ import annotations

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.stages.base import Stage
from raylabel.stages.identify_stage import IDENTIFY
from raylabel.stages.optimize_stage import OPTIMIZE, check_settings
from raylabel.stages.results import RESULTS
from raylabel.stages.scan import SCAN
from raylabel.stages.subject import refuse_contradiction
from raylabel.stages.tokenize import TOKENIZE
from raylabel.stages.verify_stage import VERIFY
from raylabel.store.rundir import RunDir

PIPELINE: tuple[Stage, ...] = (TOKENIZE, SCAN, IDENTIFY, VERIFY, OPTIMIZE, RESULTS)


def prepare(run: RunDir, config: RunConfig) -> None:
    """Refuses what no stage of this version can run."""
    if config.exemplars.source != "corpus":
        raise BadInput(f"exemplars.source: {config.exemplars.source} is not part of this version; use corpus")
    refuse_contradiction(config)
    check_settings(config.optimize)

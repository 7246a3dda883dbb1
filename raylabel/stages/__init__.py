"""The stages in the order of the pipeline. A stage is a file of pure functions and the worker that runs one work unit."""

from __future__ import annotations

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.stages.base import Stage
from raylabel.stages.scan import SCAN
from raylabel.stages.tokenize import TOKENIZE
from raylabel.store.rundir import RunDir

PIPELINE: tuple[Stage, ...] = (TOKENIZE, SCAN)


def prepare(run: RunDir, config: RunConfig) -> None:
    """Refuses what no stage of this version can run."""
    if config.exemplars.source != "corpus":
        raise BadInput(f"exemplars.source: {config.exemplars.source} is not part of this version; use corpus")

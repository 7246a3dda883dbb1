"""Runs units one after another in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raylabel.engine.execute import UnitFailed, execute, opened
from raylabel.stages.base import Step
from raylabel.store.files import Files
from raylabel.store.plan import Unit

ATTEMPTS = 3


class InlinePool:
    """The engine without Ray."""

    workers = 1

    def run(
        self, step: Step, units: list[tuple[Unit, int]], files: Files, format: str, done: Callable[[dict[str, Any]], None]
    ) -> None:
        """Runs (unit, first attempt number) pairs; calls `done` with each manifest entry.

        Raises UnitFailed after the last attempt at a unit that cannot be cut.
        """
        worker = opened(step, files.url)
        for unit, first in units:
            for attempt in range(first, first + ATTEMPTS):
                try:
                    done(execute(worker, step, files, unit, attempt, format))
                    break
                except UnitFailed:
                    if attempt == first + ATTEMPTS - 1:
                        raise

    def close(self) -> None:
        """Nothing to end."""

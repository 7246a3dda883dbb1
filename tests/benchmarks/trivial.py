"""Work that is next to nothing, for the fixed cost of a stage. Imports nothing heavy, so that a worker brings in no more."""

from __future__ import annotations

import time
from typing import Any


class Plain:
    """A worker in one piece that writes nothing."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, unit: Any) -> Any:
        from raylabel.store.shards import Output

        return Output()


class First:
    """The link that hands on nothing."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, unit: Any, payload: Any) -> Any:
        return {}


class Last(First):
    """The link that gives an output of nothing."""

    def __call__(self, unit: Any, payload: Any) -> Any:
        from raylabel.store.shards import Output

        return Output()


def seconds_of_imports() -> float:
    """Seconds that a fresh process takes to import what a worker of the engine needs, torch and the models included."""
    started = time.perf_counter()
    import raylabel.engine.cluster
    import raylabel.stages  # noqa: F401

    return time.perf_counter() - started

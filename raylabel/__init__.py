"""raylabel labels what the inside of a language model means: `run`, `open_run` and `RunConfig` are its public names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raylabel.api import open_run, run
    from raylabel.config import RunConfig

__version__ = "0.1.0"
__all__ = ["RunConfig", "open_run", "run"]


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used, so that `import raylabel` costs nothing."""
    if name == "RunConfig":
        from raylabel.config import RunConfig

        return RunConfig
    if name in ("run", "open_run"):
        from raylabel import api

        return getattr(api, name)
    raise AttributeError(f"module 'raylabel' has no attribute {name!r}")

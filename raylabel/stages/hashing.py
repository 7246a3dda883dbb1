"""Numbers drawn by hash: the same for the same key on every machine, in any order."""

from __future__ import annotations

from typing import Any

import numpy as np


def hashed(*parts: Any) -> Any:
    """uint64 from integers, broadcast against each other (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed: Any = np.zeros(1, np.uint64)
        for part in parts:
            given = np.asarray(part)
            given = given if given.dtype == np.uint64 else given.astype(np.int64).astype(np.uint64)
            mixed = mixed + given + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def uniform(bits: Any) -> Any:
    """float64 in [0, 1) from uint64."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

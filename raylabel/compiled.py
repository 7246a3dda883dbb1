"""Functions on numbers and arrays, compiled by Numba at their first call."""

from __future__ import annotations

from typing import Any

import numba


def compiled(function: Any) -> Any:
    """The function without the interpreter and its lock; kept on disk where there is a folder to write to."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        return numba.njit(nogil=True, error_model="numpy")(function)

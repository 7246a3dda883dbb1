"""A Hadamard matrix of 2^k rows, and its products with signed, folded rows without the matrix.

The matrix is Sylvester's with its columns in the order in which the transform leaves them: entries +1 and -1, columns
orthogonal. A row's result depends on nothing but that row, bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylabel.compiled import compiled

LANES = 16
"""Numbers that are next to each other in the first half of the transform: what a vector register holds."""


@cache
def hadamard(size: int) -> Tensor:
    """float32 [size, size], size a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    lanes = min(LANES, size)
    order = torch.arange(size).view(size // lanes, lanes).T.flatten()
    return matrix[:, order]


@compiled
def _butterflies(row: Any, least: int) -> None:
    """In place: sums and differences of numbers `least`, 2 `least`, 4 `least` … apart."""
    h = least
    while h < len(row):
        for i in range(0, len(row), 2 * h):
            a, b = row[i : i + h], row[i + h : i + 2 * h]
            for j in range(h):
                x, y = a[j], b[j]
                a[j], b[j] = x + y, x - y
        h *= 2


@compiled
def _transform(row: Any, turned: Any) -> None:
    """`turned` = row @ hadamard(len(row)); `row` is used up."""
    lanes = min(LANES, len(row))
    parts = len(row) // lanes
    _butterflies(row, lanes)
    # Turned, so that what is added next lies far enough apart to be handled together.
    for i in range(parts):
        for k in range(lanes):
            turned[k * parts + i] = row[i * lanes + k]
    _butterflies(turned, parts)


@compiled
def mixed(rows: Any, drawn: Any, scale: Any, constant: Any, out: Any) -> None:
    """Folds each of the rows, transforms it, gives it the signs between, transforms it again and scales it.

    Args:
        rows: float32 [N, width].
        drawn: [rounds, 1 + blocks, P]: see `controls.draw`; blocks * P >= width.
        scale, constant: [n], n <= rounds * P; out: [N, n].
    """
    rounds, blocks, size = drawn.shape
    width, n = rows.shape[1], out.shape[1]
    folded, turned = np.empty(size, np.float32), np.empty(size, np.float32)
    for t in range(len(rows)):
        for r in range(rounds):
            folded[:] = 0
            for b in range(blocks - 1):
                units, sign = rows[t, b * size : min((b + 1) * size, width)], drawn[r, 1 + b]
                for j in range(len(units)):
                    folded[j] += units[j] * sign[j]
            _transform(folded, turned)
            between = drawn[r, 0]
            for j in range(size):
                turned[j] *= between[j]
            _transform(turned, folded)
            first = r * size
            for i in range(min(size, n - first)):
                out[t, first + i] = folded[i] * scale[first + i] + constant[first + i]

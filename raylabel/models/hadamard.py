"""A Hadamard matrix of 2^k rows, and its product with signed, folded rows without the matrix.

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
def signed_transform(rows: Any, signs: Any, scale: Any, constant: Any, out: Any) -> None:
    """`out[t, r * P + i]` = constant + scale * sum over b, j of rows[t, b * P + j] * signs[r, b, j] * hadamard(P)[j, i].

    Args:
        rows: float32 [N, width].
        signs: [rounds, blocks, P], blocks * P >= width.
        scale, constant: [n], n <= rounds * P; out: [N, n].
    """
    rounds, blocks, size = signs.shape
    width, n = rows.shape[1], out.shape[1]
    lanes = min(LANES, size)
    parts = size // lanes
    folded, turned = np.empty(size, np.float32), np.empty(size, np.float32)
    for t in range(len(rows)):
        for r in range(rounds):
            folded[:] = 0
            for b in range(blocks):
                units, sign = rows[t, b * size : min((b + 1) * size, width)], signs[r, b]
                for j in range(len(units)):
                    folded[j] += units[j] * sign[j]
            _butterflies(folded, lanes)
            # Turned, so that numbers next to each other lie far enough apart to be handled together.
            for i in range(parts):
                for k in range(lanes):
                    turned[k * parts + i] = folded[i * lanes + k]
            _butterflies(turned, parts)
            first = r * size
            for i in range(min(size, n - first)):
                out[t, first + i] = turned[i] * scale[first + i] + constant[first + i]

"""Units near a unit: by what they write into the residual stream, by the tokens they raise and lower, by where they peak.

All three give, for each of N units, up to K others: `Near(index [N, K] int32, value [N, K] float32)`, most alike first,
index -1 where there is none. A unit's other polarities are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

NEAREST = 8
WORK = 2e13
"""Multiplications of a comparison of all units with all; beyond, units are compared within their layer."""
BLOCK = 1024


@dataclass(frozen=True)
class Near:
    """Units near each unit; `within` says whether only those of the same layer were looked at."""

    index: np.ndarray
    value: np.ndarray
    within: bool = False
    second: np.ndarray | None = None
    """A further figure beside the value."""


def by_direction(units: np.ndarray, directions: dict[int, np.ndarray], k: int = NEAREST) -> Near:
    """Cosines between output directions; the low end of a unit writes the opposite of its high end.

    Args:
        units: [N, 3] layer, neuron, polarity. directions: layer -> [width, d_model].
    """
    width = next(iter(directions.values())).shape[1] if directions else 0
    vectors = np.zeros((len(units), width), np.float32)
    for layer, rows in directions.items():
        mine = units[:, 0] == layer
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        unit = np.divide(rows, length, out=np.zeros_like(rows, dtype=np.float32), where=length > 0)
        vectors[mine] = unit[units[mine, 1]] * np.sign(units[mine, 2])[:, None]
    within = float(len(units)) ** 2 * width > WORK
    index = np.full((len(units), k), -1, np.int32)
    value = np.full((len(units), k), np.nan, np.float32)
    groups = [np.flatnonzero(units[:, 0] == layer) for layer in np.unique(units[:, 0])] if within else [np.arange(len(units))]
    for group in groups:
        for at in range(0, len(group), BLOCK):
            mine = group[at : at + BLOCK]
            cosines = vectors[mine] @ vectors[group].T
            cosines[_same(units[mine], units[group])] = -np.inf
            n = min(k, len(group))
            best = np.argpartition(-cosines, n - 1, axis=1)[:, :n]
            found = np.take_along_axis(cosines, best, 1)
            order = np.argsort(-found, axis=1, kind="stable")
            best, found = np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)
            index[mine, :n] = np.where(found > 0, group[best], -1)
            value[mine, :n] = np.where(found > 0, found, np.nan)
    return Near(index, value, within)


def by_logits(units: np.ndarray, up: list[Any], down: list[Any], k: int = NEAREST) -> Near:
    """Cosines between what the run recorded of the output: the few tokens a unit raises and lowers most, all others 0.

    Args:
        up, down: per unit a list of {token, value}, or None.
    """
    tokens: dict[str, int] = {}
    rows, columns, values = [], [], []
    for i, lists in enumerate(zip(up, down, strict=True)):
        for entry in (e for entries in lists for e in entries or []):
            rows.append(i)
            columns.append(tokens.setdefault(entry["token"], len(tokens)))
            values.append(entry["value"] or 0.0)
    matrix = sp.csr_matrix((np.array(values, np.float32), (rows, columns)), (len(units), max(len(tokens), 1)))
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(1)).ravel())
    matrix = (sp.diags_array(1 / np.where(length > 0, length, 1)) @ matrix).tocsr()
    return _sparse(units, matrix, matrix, k, least=0.05)


def by_cofiring(units: np.ndarray, which: np.ndarray, samples: np.ndarray, places: np.ndarray, k: int = NEAREST) -> Near:
    """Shared top exemplars: the share of a unit's samples in which the other has a top exemplar too.

    Args:
        which: [M] index of the unit of each top exemplar. samples, places: [M] its sample, and its peak's position in it.

    `second` is the share in which both peak at the same token. Units with fewer than two samples in common are left out.
    """
    n = len(units)
    if not len(which):
        return Near(np.full((n, k), -1, np.int32), np.full((n, k), np.nan, np.float32), second=np.zeros((n, k), np.float32))
    _, columns = np.unique(samples, return_inverse=True)
    together = np.stack([samples, places], axis=1)
    _, spots = np.unique(together, axis=0, return_inverse=True)
    shared = _ones(which, columns, n)
    same = _ones(which, spots.ravel(), n)
    counts = np.maximum(np.asarray(shared.sum(1)).ravel(), 1)
    found = _sparse(units, shared, shared, k, least=2)
    value = found.value / counts[:, None]
    exact = np.zeros_like(value)
    for column in range(k):
        other = np.maximum(found.index[:, column], 0)
        exact[:, column] = np.asarray(same.multiply(same[other]).sum(1)).ravel() / counts
    return Near(found.index, value, second=np.where(found.index < 0, 0, exact).astype(np.float32))


def _ones(rows: np.ndarray, columns: np.ndarray, n: int) -> sp.csr_matrix:
    matrix = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (n, int(columns.max()) + 1))
    matrix.data[:] = 1
    return matrix


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[len(a), len(b)] whether two rows are one unit, at whichever end."""
    same: np.ndarray = (a[:, None, 0] == b[None, :, 0]) & (a[:, None, 1] == b[None, :, 1])
    return same


def _sparse(units: np.ndarray, a: sp.csr_matrix, b: sp.csr_matrix, k: int, least: float) -> Near:
    """The k largest products of each row of `a` with rows of `b`, those of `least` or more."""
    index = np.full((len(units), k), -1, np.int32)
    value = np.full((len(units), k), np.nan, np.float32)
    right = b.T.tocsr()
    for at in range(0, len(units), BLOCK):
        block = (a[at : at + BLOCK] @ right).tocsr()
        for i in range(block.shape[0]):
            others = block.indices[block.indptr[i] : block.indptr[i + 1]]
            found = block.data[block.indptr[i] : block.indptr[i + 1]]
            keep = (found >= least) & ~((units[others, 0] == units[at + i, 0]) & (units[others, 1] == units[at + i, 1]))
            others, found = others[keep], found[keep]
            best = np.lexsort((others, -found))[:k]
            index[at + i, : len(best)], value[at + i, : len(best)] = others[best], found[best]
    return Near(index, value)

"""Power sums of every unit, added up along a binary tree over sample numbers.

The order of the floating-point additions then does not depend on how the samples were cut, and the sums are the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Moments:
    """Power sums 1..4 of C units over samples; holds as many nodes of the tree as the samples seen need."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], Tensor] = {}

    def add(self, first: int, sums: Tensor) -> None:
        """Per-sample sums [B, 4, C] float64 of samples first .. first + B, B a power of two that divides `first`.

        Overwrites `sums`.
        """
        level = 0
        while len(sums) >> level > 1:
            step = 1 << level
            sums[0 :: 2 * step] += sums[step :: 2 * step]
            level += 1
        self._insert(level, first >> level, sums[0].clone())

    def _insert(self, level: int, index: int, value: Tensor) -> None:
        while (level, index ^ 1) in self.nodes:
            other = self.nodes.pop((level, index ^ 1))
            value = value + other if index & 1 == 0 else other + value
            level, index = level + 1, index >> 1
        self.nodes[(level, index)] = value

    def total(self) -> Tensor:
        """Sums [4, C] over everything added, float64."""
        ordered = sorted(self.nodes.items(), key=lambda item: item[0][1] << item[0][0])
        total = torch.zeros_like(ordered[0][1])
        for _, value in ordered:
            total = total + value
        return total

    def arrays(self, units: Tensor) -> dict[str, np.ndarray]:
        """The sums of some units."""
        names = sorted(self.nodes)
        return {
            "nodes": np.array(names, dtype=np.int64).reshape(-1, 2),
            "sums": np.stack([self.nodes[name][:, units].cpu().numpy() for name in names]),
        }

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds the sums of other samples."""
        for (level, index), value in zip(arrays["nodes"].tolist(), arrays["sums"], strict=True):
            self._insert(level, index, torch.from_numpy(value))

"""Running state of a scan: top samples, a sample of the firing ones, moments and histogram of every unit, mergeable.

A column is one unit at one polarity; activations below are polarity * activation. All state is of a fixed size however
many tokens were seen, and merging is exact: any cut of the samples into leases, merged in any order, gives the same bits.

- top: the k samples of largest maximum, ties to the smaller sample number.
- firing: of the samples in which the unit fires, those m with the smallest hash: a uniform draw without replacement.
- moments: power sums of (activation - shift) a sample, added up along a binary tree over sample numbers, so that the
  order of the floating-point additions does not depend on the cut.
- histogram: counts of signed activations in the bins of the schema.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raylabel.tables import HISTOGRAM_BINS, HISTOGRAM_LOW, MAGNITUDES

NOTHING = torch.iinfo(torch.int64).max
"""Key of an empty slot of the firing samples, and sample number of an empty slot of the top."""
BUFFERED = 256
"""Samples gathered before they are merged into the top."""
_HALF_OCTAVE_ZERO = (127 + HISTOGRAM_LOW) << 1


def hash_keys(samples: np.ndarray, seed: int, salt: int) -> np.ndarray:
    """int64 keys that order samples at random: 31 bits of splitmix64 above 32 bits of the sample's own number."""
    with np.errstate(over="ignore"):
        mixed = samples.astype(np.uint64) + np.uint64(((seed * 2 + 1) * 0x9E3779B97F4A7C15 + salt) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return ((mixed >> np.uint64(33)).astype(np.int64) << 32) | samples.astype(np.int64)


def top_merge(values: Tensor, samples: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row of [C, N] candidates, best first; equal values in the order of sample numbers.

    Candidates with value -inf are empty. Sample numbers must be unique within a row's non-empty candidates.
    """
    order = torch.argsort(samples, dim=1, stable=True)
    values, samples = values.gather(1, order), samples.gather(1, order)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), samples.gather(1, order)[:, :k].contiguous()


def firing_merge(keys: Tensor, values: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The m smallest keys of each row of [C, N] candidates with their values; empty slots have key NOTHING."""
    keys, order = torch.sort(keys, dim=1)
    return keys[:, :m].contiguous(), values.gather(1, order)[:, :m].contiguous()


@dataclass
class Best:
    """Top and firing samples of C columns in one split."""

    k: int
    m: int
    values: Tensor
    samples: Tensor
    keys: Tensor
    firing: Tensor
    _buffer: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _rows: int = 0

    @staticmethod
    def empty(columns: int, k: int, m: int, device: torch.device) -> Best:
        """No samples seen."""
        return Best(
            k, m,
            torch.full((columns, k), -torch.inf, device=device),
            torch.full((columns, k), NOTHING, device=device),
            torch.full((columns, m), NOTHING, device=device),
            torch.zeros((columns, m), device=device),
        )  # fmt: skip

    def add(self, maxima: Tensor, samples: Tensor, keys: Tensor) -> None:
        """Maxima [B, C] of the samples with these numbers [B] and hash keys [B]; -inf where a unit does not fire."""
        if len(samples) == 0:
            return
        self._buffer.append((maxima.T, samples, keys))
        self._rows += len(samples)
        if self._rows >= BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Merges what is buffered."""
        if not self._buffer:
            return
        maxima = torch.cat([b[0] for b in self._buffer], dim=1)
        samples = torch.cat([b[1] for b in self._buffer]).expand(maxima.shape)
        keys = torch.cat([b[2] for b in self._buffer]).expand(maxima.shape)
        self._buffer, self._rows = [], 0
        empty = torch.full_like(keys, NOTHING)
        fires = maxima > -torch.inf
        self._merge(maxima, torch.where(fires, samples, empty), torch.where(fires, keys, empty), maxima)

    def _merge(self, values: Tensor, samples: Tensor, keys: Tensor, firing: Tensor) -> None:
        self.values, self.samples = top_merge(
            torch.cat([self.values, values], 1), torch.cat([self.samples, samples], 1), self.k
        )
        if self.m:
            self.keys, self.firing = firing_merge(
                torch.cat([self.keys, keys], 1), torch.cat([self.firing, firing], 1), self.m
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as arrays."""
        self.flush()
        return {
            "values": self.values.cpu().numpy(), "samples": self.samples.cpu().numpy(),
            "keys": self.keys.cpu().numpy(), "firing": self.firing.cpu().numpy(),
        }  # fmt: skip

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds the state of other samples."""
        self._merge(*(torch.from_numpy(arrays[name]) for name in ("values", "samples", "keys", "firing")))


class Moments:
    """Power sums 1..4 of C columns along a binary tree over sample numbers."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], Tensor] = {}

    def add(self, first: int, sums: Tensor) -> None:
        """Per-sample sums [B, 4, C] float64 of samples first .. first + B, B a power of two that divides `first`."""
        level = 0
        while len(sums) > 1:
            sums = sums[0::2] + sums[1::2]
            level += 1
        self._insert(level, first >> level, sums[0])

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

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as arrays."""
        names = sorted(self.nodes)
        return {
            "nodes": np.array(names, dtype=np.int64).reshape(-1, 2),
            "sums": np.stack([self.nodes[name].cpu().numpy() for name in names]),
        }

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds the state of other samples."""
        for (level, index), value in zip(arrays["nodes"].tolist(), arrays["sums"], strict=True):
            self._insert(level, index, torch.from_numpy(value))


def histogram(values: Tensor, columns: Tensor, n: int) -> Tensor:
    """Counts [n, HISTOGRAM_BINS] of finite values by column.

    A float32's sign, exponent and first mantissa bit are its bin, so the counting compares nothing.
    """
    half = len(MAGNITUDES)
    # values.view is exact: the shift keeps exponent and leading mantissa bit of |value|.
    octave = (values.abs().view(torch.int32) >> 22) - _HALF_OCTAVE_ZERO
    magnitude = octave.clamp_(-1, half - 1).add_(1)
    bins = torch.where(values < 0, half - magnitude, half + magnitude)
    flat = bins.long().add_(columns * HISTOGRAM_BINS)
    return torch.bincount(flat.flatten(), minlength=n * HISTOGRAM_BINS).view(n, HISTOGRAM_BINS)

"""What a scan keeps of a group of units (a layer's neurons or latents, or its decoys), and the update with a batch.

The state is of a fixed size however many tokens were seen, and merging is exact: any cut of the samples into leases,
merged in any order, gives the same bits. A column is a unit at one sign: the units at the first sign, then all of them
at the next. Sums, counts and histograms are kept once a unit, for sign +1.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylabel.stages import device
from raylabel.stages.kept import Kept
from raylabel.stages.moments import Moments
from raylabel.tables import HISTOGRAM_BINS, SPLITS

KEPT = ("order", "value", "place", "ties", "slot", "window", "floor")
HISTOGRAM_ROW = 128
"""Counts a unit's histogram is given, a power of two."""
CPU_PASS, GPU_PASS = 1 << 22, 1 << 26
"""Activations handled at a time."""
LISTS = tuple(f"{split}.{kind}" for split in SPLITS for kind in ("top", "firing"))
"""The lists' order, as the update of a batch counts on it."""


@dataclass(frozen=True)
class Sizes:
    """How much is kept.

    Attributes:
        lists: entries of each of LISTS.
        before, after, window: positions kept around a peak, and how many these are at most.
        random: random samples of a lease.
    """

    lists: tuple[int, ...]
    before: int
    after: int
    window: int
    random: int


@dataclass(frozen=True)
class Batch:
    """What the update needs to know of the samples of a batch; numpy arrays [B] unless said otherwise.

    Attributes:
        first: number of row 0; B is a power of two that divides it, and missing rows are masked out whole.
        samples, lots: numbers, and orders in the firing list.
        split: 0 explain, 1 score.
        chosen: place among the lease's random samples, -1 for none.
        lengths: tokens.
    """

    first: int
    samples: np.ndarray
    lots: np.ndarray
    split: np.ndarray
    chosen: np.ndarray
    lengths: np.ndarray

    def part(self, rows: slice) -> Batch:
        """Some of the rows."""
        arrays = (getattr(self, name)[rows] for name in ("samples", "lots", "split", "chosen", "lengths"))
        return Batch(self.first + (rows.start or 0), *arrays)


class UnitState:
    """Running state of W units over the samples of a lease."""

    def __init__(self, shift: Tensor, signs: tuple[int, ...], sizes: Sizes) -> None:
        """`shift` [W]: the units' means in the pilot, taken off before moments are summed; its device is the state's."""
        self.shift, self.signs, self.sizes, self.device = shift, signs, sizes, shift.device
        width, columns = len(shift), len(shift) * len(signs)
        self.kept = [Kept.empty(columns, k, sizes.window, self.device) for k in sizes.lists]
        self.random = Kept.empty(columns, sizes.random, sizes.window, self.device)
        self.random.value.fill_(-torch.inf)
        self.moments = Moments()

        def full(shape: Any, value: float, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self.device)

        self.high, self.low = full((width,), -torch.inf, torch.float32), full((width,), torch.inf, torch.float32)
        self.fires = full((2, width), 0, torch.int64)
        self.bad = full((width,), False, torch.bool)
        self.histogram = full((width, HISTOGRAM_ROW), 0, torch.int32)

    def add(self, read: Callable[[slice], Tensor], mask: Tensor, batch: Batch) -> None:
        """One batch: `read(rows)` gives the activations [b, T, W] float32 of some rows, mask [B, T] what counts of them."""
        rows, length, width = len(mask), mask.shape[1], len(self.shift)
        sums = torch.empty((rows, 4, width), dtype=torch.float64, device=self.device)
        on_cpu = self.device.type == "cpu"
        update, size = (_update_cpu, CPU_PASS) if on_cpu else (device.update, GPU_PASS)
        step = max(1, size // (length * width))
        for at in range(0, rows, step):
            part = slice(at, min(at + step, rows))
            update(self, read(part), mask[part], batch.part(part), sums[part])
        self.moments.add(batch.first, sums)

    @cached_property
    def cpu_arrays(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The state's memory as the arguments of `kernel.update` before and after `sums`."""
        fixed = (self.shift.numpy(), np.array(self.signs, dtype=np.float32), self.sizes.before, self.sizes.after)
        whole = (self.high, self.low, self.fires, self.bad, self.histogram)
        drawn = (self.random.value, self.random.place, self.random.ties, self.random.window)
        views = [t.numpy() for t in whole]
        views[-1] = views[-1].view(np.uint32)
        kept = (tuple(getattr(k, name).numpy() for k in self.kept) for name in KEPT)
        return (*fixed, *views), (*kept, *(t.numpy() for t in drawn))

    def arrays(self, units: Tensor | None = None) -> dict[str, np.ndarray]:
        """The state of some units, given by their places, as arrays."""
        width = len(self.shift)
        units = torch.arange(width) if units is None else units
        units = units.to(self.device)
        columns = torch.cat([units + i * width for i in range(len(self.signs))])
        found = {"high": self.high[units], "low": self.low[units], "fires": self.fires[:, units], "bad": self.bad[units]}
        arrays = {name: tensor.cpu().numpy() for name, tensor in found.items()}
        # The counts of a lease fit 32 bits without a sign.
        counts = self.histogram[units, :HISTOGRAM_BINS].cpu().numpy().view(np.uint32)
        arrays["histogram"] = counts.astype(np.int64)
        arrays |= {f"moments.{k}": v for k, v in self.moments.arrays(units).items()}
        for name, kept in zip((*LISTS, "random"), (*self.kept, self.random), strict=True):
            arrays |= {f"{name}.{k}": v for k, v in kept.arrays(columns).items()}
        return arrays


def state_bytes(units: int, signs: int, sizes: Sizes, batch: int, samples: int) -> int:
    """Bytes of the state of a group of units, the power sums of a batch included."""
    entry = 8 + 4 + 4 + 4 + 4 + 4 * sizes.window
    column = (sum(sizes.lists) + sizes.random) * entry + 8 * (len(sizes.lists) + 1)
    row = 4 + 4 + 4 + 16 + 1 + 4 * HISTOGRAM_ROW + 32 * (2 * batch + max(samples, 1).bit_length())
    return units * (signs * column + row)


def _update_cpu(state: UnitState, acts: Tensor, mask: Tensor, batch: Batch, sums: Tensor) -> None:
    from raylabel.stages import kernel

    values, given = acts.contiguous().numpy(), state.cpu_arrays
    wanted = (
        mask.numpy(), batch.lengths, batch.split, batch.samples, batch.lots, batch.chosen, *given[0], sums.numpy(), *given[1],
    )  # fmt: skip

    def part(first: int, last: int) -> None:
        kernel.update(values, values.view(np.int32), first, last, *wanted)

    width, threads = values.shape[2], torch.get_num_threads()
    share = -(-width // (threads * kernel.BLOCK)) * kernel.BLOCK
    starts = range(0, width, share)
    if len(starts) == 1:
        part(0, width)
    else:
        list(_pool(threads).map(lambda a: part(a, min(a + share, width)), starts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)

"""The update of a scan's state with one batch as tensor operations, for any device; see `kernel.py` for the compiled one.

Both give the same bits but for the power sums, whose additions have another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raylabel.stages.kept import top_orders
from raylabel.tables import HISTOGRAM_LOW, MAGNITUDES

if TYPE_CHECKING:
    from raylabel.stages.state import Batch, UnitState

OCTAVE_ZERO = (127 + HISTOGRAM_LOW) << 1
HALF = len(MAGNITUDES)


def update(state: UnitState, acts: Tensor, mask: Tensor, batch: Batch, sums: Tensor) -> None:
    """Adds activations [B, T, W] to the state and sets `sums` [B, 4, W]."""
    high, low = _reduce(state, acts, mask, sums)
    for i, sign in enumerate(state.signs):
        _keep(state, acts, mask, batch, high if sign > 0 else -low, sign, i * acts.shape[2])


def _reduce(state: UnitState, x: Tensor, mask: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    inside = mask[..., None]
    high = torch.where(inside, x, -torch.inf).amax(1)
    low = torch.where(inside, x, torch.inf).amin(1)
    # A masked position adds exactly nothing to any power sum.
    moved = torch.where(inside, x - state.shift, 0.0)
    square = moved * moved
    for i, power in enumerate((moved, square, square * moved, square * square)):
        sums[:, i] = power.sum(1).double()
    state.fires[0] += ((x > 0) & inside).sum((0, 1))
    state.fires[1] += ((x < 0) & inside).sum((0, 1))
    state.bad |= (sums[:, 0].isnan() | (high == torch.inf) | (low == -torch.inf)).any(0)
    state.high = torch.maximum(state.high, torch.nan_to_num(high, nan=-torch.inf, neginf=-torch.inf).amax(0))
    state.low = torch.minimum(state.low, torch.nan_to_num(low, nan=torch.inf, posinf=torch.inf).amin(0))
    octave = (x.abs().view(torch.int32) >> 22).sub_(OCTAVE_ZERO).clamp_(-1, HALF - 1).add_(1)
    # The last place of a unit's row takes what does not count.
    rest = state.histogram.shape[1] - 1
    bins = torch.where(inside, torch.where(x < 0, HALF - octave, HALF + octave), rest)
    units = torch.arange(x.shape[2], device=x.device) * state.histogram.shape[1]
    flat = (bins.long() + units).flatten()
    state.histogram.view(-1).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return high, low


def _keep(
    state: UnitState, acts: Tensor, mask: Tensor, batch: Batch, extreme: Tensor, sign: int, offset: int
) -> None:  # fmt: skip
    """Enters the batch's samples in the lists of the columns offset, offset + 1, …; extreme [B, units]."""
    def tensor(array: object) -> Tensor:
        return torch.as_tensor(array, device=state.device)

    columns = slice(offset, offset + extreme.shape[1])
    fires = extreme > 0
    for split in (0, 1):
        rows = tensor((batch.split == split).nonzero()[0])
        if not len(rows):
            continue
        top = top_orders(extreme[rows], tensor(batch.samples)[rows, None])
        lots = tensor(batch.lots)[rows, None].expand(top.shape)
        for kept, order in zip(state.kept[2 * split : 2 * split + 2], (top, lots), strict=True):
            # Transposed, so that the newcomers of a column follow each other.
            unit, row = (fires[rows] & (order > kept.floor[columns])).T.nonzero(as_tuple=True)
            found = _peaks(state, acts, mask, batch, rows[row], unit, sign, extreme[rows[row], unit])
            kept.add(columns.start + unit, order[row, unit], extreme[rows[row], unit], *found)
    for b in (batch.chosen >= 0).nonzero()[0].tolist():
        slot, units = int(batch.chosen[b]), torch.arange(extreme.shape[1], device=state.device)
        found = _peaks(state, acts, mask, batch, torch.full_like(units, b), units, sign, extreme[b])
        here = torch.isfinite(extreme[b])
        into = columns.start + units[here]
        state.random.value[into, slot] = extreme[b][here]
        for name, values in zip(("place", "ties", "window"), found, strict=True):
            getattr(state.random, name)[into, slot] = values[here]


def _peaks(
    state: UnitState, acts: Tensor, mask: Tensor, batch: Batch, rows: Tensor, units: Tensor, sign: int, extreme: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(place, ties, window) of the peaks of N pairs of a row and a unit."""
    sizes, lengths = state.sizes, torch.as_tensor(batch.lengths, device=state.device)[rows]
    series = sign * acts[rows, :, units].float()
    at_peak = (series == extreme[:, None]) & mask[rows]
    place = at_peak.int().argmax(1)
    ties = at_peak.sum(1) - 1
    start, stop = (place - sizes.before).clamp(min=0), torch.minimum(place + sizes.after + 1, lengths)
    position = start[:, None] + torch.arange(sizes.window, device=state.device)
    window = series.gather(1, position.clamp(max=series.shape[1] - 1))
    return place.int(), ties.int(), torch.where(position < stop[:, None], window, 0.0)

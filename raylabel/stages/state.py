"""Everything a scan keeps for one layer, and the update with one batch of activations. Torch only.

Columns are the wanted neurons at each polarity in turn, then the decoys. Sums, counts and histograms are kept once for
each neuron and mirrored for polarity -1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylabel.models.controls import Decoys
from raylabel.stages.running import Best, Moments, histogram
from raylabel.tables import HISTOGRAM_BINS, SPLITS

ROWS = 8
"""Samples handled at a time on the CPU: their activations stay in the cache through all passes."""


@dataclass(frozen=True)
class LayerSetup:
    """What is fixed of a layer before the scan.

    Attributes:
        neurons: [U] wanted neurons; None for all.
        polarities: of the neurons; decoys have +1 only.
        shift: [U + n] the units' pilot means, taken off before moments are summed.
        sink: residual norm above which a position does not count.
        decoys: the layer's control directions, None for none.
    """

    neurons: Tensor | None
    polarities: tuple[int, ...]
    shift: Tensor
    sink: float
    decoys: Decoys | None

    def units(self, acts: Tensor) -> Tensor:
        """Activations [B, T, U + n] of the wanted neurons and the decoys, float32."""
        acts = acts.float()
        wanted = acts if self.neurons is None else acts[..., self.neurons]
        if self.decoys is None:
            return wanted
        if not torch.isfinite(acts.amax()) or not torch.isfinite(acts.amin()):
            # One broken neuron is reported under its own name; it must not take the controls with it.
            acts = torch.nan_to_num(acts, nan=0.0, posinf=0.0, neginf=0.0)
        return torch.cat([wanted, self.decoys(acts)], dim=-1)


def valid(ids: Tensor, lengths: Tensor, special: Tensor, resid: Tensor, sink: float) -> Tensor:
    """[B, T] positions that count: not padding, not a special token, not an attention sink.

    A residual that is not finite is no sink: its position counts, and the units that see it are reported.
    """
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return inside & ~torch.isin(ids, special) & ~sinks(resid, sink)


def sinks(resid: Tensor, sink: float) -> Tensor:
    """[B, T] positions whose residual [B, T, d_model] has a finite norm above `sink`."""
    norm = resid.float().norm(dim=-1)
    return torch.isfinite(norm) & (norm > sink)


class LayerState:
    """Running state of one layer over the samples of a lease."""

    def __init__(self, setup: LayerSetup, n_units: int, n_decoys: int, counts: dict[str, int], device: torch.device) -> None:
        self.setup, self.n_units, self.n_decoys, self.device = setup, n_units, n_decoys, device
        rows = n_units + n_decoys
        columns = n_units * len(setup.polarities) + n_decoys
        self.best = {
            split: Best.empty(columns, counts[f"top_{split}"], counts["firing"], device) for split in SPLITS
        }
        self.moments = Moments()
        self.max = torch.full((rows,), -torch.inf, device=device)
        self.min = torch.full((rows,), torch.inf, device=device)
        self.fires = torch.zeros((2, rows), dtype=torch.int64, device=device)
        self.bad = torch.zeros(rows, dtype=torch.bool, device=device)
        self.histogram = torch.zeros((rows, HISTOGRAM_BINS), dtype=torch.int64, device=device)
        self.tokens = 0
        self._column = torch.arange(rows, device=device)

    def add(self, acts: Tensor, mask: Tensor, first: int, samples: Tensor, keys: Tensor, explain: Tensor) -> None:
        """One batch: activations [B, T, width] at the site, mask [B, T] of positions that count.

        Args:
            first: sample number of row 0; B is a power of two that divides it, missing rows are masked out whole.
            samples, keys: [B] sample numbers and hash keys.
            explain: [B] whether the sample is in the explain split.
        """
        step = ROWS if acts.device.type == "cpu" else len(acts)
        high, low, sums = [], [], []
        for at in range(0, len(acts), step):
            part, inside = self.setup.units(acts[at : at + step]), mask[at : at + step, :, None]
            high.append(torch.where(inside, part, -torch.inf).amax(1))
            low.append(torch.where(inside, part, torch.inf).amin(1))
            self.fires[0] += ((part > 0) & inside).sum((0, 1))
            self.fires[1] += ((part < 0) & inside).sum((0, 1))
            # A masked position adds exactly nothing to any power sum.
            moved = torch.where(inside, part - self.setup.shift, 0.0)
            square = moved * moved
            powers = [moved.sum(1), square.sum(1), (square * moved).sum(1), (square * square).sum(1)]
            sums.append(torch.stack(powers, 1).double())
            chosen = part[mask[at : at + step]]
            self.histogram += histogram(
                torch.nan_to_num(chosen), self._column.expand(chosen.shape), len(self._column)
            )
        highest, lowest = torch.cat(high), torch.cat(low)
        rows = mask.any(1)
        self.bad |= (~torch.isfinite(highest[rows]) | ~torch.isfinite(lowest[rows])).any(0)
        self.max = torch.maximum(self.max, highest.amax(0))
        self.min = torch.minimum(self.min, lowest.amin(0))
        self.tokens += int(mask.sum())
        self.moments.add(first, torch.cat(sums))
        parts = [highest[:, : self.n_units] if p > 0 else -lowest[:, : self.n_units] for p in self.setup.polarities]
        maxima = torch.cat([*parts, highest[:, self.n_units :]], 1)
        maxima = torch.where(maxima > 0, maxima, -torch.inf)
        for split, chosen_rows in (("explain", rows & explain), ("score", rows & ~explain)):
            self.best[split].add(maxima[chosen_rows], samples[chosen_rows], keys[chosen_rows])

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as arrays."""
        found: dict[str, np.ndarray] = {
            "max": self.max.cpu().numpy(), "min": self.min.cpu().numpy(), "fires": self.fires.cpu().numpy(),
            "bad": self.bad.cpu().numpy(), "histogram": self.histogram.cpu().numpy(),
            "tokens": np.array(self.tokens, dtype=np.int64),
        }  # fmt: skip
        found |= {f"moments.{k}": v for k, v in self.moments.arrays().items()}
        for split in SPLITS:
            found |= {f"{split}.{k}": v for k, v in self.best[split].arrays().items()}
        return found

    def merge(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds the state of other samples."""

        def part(name: str) -> Any:
            return torch.from_numpy(arrays[name])

        def under(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

        self.max, self.min = torch.maximum(self.max, part("max")), torch.minimum(self.min, part("min"))
        self.fires += part("fires")
        self.bad |= part("bad")
        self.histogram += part("histogram")
        self.tokens += int(arrays["tokens"])
        self.moments.merge(under("moments."))
        for split in SPLITS:
            self.best[split].merge(under(f"{split}."))

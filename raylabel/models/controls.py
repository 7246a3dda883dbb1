"""Decoys: random directions of a layer's site, controls that share a model's text and positions and mean nothing.

A decoy mixes a stretch of neighbouring units; their order in a layer means nothing. `draw_directions` gives the same
directions on every machine for the same (width, n, seed, layer). `fit_decoys` scales them on pilot activations so that
each decoy has the mean and the standard deviation that a real unit, drawn at random from that layer, has there.
Everything is float32, the pilot's moments float64. `ValueError` for a pilot that is not finite or not [N, width].
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

STRETCHES, LEAST_STRETCH = 8, 512
"""A decoy mixes the units of one of STRETCHES equal parts of its layer, fewer where a part would be below LEAST_STRETCH
units: an eighth of the products of a matrix of full directions. Mixtures of few units are no longer what a random direction
is: over 64 units each, decoys of the demo model came out as `concept` as often as its neurons."""


@dataclass(frozen=True, eq=False)
class Decoys:
    """n directions of a space of `width` units, all on one device."""

    directions: Tensor
    """[width, n], columns of length 1."""
    centre: Tensor
    """[width]: the pilot's mean."""
    gain: Tensor
    """[n]"""
    offset: Tensor
    """[n]: the mean of the unit whose spread the decoy has."""

    @cached_property
    def _parts(self) -> list[tuple[slice, slice, Tensor, Tensor]]:
        """(units, decoys, scaled directions, constants) of each stretch."""
        scaled = self.directions.double() * self.gain.double()
        constant = self.offset.double() - self.centre.double() @ scaled
        return [
            (units, decoys, scaled[units, decoys].float().contiguous(), constant[decoys].float())
            for units, decoys in stretches(*self.directions.shape)
        ]

    def __call__(self, acts: Tensor) -> Tensor:
        """Activations [..., width] to the decoys' [..., n], float32 whatever comes in."""
        flat = acts.float().reshape(-1, acts.shape[-1])
        found = torch.empty((flat.shape[0], self.directions.shape[1]), device=acts.device)
        for units, decoys, scaled, constant in self._parts:
            torch.addmm(constant, flat[:, units], scaled, out=found[:, decoys])
        return found.view(*acts.shape[:-1], -1)

    def to(self, device: torch.device | str) -> Decoys:
        return Decoys(*(part.to(device) for part in (self.directions, self.centre, self.gain, self.offset)))


def stretches(width: int, n: int) -> list[tuple[slice, slice]]:
    """(units, decoys) of each stretch of a layer: consecutive units, and the decoys that mix them."""
    count = max(1, min(STRETCHES, width // LEAST_STRETCH, n))
    ends = [(width * i // count, n * i // count) for i in range(count + 1)]
    return [(slice(a, b), slice(i, j)) for (a, i), (b, j) in itertools.pairwise(ends)]


def draw_directions(width: int, n: int, seed: int, layer: int) -> Tensor:
    """float32 [width, n] on the CPU: Gaussian columns scaled to length 1, each over the units of its stretch."""
    drawn = torch.randn(n, width, generator=_generator(seed, layer, "directions"), dtype=torch.float64)
    columns = torch.zeros_like(drawn)
    for units, decoys in stretches(width, n):
        columns[decoys, units] = drawn[decoys, units]
    return (columns / columns.norm(dim=1, keepdim=True)).T.to(torch.float32).contiguous()


def fit_decoys(acts: Tensor, n: int, seed: int, layer: int) -> Decoys:
    """Decoys for pilot activations [N, width], on their device.

    A unit without spread in the pilot lends its moments to none; in a layer where no unit has any (or N < 2), decoys
    are 0 throughout, as a dead layer's units are.
    """
    if acts.ndim != 2 or not bool(torch.isfinite(acts).all()):
        raise ValueError(f"decoys need finite pilot activations [N, width]; these are {list(acts.shape)}")
    pilot = acts.double() if acts.shape[0] else acts.new_zeros((1, acts.shape[1]), dtype=torch.float64)
    mean, spread = pilot.mean(dim=0), pilot.std(dim=0, correction=0)
    # A constant column's deviation comes out as its rounding, not as zero.
    lively = (spread > 1e-7 * mean.abs()).nonzero().flatten().cpu()
    if lively.numel() == 0:
        nothing = torch.zeros(n, device=acts.device)
        return Decoys(draw_directions(acts.shape[1], n, seed, layer).to(acts.device), mean.float(), nothing, nothing)
    drawn = torch.randint(int(lively.numel()), (n,), generator=_generator(seed, layer, "units"))
    models = lively[drawn].to(acts.device)
    directions = draw_directions(acts.shape[1], n, seed, layer).to(acts.device)
    projected = ((pilot - mean) @ directions.double()).std(dim=0, correction=0)
    gain = torch.where(projected > 0, spread[models] / projected, torch.zeros_like(projected))
    return Decoys(directions, mean.float(), gain.float(), mean[models].float())


def _generator(seed: int, layer: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on these three alone."""
    digest = hashlib.sha256(f"{seed}/{layer}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

"""Decoys: random directions of a layer's site, controls that share a model's text and positions and mean nothing.

All decoys of a layer together cost hardly more than one. Units are given random signs and folded into a row of P sums;
two Hadamard transforms of the row with random signs between them, 2 P log2 P additions, give P decoys, orthogonal where P
divides the width. A unit's weight in a decoy is a sum of P random signs, as good as a Gaussian number, so that a few
units weigh most, as in any Gaussian direction, and others in each decoy (Ailon and Chazelle, "The fast Johnson-
Lindenstrauss transform", 2009; Le, Sarlos and Smola, "Fastfood", 2013).

`draw` gives the same decoys on every machine for the same (width, n, seed, layer). `fit_decoys` scales them on pilot
activations so that each decoy has the mean and the standard deviation that a real unit, drawn at random from that layer,
has there. Everything is float32, the pilot's moments float64. `ValueError` for a pilot that is not finite or not
[N, width].
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raylabel.models.hadamard import hadamard, mixed

LEAST_ROW = 256
"""Sums in a row, at least, where the layer has so many units: few signs do not add up to Gaussian weights."""


@dataclass(frozen=True, eq=False)
class Decoys:
    """n directions of a space of `width` units, all on one device."""

    drawn: Tensor
    """[rounds, 1 + blocks, P], see `draw`."""
    centre: Tensor
    """[width]: the pilot's mean."""
    gain: Tensor
    """[n]"""
    offset: Tensor
    """[n]: the mean of the unit whose spread the decoy has."""

    @cached_property
    def directions(self) -> Tensor:
        """[width, n], columns of length 1."""
        raw = unscaled(self.drawn, len(self.centre), len(self.gain))
        return raw / raw.norm(dim=0)

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """(scales, constants) [n] of what the transform gives."""
        raw = unscaled(self.drawn, len(self.centre), len(self.gain)).double()
        scale = self.gain.double() / raw.norm(dim=0)
        return scale.float(), (self.offset.double() - self.centre.double() @ raw * scale).float()

    def __call__(self, acts: Tensor) -> Tensor:
        """Activations [..., width] to the decoys' [..., n], float32 whatever comes in."""
        flat = acts.float().reshape(-1, acts.shape[-1])
        found = self.compiled(flat) if acts.device.type == "cpu" else self.in_torch(flat)
        return found.view(*acts.shape[:-1], -1)

    def compiled(self, rows: Tensor) -> Tensor:
        """float32 [N, width] to [N, n], on a CPU; a row's result depends on no other row, bit for bit."""
        found = torch.empty((len(rows), len(self.gain)))
        given = (rows.contiguous(), self.drawn, *self._affine, found)
        mixed(*(tensor.numpy() for tensor in given))
        return found

    def in_torch(self, rows: Tensor) -> Tensor:
        """The same but for rounding, on any device."""
        found = []
        size, n, (scale, constant) = self.drawn.shape[2], len(self.gain), self._affine
        for at, (between, *signs) in zip(range(0, n, size), self.drawn, strict=True):
            folded = torch.nn.functional.pad(rows, (0, len(signs) * size - rows.shape[1])) * torch.cat(signs)
            these = slice(at, min(at + size, n))
            columns = mixing(between)[:, : these.stop - at] * scale[these]
            found.append(torch.addmm(constant[these], folded.view(len(rows), -1, size).sum(1), columns))
        return torch.cat(found, 1)

    def to(self, device: torch.device | str) -> Decoys:
        return Decoys(*(part.to(device) for part in (self.drawn, self.centre, self.gain, self.offset)))


def draw(width: int, n: int, seed: int, layer: int) -> Tensor:
    """float32 [rounds, 1 + blocks, P] of +1 and -1, on the CPU.

    Decoys r * P to (r + 1) * P are made from round r: row 0 holds the signs between the transforms, row 1 + b those of the
    units from b * P on. P is the least power of two that is at least n and LEAST_ROW, but at most `width`: beyond it,
    decoys would repeat each other.
    """
    size = min(1 << (max(n, LEAST_ROW) - 1).bit_length(), 1 << (width.bit_length() - 1))
    shape = (-(-n // size), 1 + -(-width // size), size)
    return 2.0 * torch.randint(2, shape, generator=_generator(seed, layer, "signs")).float() - 1


def mixing(between: Tensor) -> Tensor:
    """float32 [P, P]: both transforms with the signs `between` them, a row of P sums to P decoys, not yet scaled."""
    matrix = hadamard(len(between)).to(between.device)
    return (matrix * between) @ matrix


def unscaled(drawn: Tensor, width: int, n: int) -> Tensor:
    """float32 [width, n]: the directions that were drawn, whatever their length."""
    rounds = [(part[1:, :, None] * mixing(part[0])).flatten(0, 1)[:width] for part in drawn]
    return torch.cat(rounds, dim=1)[:, :n]


def fit_decoys(acts: Tensor, n: int, seed: int, layer: int) -> Decoys:
    """Decoys for pilot activations [N, width], on their device.

    A unit without spread in the pilot lends its moments to none; in a layer where no unit has any (or N < 2), decoys
    are 0 throughout, as a dead layer's units are.
    """
    if acts.ndim != 2 or not bool(torch.isfinite(acts).all()):
        raise ValueError(f"decoys need finite pilot activations [N, width]; these are {list(acts.shape)}")
    drawn = draw(acts.shape[1], n, seed, layer).to(acts.device)
    pilot = acts.double() if acts.shape[0] else acts.new_zeros((1, acts.shape[1]), dtype=torch.float64)
    mean, spread = pilot.mean(dim=0), pilot.std(dim=0, correction=0)
    # A constant column's deviation comes out as its rounding, not as zero.
    lively = (spread > 1e-7 * mean.abs()).nonzero().flatten().cpu()
    if lively.numel() == 0:
        nothing = torch.zeros(n, device=acts.device)
        return Decoys(drawn, mean.float(), nothing, nothing)
    chosen = torch.randint(int(lively.numel()), (n,), generator=_generator(seed, layer, "units"))
    models = lively[chosen].to(acts.device)
    raw = unscaled(drawn, acts.shape[1], n).double()
    projected = ((pilot - mean) @ (raw / raw.norm(dim=0))).std(dim=0, correction=0)
    # Units that cancel leave their rounding, as a constant column does.
    seen = projected > 1e-7 * spread.norm()
    gain = torch.where(seen, spread[models] / torch.where(seen, projected, 1), torch.zeros_like(projected))
    return Decoys(drawn, mean.float(), gain.float(), mean[models].float())


def _generator(seed: int, layer: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on these three alone."""
    digest = hashlib.sha256(f"{seed}/{layer}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

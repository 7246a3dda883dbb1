"""Decoys: random directions of a layer's site, controls that share a model's text and positions and mean nothing.

Each decoy adds every unit with a random sign, +1 or -1 with equal chance and independent of each other's. All decoys
together cost hardly more than one: units are given random signs and folded into a row of P sums (`Signs`), and one
Hadamard transform of the row, P log2 P additions, gives P decoys that are orthogonal where P divides the width (Ailon
and Chazelle, "The fast Johnson-Lindenstrauss transform", 2009). `draw_signs` gives the same decoys on every machine for
the same (width, n, seed, layer). `fit_decoys` scales them on pilot activations so that each decoy has the mean and the
standard deviation that a real unit, drawn at random from that layer, has there. Everything is float32, the pilot's
moments float64. `ValueError` for a pilot that is not finite or not [N, width].
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raylabel.models.hadamard import hadamard, signed_transform


@dataclass(frozen=True, eq=False)
class Decoys:
    """n directions of a space of `width` units, all on one device."""

    signs: Tensor
    """[rounds, blocks, P], +1 or -1: unit b * P + j is given signs[r, b, j] for the decoys from r * P on; see `draw_signs`."""
    centre: Tensor
    """[width]: the pilot's mean."""
    gain: Tensor
    """[n]"""
    offset: Tensor
    """[n]: the mean of the unit whose spread the decoy has."""

    @cached_property
    def directions(self) -> Tensor:
        """[width, n], columns of length 1."""
        return directions(self.signs, len(self.centre), len(self.gain))

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """(scales, constants) [n] of what the transform gives."""
        centre = self.centre.double() @ self.directions.double()
        scale = self.gain.double() / len(self.centre) ** 0.5
        return scale.float(), (self.offset.double() - centre * self.gain.double()).float()

    def __call__(self, acts: Tensor) -> Tensor:
        """Activations [..., width] to the decoys' [..., n], float32 whatever comes in."""
        flat = acts.float().reshape(-1, acts.shape[-1])
        found = self.compiled(flat) if acts.device.type == "cpu" else self.in_torch(flat)
        return found.view(*acts.shape[:-1], -1)

    def compiled(self, rows: Tensor) -> Tensor:
        """float32 [N, width] to [N, n], on a CPU; a row's result depends on no other row, bit for bit."""
        found = torch.empty((len(rows), len(self.gain)))
        given = (rows.contiguous(), self.signs, *self._affine, found)
        signed_transform(*(tensor.numpy() for tensor in given))
        return found

    def in_torch(self, rows: Tensor) -> Tensor:
        """The same but for rounding, on any device."""
        found = []
        size, n = self.signs.shape[2], len(self.gain)
        padded = torch.nn.functional.pad(rows, (0, self.signs[0].numel() - rows.shape[1]))
        for at, signs in zip(range(0, n, size), self.signs, strict=True):
            scale, constant = (part[at : at + size] for part in self._affine)
            folded = (padded * signs.flatten()).view(len(rows), -1, size).sum(1)
            found.append(torch.addmm(constant, folded, hadamard(size).to(rows.device)[:, : len(scale)] * scale))
        return torch.cat(found, 1)

    def to(self, device: torch.device | str) -> Decoys:
        return Decoys(*(part.to(device) for part in (self.signs, self.centre, self.gain, self.offset)))


def draw_signs(width: int, n: int, seed: int, layer: int) -> Tensor:
    """float32 [rounds, blocks, P] on the CPU.

    P is the least power of two that is at least n, but at most `width`: beyond it, decoys would repeat each other, and
    a further round with other signs makes the rest.
    """
    size = min(1 << (n - 1).bit_length(), 1 << (width.bit_length() - 1))
    shape = (-(-n // size), -(-width // size), size)
    return 2.0 * torch.randint(2, shape, generator=_generator(seed, layer, "signs")).float() - 1


def directions(signs: Tensor, width: int, n: int) -> Tensor:
    """float32 [width, n]: the directions that `signs` stand for, columns of length 1."""
    matrix = hadamard(signs.shape[2]).to(signs.device)
    rows = [(signs_of[:, :, None] * matrix).flatten(0, 1)[:width] for signs_of in signs]
    return torch.cat(rows, dim=1)[:, :n] / width**0.5


def fit_decoys(acts: Tensor, n: int, seed: int, layer: int) -> Decoys:
    """Decoys for pilot activations [N, width], on their device.

    A unit without spread in the pilot lends its moments to none; in a layer where no unit has any (or N < 2), decoys
    are 0 throughout, as a dead layer's units are.
    """
    if acts.ndim != 2 or not bool(torch.isfinite(acts).all()):
        raise ValueError(f"decoys need finite pilot activations [N, width]; these are {list(acts.shape)}")
    signs = draw_signs(acts.shape[1], n, seed, layer).to(acts.device)
    pilot = acts.double() if acts.shape[0] else acts.new_zeros((1, acts.shape[1]), dtype=torch.float64)
    mean, spread = pilot.mean(dim=0), pilot.std(dim=0, correction=0)
    # A constant column's deviation comes out as its rounding, not as zero.
    lively = (spread > 1e-7 * mean.abs()).nonzero().flatten().cpu()
    if lively.numel() == 0:
        nothing = torch.zeros(n, device=acts.device)
        return Decoys(signs, mean.float(), nothing, nothing)
    drawn = torch.randint(int(lively.numel()), (n,), generator=_generator(seed, layer, "units"))
    models = lively[drawn].to(acts.device)
    projected = ((pilot - mean) @ directions(signs, acts.shape[1], n).double()).std(dim=0, correction=0)
    # Signed units that cancel leave their rounding, as a constant column does.
    seen = projected > 1e-7 * spread.norm()
    gain = torch.where(seen, spread[models] / torch.where(seen, projected, 1), torch.zeros_like(projected))
    return Decoys(signs, mean.float(), gain.float(), mean[models].float())


def _generator(seed: int, layer: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on these three alone."""
    digest = hashlib.sha256(f"{seed}/{layer}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

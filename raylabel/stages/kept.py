"""Lists of a fixed length: the samples a scan keeps for each column (a unit at one polarity), with their windows.

Every entry has an order, a non-negative int64 that no other sample has, with the sample's number in its low half; a list
holds the entries of largest order. Merging is exact and associative: any cut of the samples, merged in any order, gives
the same bits.

- top: ordered by activation, equal ones by falling sample number.
- firing: ordered by a hash of the sample, a uniform draw without replacement from those in which the unit fires.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EMPTY = -1
"""Order of an empty slot; larger than none."""
FULL = np.iinfo(np.int64).max
"""What no order exceeds."""
LOW = 0xFFFFFFFF
FIELDS = ("order", "value", "place", "ties", "window")


def hash_keys(samples: np.ndarray, seed: int, salt: int) -> np.ndarray:
    """int64 keys that order samples at random: 31 bits of splitmix64 above 32 bits of the sample's own number."""
    with np.errstate(over="ignore"):
        mixed = samples.astype(np.uint64) + np.uint64(((seed * 2 + 1) * 0x9E3779B97F4A7C15 + salt) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return ((mixed >> np.uint64(33)).astype(np.int64) << 32) | samples.astype(np.int64)


def lots(samples: np.ndarray, seed: int, salt: int) -> np.ndarray:
    """Orders in a firing list: those of the smallest hash keys are the largest."""
    return FULL - hash_keys(samples, seed, salt)


def top_orders(values: Tensor, samples: Tensor) -> Tensor:
    """Orders in a top list of positive activations [...] of samples (broadcast)."""
    # Positive floats are ordered as their bits are.
    return (values.contiguous().view(torch.int32).long() << 32) | (LOW - samples)


def samples_of(order: np.ndarray) -> np.ndarray:
    """Sample numbers of orders of either kind, -1 for empty ones."""
    return np.where(order == EMPTY, -1, LOW - (order & LOW))


@dataclass
class Kept:
    """Lists of k entries for C columns, best first.

    Attributes:
        order: [C, k] int64. value: [C, k] float32, the activation at the peak.
        place, ties: [C, k] int32, the peak's position in the sample and how many more positions are equal to it.
        window: [C, k, w] float32 activations around the peak, in the slots that `slot` [C, k] int32 names.
        floor: [C] int64, the order that a newcomer must exceed.
    """

    order: Tensor
    value: Tensor
    place: Tensor
    ties: Tensor
    slot: Tensor
    window: Tensor
    floor: Tensor

    @staticmethod
    def empty(columns: int, k: int, window: int, device: torch.device | str) -> Kept:
        """Lists without entries."""
        def full(value: int, dtype: torch.dtype) -> Tensor:
            return torch.full((columns, k), value, dtype=dtype, device=device)

        return Kept(
            full(EMPTY, torch.int64), full(0, torch.float32), full(0, torch.int32), full(0, torch.int32),
            torch.arange(k, dtype=torch.int32, device=device).repeat(columns, 1),
            torch.zeros((columns, k, window), device=device),
            torch.full((columns,), EMPTY if k else FULL, dtype=torch.int64, device=device),
        )  # fmt: skip

    def add(self, columns: Tensor, order: Tensor, value: Tensor, place: Tensor, ties: Tensor, window: Tensor) -> None:
        """Entries [N] of the given columns, which are in rising order; each exceeds its column's floor."""
        if len(columns) == 0:
            return
        touched, counts = torch.unique_consecutive(columns, return_counts=True)
        first = torch.cumsum(counts, 0) - counts
        line = torch.repeat_interleave(torch.arange(len(touched), device=columns.device), counts)
        rank = torch.arange(len(columns), device=columns.device) - first[line]
        shape = (len(touched), int(counts.max()))
        new = [torch.full(shape, EMPTY, dtype=torch.int64, device=columns.device)]
        new += [torch.zeros(shape, dtype=t.dtype, device=columns.device) for t in (self.value, self.place, self.ties)]
        new += [torch.zeros((*shape, window.shape[1]), device=columns.device)]
        for array, values in zip(new, (order, value, place, ties, window), strict=True):
            array[line, rank] = values.to(array.dtype)
        slot = self.slot[touched].long()
        held = [self.order[touched], self.value[touched], self.place[touched], self.ties[touched]]
        held.append(self.window[touched].gather(1, slot[..., None].expand(-1, -1, self.window.shape[2])))
        merged = best(dict(zip(FIELDS, held, strict=True)), dict(zip(FIELDS, new, strict=True)))
        for name in FIELDS:
            getattr(self, name)[touched] = merged[name]
        self.slot[touched] = torch.arange(self.order.shape[1], dtype=torch.int32, device=columns.device)
        self.floor[touched] = merged["order"][:, -1]

    def arrays(self, columns: Tensor) -> dict[str, np.ndarray]:
        """The lists of some columns, windows in the order of their entries."""
        slot = self.slot[columns].long()
        window = self.window[columns].gather(1, slot[..., None].expand(-1, -1, self.window.shape[2]))
        found = {name: getattr(self, name)[columns] for name in ("order", "value", "place", "ties")}
        return {name: tensor.cpu().numpy() for name, tensor in {**found, "window": window}.items()}


def best(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """The best entries of two sets of lists: as many as `a` holds; arrays named as FIELDS."""
    k = a["order"].shape[1]
    order, at = torch.sort(torch.cat([a["order"], b["order"]], 1), dim=1, descending=True)
    at = at[:, :k]
    found = {"order": order[:, :k].contiguous()}
    for name in FIELDS[1:]:
        both = torch.cat([a[name], b[name]], 1)
        found[name] = both.gather(1, at if both.ndim == 2 else at[..., None].expand(-1, -1, both.shape[2]))
    return found


def merge(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Lists of the same columns over different samples, as from `Kept.arrays`, into one."""
    found = best(*({name: torch.from_numpy(part[name]) for name in FIELDS} for part in (a, b)))
    return {name: tensor.numpy() for name, tensor in found.items()}

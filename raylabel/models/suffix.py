"""Many texts that begin alike in one forward pass, every beginning computed once.

`grow` sorts texts and lays them out as tries: a node is a token behind one particular beginning, and a text is a path
from a root. The nodes of a trie are a row of a batch, in the order of their texts, and each of them attends to its own
ancestors and to itself (`Tree`), at the position that it has in its texts. A causal model gives a node exactly what it
gives the last token of that beginning alone, so nothing of a text is computed twice and no cache is kept or copied.

A trie is no larger than it is told to be: attention over a row grows with its square, and what two rows repeat is only
a beginning. Without sharing each text is a row of its own, and rows are plain texts.

`call_transformers` and `call_native` run a model over rows of nodes. They need models whose attention takes a mask as
it is given; `models.sites` says which families do, `agrees` tries a model on given texts against the plain pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LEAST_SHARED = 4
"""A text that begins with fewer tokens of the one before it starts a row: shorter rows attend faster."""
CELLS = 1 << 22
"""Texts times tokens that are laid out at once."""
# Largest relative difference from the plain pass, by the norm over a batch; a wrong mask or position gives far more.
_EXACT, _COARSE = 1e-3, 1e-1


class Tree(NamedTuple):
    """What a forward pass over nodes needs beside their ids."""

    positions: Tensor
    """[B, Q] int64."""
    seen: Tensor
    """[B, Q, Q] bool: whether the query (first) attends to the key (second); every query attends to itself."""

    def bias(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """[B, 1, Q, Q] to add to attention scores; keys `window` positions back and more are not seen."""
        seen = self.seen
        if window is not None:
            seen = seen & (self.positions[:, :, None] - self.positions[:, None, :] < window)
        bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return bias.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True)
class Forest:
    """Rows of nodes. Nodes of a row are consecutive; so are its texts, counted in sorted order."""

    order: np.ndarray
    """[texts]: their numbers, in sorted order."""
    nodes: np.ndarray
    """[texts, longest] int64: the node of each token of a sorted text; nothing meaningful behind its end."""
    ids: np.ndarray
    depth: np.ndarray
    """[nodes]: position of the token in its texts."""
    first: np.ndarray
    last: np.ndarray
    """[nodes]: the first and the last of the sorted texts that a node is of."""
    rows: np.ndarray
    """[rows + 1]: the first node of each row."""
    owned: np.ndarray
    """[rows + 1]: the first sorted text of each row."""
    shared: bool

    def batch(self, rows: np.ndarray, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tree | None]:
        """(ids [B, Q], whether there is a node [B, Q], tree) of some rows; None where each row is one text."""
        begin, size = self.rows[rows], self.rows[rows + 1] - self.rows[rows]
        inner = np.arange(int(size.max()))
        inside = inner < size[:, None]
        node = np.minimum(begin[:, None] + inner, len(self.ids) - 1)

        def filled(values: np.ndarray, empty: int) -> Tensor:
            return torch.from_numpy(np.where(inside, values[node], empty).astype(np.int64)).to(device)

        ids, there = filled(self.ids, pad_id), torch.from_numpy(inside).to(device)
        if not self.shared:
            return ids, there, None
        depth, first, last = filled(self.depth, 0), filled(self.first, -1), filled(self.last, -1)
        # A key lies on the path to a query if the query's first text is one of the key's, and the key is not behind it.
        seen = depth[:, None, :] <= depth[:, :, None]
        seen &= first[:, None, :] <= first[:, :, None]
        seen &= first[:, :, None] <= last[:, None, :]
        return ids, there, Tree(depth, seen)


def grow(flat: np.ndarray, offsets: np.ndarray, largest: int, shared: bool = True) -> Iterator[Forest]:
    """Distinct texts as rows of at most `largest` nodes (a text that is longer is a row), some texts at a time.

    Args:
        flat: ids of all texts, end to end.
        offsets: [texts + 1], where in `flat` each begins. No text is empty.
        shared: False makes every text a row.
    """
    lengths = np.diff(offsets)
    # Big-endian bytes sort as their numbers do.
    data, bounds = flat.astype(">u4").tobytes(), (offsets * 4).tolist()
    keys = [data[a:b] for a, b in pairwise(bounds)]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    step = max(CELLS // int(lengths.max(initial=1)), 1)
    for begin in range(0, len(order), step):
        yield _forest(flat, offsets, order[begin : begin + step], largest, shared)


def _forest(flat: np.ndarray, offsets: np.ndarray, order: np.ndarray, largest: int, shared: bool) -> Forest:
    lengths = (offsets[order + 1] - offsets[order]).astype(np.int64)
    n, place = len(order), np.arange(int(lengths.max()))
    inside = place < lengths[:, None]
    ids = np.where(inside, flat[np.minimum(offsets[order][:, None] + place, len(flat) - 1)], -1)
    common = np.zeros(n, dtype=np.int64)
    if shared:
        common[1:] = (ids[1:] != ids[:-1]).argmax(axis=1)
    starts, size = [], 0
    for i, (length, same) in enumerate(zip(lengths.tolist(), common.tolist(), strict=True)):
        size += length - same
        if i == 0 or same < LEAST_SHARED or size > largest:
            starts.append(i)
            size = length
    common[starts] = 0
    # A sorted text makes the nodes behind what it shares with the one before it; the others are that one's.
    own = place >= common[:, None]
    number = np.arange(n)[:, None]
    maker = np.maximum.accumulate(np.where(own, number, -1), axis=0)
    base = np.cumsum(lengths - common) - (lengths - common)
    nodes = base[maker] + place - common[maker]
    remade = np.minimum.accumulate(np.where(own, number, n)[::-1], axis=0)[::-1]
    last = np.vstack([remade[1:], np.full((1, len(place)), n)]) - 1
    made = own & inside
    first, depth = np.nonzero(made)
    return Forest(
        order=order,
        nodes=nodes,
        ids=ids[made],
        depth=depth,
        first=first,
        last=last[made],
        rows=np.append(base[starts], len(depth)),
        owned=np.append(starts, n),
        shared=shared,
    )


def call_transformers(trunk: Any, config: Any, ids: Tensor, tree: Tree, masks: str) -> None:
    """A forward pass of a transformers trunk; `masks` is `one` or `by layer`, see `sites.Family`."""
    dtype, window = next(trunk.parameters()).dtype, getattr(config, "sliding_window", None)
    if masks == "one":
        mask: Any = tree.bias(dtype, window)
    else:
        mask = {"full_attention": tree.bias(dtype)}
        if "sliding_attention" in config.layer_types:
            mask["sliding_attention"] = tree.bias(dtype, window)
    trunk(input_ids=ids, attention_mask=mask, position_ids=tree.positions, use_cache=False)


def call_native(model: Any, ids: Tensor, tree: Tree) -> None:
    """A forward pass over the blocks of a `NativeModel` with `native.FastAttention`, which has no bound on its length."""
    hidden = model.tok_embed(ids)
    if model.pos is not None:
        hidden = hidden + model.pos(tree.positions)
    mask = tree.bias(hidden.dtype)
    for block in model.layers:
        (hidden,) = block(hidden, attention_mask=mask, position_ids=tree.positions)


def agrees(subject: Any, layer: int, flat: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether the model gives these few texts the same activations by tries as by the plain pass."""
    found: list[Tensor] = []

    def keep(_layer: int, activations: Tensor, _resid: Tensor) -> None:
        found.append(activations.float())

    total = error = 0.0
    for plain, tries in zip(grow(flat, offsets, 1, False), grow(flat, offsets, len(flat)), strict=True):
        for forest in (plain, tries):
            rows = np.arange(len(forest.rows) - 1)
            ids, _, tree = forest.batch(rows, subject.pad_id, subject.device)
            subject.run(ids, [layer], keep, tree)
        expected, given = found[-2:]
        for i, text in enumerate(plain.order.tolist()):
            length = int(offsets[text + 1] - offsets[text])
            row = int(np.searchsorted(tries.owned, i, side="right")) - 1
            slots = torch.from_numpy(tries.nodes[i, :length] - tries.rows[row]).to(given.device)
            total += float(expected[i, :length].square().sum())
            error += float((given[row, slots] - expected[i, :length]).square().sum())
    tolerance = _EXACT if subject.dtype == torch.float32 else _COARSE
    return error <= tolerance**2 * total

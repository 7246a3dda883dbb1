"""verify, the second of three steps: the activations that a plan asks for, with the model. No Ray, no files.

`measure` runs the distinct texts to the layer and no further, what they have in common at their beginning once for all
of them (`models.suffix`) if the model can do so, and gathers on the device what the requests ask for: the maximum over a
window of positions of the unit's column times its sign (`units.column`, `units.sign`), special tokens and attention
sinks left out as in the scan. Latents are computed at the positions that are asked for only. A unit
that the model gives no finite value for is returned as failed and has no rows.

`unreproduced` says whose recordings the model does not give back, `diagnose` what would. Recordings and
measurements must belong to the same site and the same BOS policy: comparing others means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raylabel.models.suffix import Forest, Tree, agrees, grow
from raylabel.stages.units import column, sign
from raylabel.stages.verify import Plan, Unit, unit_numbers

CPU_TOKENS, GPU_TOKENS = 2048, 65_536
"""Tokens of a forward pass: on a CPU its activations should stay in the cache."""
ATTENDED = 1 << 24
"""Pairs of a query and a key in a forward pass, at most."""
ROW_TEXTS, ROW_TOKENS = 4, 256
"""A row holds as many tokens as this many of the longest text, or this many where that is more: the more, the seldomer
a beginning is repeated, and the more is attended to in vain."""
LEAST_FILLED = 0.7
"""Size of the smallest row of a batch, as a share of the largest."""
EXACT, COARSE = 1e-3, 5e-2
"""Tolerance of a reproduction as a share of the unit's maximum, in float32 and in half precision."""
LEAST_REPRODUCED = 0.8
TRIED = 5
"""Exemplars that a diagnosis runs."""


def measure(
    subject: Any,
    layer: int,
    plan: Plan,
    decoys: Any = None,
    *,
    sink: float = float("inf"),
    batch_tokens: int | None = None,
) -> tuple[pa.Table, list[tuple[Unit, str]]]:
    """The plan's rows with a column `activation` float32, and the units that failed, with the reason.

    `activation` is null where every position of the window is masked.

    Args:
        subject: see models.subject.Subject.
        decoys: the layer's decoys, for rows whose control is `decoy`.
        sink: residual norm above which a position is an attention sink.
        batch_tokens: tokens of a forward pass, padding included; a batch for which memory runs out is cut in two.
    """
    batch_tokens = batch_tokens or (CPU_TOKENS if subject.device.type == "cpu" else GPU_TOKENS)
    rows = plan["rows"].combine_chunks()
    requests = _Requests(rows, subject, layer)
    ids, offsets = _flat(plan["texts"])
    found = np.full(rows.num_rows, np.nan, dtype=np.float32)
    broken = np.zeros(rows.num_rows, dtype=bool)
    special = torch.tensor(sorted(subject.special_ids), dtype=torch.int64, device=subject.device)
    longest = int(np.diff(offsets).max(initial=0))
    shared = getattr(subject, "shares_beginnings", False) and _agrees(subject, layer, ids, offsets)
    for forest in grow(ids, offsets, min(max(ROW_TEXTS * longest, ROW_TOKENS), batch_tokens), shared):
        sizes = np.diff(forest.rows)
        order = np.argsort(-sizes, kind="stable")
        pending = list(reversed(list(_batches(sizes[order], batch_tokens))))
        while pending:
            first, last = pending.pop()
            batch = order[first:last]
            tokens, there, tree = forest.batch(batch, subject.pad_id, subject.device)
            usable = there & ~torch.isin(tokens, special)
            try:
                at, best, bad = requests.run(subject, layer, tokens, tree, forest, batch, usable, decoys, sink)
            except torch.OutOfMemoryError:
                if last - first == 1:
                    raise
                middle = (first + last) // 2
                pending += [(middle, last), (first, middle)]
                continue
            found[at], broken[at] = best, bad
    failed = np.unique(requests.unit[broken])
    failures = [(unit_of(rows, int(np.argmax(requests.unit == u))), "activations are not finite") for u in failed]
    measured = rows.append_column("activation", pa.array(found, mask=np.isnan(found)))
    return measured.filter(pa.array(~np.isin(requests.unit, failed))), failures


def unit_of(rows: pa.Table, row: int) -> Unit:
    """The unit that a row belongs to."""
    return rows["control"][row].as_py(), rows["neuron"][row].as_py(), rows["polarity"][row].as_py()


class _Requests:
    """The rows of a plan by text, ready to be gathered."""

    def __init__(self, rows: pa.Table, subject: Any, layer: int) -> None:
        self.device = subject.layer_device(layer)
        self.unit = unit_numbers(rows)
        self.decoy = pc.fill_null(rows["control"], "").combine_chunks().to_numpy(zero_copy_only=False) == "decoy"
        names = ("neuron", "polarity", "start", "end", "text")
        self.columns = {name: rows[name].to_numpy().astype(np.int64) for name in names}
        neuron, polarity = self.columns["neuron"], self.columns["polarity"]
        # A decoy's column is its own number: decoys have no quadrants.
        self.columns["column"] = np.where(self.decoy, neuron, column(neuron, polarity, subject.width))
        self.columns["sign"] = sign(polarity)
        text = self.columns["text"]
        self.order = np.argsort(text, kind="stable")
        self.begin = np.searchsorted(text[self.order], np.arange(text.max(initial=0) + 2))

    def run(
        self, subject: Any, layer: int, tokens: Tensor, tree: Tree | None, forest: Forest, rows: np.ndarray,
        usable: Tensor, decoys: Any, sink: float,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        """(row numbers, maximum or NaN, whether the maximum is not finite) of all requests of a batch of texts."""
        begin, many = forest.owned[rows], forest.owned[rows + 1] - forest.owned[rows]
        ranks = _ranges(begin, many)
        texts = forest.order[ranks]
        counts = self.begin[texts + 1] - self.begin[texts]
        at = self.order[_ranges(self.begin[texts], counts)]
        rank, line = np.repeat(ranks, counts), np.repeat(np.repeat(np.arange(len(rows)), many), counts)
        # Decoys last: their activations are gathered from another tensor.
        decoy = self.decoy[at]
        by_kind = np.argsort(decoy, kind="stable")
        at, rank, line, real = at[by_kind], rank[by_kind], line[by_kind], int((~decoy).sum())
        start, end = self.columns["start"][at], self.columns["end"][at]
        place = start[:, None] + np.arange(int((end - start).max(initial=1)))
        inside = place < end[:, None]
        nodes = forest.nodes[rank[:, None], np.where(inside, place, start[:, None])]
        within = torch.from_numpy(inside).to(self.device)
        positions = torch.from_numpy(nodes - forest.rows[rows][line][:, None]).to(self.device)
        lines = torch.from_numpy(line).to(self.device)[:, None]
        columns = torch.from_numpy(self.columns["column"][at]).to(self.device)[:, None]
        signs = torch.from_numpy(self.columns["sign"][at]).to(self.device)[:, None]
        usable = usable.to(self.device)
        result: list[Tensor] = []

        def visit(_layer: int, acts: Tensor, resid: Tensor) -> None:
            # A norm that is not a number is no sink: its activations must come to light as failures.
            open_ = usable & ~(resid.float().norm(dim=-1) > sink)
            values = self._units(subject, layer, acts, lines[:real], positions[:real], columns[:real])
            if real < len(at):
                values = torch.cat([values, self._decoys(acts, decoys, lines[real:], positions[real:], columns[real:])])
            values = values * signs
            counted = within & open_[lines, positions]
            result.append(values.masked_fill(~counted, -torch.inf).amax(dim=1))
            result.append(counted.any(dim=1))
            result.append((counted & ~torch.isfinite(values)).any(dim=1))

        _run(subject, layer, tokens, visit, tree)
        best, any_, bad = (tensor.cpu() for tensor in result)
        best = best.masked_fill(~any_ | bad, torch.nan)
        return at, best.numpy(), bad.numpy()

    def _units(
        self, subject: Any, layer: int, acts: Tensor, lines: Tensor, positions: Tensor, columns: Tensor
    ) -> Tensor:  # fmt: skip
        """Units' activations at some positions: float32 in the shape of `positions`."""
        if subject.latents is None:
            return acts[lines, positions, columns].float()
        asked, place = self._asked(acts, lines, positions)
        wanted, at = columns.unique(return_inverse=True)
        values: Tensor = subject.read(layer, asked, wanted)[place, at]
        return values

    def _decoys(self, acts: Tensor, decoys: Any, lines: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
        """The same of decoys."""
        asked, place = self._asked(acts, lines, positions)
        # As in the scan: one broken neuron is reported under its own name and does not take the controls with it.
        values: Tensor = decoys(torch.nan_to_num(asked.float(), nan=0.0, posinf=0.0, neginf=0.0))
        return values[place, columns].float()

    def _asked(self, acts: Tensor, lines: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(activations [n, site_width] of the positions that are asked for, each once, which of them each request is)."""
        asked = torch.zeros(acts.shape[:2], dtype=torch.bool, device=self.device)
        asked[lines, positions] = True
        place = asked.flatten().cumsum(0).view(asked.shape) - 1
        return acts[asked], place[lines, positions]


def _run(subject: Any, layer: int, tokens: Tensor, visit: Any, tree: Tree | None) -> None:
    if tree is None:
        subject.run(tokens, [layer], visit)
    else:
        subject.run(tokens, [layer], visit, tree)


def _agrees(subject: Any, layer: int, ids: np.ndarray, offsets: np.ndarray) -> bool:
    """Tries the model on the longest text and another end to it."""
    if len(offsets) == 1:
        return False
    longest = int(np.diff(offsets).argmax())
    text = ids[offsets[longest] : offsets[longest + 1]]
    changed = len(text) - len(text) // 4
    pair = np.concatenate([text, text[:changed], text[: len(text) - changed]])
    return agrees(subject, layer, pair, np.array([0, len(text), 2 * len(text)]))


def _ranges(begin: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, … (counts[0] numbers), begin[1], …"""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    ranges: np.ndarray = np.repeat(begin - ends + counts, counts) + np.arange(total)
    return ranges


def _batches(sizes: np.ndarray, tokens: int) -> Iterator[tuple[int, int]]:
    """Pieces [first, last) of rows of falling size, each of `tokens` tokens at most with its padding, which is little."""
    first = 0
    while first < len(sizes):
        size = int(sizes[first])
        alike = int(np.searchsorted(-sizes, -LEAST_FILLED * size, side="right"))
        last = min(first + max(min(tokens, ATTENDED // size) // size, 1), alike)
        yield first, last
        first = last


def _flat(texts: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    array = texts["ids"].combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], texts.schema.field("ids").type)
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def reproduces(
    recorded: np.ndarray, measured: np.ndarray, largest: np.ndarray, coarse: bool, rounding: float
) -> np.ndarray:
    """Whether measurements give recordings back; a measurement that is NaN does not.

    Args:
        largest: the unit's largest recording.
        coarse: whether the model runs in half precision.
        rounding: half a unit of the last digit that the recordings hold.
    """
    tolerance = np.maximum((COARSE if coarse else EXACT) * np.abs(largest), rounding)
    with np.errstate(invalid="ignore"):
        good: np.ndarray = np.abs(measured - recorded) <= tolerance
    return good


def reproduced(rows: pa.Table, coarse: bool, rounding: float = 0.0) -> np.ndarray:
    """[rows] bool: whether the original of each row's exemplar gave its recording back. `rows` as from `measure`."""
    unit, recorded = unit_numbers(rows), rows["recorded"].to_numpy()
    original = pc.equal(rows["kind"], "original").to_numpy(zero_copy_only=False)
    largest = np.full(int(unit.max(initial=-1)) + 1, -np.inf)
    np.maximum.at(largest, unit, recorded)
    measured = pc.fill_null(rows["activation"].cast(pa.float64()), float("nan")).to_numpy()
    good = reproduces(recorded, measured, largest[unit], coarse, rounding)
    # Each exemplar's original is the first of its rows.
    of_exemplar: np.ndarray = good[original][np.cumsum(original) - 1]
    return of_exemplar


def unreproduced(rows: pa.Table, coarse: bool, rounding: float = 0.0) -> list[Unit]:
    """The units too few of whose exemplars are reproduced."""
    original = pc.equal(rows["kind"], "original").to_numpy(zero_copy_only=False)
    unit, good = unit_numbers(rows)[original], reproduced(rows, coarse, rounding)[original]
    share = np.bincount(unit, good) / np.maximum(np.bincount(unit), 1)
    place = np.nonzero(original)[0][np.searchsorted(unit, np.arange(len(share)))]
    return [unit_of(rows, int(i)) for i in place[share < LEAST_REPRODUCED]]


def diagnose(
    subject: Any, rows: pa.Table, samples: pa.Table, layer: int, unit: Unit, rounding: float = 0.0, *, coarse: bool | None = None
) -> str | None:
    """What reproduces a unit's recordings where the recorded site does not; None if nothing that was tried does.

    Tries the sister site and the other BOS policy on a handful of exemplars. `rows` as from `measure`.
    """
    control, neuron, polarity = unit
    if control is not None:
        return None
    mine = pc.and_(pc.equal(rows["neuron"], neuron), pc.equal(rows["polarity"], polarity))
    mine = pc.and_(pc.and_(mine, pc.is_null(rows["control"])), pc.equal(rows["kind"], "original"))
    originals = rows.filter(mine)
    recorded = originals["recorded"].to_numpy()
    numbers, positions = (originals[name].to_pylist()[:TRIED] for name in ("sample", "position"))
    few = samples.filter(pc.is_in(samples["sample"], pa.array(numbers, pa.int64())))
    ids = dict(zip(few["sample"].to_pylist(), few["token_ids"].to_pylist(), strict=True))
    exemplars = [(ids[number], position) for number, position in zip(numbers, positions, strict=True)]
    coarse = subject.dtype != torch.float32 if coarse is None else coarse
    for name, other, shift in alternatives(subject, exemplars):
        at_column = column(neuron, polarity, other.width)
        values = np.array([peak_at(other, layer, ids, at, shift, at_column) * sign(polarity) for ids, at in exemplars])
        good = reproduces(recorded[: len(values)], values, recorded.max(), coarse, rounding)
        if good.mean() >= LEAST_REPRODUCED:
            return f"recordings are reproduced {name}"
    return None


def alternatives(subject: Any, exemplars: Iterable[tuple[list[int], int]]) -> Iterator[tuple[str, Any, int]]:
    """(in words, subject, change of positions: 1 for a BOS in front, -1 for one gone) in the order they are tried."""
    with_bos = all(subject.bos_id is not None and ids[:1] == [subject.bos_id] for ids, _ in exemplars)
    shift = 0 if subject.bos_id is None else -1 if with_bos else 1
    bos = "without BOS" if with_bos else "with BOS"
    sister = subject.sister_site()
    if sister is not None:
        yield f"at {sister}", subject.at(sister), 0
    if shift:
        yield bos, subject, shift
    if sister is not None and shift:
        yield f"at {sister} {bos}", subject.at(sister), shift


def peak_at(subject: Any, layer: int, ids: list[int], position: int, shift: int, at_column: int) -> float:
    """The activation at the MAT; NaN where there is no such position any more."""
    given = [subject.bos_id, *ids] if shift > 0 else ids[-shift:]
    if position + shift < 0:
        return float("nan")
    found: list[float] = []

    def visit(_layer: int, acts: Tensor, _resid: Tensor) -> None:
        found.append(float(subject.read(layer, acts[0, position + shift], wanted)[0]))

    wanted = torch.tensor([at_column], device=subject.layer_device(layer))
    subject.run(torch.tensor([given[: position + shift + 1]]), [layer], visit)
    return found[0]

"""The second pass of a scan: windows around the peaks of the winners, and the table `exemplars` made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raylabel.config import RunConfig
from raylabel.stages.arrays import lists, read_table, table_bytes
from raylabel.stages.samples import Samples, load_samples
from raylabel.stages.scanner import Scanner, working_batch
from raylabel.stages.select import SAMPLINGS, WINNERS
from raylabel.stages.state import ROWS, LayerSetup, valid
from raylabel.store.plan import Unit
from raylabel.store.shards import Blob, Output, Shard
from raylabel.tables import SPLITS, schema

GATHERED = pa.schema([
    *((f.name, f.type) for f in WINNERS), ("activation", pa.float32()), ("start", pa.int32()), ("position", pa.int32()),
    ("mat_ties", pa.int16()), ("tokens", pa.list_(pa.string())), ("token_ids", pa.list_(pa.int32())),
    ("activations", pa.list_(pa.float32())), ("document", pa.int64()),
])  # fmt: skip


class GatherWorker(Scanner):
    """Windows around the peaks of the winners in a lease of samples."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.open()
        self.batch, self.notes = working_batch(self.subject, self.facts["batch"], self.config.subject.context, self.layers)
        self.special_names = {i: self.subject.tokenizer.convert_ids_to_tokens(i) for i in self.facts["special_ids"]}

    def __call__(self, unit: Unit) -> Output:
        first, last = unit.key["first"], unit.key["last"]
        samples = load_samples(self.run, first, last)
        won = {}
        for layer in self.layers:
            for _, data in self.run.temporaries(unit, "select", f"winners={layer}.arrow"):
                table = read_table(data)
                a, b = np.searchsorted(table.column("sample").to_numpy(), [first, last])
                won[layer] = table.slice(a, b - a).combine_chunks()
        rows = gather(self, samples, first, self.batch, won)
        blobs = [Blob(f"rows={layer}.arrow", table_bytes(rows[layer]), True) for layer in self.layers]
        return Output(blobs=blobs, notes=self.notes)


def gather(
    scanner: GatherWorker, samples: Samples, first: int, batch: int, won: dict[int, pa.Table]
) -> dict[int, pa.Table]:
    """Rows of schema GATHERED for the winners (sorted by sample) of each layer.

    Batches are those of the accumulation, so that the activations are the same bits.
    """
    numbers = {layer: table.column("sample").to_numpy() for layer, table in won.items()}
    found: dict[int, list[dict[str, np.ndarray]]] = {layer: [] for layer in won}
    for at, ids, lengths, _ in scanner.batches(samples, first, batch):
        spans = {layer: np.searchsorted(n, [at, at + batch]) for layer, n in numbers.items()}
        wanted = [layer for layer, (a, b) in spans.items() if b > a]
        if not wanted:
            continue

        def visit(
            layer: int, acts: Tensor, resid: Tensor, at: int = at, ids: Tensor = ids, lengths: Tensor = lengths,
            spans: dict[int, Any] = spans,
        ) -> None:  # fmt: skip
            setup = scanner.setups[layer]
            mask = valid(ids, lengths, scanner.special, resid, setup.sink)
            part = won[layer].slice(spans[layer][0], spans[layer][1] - spans[layer][0])
            found[layer].append(_windows(setup, acts, mask, part, at, lengths.cpu().numpy(), scanner.config))

        scanner.subject.run(ids, wanted, visit)
    return {layer: _rows(scanner, samples, won[layer], found[layer]) for layer in won}


def _windows(
    setup: LayerSetup, acts: Tensor, mask: Tensor, part: pa.Table, at: int, lengths: np.ndarray, config: RunConfig
) -> dict[str, np.ndarray]:
    in_batch = part.column("sample").to_numpy() - at
    row, sign = part.column("row").to_numpy(), part.column("polarity").to_numpy().astype(np.float32)
    series = np.zeros((len(in_batch), acts.shape[1]), dtype=np.float32)
    step = ROWS if acts.device.type == "cpu" else len(acts)
    for start in range(0, len(acts), step):
        a, b = np.searchsorted(in_batch, [start, start + step])
        if b > a:
            units = setup.units(acts[start : start + step])
            device = units.device
            where = torch.from_numpy(in_batch[a:b] - start).to(device), torch.from_numpy(row[a:b].astype(np.int64)).to(device)
            series[a:b] = units[where[0], :, where[1]].cpu().numpy()
    series *= sign[:, None]
    counted = np.where(mask.cpu().numpy()[in_batch], series, -np.inf)
    peak = counted.argmax(1)
    value = counted[np.arange(len(peak)), peak]
    start = np.maximum(peak - config.exemplars.before, 0)
    stop = np.minimum(peak + config.exemplars.after + 1, lengths[in_batch])
    length = stop - start
    inside = np.repeat(start - np.concatenate([[0], np.cumsum(length)[:-1]]), length) + np.arange(int(length.sum()))
    return {
        "activation": value, "start": start, "position": peak - start,
        "mat_ties": (counted == value[:, None]).sum(1) - 1, "length": length,
        "activations": series[np.repeat(np.arange(len(peak)), length), inside],
    }  # fmt: skip


def _rows(scanner: GatherWorker, samples: Samples, won: pa.Table, found: list[dict[str, np.ndarray]]) -> pa.Table:
    if not found:
        return GATHERED.empty_table()
    flat = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
    rows = won.column("sample").to_numpy() - samples.numbers[0]
    used, inverse = np.unique(rows, return_inverse=True)
    strings, starts = samples.strings(used, scanner.special_names)
    length, start = flat["length"], flat["start"]
    step = np.arange(int(length.sum())) - np.repeat(np.concatenate([[0], np.cumsum(length)[:-1]]), length)
    in_strings = np.repeat(starts[inverse] + start, length) + step
    in_ids = np.repeat(samples.offsets[rows] + start, length) + step
    tokens = strings.take(pa.array(in_strings))
    offsets = pa.array(np.concatenate([[0], np.cumsum(length)]).astype(np.int32))
    columns = {name: won.column(name) for name in WINNERS.names}
    columns |= {name: flat[name] for name in ("activation", "start", "position", "mat_ties")}
    columns["tokens"] = pa.ListArray.from_arrays(offsets, tokens)
    columns["token_ids"] = lists(samples.ids[in_ids], length, pa.int32())
    columns["activations"] = lists(flat["activations"], length, pa.float32())
    columns["document"] = samples.documents[rows]
    table = pa.table({name: columns[name] for name in GATHERED.names}).cast(GATHERED)
    # A sample without a position that counts has no peak to show.
    return table.filter(np.isfinite(flat["activation"]))


class CloseWorker(Scanner):
    """`exemplars` of a range of neurons of a layer."""

    def __call__(self, unit: Unit) -> Output:
        layer, first, last = unit.key["layer"], unit.key["first"], unit.key["last"]
        decoy = pc.field("decoy")
        wanted = (pc.field("neuron") >= first) & (pc.field("neuron") < last) & ~decoy
        # The first range of a layer brings its controls along.
        wanted = wanted | decoy if unit.key["controls"] else wanted
        parts = [read_table(data).filter(wanted) for _, data in self.run.temporaries(unit, "gather", f"rows={layer}.arrow")]
        whole = pa.concat_tables(parts)
        names = {name: pa.array(values) for name, values in (("sampling", SAMPLINGS), ("split", SPLITS))}
        order = [(n, "ascending") for n in ("neuron", "polarity", "sampling", "split", "rank")]
        order[1] = ("polarity", "descending")
        whole = whole.sort_by(order).combine_chunks()
        for name, values in names.items():
            whole = whole.set_column(
                whole.schema.get_field_index(name), name, values.take(whole.column(name).combine_chunks())
            )
        n = whole.num_rows
        whole = whole.append_column("site", pa.array([self.facts["sites"][layer]] * n, pa.string()))
        whole = whole.append_column("source", pa.array(["corpus"] * n, pa.string()))
        is_decoy = whole.column("decoy")
        columns = schema("exemplars").names
        shards = [Shard("exemplars", whole.filter(pc.invert(is_decoy)).select(columns), layer)]
        controls = whole.filter(is_decoy)
        if controls.num_rows:
            marked = controls.append_column("control", pa.array(["decoy"] * controls.num_rows, pa.string()))
            shards.append(Shard("exemplars", marked.select(["control", *columns]), layer, controls=True))
        return Output(shards)

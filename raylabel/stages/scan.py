"""scan: one pass over all samples for every layer, unit, polarity and decoy, then a second one for the winners' windows.

Steps: `pilot` fixes sinks, shifts and decoys; `accumulate` runs leases of samples and keeps one small state a layer;
`select` merges a layer's states into winners and writes `statistics`; `gather` runs the samples that won and cuts the
windows out; `close` writes `exemplars` sorted. Nothing of size tokens x units is ever kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from raylabel.config import RunConfig
from raylabel.stages.arrays import array_bytes, lists, read_arrays, read_table, table_bytes
from raylabel.stages.base import Key, Stage, Step, neuron_ranges
from raylabel.stages.pilot import load_decoys, pilot_samples, run_pilot
from raylabel.stages.running import hash_keys
from raylabel.stages.samples import Samples, load_samples
from raylabel.stages.select import (
    FIRING_FACTOR,
    FIRING_SALT,
    SAMPLINGS,
    WINNERS,
    columns_of,
    random_samples,
    statistics,
    winners,
)
from raylabel.stages.state import ROWS, LayerSetup, LayerState, valid
from raylabel.stages.subject import open_subject
from raylabel.stages.units import polarities, wanted_units
from raylabel.store.plan import Unit, digest
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output, Shard
from raylabel.tables import SPLITS, from_rows, schema

CPU_BATCH, GPU_BATCH = 32, 128
LEASES, LEASE_SAMPLES = 8, 8192
"""A scan has about LEASES leases, more where a lease would exceed LEASE_SAMPLES."""
EFFECTS = 10
CLOSE_NEURONS = 4096
GATHERED = pa.schema([
    *((f.name, f.type) for f in WINNERS), ("activation", pa.float32()), ("start", pa.int32()), ("position", pa.int32()),
    ("mat_ties", pa.int16()), ("tokens", pa.list_(pa.string())), ("token_ids", pa.list_(pa.int32())),
    ("activations", pa.list_(pa.float32())), ("document", pa.int64()),
])  # fmt: skip


class Scanner:
    """What every step of a scan that runs the subject needs."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.facts = self.run.resolved
        self.units = wanted_units(self.config, self.facts)
        self.polarities = polarities(self.config, self.facts)
        self.layers = list(self.units)
        self.seed = self.config.run.seed

    @property
    def subject(self) -> Any:
        """The loaded subject."""
        return open_subject(self.config, self.facts)

    def open(self) -> None:
        """Reads the pilot and makes the layers' setups on the subject's device."""
        device = self.subject.device
        self.pilot = read_arrays(self.run.files.read("pilot.npz"))
        self.special = torch.tensor(self.facts["special_ids"], device=device, dtype=torch.int64)
        self.setups = {layer: self.setup(layer, device) for layer in self.layers}

    def setup(self, layer: int, device: Any) -> LayerSetup:
        """The fixed part of a layer."""
        decoys = load_decoys(self.pilot, layer, self.facts["width"], self.seed, device)
        neurons = torch.tensor(self.units[layer])
        shift = torch.from_numpy(self.pilot[f"mean.{layer}"])[neurons]
        if decoys is not None:
            shift = torch.cat([shift, decoys.offset.cpu()])
        whole = len(neurons) == self.facts["width"]
        return LayerSetup(
            None if whole else neurons.to(device), self.polarities, shift.to(device), float(self.pilot[f"sink.{layer}"]), decoys
        )

    def state(self, layer: int, setup: LayerSetup, device: Any) -> LayerState:
        """An empty state of a layer."""
        wanted = self.config.exemplars
        counts = {
            "top_explain": wanted.top, "top_score": max(1, wanted.top // 2), "firing": FIRING_FACTOR * wanted.quantile,
        }  # fmt: skip
        return LayerState(setup, len(self.units[layer]), self.decoys, counts, device)

    @property
    def decoys(self) -> int:
        """Decoys a layer."""
        return self.config.controls.decoys

    def batches(self, samples: Samples, first: int, size: int) -> Any:
        """(number of row 0, ids [B, T], lengths [B], rows [B]) of aligned batches; missing rows are -1."""
        last = first + len(samples.numbers)
        for at in range(first, last, size):
            rows = np.arange(at, at + size) - first
            rows = np.where(rows < len(samples.numbers), rows, -1)
            ids, lengths = samples.padded(rows, self.facts["pad_id"])
            device = self.subject.device
            yield at, torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device), rows


class PilotWorker(Scanner):
    """`pilot.npz`."""

    def __call__(self, unit: Unit) -> Output:
        few = load_samples(self.run, among=pilot_samples(self.run.dataset("samples").count_rows()))
        arrays = run_pilot(self.subject, few, self.layers, self.config)
        return Output(blobs=[Blob("pilot.npz", array_bytes(arrays))])


class AccumulateWorker(Scanner):
    """The state of every layer over a lease of samples."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.open()
        self.batch, self.notes = working_batch(self.subject, self.facts["batch"], self.config.subject.context, self.layers)

    def __call__(self, unit: Unit) -> Output:
        samples = load_samples(self.run, unit.key["first"], unit.key["last"])
        states = accumulate(self, samples, unit.key["first"], self.batch)
        blobs = [Blob(f"layer={layer}.npz", array_bytes(states[layer].arrays()), True) for layer in self.layers]
        return Output(blobs=blobs, notes=self.notes)


def accumulate(scanner: Scanner, samples: Samples, first: int, batch: int) -> dict[int, LayerState]:
    """The states of all layers over samples numbered from `first` on, which `batch` divides."""
    device = scanner.subject.device
    states = {layer: scanner.state(layer, scanner.setups[layer], device) for layer in scanner.layers}
    keys = torch.from_numpy(hash_keys(samples.numbers, scanner.seed, FIRING_SALT)).to(device)
    explain = torch.from_numpy(samples.explain).to(device)
    for at, ids, lengths, rows in scanner.batches(samples, first, batch):
        numbers = torch.arange(at, at + batch, device=device)
        index = torch.from_numpy(np.maximum(rows, 0)).to(device)

        def visit(
            layer: int, acts: Tensor, resid: Tensor, ids: Tensor = ids, lengths: Tensor = lengths, at: int = at,
            numbers: Tensor = numbers, index: Tensor = index,
        ) -> None:  # fmt: skip
            mask = valid(ids, lengths, scanner.special, resid, scanner.setups[layer].sink)
            states[layer].add(acts, mask, at, numbers, keys[index], explain[index])

        scanner.subject.run(ids, scanner.layers, visit)
    return states


class SelectWorker(Scanner):
    """Winners and statistics of a layer."""

    def __call__(self, unit: Unit) -> Output:
        layer = unit.key["layer"]
        self.pilot = read_arrays(self.run.files.read("pilot.npz"))
        setup = self.setup(layer, torch.device("cpu"))
        state = self.state(layer, setup, torch.device("cpu"))
        for _, data in self.run.temporaries(unit, "accumulate", f"layer={layer}.npz"):
            state.merge(read_arrays(data))
        columns = columns_of(self.units[layer], self.polarities, self.decoys)
        index = self.run.table("samples", columns=["sample", "split"]).sort_by("sample")
        explain = pc.equal(index.column("split"), "explain").to_numpy()
        random = random_samples(index.column("sample").to_numpy(), explain, self.config.exemplars.random, self.seed)
        won = winners(state, columns, random, self.config.exemplars.quantile)
        rows = statistics(state, columns, self.facts["sites"][layer], self.effects(layer, setup), self.names())
        # By unit, not by polarity: a reader of a range of neurons finds its rows together.
        rows = sorted(rows, key=lambda r: (r["neuron"], -r["polarity"]))
        shards = [
            Shard("statistics", from_rows([_without_decoy(r) for r in rows if not r["decoy"]], "statistics"), layer)
        ]
        if self.decoys:
            controls = [{**_without_decoy(r), "control": "decoy"} for r in rows if r["decoy"]]
            shards.append(Shard("statistics", from_rows(controls, "statistics", controls=True), layer, controls=True))
        return Output(shards, [Blob(f"winners={layer}.arrow", table_bytes(won), True)], self.failures(layer, state))

    def effects(self, layer: int, setup: LayerSetup) -> dict[str, np.ndarray]:
        """Direct effect of each row on the output: the decoys' as if they wrote along what they read."""
        writes = self.subject.output_directions(layer).float()
        directions = writes[torch.tensor(self.units[layer], device=writes.device)]
        if setup.decoys is not None:
            directions = torch.cat([directions, setup.decoys.directions.to(writes.device).T @ writes])
        up, up_ids, down, down_ids = self.subject.logit_effects(directions, EFFECTS)
        found = {"up": up, "up_ids": up_ids, "down": down, "down_ids": down_ids}
        return {name: value.float().cpu().numpy() if "ids" not in name else value.cpu().numpy() for name, value in found.items()}

    def names(self) -> list[str]:
        """A readable string for every token id."""
        tokenizer = self.subject.tokenizer
        return [tokenizer.decode([i]) for i in range(max(tokenizer.get_vocab().values()) + 1)]

    def failures(self, layer: int, state: LayerState) -> list[dict[str, Any]]:
        """One failure for every unit that gave NaN or infinite activations."""
        why = f"NaN or infinite activations at {self.facts['sites'][layer]}"
        found = []
        for row in np.flatnonzero(state.bad.numpy()).tolist():
            n = len(self.units[layer])
            neuron = self.units[layer][row] if row < n else row - n
            found.append({"layer": layer, "neuron": neuron, "reason": why} | ({} if row < n else {"control": "decoy"}))
        return found


def _without_decoy(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "decoy"}


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


def working_batch(subject: Any, batch: int, context: int, layers: list[int]) -> tuple[int, dict[str, Any]]:
    """The batch that fits on the device: halved until a forward of full length does; a halving is noted."""
    if subject.device.type == "cpu":
        return batch, {}
    size = batch
    while True:
        try:
            subject.run(torch.zeros((size, context), dtype=torch.int64, device=subject.device), layers, lambda *_: None)
            return size, {} if size == batch else {"batch_halved_to": size}
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            torch.cuda.empty_cache()
            size //= 2


def power_of_two(n: int) -> int:
    """The largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)


def lease_keys(n: int, batch: int, leases: int = LEASES) -> list[Key]:
    """Leases {first, last} over samples 0 .. n, each but the last a multiple of the batch."""
    size = -(-n // leases)
    size = min(-(-size // batch) * batch, max(LEASE_SAMPLES // batch, 1) * batch)
    return [{"first": a, "last": min(a + size, n)} for a in range(0, n, size)]


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    import json

    facts = json.loads(run.files.read("subject.json"))
    units = wanted_units(config, facts)
    on_gpu = facts["device"].startswith("cuda")
    batch = config.subject.batch if config.subject.batch != "auto" else GPU_BATCH if on_gpu else CPU_BATCH
    wanted = digest({str(layer): neurons for layer, neurons in units.items()})
    resolved = {**facts, "batch": power_of_two(int(batch)), "units": wanted, "n_units": sum(map(len, units.values()))}
    run.resolve(resolved, of=digest([config.subject.model_dump(mode="json"), facts, wanted]))
    leases = lease_keys(run.dataset("samples").count_rows(), run.resolved["batch"])
    close = neuron_ranges(units, CLOSE_NEURONS)
    seen: set[int] = set()
    for key in close:
        key["controls"] = key["layer"] not in seen
        seen.add(key["layer"])
    return [
        Step("pilot", [{}], PilotWorker, model=True),
        Step("accumulate", leases, AccumulateWorker, model=True),
        Step("select", [{"layer": layer} for layer in units], SelectWorker, model=True),
        Step("gather", leases, GatherWorker, model=True),
        Step("close", close, CloseWorker),
    ]


SCAN = Stage(
    name="scan", version=1, needs=("tokenize", "tokenize.subject"), tables=("exemplars", "statistics"), steps=_steps,
    facts=("batch", "units"),
    reads=(
        "subject.units", "subject.layers", "subject.neurons", "subject.polarity", "exemplars.top", "exemplars.quantile",
        "exemplars.random", "exemplars.before", "exemplars.after", "exemplars.sink_factor", "controls.decoys",
        "run.seed", "run.format",
    ),
)  # fmt: skip

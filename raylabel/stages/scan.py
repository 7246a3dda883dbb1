"""scan: one pass over all samples for every layer, unit, polarity and decoy, then a second one for the winners' windows.

Steps: `pilot` fixes sinks, shifts and decoys; `accumulate` runs leases of samples and keeps one small state a layer;
`select` merges a layer's states into winners and writes `statistics`; `gather` runs the samples that won and cuts the
windows out; `close` writes `exemplars` sorted. Nothing of size tokens x units is ever kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from raylabel.config import RunConfig
from raylabel.stages.arrays import array_bytes, read_arrays, table_bytes
from raylabel.stages.base import Key, Stage, Step, neuron_ranges
from raylabel.stages.gather import CloseWorker, GatherWorker
from raylabel.stages.pilot import pilot_samples, run_pilot
from raylabel.stages.running import hash_keys
from raylabel.stages.samples import Samples, load_samples
from raylabel.stages.scanner import Scanner, working_batch
from raylabel.stages.select import (
    FIRING_SALT,
    columns_of,
    random_samples,
    statistics,
    winners,
)
from raylabel.stages.state import LayerSetup, LayerState, valid
from raylabel.stages.units import wanted_units
from raylabel.store.plan import Unit, digest
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output, Shard
from raylabel.tables import from_rows

CPU_BATCH, GPU_BATCH = 32, 128
LEASES, LEASE_SAMPLES = 8, 8192
"""A scan has about LEASES leases, more where a lease would exceed LEASE_SAMPLES."""
EFFECTS = 10
CLOSE_NEURONS = 4096


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

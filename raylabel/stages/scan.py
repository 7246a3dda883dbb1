"""scan: one pass over all samples for every layer, unit, polarity and decoy.

Steps: `pilot` fixes sinks, shifts and decoys; `accumulate` runs leases of samples and keeps a state of a fixed size for
each layer, windows around the peaks included; `close` merges the states of a range of neurons into `exemplars` and
`statistics`. Nothing of size tokens x units is ever kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from raylabel.config import RunConfig
from raylabel.stages.accumulate import AccumulateWorker
from raylabel.stages.arrays import array_bytes
from raylabel.stages.base import Key, Stage, Step, neuron_ranges
from raylabel.stages.close import CloseWorker
from raylabel.stages.memory import scan_bytes
from raylabel.stages.pilot import pilot_samples, run_pilot
from raylabel.stages.planting import count_words, nulls, plant, to_json
from raylabel.stages.samples import load_samples
from raylabel.stages.scanner import CLOSE_NEURONS, Scanner
from raylabel.stages.units import polarities, wanted_units
from raylabel.store.plan import Unit, digest
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output
from raylabel.words.lists import load_lists

COUNTED = 50_000
"""Samples whose words are counted to choose what planted units fire on."""
CPU_BATCH, GPU_BATCH = 32, 128
CPU_BYTES = 6 << 20
"""Bytes of a layer's activations in a batch on a CPU, at most: larger ones leave the caches before the update sees them."""
LEASES = 4
"""A scan has at least so many leases."""
LEASE_SECONDS = 120
"""Forward passes of a lease, by the pace that was measured: what a crash costs at most."""
STATE_PACE = 5_000_000
"""Bytes of state that a second of a lease must carry, at most: a large state takes long to fill, to write and to merge, and
is worth a longer lease."""


class PilotWorker(Scanner):
    """`pilot.npz`."""

    def __call__(self, unit: Unit) -> Output:
        n = self.run.dataset("samples").count_rows()
        few = load_samples(self.run, among=pilot_samples(n))
        blobs = [Blob("pilot.npz", array_bytes(run_pilot(self.subject, few, self.layers, self.config)))]
        wanted = self.config.controls
        if wanted.nulls + wanted.planted:
            lists = load_lists(wanted.lists) if wanted.planted else {}
            counts = count_words(self._texts(n)) if wanted.planted else Counter[str]()
            plants = {
                layer: [*nulls(wanted.nulls), *plant(lists, counts, wanted.planted, self.seed, layer)] for layer in self.layers
            }
            blobs.append(Blob("planted.json", json.dumps(to_json(plants), ensure_ascii=False).encode()))
        return Output(blobs=blobs)

    def _texts(self, n: int) -> Iterator[str]:
        """The texts of COUNTED samples of the explain split at most, evenly spread."""
        every = max(n // COUNTED, 1)
        columns, condition = ["sample", "text"], pc.field("split") == "explain"
        for batch in self.run.dataset("samples").to_batches(columns=columns, filter=condition):
            for number, text in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                if number % every == 0:
                    yield text


def batch_size(config: RunConfig, facts: dict[str, Any]) -> int:
    """Samples of a batch, a power of two."""
    if config.subject.batch != "auto":
        return power_of_two(int(config.subject.batch))
    if facts["device"].startswith("cuda"):
        return GPU_BATCH
    fitting = CPU_BYTES // (4 * config.subject.context * facts["site_width"])
    return power_of_two(max(1, min(CPU_BATCH, fitting)))


def power_of_two(n: int) -> int:
    """The largest power of two that is at most n."""
    return 1 << (n.bit_length() - 1)


def lease_size(n: int, batch: int, context: int, pace: float, state: int, leases: int = LEASES) -> int:
    """Samples of a lease, a multiple of the batch: of n in all, at `pace` tokens a second, for `state` bytes in all."""
    seconds = max(LEASE_SECONDS, state / STATE_PACE)
    size = min(-(-n // leases), int(pace * seconds / context))
    return max(-(-size // batch), 1) * batch


def least_leases(config: RunConfig, workers: int | None = None) -> int:
    """Leases of a scan at least: one for every worker that is asked for."""
    asked = workers if config.run.workers == "auto" else int(config.run.workers)
    return max(LEASES, asked or 0)


def lease_keys(n: int, size: int) -> list[Key]:
    """Leases {first, last} over samples 0 .. n."""
    return [{"first": a, "last": min(a + size, n)} for a in range(0, n, size)]


def _pilot_key(config: RunConfig) -> Key:
    """What else decides the pilot: the words of the planted units' lists."""
    return {"lists": digest(load_lists(config.controls.lists))} if config.controls.planted else {}


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    facts = json.loads(run.files.read("subject.json"))
    units = wanted_units(config, facts)
    batch = batch_size(config, facts)
    wanted = digest({str(layer): neurons for layer, neurons in units.items()})
    n, pace = run.dataset("samples").count_rows(), json.loads(run.files.read("pace.json"))["tokens_per_second"]
    state = sum(scan_bytes(config, units, polarities(config, facts), batch, n).values())
    lease = lease_size(n, batch, config.subject.context, pace, state, least_leases(config))
    resolved = {**facts, "batch": batch, "units": wanted, "n_units": sum(map(len, units.values())), "lease": lease}
    run.resolve(resolved, of=digest([config.subject.model_dump(mode="json"), facts, wanted, n]))
    leases = lease_keys(n, run.resolved["lease"])
    close = neuron_ranges(units, CLOSE_NEURONS)
    seen: set[int] = set()
    for key in close:
        key["controls"] = key["layer"] not in seen
        seen.add(key["layer"])
    return [
        Step("pilot", [_pilot_key(config)], PilotWorker, model=True),
        Step("accumulate", leases, AccumulateWorker, model=True),
        Step("close", close, CloseWorker, model=True),
    ]


SCAN = Stage(
    name="scan", version=4, needs=("tokenize", "tokenize.subject"), tables=("exemplars", "statistics"), steps=_steps,
    facts=("batch", "units"),
    reads=(
        "subject.units", "subject.layers", "subject.neurons", "subject.polarity", "exemplars.top", "exemplars.quantile",
        "exemplars.random", "exemplars.before", "exemplars.after", "exemplars.sink_factor", "controls",
        "run.seed", "run.format",
    ),
)  # fmt: skip

"""The first pass of a scan over a lease of samples: the state of every layer, as one file a layer and part of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from raylabel.stages.arrays import array_bytes
from raylabel.stages.kept import hash_keys, lots
from raylabel.stages.memory import layer_bytes, layer_groups, out_of_memory
from raylabel.stages.positions import sinks, usable
from raylabel.stages.samples import Samples, load_samples
from raylabel.stages.scanner import Given, LayerState, Scanner, sizes
from raylabel.stages.state import Batch
from raylabel.store.plan import Unit
from raylabel.store.shards import Blob, Output
from raylabel.tables import SPLITS

RANDOM_SALT, FIRING_SALT = 1, 2

log = logging.getLogger(__name__)


class AccumulateWorker(Scanner):
    """The state of every layer over a lease of samples."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.open()
        self.batch = self.facts["batch"]
        index = self.run.table("samples", columns=["sample", "split"]).sort_by("sample")
        explain = pc.equal(index.column("split"), "explain").to_numpy()
        random = random_samples(index.column("sample").to_numpy(), explain, self.config.exemplars.random, self.seed)
        self.random = np.sort(np.concatenate(list(random.values())))

    def __call__(self, unit: Unit) -> Output:
        samples = load_samples(self.run, unit.key["first"], unit.key["last"])
        # A worker that ran out of memory in an earlier lease goes on with what fits.
        notes: dict[str, Any] = {} if self.batch == self.facts["batch"] else {"batch_halved_to": self.batch}
        return Output(blobs=self._blobs(samples, unit.key["first"], notes), notes=notes)

    def _blobs(self, samples: Samples, first: int, notes: dict[str, Any]) -> Iterator[Blob]:
        random = np.intersect1d(self.random, samples.numbers)
        groups = self._groups(len(random), len(samples.numbers))
        if len(groups) > 1:
            notes["passes"] = len(groups)
        for layers in groups:
            states = self._accumulate(samples, first, layers, random, notes)
            for layer in layers:
                state = states.pop(layer)
                extra = {"tokens": state.tokens.cpu().numpy(), "random": random}
                for key in self.ranges:
                    if key["layer"] == layer:
                        rows = torch.from_numpy(self.places(key))
                        data = array_bytes({**state.units.arrays(rows), **extra})
                        yield Blob(part_name(key), data, True)
                if state.decoys is not None:
                    yield Blob(control_name(layer, "decoy"), array_bytes({**state.decoys.arrays(), **extra}), True)
                if state.texts is not None:
                    extra["tokens"] = state.tokens_of_texts.numpy()
                    for control, places in self.text_controls:
                        data = array_bytes({**state.texts.arrays(torch.from_numpy(places)), **extra})
                        yield Blob(control_name(layer, control), data, True)

    def _accumulate(
        self, samples: Samples, first: int, layers: list[int], random: np.ndarray, notes: dict[str, Any]
    ) -> dict[int, LayerState]:
        """Where memory runs out, once more with half the batch."""
        while True:
            try:
                return accumulate(self, samples, first, self.batch, layers, random)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.batch == 1:
                    raise
            # Outside the handler: the traceback would hold what did not fit.
            self.batch //= 2
            notes["batch_halved_to"] = self.batch
            log.warning("scan: out of memory; goes on with batches of %d samples", self.batch)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _groups(self, random: int, samples: int) -> list[list[int]]:
        """The layers that a forward pass serves: all, but where their states would not fit on the device."""
        needed = {
            layer: layer_bytes(self.config, len(setup.shift), len(self.signs), random, self.batch, samples)
            for layer, setup in self.setups.items()
        }
        return layer_groups(needed, {layer: str(setup.shift.device) for layer, setup in self.setups.items()})


def accumulate(
    scanner: Scanner, samples: Samples, first: int, batch: int, layers: list[int], random: np.ndarray
) -> dict[int, LayerState]:
    """The states of some layers over samples numbered from `first` on, which `batch` divides.

    Args:
        random: the numbers of those among the samples that are kept for every unit.
    """
    kept = sizes(scanner.config, len(random))
    states = {layer: LayerState(layer, scanner.setups[layer], scanner.signs, kept) for layer in layers}
    orders = lots(samples.numbers, scanner.seed, FIRING_SALT)
    place = dict(zip(random.tolist(), range(len(random)), strict=True))
    for at, ids, lengths, rows in scanner.batches(samples, first, batch):
        index, numbers = np.maximum(rows, 0), np.arange(at, at + batch)
        chosen = np.array([place.get(number, -1) for number in numbers.tolist()])
        split = np.where(samples.explain[index], 0, 1)
        here = Batch(at, numbers, orders[index], split, chosen, lengths.cpu().numpy())
        usual = usable(ids, lengths, scanner.special)
        given = scanner.given(ids, lengths, usual)

        def visit(layer: int, acts: Tensor, resid: Tensor, here: Batch = here, given: Given = given) -> None:
            mask = given.mask.to(resid.device) & ~sinks(resid, scanner.setups[layer].sink)
            states[layer].add(scanner.subject, acts, mask, here, given)

        scanner.subject.run(ids, layers, visit)
    return states


def random_samples(numbers: np.ndarray, explain: np.ndarray, n: int, seed: int) -> dict[str, np.ndarray]:
    """`n` samples of each split, the same for every unit of the run."""
    keys = hash_keys(numbers, seed, RANDOM_SALT)
    found = {}
    for split, inside in zip(SPLITS, (explain, ~explain), strict=True):
        found[split] = numbers[inside][np.argsort(keys[inside])][:n]
    return found


def part_name(key: dict[str, Any]) -> str:
    """File of the state of a range of a layer's neurons."""
    return f"layer={key['layer']}.{key['first']}.npz"


def control_name(layer: int, control: str) -> str:
    """File of the state of a layer's controls of one kind."""
    return f"layer={layer}.{control}.npz"

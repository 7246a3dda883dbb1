"""What every step of a scan that runs the subject needs: the run's facts, the layers' setups, aligned batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylabel.config import RunConfig
from raylabel.models.controls import Decoys
from raylabel.stages.base import Key, neuron_ranges
from raylabel.stages.fixed import Fixed
from raylabel.stages.pilot import finite
from raylabel.stages.samples import Samples
from raylabel.stages.state import Batch, Sizes, UnitState
from raylabel.stages.subject import open_subject
from raylabel.stages.textual import NULL, PLANTED, Read, TextUnits
from raylabel.stages.units import polarities, wanted_units
from raylabel.store.rundir import RunDir

CLOSE_NEURONS = 1024
"""Neurons that one unit of the last step handles."""


def sizes(config: RunConfig, random: int) -> Sizes:
    """What a scan keeps of each unit; `random` samples of a lease are kept for all."""
    wanted = config.exemplars
    top, firing = (wanted.top, max(1, wanted.top // 2)), FIRING_FACTOR * wanted.quantile
    lists = (top[0], firing, top[1], firing)
    window = min(wanted.before + wanted.after + 1, config.subject.context)
    return Sizes(lists, wanted.before, wanted.after, window, random)


FIRING_FACTOR = 2
"""Firing samples kept for each quantile exemplar wanted."""


@dataclass(frozen=True)
class LayerSetup:
    """What is fixed of a layer before the scan.

    Attributes:
        columns: [U] unit columns in `Subject.read`'s sense; None for all.
        shift: [U] the units' pilot means. decoy_shift: [n] likewise.
        sink: residual norm above which a position does not count.
        decoys: the layer's control directions, None for none.
        texts: the layer's controls that are functions of text, None for none.
    """

    columns: Tensor | None
    shift: Tensor
    decoy_shift: Tensor
    sink: float
    decoys: Decoys | None
    texts: TextUnits | None


@dataclass(frozen=True)
class Given:
    """What text controls see of a batch: ids [B, T] and lengths [B] as arrays, the words read, the positions that count.

    Without text controls there is nothing but the positions: a copy from the device would wait for it.
    """

    ids: np.ndarray
    lengths: np.ndarray
    reads: list[list[Read]]
    mask: Tensor


class LayerState:
    """The states of a layer's units and of its controls over a lease."""

    def __init__(self, layer: int, setup: LayerSetup, signs: tuple[int, ...], sizes: Sizes) -> None:
        self.layer, self.setup = layer, setup
        self.units = UnitState(setup.shift, signs, sizes)
        self.decoys = None if setup.decoys is None else UnitState(setup.decoy_shift, (1,), sizes)
        self.texts = None if setup.texts is None else UnitState(torch.zeros(len(setup.texts.plants)), (1,), sizes)
        self.tokens = torch.zeros((), dtype=torch.int64, device=setup.shift.device)
        self.tokens_of_texts = torch.zeros((), dtype=torch.int64)

    def add(self, subject: Any, acts: Tensor, mask: Tensor, batch: Batch, given: Given) -> None:
        """One batch: what the site gives, [B, T, site_width], and the positions [B, T] that count."""
        self.tokens += mask.sum()
        self.units.add(lambda rows: subject.read(self.layer, acts[rows], self.setup.columns), mask, batch)
        if self.decoys is not None:
            decoys: Decoys = self.setup.decoys  # type: ignore[assignment]
            self.decoys.add(lambda rows: controlled(decoys, acts[rows]), mask, batch)
        if self.texts is not None:
            # A sink is known by the residual stream, which a function of text has none of.
            mask = given.mask.cpu()
            self.tokens_of_texts += mask.sum()
            values = torch.from_numpy(self.setup.texts.batch(given.ids, given.lengths, given.reads))  # type: ignore[union-attr]
            self.texts.add(lambda rows: values[rows], mask, batch)


def controlled(decoys: Decoys, acts: Tensor) -> Tensor:
    """The decoys' activations; a broken neuron is reported under its own name and does not take them with it."""
    if acts.device.type == "cpu":
        found = decoys(acts)
        if torch.isfinite(found.sum()):
            return found
    return decoys(finite(acts.float()))


class Scanner:
    """What every step of a scan that runs the subject needs."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.facts = self.run.resolved
        self.units = wanted_units(self.config, self.facts)
        found = polarities(self.config, self.facts)
        self.signs = tuple(p for p in found if abs(p) == 1)
        self.regimes = max(abs(p) for p in found)
        self.layers = list(self.units)
        self.seed = self.config.run.seed
        self.fixed = Fixed(self.run, self.seed)

    @property
    def subject(self) -> Any:
        """The loaded subject."""
        return open_subject(self.config, self.facts)

    def given(self, ids: Tensor, lengths: Tensor, mask: Tensor) -> Given:
        """What text controls see of a batch."""
        if not self.text_controls:
            return Given(np.zeros((0, 0), np.int64), np.zeros(0, np.int64), [], mask)
        rows, sizes = ids.cpu().numpy(), lengths.cpu().numpy()
        reads = [self.fixed.reader(row[:n].tolist()) for row, n in zip(rows, sizes.tolist(), strict=True)]
        return Given(rows, sizes, reads, mask)

    def open(self) -> None:
        """Makes the layers' setups, each on its layer's device."""
        self.special = torch.tensor(self.facts["special_ids"], device=self.subject.device, dtype=torch.int64)
        self.setups = {layer: self.setup(layer, self.subject.layer_device(layer)) for layer in self.layers}

    def setup(self, layer: int, device: Any) -> LayerSetup:
        """The fixed part of a layer."""
        decoys = self.fixed.decoys(layer, device)
        neurons = torch.tensor(self.units[layer])
        columns = torch.cat([neurons + i * self.facts["width"] for i in range(self.regimes)])
        shift = torch.from_numpy(self.fixed.pilot[f"mean.{layer}"])[columns].to(device)
        whole = len(columns) == self.facts["columns"]
        return LayerSetup(
            None if whole else columns.to(device), shift, torch.zeros(0) if decoys is None else decoys.offset,
            self.fixed.sink(layer), decoys, self.fixed.texts(layer) if self.text_controls else None,
        )  # fmt: skip

    @property
    def decoys(self) -> int:
        """Decoys a layer."""
        return self.config.controls.decoys

    @property
    def text_controls(self) -> list[tuple[str, np.ndarray]]:
        """(kind, places among a layer's text controls) of each kind there is."""
        nulls, planted = self.config.controls.nulls, self.config.controls.planted
        both = ((NULL, np.arange(nulls)), (PLANTED, np.arange(nulls, nulls + planted)))
        return [(control, places) for control, places in both if len(places)]

    @property
    def ranges(self) -> list[Key]:
        """The parts of a layer that the last step handles apart."""
        return neuron_ranges(self.units, CLOSE_NEURONS)

    def places(self, key: Key) -> np.ndarray:
        """Places, among the units of a layer's state, of a range of neurons: of each regime in turn."""
        first, last = np.searchsorted(self.units[key["layer"]], [key["first"], key["last"]])
        n = len(self.units[key["layer"]])
        return np.concatenate([np.arange(first, last) + i * n for i in range(self.regimes)])

    def batches(self, samples: Samples, first: int, size: int) -> Iterator[tuple[int, Tensor, Tensor, np.ndarray]]:
        """(number of row 0, ids [B, T], lengths [B], rows [B]) of aligned batches; missing rows are -1."""
        last = first + len(samples.numbers)
        for at in range(first, last, size):
            rows = np.arange(at, at + size) - first
            rows = np.where(rows < len(samples.numbers), rows, -1)
            ids, lengths = samples.padded(rows, self.facts["pad_id"])
            device = self.subject.device
            yield at, torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device), rows

"""What every step of a scan that runs the subject needs: the run's facts, the layers' setups, aligned batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylabel.config import RunConfig
from raylabel.stages.arrays import read_arrays
from raylabel.stages.pilot import load_decoys
from raylabel.stages.samples import Samples
from raylabel.stages.select import FIRING_FACTOR
from raylabel.stages.state import LayerSetup, LayerState
from raylabel.stages.subject import open_subject
from raylabel.stages.units import polarities, wanted_units
from raylabel.store.rundir import RunDir


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

    def batches(self, samples: Samples, first: int, size: int) -> Iterator[tuple[int, Tensor, Tensor, np.ndarray]]:
        """(number of row 0, ids [B, T], lengths [B], rows [B]) of aligned batches; missing rows are -1."""
        last = first + len(samples.numbers)
        for at in range(first, last, size):
            rows = np.arange(at, at + size) - first
            rows = np.where(rows < len(samples.numbers), rows, -1)
            ids, lengths = samples.padded(rows, self.facts["pad_id"])
            device = self.subject.device
            yield at, torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device), rows


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

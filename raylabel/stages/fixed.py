"""What a run's pilot has fixed, for every step that measures again: sinks, decoys and text controls.

`measure_all` fills in the activations of a plan, whoever its rows are about: the model's units and decoys by the model,
text controls by reading.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.models.controls import Decoys
from raylabel.stages import measure
from raylabel.stages.arrays import read_arrays
from raylabel.stages.pilot import load_decoys
from raylabel.stages.planting import from_json, text_units
from raylabel.stages.subject import open_tokenizer
from raylabel.stages.textmeasure import measure_texts
from raylabel.stages.textual import TEXT_CONTROLS, Plant, Reader, TextUnits, pieces
from raylabel.stages.verify import Plan, Unit, part
from raylabel.store.rundir import RunDir


class Fixed:
    """Opened when first asked for, then kept."""

    def __init__(self, run: RunDir, seed: int) -> None:
        self.run, self.seed, self.facts = run, seed, run.resolved

    @cached_property
    def pilot(self) -> dict[str, np.ndarray]:
        """The arrays of `pilot.npz`."""
        return read_arrays(self.run.files.read("pilot.npz"))

    @cached_property
    def plants(self) -> dict[int, list[Plant]]:
        """The text controls of every layer."""
        return from_json(json.loads(self.run.files.read("planted.json")))

    @cached_property
    def reader(self) -> Reader:
        """Reads token ids as words."""
        return Reader(pieces(open_tokenizer(self.run), self.facts["special_ids"]))

    def sink(self, layer: int) -> float:
        """The residual norm above which a position does not count."""
        return float(self.pilot[f"sink.{layer}"])

    def decoys(self, layer: int, device: Any) -> Decoys | None:
        """The control directions of a layer, None where there are none."""
        return load_decoys(self.pilot, layer, self.facts["site_width"], self.seed, device)

    def texts(self, layer: int) -> TextUnits:
        """The text controls of a layer."""
        return text_units(self.plants[layer], self.pilot, self.seed, layer)


def measure_all(fixed: Fixed, subject: Any, layer: int, plan: Plan) -> tuple[pa.Table, list[tuple[Unit, str]]]:
    """The plan's rows with `activation`, text controls last, and (unit, reason) of what the model could not measure."""
    control = plan["rows"]["control"]
    by_text = pc.fill_null(pc.is_in(control, pa.array(TEXT_CONTROLS)), False)
    found: list[pa.Table] = []
    failures: list[tuple[Unit, str]] = []
    if not pc.all(by_text).as_py() or not plan["rows"].num_rows:
        decoys = fixed.decoys(layer, subject.layer_device(layer)) if pc.any(pc.equal(control, "decoy")).as_py() else None
        rows, failures = measure.measure(subject, layer, part(plan, pc.invert(by_text)), decoys, sink=fixed.sink(layer))
        found.append(rows)
    if pc.any(by_text).as_py():
        found.append(measure_texts(fixed.texts(layer), fixed.reader, fixed.facts["special_ids"], part(plan, by_text)))
    return pa.concat_tables(found), failures

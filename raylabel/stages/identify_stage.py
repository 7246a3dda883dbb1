"""The stage identify: `background.npz` fitted once, units measured apart, one closing unit that sees them all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.config import RunConfig
from raylabel.stages import identify
from raylabel.stages.arrays import lists, read_table, table_bytes
from raylabel.stages.base import Chain, Stage, Step, blame_neurons, halve_neurons, text_stage, with_controls
from raylabel.stages.samples import load_samples
from raylabel.stages.units import wanted_units
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output, Shard
from raylabel.tables import conform, from_rows, schema
from raylabel.words.background import Background, fit_background
from raylabel.words.contexts import Contexts, fit_contexts
from raylabel.words.vectors import Vectors

CONTEXTS = "contexts.npz"
WORD = 4
"""Tokens beyond the phrase that a word at its edge may take."""
NEURONS = 256
"""Neurons of a work unit."""
TOP = (pc.field("sampling") == "top") & (pc.field("split") == "explain")


def open_vectors(run: RunDir, config: RunConfig) -> Vectors:
    """The run's word vectors: its own `vectors.bin`, or the file that `identify.vectors` names."""
    given = config.identify.vectors
    return _vectors(run.files.url, given, tuple(_stamp(run, given)))


def _stamp(run: RunDir, given: str) -> list[str]:
    """Tells the word vectors of the run, or the file it was given, from others under the same name."""
    if given == "train":
        plan = run.plan(text_stage(RunConfig.model_validate(run.config)))
        return [unit.id for unit in plan.units if unit.step == "vectors"] if plan else []
    try:
        status = os.stat(given)
    except OSError:
        return []
    return [str(status.st_size), str(status.st_mtime_ns)]


@lru_cache(maxsize=1)
def _vectors(url: str, given: str, _print: tuple[str, ...]) -> Vectors:
    if given != "train":
        return Vectors(given)
    files = RunDir(url).files
    if files.local:
        return Vectors(files.path("vectors.bin"))
    # fastText reads from a path only.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.bin"
        path.write_bytes(files.read("vectors.bin"))
        return Vectors(str(path))


def open_background(run: RunDir, config: RunConfig) -> Background:
    """What was fitted once a run on the corpus."""
    beside = Contexts.from_bytes(run.files.read(CONTEXTS)) if config.identify.nearness == "both" else None
    return Background.from_bytes(run.files.read("background.npz"), open_vectors(run, config), beside)


class BackgroundWorker:
    """`background.npz` and `contexts.npz`."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)

    def __call__(self, unit: Unit) -> Output:
        wanted = self.config.identify
        vectors = open_vectors(self.run, self.config)
        fitted = fit_background(self._samples(), vectors, wanted.window, wanted.weighting, self.config.run.seed)
        blobs = [Blob("background.npz", fitted.to_bytes())]
        if wanted.nearness == "both":
            beside = fit_contexts(lambda: (sample["text"] for sample in self._samples()))
            blobs.append(Blob(CONTEXTS, beside.to_bytes()))
        return Output(blobs=blobs)

    def _samples(self) -> Iterator[dict[str, Any]]:
        condition = pc.field("split") == "explain"
        for batch in self.run.dataset("samples").to_batches(columns=["text", "ends"], filter=condition):
            yield from batch.to_pylist()


class MeasureLink:
    """Rows of `candidates` for a range of neurons, or of decoys, of a layer."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.special = self.run.resolved["special_ids"]
        self.background = open_background(self.run, self.config)

    def __call__(self, unit: Unit, _: dict[str, pa.Table]) -> Output:
        key = unit.key
        run = self.run.controls if key["controls"] else self.run
        exemplars = run.table("exemplars", key["layer"], (key["first"], key["last"]), filter=TOP)
        kept, window = self.config.exemplars, self.config.identify.window
        if min(kept.before, kept.after) < window + WORD:
            exemplars = self._whole(exemplars)
        found = identify.measure(
            exemplars, self.background, self.config.identify.window, self.special, self.config.run.seed
        )
        numbers = run.table("statistics", key["layer"], (key["first"], key["last"]))
        whole = _with_silent(found, numbers, bool(key["controls"]))
        whole = whole.append_column("layer", pa.array([key["layer"]] * whole.num_rows, pa.int32()))
        return Output(blobs=[Blob("controls.arrow" if key["controls"] else "units.arrow", table_bytes(whole), True)])


    def _whole(self, exemplars: pa.Table) -> pa.Table:
        """The exemplars with all of their sample's tokens, where the kept windows may cut a phrase or a word."""
        numbers = exemplars.column("sample").to_numpy()
        samples = load_samples(self.run, among=numbers)
        rows = np.searchsorted(samples.numbers, numbers)
        names = dict.fromkeys(self.special, "")
        strings, starts = samples.strings(np.arange(len(samples.numbers)), names)
        lengths = samples.lengths[rows]
        inside = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        tokens = strings.take(pa.array(np.repeat(starts[rows], lengths) + inside))
        columns = {
            "tokens": pa.ListArray.from_arrays(offsets, tokens),
            "token_ids": lists(samples.ids[np.repeat(samples.offsets[rows], lengths) + inside], lengths, pa.int32()),
            "position": pa.array(exemplars.column("start").to_numpy() + exemplars.column("position").to_numpy()),
        }
        for name, column in columns.items():
            exemplars = exemplars.set_column(exemplars.schema.get_field_index(name), name, column)
        return exemplars


def _with_silent(found: pa.Table, statistics: pa.Table, controls: bool) -> pa.Table:
    """The rows, and one with status `too_few` for every unit that has no exemplar, sorted by unit."""
    names = ["neuron", "polarity", *(["control"] if controls else [])]
    have = {tuple(row.values()) for row in found.select(names).to_pylist()}
    silent = [row for row in statistics.select(names).to_pylist() if tuple(row.values()) not in have]
    empty: dict[str, Any] = {"n_exemplars": 0, "n_families": 0, "status": "too_few"}
    empty |= {name: [] for name in ("mats", "phrases", "mat_words", "families")}
    rows = [{**row, **empty} for row in silent]
    whole = pa.concat_tables([conform(found, "candidates", controls), from_rows(rows, "candidates", controls)])
    return whole.sort_by(by_unit(controls))


def by_unit(controls: bool) -> list[tuple[str, str]]:
    """The order of rows a unit: all of a range of neurons together."""
    return [("neuron", "ascending"), *([("control", "ascending")] if controls else []), ("polarity", "descending")]


class MeasureWorker(Chain):
    """`MeasureLink` as one Ray Data operator."""

    links = (MeasureLink,)


class CloseWorker:
    """`candidates` with what needs all units: q-values, kinds, decoy rates."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)

    def __call__(self, unit: Unit) -> Output:
        tables = {}
        for name, controls in (("units", False), ("controls", True)):
            empty = schema("candidates", controls).append(pa.field("layer", pa.int32())).empty_table()
            parts = [read_table(data) for _, data in self.run.temporaries(unit, "measure", f"{name}.arrow")]
            tables[name] = pa.concat_tables([empty, *parts]).combine_chunks()
        closed = identify.close(tables["units"], tables["controls"], self.config.identify)
        shards = []
        for table, controls in zip(closed, (False, True), strict=True):
            layers = table.column("layer").to_numpy()
            for layer in np.unique(layers).tolist():
                rows = table.filter(pa.array(layers == layer)).drop_columns("layer")
                rows = rows.sort_by(by_unit(controls))
                shards.append(Shard("candidates", rows, layer, controls))
        return Output(shards)


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    if config.identify.vectors != "train":
        Vectors(config.identify.vectors)
    units = wanted_units(config, run.resolved)
    keys = with_controls(units, config.controls, NEURONS)
    return [
        Step("background", [{"vectors": _stamp(run, config.identify.vectors)}], BackgroundWorker),
        Step("measure", keys, MeasureWorker, divide=halve_neurons, blame=blame_neurons),
        Step("close", [{}], CloseWorker),
    ]


IDENTIFY = Stage(
    name="identify", version=4, needs=("scan", "tokenize", "tokenize.vectors"), tables=("candidates",), steps=_steps,
    reads=("identify", "run.seed", "run.format"),
)  # fmt: skip

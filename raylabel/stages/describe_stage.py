"""The stage describe: `labels` for every unit that has exemplars, of the model and of the controls.

With an explainer, the units of `describe.units` are asked about, many at once; what it cannot be made to label is in
`failures` and has no row. All others get the built-in label.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.config import RunConfig
from raylabel.llm.client import AskFailed, open_client
from raylabel.llm.local import LOCAL
from raylabel.llm.prompts import MAX_TOKENS, Label
from raylabel.stages import describe
from raylabel.stages.arrays import read_table
from raylabel.stages.base import Stage, Step, blame_neurons, halve_neurons, with_controls
from raylabel.stages.describe import BUILT_IN, Question, Row
from raylabel.stages.identify_stage import by_unit, open_background
from raylabel.stages.units import wanted_units
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Output, Shard
from raylabel.tables import from_rows

NEURONS = 256
"""Neurons of a work unit: enough questions to keep a server busy."""
IMPORTED = "imported_labels"
"""Where labels lie that came with exemplars that were fetched or read: `LAYER.arrow`, schema `labels`."""
Names = tuple[Any, ...]


class DescribeWorker:
    """`labels` of a range of neurons, or of controls, of a layer."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.special = set(self.run.resolved["special_ids"])
        self.background = open_background(self.run, self.config)
        self.wanted = self.config.describe
        self.loop = asyncio.new_event_loop()
        self.client = None if self.wanted.explainer == BUILT_IN else open_client(self.run, self.config)

    def __call__(self, unit: Unit) -> Output:
        layer, controls = unit.key["layer"], bool(unit.key["controls"])
        keys = [*(["control"] if controls else []), "neuron", "polarity"]
        candidates = {_names(r, keys): r for r in self._rows(unit, "candidates")}
        concepts = {_names(r, keys): r for r in self._rows(unit, "concepts")} if self.run.complete("concepts") else {}
        exemplars: dict[Names, list[Row]] = {}
        wanted = (pc.field("split") == "explain") & pc.field("sampling").isin(["top", "quantile"])
        for row in self._rows(unit, "exemplars", wanted):
            exemplars.setdefault(_names(row, keys), []).append(row)
        asked_about = self._asked_about(unit, keys, candidates)
        rows: list[Row] = []
        questions: dict[Names, Question] = {}
        for name, candidate in candidates.items():
            found = describe.seen(
                exemplars.get(name, []), candidate, self.special, self.config.identify.window, self._vectors
            )
            if found is None:
                continue
            if name in asked_about:
                questions[name] = describe.question(found, self.wanted.prompt, self.wanted.exemplars)
            else:
                rows.append({**dict(zip(keys, name, strict=True)), **describe.built_in(found, concepts.get(name))})
        rows += imported(self.run, layer, (unit.key["first"], unit.key["last"])) if not controls else []
        answers, failures = self._asked(questions)
        rows += [{**dict(zip(keys, name, strict=True)), **row} for name, row in answers.items()]
        failed = [{"layer": layer, **dict(zip(keys, name, strict=True)), "reason": why} for name, why in failures.items()]
        # Of several labels of a unit the last is the one that results show: built-in, imported, the explainer's.
        table = from_rows(rows, "labels", controls)
        table = table.take(pa.array(_order(table, controls), pa.int64()))
        notes = {"llm": self.client.tally()} if self.client else {}
        return Output([Shard("labels", table, layer, controls)], failures=failed, notes=notes)

    def _rows(self, unit: Unit, table: str, filter: Any = None) -> list[Row]:
        run = self.run.controls if unit.key["controls"] else self.run
        found = run.table(table, unit.key["layer"], (unit.key["first"], unit.key["last"]), filter=filter)
        rows: list[Row] = found.to_pylist()
        return rows

    def _asked_about(self, unit: Unit, keys: list[str], candidates: dict[Names, Row]) -> set[Names]:
        if self.client is None:
            return set()
        if self.wanted.units == "all":
            return set(candidates)
        if self.wanted.units == "flagged":
            return {name for name, row in candidates.items() if row["flagged"]}
        return {_names(row, keys) for row in self._rows(unit, "verifications", pc.field("verified"))}

    def _vectors(self, words: list[str], phrases: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return self.background.words(words), self.background.phrases(phrases)

    def _asked(self, questions: dict[Names, Question]) -> tuple[dict[Names, Row], dict[Names, str]]:
        """Rows by unit, and why there is none for the others."""
        if self.client is None or not questions:
            return {}, {}
        client = self.client

        async def all_of_them() -> list[Any]:
            calls = [
                client.ask(q.messages, schema=Label, max_tokens=MAX_TOKENS, check=q.check) for q in questions.values()
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

        found = self.loop.run_until_complete(all_of_them())
        rows, failures = {}, {}
        for (name, asked), answer in zip(questions.items(), found, strict=True):
            if isinstance(answer, AskFailed):
                failures[name] = f"{self.wanted.explainer}: {answer.reason}"
            elif isinstance(answer, BaseException):
                client.tally()
                raise answer
            else:
                rows[name] = describe.answered(asked, answer, self.wanted.explainer)
        return rows, failures


def imported(run: RunDir, layer: int, neurons: tuple[int, int]) -> list[Row]:
    """Rows of `labels` that came with the exemplars, under their own explainers (`neuronpedia`); a corpus brings none."""
    try:
        table = read_table(run.files.read(f"{IMPORTED}/{layer:02d}.arrow"))
    except FileNotFoundError:
        return []
    number = pc.field("neuron")
    rows: list[Row] = table.filter((number >= neurons[0]) & (number < neurons[1])).to_pylist()
    return rows


def _names(row: Row, keys: list[str]) -> Names:
    return tuple(row[key] for key in keys)


def _order(table: pa.Table, controls: bool) -> list[int]:
    """Rows by unit; those of one unit stay in their order."""
    numbered = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
    order: list[int] = numbered.sort_by([*by_unit(controls), ("row", "ascending")]).column("row").to_pylist()
    return order


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    asks = config.describe.explainer != BUILT_IN
    keys = with_controls(wanted_units(config, run.resolved), config.controls, NEURONS)
    local = asks and config.describe.base_url == LOCAL
    return [Step("labels", keys, DescribeWorker, divide=halve_neurons, blame=blame_neurons, model=local, limited=asks)]


DESCRIBE = Stage(
    name="describe", version=1, needs=("scan", "identify", "verify"), tables=("labels",), steps=_steps, uses=("optimize",),
    reads=("describe.explainer", "describe.units", "describe.prompt", "describe.exemplars", "describe.model",
           "identify.window", "run.format"),
)  # fmt: skip

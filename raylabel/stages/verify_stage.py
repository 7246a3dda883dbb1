"""The stage verify: substitute (CPU) -> re-measure (model) -> summarise (CPU) as one pipeline, then a close a layer.

Only flagged units are verified, and the controls that are flagged under the same settings.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raylabel.config import RunConfig
from raylabel.stages import causal, measure, verify
from raylabel.stages.arrays import read_table, table_bytes
from raylabel.stages.base import Chain, Stage, Step, blame_neurons, halve_neurons, with_controls
from raylabel.stages.fixed import Fixed, measure_all
from raylabel.stages.identify_stage import open_background
from raylabel.stages.subject import open_subject, open_tokenizer
from raylabel.stages.units import wanted_units
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output, Shard
from raylabel.tables import schema
from raylabel.words.splice import Splicer
from raylabel.words.substitutes import Substitutes

NEURONS = 64
"""Neurons of a work unit."""
FAILED = pa.schema([
    ("control", pa.string()), ("neuron", pa.int32()), ("polarity", pa.int8()), ("reason", pa.string()),
])  # fmt: skip


class Link:
    """What every link of the pipeline needs."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.facts = self.run.resolved
        # Neuroscope recorded in half precision.
        self.coarse = self.facts["dtype"] != "float32" or self.config.exemplars.source == "neuroscope"

    def table(self, unit: Unit, name: str, **options: Any) -> pa.Table:
        """The unit's rows of a table, of its controls if it is about them."""
        run = self.run.controls if unit.key["controls"] else self.run
        return run.table(name, unit.key["layer"], (unit.key["first"], unit.key["last"]), **options)

    def keys(self, unit: Unit) -> list[str]:
        """The columns that name a unit in its tables."""
        return [*(["control"] if unit.key["controls"] else []), "neuron", "polarity"]

    def flagged(self, unit: Unit) -> set[tuple[Any, ...]]:
        """The unit's flagged candidates."""
        rows = self.table(unit, "candidates", filter=pc.field("flagged"), columns=self.keys(unit))
        return {tuple(row.values()) for row in rows.to_pylist()}

    def samples(self, numbers: pa.ChunkedArray) -> pa.Table:
        """The samples with these numbers."""
        return self.run.table("samples", filter=pc.field("sample").isin(pc.unique(numbers)))


def open_substitutes(run: RunDir, config: RunConfig) -> Substitutes:
    """Where the words come from that stand for others in this run."""
    return Substitutes(open_background(run, config), config.run.seed)


class SubstituteLink(Link):
    """Which variants the flagged units get."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.substitutes = open_substitutes(self.run, self.config)
        self.splicer = Splicer(open_tokenizer(self.run), self.facts["special_ids"])

    def __call__(self, unit: Unit, _: dict[str, pa.Table]) -> dict[str, pa.Table]:
        wanted = self.flagged(unit)
        condition = (pc.field("sampling") == "top") & (pc.field("split") == "explain")
        exemplars = self.table(unit, "exemplars", filter=condition)
        keys = (tuple(row.values()) for row in exemplars.select(self.keys(unit)).to_pylist())
        exemplars = exemplars.filter(pa.array([key in wanted for key in keys], pa.bool_()))
        return verify.plan_variants(
            exemplars, self.samples(exemplars.column("sample")), self.substitutes, self.splicer, self.config.verify,
            window=self.config.identify.window, special_ids=self.facts["special_ids"], seed=self.config.run.seed,
            limit=self.facts["max_context"],
        )  # fmt: skip


class RemeasureLink(Link):
    """The activations of the variants, and what reproduces the recordings of units whose own site does not."""

    model = True

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.subject = open_subject(self.config, self.facts)
        self.fixed = Fixed(self.run, self.config.run.seed)

    def __call__(self, unit: Unit, plan: dict[str, pa.Table]) -> dict[str, pa.Table]:
        layer, subject = unit.key["layer"], self.subject
        rows, failures = measure_all(self.fixed, subject, layer, plan)
        notes = []
        for key in measure.unreproduced(rows, self.coarse):
            numbers = rows.filter(pc.equal(rows["kind"], "original")).column("sample")
            found = measure.diagnose(subject, rows, self.samples(numbers), layer, key, coarse=self.coarse)
            notes.append((key, found or "nothing that was tried reproduces them"))
        return {"rows": rows, "failures": _reasons(failures), "notes": _reasons(notes)}


def _reasons(found: list[tuple[verify.Unit, str]]) -> pa.Table:
    rows = [{"control": k[0], "neuron": k[1], "polarity": k[2], "reason": why} for k, why in found]
    return pa.Table.from_pylist(rows, schema=FAILED)


class SummariseLink(Link):
    """The tables `variants` and, before its closing, `verifications`."""

    def __call__(self, unit: Unit, payload: dict[str, pa.Table]) -> Output:
        layer, controls = unit.key["layer"], unit.key["controls"]
        random = self.table(unit, "exemplars", filter=pc.field("sampling") == "random")
        numbers = self.table(unit, "statistics", columns=None)
        if not controls:
            random, numbers = (t.append_column("control", pa.nulls(t.num_rows, pa.string())) for t in (random, numbers))
        notes = {(r["control"], r["neuron"], r["polarity"]): r["reason"] for r in payload["notes"].to_pylist()}
        variants, verifications = causal.summarise(
            payload["rows"], random, numbers, layer=layer, seed=self.config.run.seed,
            coarse=self.coarse, notes=notes, window=self.config.identify.window,
        )  # fmt: skip
        own, theirs = causal.divide(variants, "variants")
        shard = Shard("variants", theirs, layer, True) if controls else Shard("variants", own, layer)
        failures: list[dict[str, Any]] = []
        for row in payload["failures"].to_pylist():
            marked = {"control": row["control"]} if row["control"] else {}
            place = {"layer": layer, "neuron": row["neuron"], "polarity": row["polarity"]}
            failures.append({**place, "reason": row["reason"], **marked})
        for key, why in notes.items():
            if key[0] is None:
                place = {"layer": layer, "neuron": key[1], "polarity": key[2]}
                failures.append({**place, "reason": f"exemplars are not reproduced: {why}"})
        return Output([shard], [Blob(f"layer={layer}.arrow", table_bytes(verifications), True)], failures)


class VerifyWorker(Chain):
    """The pipeline."""

    links = (SubstituteLink, RemeasureLink, SummariseLink)


class CloseWorker(Link):
    """`verifications` of a layer with what needs all its units."""

    def __call__(self, unit: Unit) -> Output:
        layer = unit.key["layer"]
        empty = schema("verifications", True).empty_table()
        parts = [read_table(data) for _, data in self.run.temporaries(unit, "variants", f"layer={layer}.arrow")]
        own, theirs = causal.divide(pa.concat_tables([empty, *parts]), "verifications")
        top_means = self.run.table("statistics", layer, columns=["top_mean"]).column(0)
        flagged: dict[verify.Unit, bool] = {}
        for run in (self.run, self.run.controls):
            for row in run.table("candidates", layer, filter=pc.field("flagged")).to_pylist():
                flagged[row.get("control"), row["neuron"], row["polarity"]] = True
        means = pc.fill_null(top_means.cast(pa.float64()), float("nan")).to_numpy()
        closed = causal.close(own, theirs, means, flagged, self.config.verify)
        shards = [Shard("verifications", _sorted(closed[0]), layer)]
        if closed[1].num_rows:
            shards.append(Shard("verifications", _sorted(closed[1]), layer, True))
        return Output(shards)


def _sorted(table: pa.Table) -> pa.Table:
    control = [("control", "ascending")] if "control" in table.column_names else []
    return table.sort_by([("neuron", "ascending"), *control, ("polarity", "descending")])


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    units = wanted_units(config, run.resolved)
    keys = with_controls(units, config.controls, NEURONS)
    return [
        Step("variants", keys, VerifyWorker, divide=halve_neurons, blame=blame_neurons, model=True),
        Step("close", [{"layer": layer} for layer in units], CloseWorker),
    ]


VERIFY = Stage(
    name="verify", version=8, needs=("identify", "scan", "tokenize"), tables=("variants", "verifications"), steps=_steps,
    reads=("verify", "identify.window", "run.seed", "run.format"),
)  # fmt: skip

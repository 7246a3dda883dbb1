"""The stage optimize: concepts searched by workers that hold the judge, one closing unit that sees all units.

Units of the model and controls are chosen by `optimize.units` under the same settings. A work unit has so many of them
that their examples, candidates and restarts fill the judge's forward passes. Reads tables only: where exemplars come from,
and what kind of unit they are of, is all one.
"""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.config import RunConfig
from raylabel.demo.taught import categories
from raylabel.errors import BadInput
from raylabel.models.judge_prompt import Example, frame
from raylabel.sections import OptimizeConfig
from raylabel.stages import optimize
from raylabel.stages.arrays import read_table, table_bytes
from raylabel.stages.base import Key, Stage, Step, blame_neurons, halve_neurons, neuron_ranges
from raylabel.stages.identify_stage import by_unit, open_background
from raylabel.stages.intervals import draw_seed
from raylabel.stages.optimize import Examples, Row
from raylabel.stages.subject import model_fingerprint, open_subject
from raylabel.stages.units import wanted_units
from raylabel.stages.verify_stage import open_substitutes
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output, Shard
from raylabel.tables import from_rows, schema
from raylabel.words.substitutes import Substitutes

NEURONS = 16
"""Searched neurons of a work unit."""
NEIGHBOURS = 3
"""FastText neighbours of a MAT word that are tried."""
JUDGE = "judge.json"
"""How the judge did on pairs with known answers: `judge`, `auroc`, `low`, `pairs`, `words`; `judge` is null if none was asked."""
_CACHE = {"cpu": 1 << 30}
"""Bytes of what the judge has read of the examples of units that are searched side by side."""
_SHARE = 0.25
"""The same on a GPU, as a share of its memory."""

Name = tuple[str | None, int, int]
"""(control, neuron, polarity)."""


class Task(NamedTuple):
    """A unit to search."""

    name: Name
    examples: Examples
    given: list[tuple[str, str]]
    """(word, proposer)."""
    seed: int


def check_settings(settings: OptimizeConfig) -> None:
    """BadInput for settings that no judge could work with."""
    if settings.template is not None:
        frame(settings.template)
    if settings.negative >= settings.positive:
        raise BadInput(
            f"optimize.negative: {settings.negative:g} is not below optimize.positive ({settings.positive:g}); lower it"
        )


def open_judge(config: RunConfig, facts: dict[str, Any]) -> Any:
    """The judge of a configuration, with the weights of the subject where it is the same model; the last one is kept.

    BadInput for one that does not beat chance on pairs with known answers.
    """
    wanted, subject = config.optimize, config.subject
    print_ = model_fingerprint(wanted.judge, subject.revision if wanted.judge == subject.model else None, "judge")
    shared = open_subject(config, facts) if wanted.judge == subject.model != "demo" else None
    return _judge(wanted.judge, wanted.template, subject.device, print_, subject.trust_remote_code, shared)


@lru_cache(maxsize=1)
def _judge(name: str, template: str | None, device: str, _print: str, trust: bool, shared: Any) -> Any:
    from raylabel.models.judge import load_judge

    judge = load_judge(name, template=template, device=device, trust_remote_code=trust, subject=shared)
    found = judge.check()
    found.require(name)
    return judge, found


def wanted_concepts(run: RunDir, settings: OptimizeConfig, layer: int, neurons: tuple[int, int] | None = None) -> list[Name]:
    """The units of a layer to search, of a run or of its controls, in the order of their rows."""
    table = {"verified": "verifications", "flagged": "candidates", "all": "candidates"}[settings.units]
    condition = None if settings.units == "all" else pc.field(settings.units)
    keys = [*(["control"] if run.in_controls else []), "neuron", "polarity"]
    rows = run.table(table, layer, neurons, filter=condition, columns=keys).to_pylist()
    found = [(row.get("control"), row["neuron"], row["polarity"]) for row in rows]
    return sorted(found, key=lambda name: (name[1], name[0] or "", -name[2]))


class SearchWorker:
    """Rows of `concepts` for a range of neurons, or of controls, of a layer, before their closing."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.settings = self.config.optimize
        self.facts = self.run.resolved

    def __call__(self, unit: Unit) -> Output:
        key = unit.key
        run = self.run.controls if key["controls"] else self.run
        names = wanted_concepts(run, self.settings, key["layer"], (key["first"], key["last"]))
        names = [name for name in names if name[0] is None or name[0] in key["controls"]]
        rows, tasks = [], []
        for task in self._tasks(run, key, names):
            if optimize.enough(task.examples.search):
                tasks.append(task)
            else:
                rows.append(_named(task.name, {"status": "too_few", "claimed": False}))
        blobs = []
        if tasks:
            judge, check = open_judge(self.config, self.facts)
            for group in self._groups(judge, tasks):
                rows += self._search(judge, group)
            told = {"judge": self.settings.judge, "auroc": check.auroc, "low": check.low, "pairs": check.n,
                    "words": len(self.words(judge).texts)}  # fmt: skip
            blobs.append(Blob(JUDGE, json.dumps(told).encode(), True))
        table = from_rows(rows, "concepts", bool(key["controls"]))
        table = table.append_column("layer", pa.array([key["layer"]] * len(rows), pa.int32()))
        blobs.append(Blob("controls.arrow" if key["controls"] else "units.arrow", table_bytes(table), True))
        return Output(blobs=blobs)

    @cached_property
    def substitutes(self) -> Substitutes:
        return open_substitutes(self.run, self.config)

    def words(self, judge: Any) -> Any:
        """The single-token words that may win: whole ones, as far as the run's own vocabulary can tell."""
        return _words(judge, tuple(open_background(self.run, self.config).vocabulary))

    def _tasks(self, run: RunDir, key: Key, names: list[Name]) -> list[Task]:
        layer, neurons = key["layer"], (key["first"], key["last"])
        searched = pa.array(sorted({name[1] for name in names}), pa.int32())
        condition = pc.field("neuron").isin(searched)
        columns = [*optimize.COLUMNS, *(["control"] if run.in_controls else [])]
        exemplars: dict[Name, list[Row]] = {name: [] for name in names}
        for row in run.table("exemplars", layer, neurons, filter=condition, columns=columns).to_pylist():
            name = (row.get("control"), row["neuron"], row["polarity"])
            if name in exemplars:
                exemplars[name].append(row)
        promoted = {_name(r): r["promoted"] or [] for r in run.table("verifications", layer, neurons, condition).to_pylist()}
        mats = {_name(r): r["mat_words"] or [] for r in run.table("candidates", layer, neurons, condition).to_pylist()}
        tasks = []
        for name in names:
            seed = draw_seed(self.config.run.seed, layer, name)
            found = optimize.examples(
                exemplars[name], self.settings, self.facts["special_ids"], self.config.identify.window, seed
            )
            own = list(dict.fromkeys(mats.get(name, [])))
            near = [word for words in self.substitutes.neighbours(own, NEIGHBOURS) for word in words]
            given = [(word, "mat") for word in own] + [(word, "promoted") for word in promoted.get(name, [])]
            tasks.append(Task(name, found, given + [(word, "neighbour") for word in near], seed))
        return tasks

    def _groups(self, judge: Any, tasks: list[Task]) -> list[list[Task]]:
        """Tasks that are searched side by side: as many as there is room for."""
        room = _room(judge)
        groups: list[list[Task]] = []
        longest = total = 0
        for task in tasks:
            own = len(judge.prefix(max((asked.example for asked in task.examples.search), key=lambda e: len(e.text))))
            count = len(task.examples.search)
            longest, total = max(longest, own), total + count
            if not groups or total * (longest * judge.token_bytes + 4 * judge.size) > room:
                groups.append([])
                longest, total = own, count
            groups[-1].append(task)
        return groups

    def _search(self, judge: Any, tasks: list[Task]) -> list[Row]:
        """Rows of tasks that are searched side by side."""
        import torch

        from raylabel.models import concept, descent

        cached, numbers = _read(judge, [asked.example for task in tasks for asked in task.examples.search])
        units, at = [], 0
        for task in tasks:
            end = at + len(task.examples.search)
            labels = torch.tensor([asked.active for asked in task.examples.search])
            units.append(concept.Unit(numbers[at:end], labels, task.seed % (1 << 40)))
            at = end
        if self.settings.method == "descent":
            names = judge.tokenizer.batch_decode([[i] for i in range(judge.size)])
            found = descent.descend(judge, cached, units, names, _recipe(self.config))
        else:
            given = [[concept.Given(*pair) for pair in task.given] for task in tasks]
            found = concept.search(judge, cached, units, given, _settings(self.config), self.words(judge))
        del cached
        return [
            _named(task.name, {**row, **_columns(judge, task.examples, won)})
            for task, row, won in zip(tasks, self._test(judge, tasks, found), found, strict=True)
        ]

    def _test(self, judge: Any, tasks: list[Task], found: list[Any]) -> list[Row]:
        """What the score split says of each winner; nothing where it has too few words."""
        import torch

        able = [i for i, task in enumerate(tasks) if optimize.enough(task.examples.test)]
        rows: list[Row] = [{"status": "untested"} for _ in tasks]
        if not able:
            return rows
        cached, numbers = _read(judge, [asked.example for i in able for asked in tasks[i].examples.test])
        sizes = [len(tasks[i].examples.test) for i in able]
        if self.settings.method == "descent":
            vectors = torch.stack([found[i].vector for i in able]).repeat_interleave(torch.tensor(sizes).to(judge.device), 0)
            with torch.no_grad():
                odds = judge.odds(judge.soft(cached, numbers, vectors))
        else:
            concepts = [judge.encode(found[i].best) for i, size in zip(able, sizes, strict=True) for _ in range(size)]
            odds = judge.pairs(cached, numbers, concepts)
        for i, own in zip(able, odds.float().cpu().split(sizes), strict=True):
            rows[i] = {"status": "ok", **optimize.tested(own.double().numpy(), tasks[i].examples, tasks[i].seed)}
        return rows


class CloseWorker:
    """`concepts` with what needs all units: q-values and claims; and `judge.json`."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)

    def __call__(self, unit: Unit) -> Output:
        tables = {}
        for name, controls in (("units", False), ("controls", True)):
            empty = schema("concepts", controls).append(pa.field("layer", pa.int32())).empty_table()
            parts = [read_table(data) for _, data in self.run.temporaries(unit, "search", f"{name}.arrow")]
            tables[name] = pa.concat_tables([empty, *parts]).combine_chunks()
        shards = []
        for table, controls in zip(optimize.close(tables["units"], tables["controls"]), (False, True), strict=True):
            layers = table.column("layer").to_numpy()
            for layer in np.unique(layers).tolist():
                rows = table.filter(pa.array(layers == layer)).drop_columns("layer")
                shards.append(Shard("concepts", rows.sort_by(by_unit(controls)), layer, controls))
        told = next((data for _, data in self.run.temporaries(unit, "search", JUDGE)), json.dumps({"judge": None}).encode())
        return Output(shards, [Blob(JUDGE, told)])


def _name(row: Row) -> Name:
    return row.get("control"), row["neuron"], row["polarity"]


def _named(name: Name, row: Row) -> Row:
    return {**({} if name[0] is None else {"control": name[0]}), "neuron": name[1], "polarity": name[2], **row}


def _columns(judge: Any, found: Examples, won: Any) -> Row:
    """The columns that the search itself gives."""
    known = judge.knows([asked.example.word for asked in found.search])
    words, weights = won.words[: optimize.WORDS], won.weights[: optimize.WORDS]
    return {
        "words": words, "weights": weights, "label": optimize.name(words, weights), "cross_entropy": won.cross_entropy,
        "entropy": won.entropy, "kl": won.kl, "proposer": won.proposer, "evaluations": won.evaluations,
        "known": sum(known) / len(known),
    }  # fmt: skip


def _read(judge: Any, asked: list[Example]) -> tuple[Any, Any]:
    """(what the judge has read, int64 [n] which of it each example is): units share random texts, and so some examples."""
    import torch

    number = {example: i for i, example in enumerate(dict.fromkeys(asked))}
    return judge.prepare(list(number)), torch.tensor([number[example] for example in asked])


@lru_cache(maxsize=1)
def _words(judge: Any, vocabulary: tuple[str, ...]) -> Any:
    if judge.name == "demo":
        # It answers for what it was taught: names of categories. Words of the corpus are tried as MAT words and neighbours.
        return judge.words.among({name.casefold() for category in categories() for name in category.names})
    if judge.whole:
        return judge.words
    found = judge.words.among({*vocabulary, *(word.lower() for word in vocabulary)})
    if not found.texts:
        raise BadInput(f"optimize.judge: none of the corpus' words is one token of {judge.name}; use another judge")
    return found


def _room(judge: Any) -> int:
    import torch

    if judge.device.type in _CACHE:
        return _CACHE[judge.device.type]
    return int(_SHARE * torch.cuda.get_device_properties(judge.device).total_memory)


def _settings(config: RunConfig) -> Any:
    from raylabel.models.concept import Settings

    own = config.optimize
    chosen = {name: value for name in ("steps", "batch") if (value := getattr(own, name)) != "auto"}
    return Settings(
        evaluations=own.evaluations, c_entropy=own.c_entropy, c_entropy_start=own.c_entropy_start, c_kl=own.c_kl,
        flip=own.flip, temperature=own.temperature, first=own.first, screening=own.screening, rounds=own.rounds,
        restarts=own.restarts, lr=own.lr, seed=config.run.seed, **chosen,
    )  # fmt: skip


def _recipe(config: RunConfig) -> Any:
    from raylabel.models.descent import Recipe

    own = config.optimize
    chosen = {name: value for name in ("steps", "batch") if (value := getattr(own, name)) != "auto"}
    return Recipe(lr=own.lr, c_entropy=own.c_entropy, c_kl=own.c_kl, seed=config.run.seed, **chosen)


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    wanted = config.controls
    kinds = {kind: n for kind, n in (("decoy", wanted.decoys), ("null", wanted.nulls), ("planted", wanted.planted)) if n}
    judge = model_fingerprint(config.optimize.judge, None, "judge")
    keys = []
    for source, controls in ((run, {}), (run.controls, kinds)):
        units: dict[int, list[int]] = {}
        for layer in wanted_units(config, run.resolved) if controls or source is run else ():
            units[layer] = sorted({name[1] for name in wanted_concepts(source, config.optimize, layer)})
        keys += [{**key, "controls": controls, "judge": judge} for key in neuron_ranges(units, NEURONS)]
    return [
        Step("search", keys, SearchWorker, divide=halve_neurons, blame=blame_neurons, model=True),
        Step("close", [{}], CloseWorker),
    ]


OPTIMIZE = Stage(
    name="optimize", version=1, needs=("verify", "identify", "scan"), tables=("concepts",), steps=_steps,
    reads=("optimize", "identify.window", "run.seed", "run.format"),
)  # fmt: skip

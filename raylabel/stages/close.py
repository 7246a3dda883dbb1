"""The last step of a scan: the leases' states of a range of neurons become rows of `exemplars` and `statistics`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raylabel.stages import kept
from raylabel.stages.accumulate import control_name, part_name, random_samples
from raylabel.stages.arrays import lists, read_arrays
from raylabel.stages.moments import Moments
from raylabel.stages.samples import Samples, load_samples
from raylabel.stages.scanner import Scanner
from raylabel.stages.state import LISTS
from raylabel.stages.statistics import Merged, statistics
from raylabel.store.plan import Unit
from raylabel.store.shards import Output, Shard
from raylabel.tables import SPLITS, from_rows, schema

EFFECTS = 10
SAMPLINGS = ("top", "quantile", "random")


class CloseWorker(Scanner):
    """`exemplars` and `statistics` of a range of a layer's neurons; the first range brings the layer's decoys along."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        index = self.run.table("samples", columns=["sample", "split"]).sort_by("sample")
        explain = pc.equal(index.column("split"), "explain").to_numpy()
        numbers = index.column("sample").to_numpy()
        self.random = random_samples(numbers, explain, self.config.exemplars.random, self.seed)
        tokenizer = self.subject.tokenizer
        self.names = [tokenizer.decode([i]) for i in range(max(tokenizer.get_vocab().values()) + 1)]
        self.special_names = {i: tokenizer.convert_ids_to_tokens(i) for i in self.facts["special_ids"]}

    def __call__(self, unit: Unit) -> Output:
        key, layer = unit.key, unit.key["layer"]
        setup = self.setup(layer, torch.device("cpu"))
        places = self.places(key)
        neurons = np.array(self.units[layer])[places[: len(places) // self.regimes]]
        writes = self.subject.output_directions(layer).float().cpu()
        shift = setup.shift[torch.from_numpy(places)]
        output = self._rows(unit, part_name(key), neurons, self.signs, self.regimes, shift.numpy(), writes[neurons])
        found: list[Output] = []
        if key["controls"] and setup.decoys is not None:
            # A decoy's effect is as if it wrote along what it reads.
            directions = setup.decoys.directions.T @ self.subject.site_directions(layer).float().cpu()
            numbers, moved = np.arange(self.decoys), setup.decoy_shift.numpy()
            found = [self._rows(unit, control_name(layer, "decoy"), numbers, (1,), 1, moved, directions, "decoy")]
        for control, places in self.text_controls if key["controls"] else []:
            numbers, moved = np.arange(len(places)), np.zeros(len(places), np.float32)
            found.append(self._rows(unit, control_name(layer, control), numbers, (1,), 1, moved, None, control))
        if found:
            shards = zip(*(part.shards for part in found), strict=True)
            output.shards = [*output.shards, *(joined(same) for same in shards)]
            output.failures += [failure for part in found for failure in part.failures]
        return output

    def _rows(
        self, unit: Unit, name: str, neurons: np.ndarray, signs: tuple[int, ...], regimes: int, shift: np.ndarray,
        directions: torch.Tensor | None, kind: str | None = None,
    ) -> Output:  # fmt: skip
        """Rows of the model's own units, or of controls of a kind; without `directions` they have no effect on the output."""
        layer = unit.key["layer"]
        merged = merge(read_arrays(data) for _, data in self.run.temporaries(unit, "accumulate", name))
        columns: dict[str, np.ndarray] = {
            "neuron": np.tile(neurons.astype(np.int32), regimes * len(signs)),
            "polarity": np.repeat([s * (1 + r) for s in signs for r in range(regimes)], len(neurons)).astype(np.int8),
            "row": np.tile(np.arange(regimes * len(neurons)), len(signs)),
        }
        effects = None if directions is None else self.effects(directions.repeat(regimes, 1))
        control = {"control": kind} if kind else {}
        site = self.facts["sites"][layer]
        rows = statistics(merged, columns, shift, site, effects, self.names)
        # By unit, not by polarity: a reader of a range of neurons finds its rows together.
        rows = sorted(({**row, **control} for row in rows), key=lambda r: (r["neuron"], -r["polarity"]))
        table = from_rows(rows, "statistics", controls=bool(kind))
        exemplars = self._exemplars(merged, columns)
        n = exemplars.num_rows
        for column, value in {"site": site, "source": "corpus", **control}.items():
            exemplars = exemplars.append_column(column, pa.array([value] * n, pa.string()))
        exemplars = exemplars.select(schema("exemplars", bool(kind)).names)
        why = f"NaN or infinite activations at {site}"
        bad = np.unique(neurons[np.flatnonzero(merged.bad) % len(neurons)]).tolist()
        failures = [{"layer": layer, "neuron": neuron, "reason": why, **control} for neuron in bad]
        tables = (("statistics", table), ("exemplars", exemplars))
        return Output([Shard(name, rows, layer, controls=bool(kind)) for name, rows in tables], failures=failures)

    def effects(self, directions: torch.Tensor) -> dict[str, np.ndarray]:
        """Direct effect on the output of writing along directions [rows, d_model]."""
        values = self.subject.logit_effects(directions, EFFECTS)
        return {k: v.cpu().numpy() for k, v in zip(("up", "up_ids", "down", "down_ids"), values, strict=True)}

    def _exemplars(self, merged: Merged, columns: dict[str, np.ndarray]) -> pa.Table:
        """Rows of `exemplars` without site and source, sorted."""
        good = ~merged.bad[columns["row"]]
        found: list[dict[str, np.ndarray]] = []
        for s, split in enumerate(SPLITS):
            firing = merged.lists[f"{split}.firing"]
            chosen = {
                "top": (merged.lists[f"{split}.top"], None),
                "quantile": (firing, spread(firing, self.config.exemplars.quantile)),
                "random": (merged.random(self.random[split]), None),
            }
            for k, sampling in enumerate(SAMPLINGS):
                arrays, places = chosen[sampling]
                if places is None:
                    places = np.where(arrays["order"] != kept.EMPTY, np.arange(arrays["order"].shape[1]), -1)
                column, rank = np.nonzero((places >= 0) & good[:, None])
                at = places[column, rank]
                part = {name: arrays[name][column, at] for name in ("value", "place", "ties", "window")}
                part |= {name: columns[name][column] for name in ("neuron", "polarity")}
                part |= {"sample": kept.samples_of(arrays["order"][column, at]), "rank": rank}
                found.append(part | {"sampling": np.full(len(column), k), "split": np.full(len(column), s)})
        rows = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
        order = np.lexsort((rows["rank"], rows["split"], rows["sampling"], -rows["polarity"], rows["neuron"]))
        return self._texts({name: values[order] for name, values in rows.items()})

    def _texts(self, rows: dict[str, np.ndarray]) -> pa.Table:
        samples: Samples = load_samples(self.run, among=rows["sample"])
        used, inverse = np.unique(rows["sample"], return_inverse=True)
        if not np.array_equal(used, samples.numbers):
            raise RuntimeError("the samples that a lease chose from are not those of the table `samples`")
        strings, starts = samples.strings(np.arange(len(used)), self.special_names)
        start = np.maximum(rows["place"] - self.config.exemplars.before, 0)
        length = np.minimum(rows["place"] + self.config.exemplars.after + 1, samples.lengths[inverse]) - start
        step = np.arange(int(length.sum())) - np.repeat(np.concatenate([[0], np.cumsum(length)[:-1]]), length)
        in_strings = np.repeat(starts[inverse] + start, length) + step
        in_ids = np.repeat(samples.offsets[inverse] + start, length) + step
        names = {k: pa.array(v) for k, v in (("sampling", SAMPLINGS), ("split", SPLITS))}
        offsets = pa.array(np.concatenate([[0], np.cumsum(length)]).astype(np.int32))
        return pa.table({
            "neuron": rows["neuron"], "polarity": rows["polarity"],
            **{name: values.take(pa.array(rows[name])) for name, values in names.items()},
            "rank": rows["rank"].astype(np.int16), "sample": rows["sample"], "activation": rows["value"],
            "start": start.astype(np.int32), "position": (rows["place"] - start).astype(np.int32),
            "mat_ties": rows["ties"].astype(np.int16),
            "tokens": pa.ListArray.from_arrays(offsets, strings.take(pa.array(in_strings))),
            "token_ids": lists(samples.ids[in_ids], length, pa.int32()),
            "activations": lists(rows["window"][np.arange(rows["window"].shape[1]) < length[:, None]], length, pa.float32()),
            "document": samples.documents[inverse],
        })  # fmt: skip


def joined(shards: Iterable[Shard]) -> Shard:
    """The rows of several shards of controls as one, by neuron and then by kind."""
    first, *_ = given = list(shards)
    table = pa.concat_tables([shard.rows for shard in given])
    order = pc.sort_indices(table.select(["neuron"]), [("neuron", "ascending")])
    return replace(first, rows=table.take(order))


def merge(parts: Iterable[dict[str, np.ndarray]]) -> Merged:
    """The states of the same units over different leases, one after another, as one."""
    moments, whole = Moments(), dict[str, Any]()
    for part in parts:
        moments.merge({k: part[f"moments.{k}"] for k in ("nodes", "sums")})
        lists = {name: fields(part, name) for name in LISTS}
        if not whole:
            whole = {name: part[name] for name in ("tokens", "high", "low", "fires", "bad", "histogram")} | {"lists": lists}
            whole |= {"drawn": part["random"], "drawn_fields": fields(part, "random")}
            continue
        for name, add in ADDED.items():
            whole[name] = add(whole[name], part[name])
        whole["lists"] = {name: kept.merge(whole["lists"][name], lists[name]) for name in LISTS}
        whole["drawn"] = np.concatenate([whole["drawn"], part["random"]])
        more = fields(part, "random")
        whole["drawn_fields"] = {k: np.concatenate([v, more[k]], 1) for k, v in whole["drawn_fields"].items()}
    return Merged(**{**whole, "tokens": int(whole["tokens"])}, powers=moments.total().numpy())


ADDED = {
    "tokens": np.add, "high": np.maximum, "low": np.minimum, "fires": np.add, "bad": np.logical_or, "histogram": np.add,
}  # fmt: skip


def fields(part: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays of a list in a lease's state."""
    return {field: part[f"{name}.{field}"] for field in kept.FIELDS}


def spread(firing: dict[str, np.ndarray], n: int) -> np.ndarray:
    """[C, n] places, in the firing lists, of the middles of n equal strata of activation, weakest first; -1 is none."""
    order, values = firing["order"], firing["value"]
    filled = order != kept.EMPTY
    count = filled.sum(1)
    samples = kept.samples_of(order)
    ranked = np.lexsort((samples, np.where(filled, values, np.inf)), axis=1)
    place = np.arange(n)[None, :]
    middle = ((2 * place + 1) * count[:, None]) // (2 * max(n, 1))
    index = np.where(count[:, None] > n, middle, place)
    inside = (index < count[:, None]) & (index < order.shape[1])
    if order.shape[1] == 0:
        return np.full((len(order), n), -1)
    picked = np.take_along_axis(ranked, np.minimum(index, order.shape[1] - 1), 1)
    return np.where(inside, picked, -1)

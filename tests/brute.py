"""What a scan should have found, from the full activation tensor and the definitions, by loops; and a run against it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from raylabel.config import RunConfig
from raylabel.stages.accumulate import FIRING_SALT, RANDOM_SALT
from raylabel.stages.arrays import read_arrays
from raylabel.stages.kept import hash_keys
from raylabel.stages.pilot import load_decoys
from raylabel.stages.scanner import FIRING_FACTOR
from raylabel.stages.subject import open_subject
from raylabel.stages.units import column, sign
from raylabel.store.rundir import RunDir
from raylabel.tables import HISTOGRAM_EDGES, SPLITS

Series = dict[int, list[np.ndarray]]
"""By layer, an array [T, ..] for each sample."""


@dataclass(frozen=True)
class Everything:
    """The full tensor of a run.

    Attributes:
        samples: rows of `samples`, in the order of their numbers.
        acts: [T, columns] float32 unit columns (see `models.subject`). decoys: [T, decoys]. site: [T, site_width].
        masks: [T] the positions that count.
    """

    samples: list[dict[str, Any]]
    acts: Series
    decoys: Series
    site: Series
    masks: Series


@lru_cache(maxsize=2)
def every_activation(url: str) -> Everything:
    """Of the run directory at `url`. The forward has the run's own batches: another shape may round products otherwise."""
    run = RunDir(url)
    config, facts = RunConfig.model_validate(run.config), run.resolved
    subject = open_subject(config, facts)
    samples = sorted(run.table("samples").to_pylist(), key=lambda row: row["sample"])
    pilot = read_arrays(run.files.read("pilot.npz"))
    sinks = {layer: float(pilot[f"sink.{layer}"]) for layer in range(subject.n_layers) if f"sink.{layer}" in pilot}
    decoys = {layer: load_decoys(pilot, layer, subject.site_width, config.run.seed, "cpu") for layer in sinks}
    found: list[Series] = [{layer: [] for layer in sinks} for _ in range(4)]
    for at in range(0, len(samples), facts["batch"]):
        rows = samples[at : at + facts["batch"]]
        ids = torch.full((facts["batch"], max(len(row["token_ids"]) for row in rows)), subject.pad_id)
        for i, row in enumerate(rows):
            ids[i, : len(row["token_ids"])] = torch.tensor(row["token_ids"])

        def visit(layer: int, here: torch.Tensor, resid: torch.Tensor, rows: list[Any] = rows) -> None:
            controls = decoys[layer]
            values = [subject.read(layer, here), here[..., :0] if controls is None else controls(here), here]
            for i, row in enumerate(rows):
                n = len(row["token_ids"])
                for series, value in zip(found, values, strict=False):
                    series[layer].append(value[i, :n].float().numpy().copy())
                usual = np.array([token not in subject.special_ids for token in row["token_ids"]])
                found[3][layer].append(usual & (resid[i, :n].float().norm(dim=-1).numpy() <= sinks[layer]))

        subject.run(ids, list(sinks), visit)
    return Everything(samples, *found)


def unit_series(run: RunDir, layer: int, neuron: int, polarity: int) -> list[np.ndarray]:
    """polarity · activation [T] of one unit, or decoy where the run is a run's controls, in every sample."""
    if run.in_controls:
        return [polarity * acts[:, neuron] for acts in every_activation(run.files.url).decoys[layer]]
    at = column(neuron, polarity, run.resolved["width"])
    return [sign(polarity) * acts[:, at] for acts in every_activation(run.files.url).acts[layer]]


def brute_exemplars(run: RunDir, layer: int, neuron: int, polarity: int) -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    """(sampling, split) -> [(sample, activation, position in the sample, ties)] of one unit by loops over everything."""
    config, everything = RunConfig.model_validate(run.config), every_activation(run.files.url)
    seen: dict[str, list[tuple[int, float, int, int]]] = {split: [] for split in SPLITS}
    series = unit_series(run, layer, neuron, polarity)
    for row, act, mask in zip(everything.samples, series, everything.masks[layer], strict=True):
        peak = max((act[t] for t in range(len(act)) if mask[t]), default=-np.inf)
        at = [t for t in range(len(act)) if mask[t] and act[t] == peak]
        seen[row["split"]].append((row["sample"], float(peak), *((at[0], len(at) - 1) if at else (-1, 0))))
    found = {}
    k, n, seed = config.exemplars.top, config.exemplars.quantile, config.run.seed
    for split, rows in seen.items():
        numbers = np.array([r[0] for r in rows])
        fires = [r for r in rows if r[1] > 0]
        found["top", split] = sorted(fires, key=lambda r: (-r[1], r[0]))[: k if split == "explain" else max(k // 2, 1)]
        lottery = dict(zip(numbers.tolist(), hash_keys(numbers, seed, FIRING_SALT).tolist(), strict=True))
        pool = sorted(sorted(fires, key=lambda r: lottery[r[0]])[: FIRING_FACTOR * n], key=lambda r: (r[1], r[0]))
        middles = [(2 * i + 1) * len(pool) // (2 * n) for i in range(n)]
        found["quantile", split] = pool if len(pool) <= n else [pool[i] for i in middles]
        tombola = dict(zip(numbers.tolist(), hash_keys(numbers, seed, RANDOM_SALT).tolist(), strict=True))
        drawn = sorted(rows, key=lambda r: tombola[r[0]])[: config.exemplars.random]
        found["random", split] = [(*r, rank) for rank, r in enumerate(drawn) if r[2] >= 0]
    return found


def check_exemplars(run: RunDir, layer: int, neurons: list[int], polarities: tuple[int, ...]) -> None:
    """The rows of some units, windows included, bit for bit."""
    kept, everything = RunConfig.model_validate(run.config).exemplars, every_activation(run.files.url)
    place = {row["sample"]: i for i, row in enumerate(everything.samples)}
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in run.table("exemplars", layer=layer).to_pylist():
        rows.setdefault(tuple(row[k] for k in ("neuron", "polarity", "sampling", "split")), []).append(row)
    for neuron, polarity in [(n, p) for n in neurons for p in polarities]:
        series = unit_series(run, layer, neuron, polarity)
        for (sampling, split), expected in brute_exemplars(run, layer, neuron, polarity).items():
            got = rows.get((neuron, polarity, sampling, split), [])
            assert [r["rank"] for r in got] == [e[4] if sampling == "random" else i for i, e in enumerate(expected)]
            assert [(r["sample"], r["activation"], r["start"] + r["position"], r["mat_ties"]) for r in got] == [
                e[:4] for e in expected
            ]
            for r in got:
                sample, stop = everything.samples[place[r["sample"]]], r["start"] + len(r["tokens"])
                assert r["start"] == max(0, r["start"] + r["position"] - kept.before)
                assert stop == min(len(sample["token_ids"]), r["start"] + r["position"] + kept.after + 1)
                assert r["token_ids"] == sample["token_ids"][r["start"] : stop]
                assert "".join(r["tokens"]).removeprefix("<s>") in sample["text"]
                assert np.array_equal(np.array(r["activations"], dtype=np.float32), series[place[r["sample"]]][r["start"] : stop])
                assert r["document"] == sample["document"]


def check_statistics(run: RunDir, layer: int, neurons: list[int] | None = None, powers: float = 1e-4) -> None:
    """The rows of some units, or of all: counts and extremes exactly, moments to a share `powers` of the spread."""
    edges = np.array(HISTOGRAM_EDGES)
    for row in run.table("statistics", layer=layer).to_pylist():
        if neurons is not None and row["neuron"] not in neurons:
            continue
        series = unit_series(run, layer, row["neuron"], row["polarity"])
        x = np.concatenate([a[m] for a, m in zip(series, every_activation(run.files.url).masks[layer], strict=True)])
        y, spread = x.astype(np.float64), x.astype(np.float64).std()
        assert row["tokens_seen"] == len(x)
        assert (row["fires"], row["dead"]) == (int((x > 0).sum()), not (x > 0).any())
        assert (row["max"], row["min"]) == (x.max(), x.min())
        # Below the middle a bin holds its upper edge.
        bins = np.where(y < 0, np.searchsorted(edges, y, "left"), np.searchsorted(edges, y, "right")) - 1
        assert row["histogram"] == np.bincount(bins, minlength=len(edges) - 1).tolist()
        assert row["mean"] == pytest.approx(y.mean(), abs=1e-6 + powers * 0.01 * spread)
        assert row["variance"] == pytest.approx(spread**2, rel=powers, abs=1e-12)
        if spread > 1e-6:
            assert row["skewness"] == pytest.approx(((y - y.mean()) ** 3).mean() / spread**3, rel=1e-3, abs=1e-3)
            assert row["kurtosis"] == pytest.approx(((y - y.mean()) ** 4).mean() / spread**4, rel=1e-3)
        tops = [e[1] for e in brute_exemplars(run, layer, row["neuron"], row["polarity"])["top", "explain"]][:20]
        assert row["top_mean"] == (pytest.approx(np.mean(tops), rel=1e-6) if tops else None)

"""The scan against brute force over the full activation tensor, bit for bit, and against itself cut differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylabel.engine.pipeline import run_pipeline
from raylabel.stages import scan
from raylabel.stages.running import Moments, firing_merge, hash_keys, histogram, top_merge
from raylabel.stages.select import FIRING_FACTOR, FIRING_SALT, RANDOM_SALT
from raylabel.store.rundir import RunDir
from raylabel.tables import HISTOGRAM_EDGES
from tests.models.tiny import save as save_model
from tests.runs import every_activation, tables_equal, tiny_config, write_corpus

STAGES = {"stages": ["tokenize", "scan"]}
NAMES = ("exemplars", "statistics")


def do_run(model: Path, corpus: Path, out: Path, **sections: dict[str, Any]) -> RunDir:
    sections.setdefault("run", {}).update(STAGES)
    sections.setdefault("identify", {"vectors": "unused.bin"})
    run_pipeline(tiny_config(model, corpus, out, **sections))
    return RunDir(str(out))


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(request.param, folder / "model")
    return do_run(model, write_corpus(folder / "text.jsonl", 60), folder / "run")


def brute_exemplars(run: RunDir, layer: int, neuron: int, polarity: int) -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    """(sampling, split) -> [(sample, activation, position in the sample, ties)] of one unit by loops over everything."""
    samples, acts, masks = every_activation(run)
    seen: dict[str, list[tuple[int, float, int, int]]] = {"explain": [], "score": []}
    for row, act, mask in zip(samples, acts[layer], masks[layer], strict=True):
        series = np.where(mask, polarity * act[:, neuron], -np.inf)
        peak = max(series)
        at = [i for i in range(len(series)) if series[i] == peak]
        seen[row["split"]].append((row["sample"], float(peak), at[0], len(at) - 1))
    found = {}
    for split, rows in seen.items():
        numbers = np.array([r[0] for r in rows])
        fires = [r for r in rows if r[1] > 0]
        k = 6 if split == "explain" else 3
        found["top", split] = sorted(fires, key=lambda r: (-r[1], r[0]))[:k]
        lottery = dict(zip(numbers.tolist(), hash_keys(numbers, 0, FIRING_SALT).tolist(), strict=True))
        pool = sorted(sorted(fires, key=lambda r: lottery[r[0]])[: FIRING_FACTOR * 3], key=lambda r: (r[1], r[0]))
        n = len(pool)
        found["quantile", split] = pool if n <= 3 else [pool[(2 * i + 1) * n // 6] for i in range(3)]
        tombola = dict(zip(numbers.tolist(), hash_keys(numbers, 0, RANDOM_SALT).tolist(), strict=True))
        found["random", split] = sorted(rows, key=lambda r: tombola[r[0]])[:4]
    return found


def test_exemplars_equal_brute_force(finished: RunDir) -> None:
    samples = {row["sample"]: row for row in finished.table("samples").to_pylist()}
    _, acts, _ = every_activation(finished)
    order = {number: i for i, number in enumerate(sorted(samples))}
    for layer in (0, 2):
        rows = finished.table("exemplars", layer=layer).to_pylist()
        polarities = sorted({row["polarity"] for row in rows})
        for neuron in (0, 7, 39):
            for polarity in polarities:
                wanted = brute_exemplars(finished, layer, neuron, polarity)
                for (sampling, split), expected in wanted.items():
                    got = [
                        r for r in rows
                        if (r["neuron"], r["polarity"], r["sampling"], r["split"]) == (neuron, polarity, sampling, split)
                    ]  # fmt: skip
                    assert [r["rank"] for r in got] == list(range(len(expected)))
                    assert [
                        (r["sample"], r["activation"], r["start"] + r["position"], r["mat_ties"]) for r in got
                    ] == expected
                    for r in got:
                        sample = samples[r["sample"]]
                        stop = r["start"] + len(r["tokens"])
                        assert r["start"] == max(0, r["start"] + r["position"] - 5)
                        assert stop == min(len(sample["token_ids"]), r["start"] + r["position"] + 4)
                        assert r["token_ids"] == sample["token_ids"][r["start"] : stop]
                        series = polarity * acts[layer][order[r["sample"]]][r["start"] : stop, neuron]
                        assert np.array_equal(np.array(r["activations"], dtype=np.float32), series)
                        assert r["document"] == sample["document"]


def test_statistics_equal_brute_force(finished: RunDir) -> None:
    _, acts, masks = every_activation(finished)
    for layer in (0, 1, 2):
        values = np.concatenate([a[m] for a, m in zip(acts[layer], masks[layer], strict=True)])
        for row in finished.table("statistics", layer=layer).to_pylist():
            x = row["polarity"] * values[:, row["neuron"]]
            y = x.astype(np.float64)
            assert row["tokens_seen"] == len(x)
            assert row["fires"] == int((x > 0).sum())
            assert (row["max"], row["min"]) == (x.max(), x.min())
            spread = y.std()
            assert row["mean"] == pytest.approx(y.mean(), abs=1e-6 * (1 + spread))
            assert row["variance"] == pytest.approx(spread**2, rel=1e-4)
            assert row["skewness"] == pytest.approx(((y - y.mean()) ** 3).mean() / spread**3, rel=1e-3, abs=1e-3)
            assert row["kurtosis"] == pytest.approx(((y - y.mean()) ** 4).mean() / spread**4, rel=1e-3)
            assert row["dead"] == (row["fires"] == 0)


def test_histogram_follows_the_published_edges(finished: RunDir) -> None:
    _, acts, masks = every_activation(finished)
    values = np.concatenate([a[m] for a, m in zip(acts[1], masks[1], strict=True)])
    edges = np.array(HISTOGRAM_EDGES)
    for row in finished.table("statistics", layer=1, neurons=(0, 5)).to_pylist():
        expected = np.histogram(row["polarity"] * values[:, row["neuron"]].astype(np.float64), edges)[0]
        assert row["histogram"] == expected.tolist()


def test_any_cut_into_leases_gives_the_same_rows(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished.config
    n = finished.table("samples").num_rows
    for leases in (1, 2, 7):
        monkeypatch.setattr(scan, "LEASES", leases)
        monkeypatch.setattr(scan.lease_keys, "__defaults__", (leases,))
        out = tmp_path / str(leases)
        other = do_run(Path(config["subject"]["model"]), Path(config["exemplars"]["corpus"]["path"]), out)
        plan = other.plan("scan")
        assert plan is not None
        assert n > 7 * 4
        assert sum(u.step == "accumulate" for u in plan.units) == leases
        assert tables_equal(finished, other, NAMES)


def test_decoys_travel_beside_the_units(finished: RunDir) -> None:
    controls = finished.controls.table("exemplars")
    assert set(controls.column("control").to_pylist()) == {"decoy"}
    assert set(controls.column("neuron").to_pylist()) == set(range(5))
    assert set(controls.column("layer").to_pylist()) == {0, 1, 2}
    units = finished.table("exemplars")
    assert "control" not in units.column_names


def test_a_document_is_never_in_both_splits(finished: RunDir) -> None:
    splits: dict[int, set[str]] = {}
    texts: dict[str, set[str]] = {}
    for row in finished.table("samples").to_pylist():
        splits.setdefault(row["document"], set()).add(row["split"])
        texts.setdefault(row["text"], set()).add(row["split"])
    assert all(len(found) == 1 for found in [*splits.values(), *texts.values()])
    assert set.union(*splits.values()) == {"explain", "score"}


def test_a_corpus_smaller_than_k(tmp_path: Path) -> None:
    model = save_model("gpt2", tmp_path / "model")
    run = do_run(model, write_corpus(tmp_path / "text.jsonl", 7, longest=9), tmp_path / "run")
    n = run.table("samples").num_rows
    rows = run.table("exemplars").to_pylist()
    assert rows
    assert max(r["rank"] for r in rows) < n
    assert all(len(r["tokens"]) <= 16 for r in rows)


def test_non_finite_units_are_named_and_nothing_else_is_lost(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_model("gpt2", tmp_path / "model")
    corpus = write_corpus(tmp_path / "text.jsonl", 40)
    whole = do_run(model, corpus, tmp_path / "whole")
    weights = load_file(model / "model.safetensors")
    name = next(k for k in weights if k.endswith("h.2.mlp.c_fc.bias"))
    weights[name][11] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    broken = do_run(model, corpus, tmp_path / "broken")
    failures = broken.table("failures").to_pylist()
    assert [(f["stage"], f["layer"], f["neuron"]) for f in failures] == [("scan", 2, 11)]
    assert "NaN or infinite" in failures[0]["reason"]
    for table in NAMES:
        rows = broken.table(table, layer=2).to_pylist()
        assert 11 not in {r["neuron"] for r in rows}
        assert rows == [r for r in whole.table(table, layer=2).to_pylist() if r["neuron"] != 11]
        assert broken.controls.table(table, layer=1).equals(whole.controls.table(table, layer=1))


def test_top_merge_is_associative_and_breaks_ties_by_sample() -> None:
    draw = np.random.default_rng(0)
    values = torch.from_numpy(draw.integers(0, 4, (3, 40)).astype(np.float32))
    values[values == 0] = -torch.inf
    samples = torch.from_numpy(np.stack([draw.permutation(40) for _ in range(3)]))
    whole = top_merge(values, samples, 7)
    for row in range(3):
        expected = sorted(
            ((-float(v), int(s)) for v, s in zip(values[row], samples[row], strict=True) if v > -np.inf)
        )[:7]
        assert [(-float(v), int(s)) for v, s in zip(whole[0][row], whole[1][row], strict=True)] == expected
    parts = [top_merge(values[:, a:b], samples[:, a:b], 7) for a, b in ((20, 33), (0, 20), (33, 40))]
    merged = top_merge(torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1), 7)
    assert torch.equal(merged[0], whole[0])
    assert torch.equal(merged[1], whole[1])


def test_firing_sample_is_uniform_over_samples() -> None:
    counts = np.zeros(50)
    for seed in range(400):
        keys = torch.from_numpy(hash_keys(np.arange(50), seed, FIRING_SALT))[None]
        kept, _ = firing_merge(keys, torch.zeros_like(keys, dtype=torch.float32), 10)
        counts[(kept[0] & 0xFFFFFFFF).numpy()] += 1
    expected = 400 * 10 / 50
    assert ((counts - expected) ** 2 / expected).sum() < 90


def test_moments_do_not_depend_on_the_cut() -> None:
    sums = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 4, 3)) * 10.0 ** np.arange(64)[:, None, None] ** 0.3)
    whole = Moments()
    whole.add(0, sums)
    cut = Moments()
    for a, b in ((32, 64), (8, 16), (0, 8), (16, 32)):
        cut.add(a, sums[a:b])
    assert torch.equal(whole.total(), cut.total())


def test_histogram_counts_every_finite_value() -> None:
    values = torch.tensor([[0.0, -0.0, 1.0, 1.49, 1.5, -1.0, -1.5, 1e30, -1e30, 2.0**-12, 1e-20]])
    counts = histogram(values, torch.zeros_like(values, dtype=torch.int64), 1)[0]
    assert int(counts.sum()) == values.numel()
    mirrored = histogram(-values, torch.zeros_like(values, dtype=torch.int64), 1)[0]
    assert torch.equal(counts, mirrored.flip(0))

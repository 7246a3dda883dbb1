"""The scan against brute force over the full activation tensor, bit for bit, and against itself cut differently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raylabel.stages import scan
from raylabel.stages.moments import Moments
from raylabel.store.rundir import RunDir
from tests.brute import check_exemplars, check_statistics
from tests.models.tiny import save as save_model
from tests.runs import do_scan, tables_equal, write_corpus

NAMES = ("exemplars", "statistics")


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(request.param, folder / "model")
    return do_scan(model, write_corpus(folder / "text.jsonl", 60), folder / "run")


def test_exemplars_equal_brute_force(finished: RunDir) -> None:
    for layer in (0, 2):
        check_exemplars(finished, layer, [0, 7, 39], tuple(finished.resolved["polarities"]))


def test_statistics_equal_brute_force(finished: RunDir) -> None:
    for layer in (0, 1, 2):
        check_statistics(finished, layer)


def test_any_cut_into_leases_gives_the_same_rows(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished.config
    n = finished.table("samples").num_rows
    for leases in (1, 2, 7):
        monkeypatch.setattr(scan, "LEASES", leases)
        out = tmp_path / str(leases)
        other = do_scan(Path(config["subject"]["model"]), Path(config["exemplars"]["corpus"]["path"]), out)
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
    run = do_scan(model, write_corpus(tmp_path / "text.jsonl", 7, longest=9), tmp_path / "run")
    n = run.table("samples").num_rows
    rows = run.table("exemplars").to_pylist()
    assert rows
    assert max(r["rank"] for r in rows) < n
    assert all(len(r["tokens"]) <= 16 for r in rows)


def test_non_finite_units_are_named_and_nothing_else_is_lost(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_model("gpt2", tmp_path / "model")
    corpus = write_corpus(tmp_path / "text.jsonl", 40)
    whole = do_scan(model, corpus, tmp_path / "whole")
    weights = load_file(model / "model.safetensors")
    name = next(k for k in weights if k.endswith("h.2.mlp.c_fc.bias"))
    weights[name][11] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    broken = do_scan(model, corpus, tmp_path / "broken")
    failures = broken.table("failures").to_pylist()
    assert [(f["stage"], f["layer"], f["neuron"]) for f in failures] == [("scan", 2, 11)]
    assert "NaN or infinite" in failures[0]["reason"]
    for table in NAMES:
        rows = broken.table(table, layer=2).to_pylist()
        assert 11 not in {r["neuron"] for r in rows}
        assert rows == [r for r in whole.table(table, layer=2).to_pylist() if r["neuron"] != 11]
        assert broken.controls.table(table, layer=1).equals(whole.controls.table(table, layer=1))


def test_moments_do_not_depend_on_the_cut() -> None:
    sums = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 4, 3)) * 10.0 ** np.arange(64)[:, None, None] ** 0.3)
    whole = Moments()
    whole.add(0, sums.clone())
    cut = Moments()
    for a, b in ((32, 64), (8, 16), (0, 8), (16, 32)):
        cut.add(a, sums[a:b].clone())
    assert torch.equal(whole.total(), cut.total())


def test_a_lease_is_as_long_as_its_state_is_large() -> None:
    def seconds(n: int, state: int) -> float:
        return scan.lease_size(n, 8, 128, 1000.0, state) * 128 / 1000

    assert seconds(10**6, 10**6) == pytest.approx(scan.LEASE_SECONDS, rel=0.05)
    assert seconds(10**6, 10**10) == pytest.approx(10**10 / scan.STATE_PACE, rel=0.05)
    assert scan.lease_size(4000, 8, 128, 1000.0, 10**12) == 1000
    assert scan.lease_size(3, 8, 128, 1000.0, 0) == 8

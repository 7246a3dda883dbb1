"""The scan against brute force for every architecture, precision, site and kind of unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylabel.stages.pilot import PILOT_SAMPLES
from raylabel.store.rundir import RunDir
from tests.brute import check_exemplars, check_statistics, every_activation
from tests.models import tiny
from tests.models.saes import save_sae
from tests.models.test_subject_transformerlens import native_folder
from tests.runs import do_scan, write_corpus

NATIVE = {"solu": {}, "gelu": {"act_fn": "gelu"}, "gated": {"gated_mlp": True, "act_fn": "silu"}}
HALVES = ("gpt2", "gpt_neox", "llama", "gemma2", "gemma3", "solu")
Scan = Callable[..., RunDir]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl", 40, longest=40)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def saved(family: str) -> Path:
        folder = root / family
        if folder.exists():
            return folder
        return native_folder(folder, **NATIVE[family]) if family in NATIVE else tiny.save(family, folder)

    return saved


@pytest.fixture
def scan(models: Callable[[str], Path], corpus: Path, tmp_path: Path) -> Scan:
    """A scan in which sinks are common, by settings of `subject`."""

    def do(family: str, subject: dict[str, Any], name: str = "run", **exemplars: Any) -> RunDir:
        exemplars = {"sink_factor": 1.2, **exemplars}
        return do_scan(models(family), corpus, tmp_path / name, subject=subject, exemplars=exemplars)

    return do


def check(run: RunDir, neurons: list[int], polarities: tuple[int, ...], layers: tuple[int, ...], powers: float = 1e-4) -> None:
    """A handful of units and some decoys, their rows in both tables, and nothing but the wanted polarities."""
    everything = every_activation(run.files.url)
    for layer in layers:
        counted = np.concatenate(everything.masks[layer])
        assert 0.3 < counted.mean() < 1
        check_exemplars(run, layer, neurons, polarities)
        check_statistics(run, layer, neurons, powers)
        check_exemplars(run.controls, layer, [0, 3], (1,))
        check_statistics(run.controls, layer, None, powers)
        for table in ("statistics", "exemplars"):
            assert set(run.table(table, layer=layer).column("polarity").to_pylist()) == set(polarities)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gemma3", *NATIVE])
def test_every_family(scan: Scan, family: str) -> None:
    run = scan(family, {})
    check(run, [0, 7, 39], tuple(run.resolved["polarities"]), (0, 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", HALVES)
def test_half_precision(scan: Scan, family: str, dtype: str) -> None:
    run = scan(family, {"dtype": dtype})
    assert run.resolved["dtype"] == dtype
    check(run, [1, 38], tuple(run.resolved["polarities"]), (1,))


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "attn_out"])
def test_sites_of_the_stream(scan: Scan, site: str) -> None:
    run = scan("llama", {"site": site})
    check(run, [0, 15], (1, -1), (0, 2))


def test_before_the_norm_of_solu(scan: Scan) -> None:
    check(scan("solu", {"site": "mlp_mid"}), [0, 39], (1,), (1,))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gated"])
def test_quadrants(scan: Scan, family: str) -> None:
    run = scan(family, {"polarity": "quadrants"})
    check(run, [0, 39], (1, -1, 2, -2), (0, 2))
    rows = {(r["neuron"], r["polarity"]): r for r in run.table("statistics", layer=1).to_pylist()}
    assert len(rows) == 40 * 4
    both = {(r["neuron"], r["polarity"]): r for r in scan(family, {}, "both").table("statistics", layer=1).to_pylist()}
    for neuron in range(40):
        for end in (1, -1):
            regimes = [rows[neuron, end], rows[neuron, 2 * end]]
            assert sum(r["fires"] for r in regimes) == both[neuron, end]["fires"]
            assert max(r["max"] for r in regimes) == max(both[neuron, end]["max"], 0)


SAES: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"architecture": "topk", "k": 4},
    "jumprelu": {"architecture": "jumprelu"},
    "transcoder": {"architecture": "transcoder", "hook": "blocks.1.mlp.hook_in"},
}


@pytest.mark.parametrize("kind", SAES)
def test_latents(scan: Scan, tmp_path: Path, kind: str) -> None:
    folder = save_sae(tmp_path / "sae", d_sae=300, **SAES[kind])
    run = scan("gpt2", {"latents": str(folder)})
    check(run, [0, 7, 255, 256, 299], (1,), (1,))
    assert set(run.table("statistics").column("layer").to_pylist()) == {1}
    few = scan("gpt2", {"latents": str(folder), "neurons": [254, 260]}, "few")
    check(few, [254, 259], (1,), (1,))


def test_some_units_of_some_layers_are_what_they_are_among_all(scan: Scan) -> None:
    whole = scan("llama", {"polarity": "quadrants"})
    units = [[2, 30], [0, 1], [2, 3]]
    few = scan("llama", {"polarity": "quadrants", "units": units}, "few")
    for layer, neurons in {0: [1], 2: [3, 30]}.items():
        check(few, neurons, (1, -1, 2, -2), (layer,))
        for table in ("statistics", "exemplars"):
            rows = [r for r in whole.table(table, layer=layer).to_pylist() if r["neuron"] in neurons]
            found = few.table(table, layer=layer).to_pylist()
            for row, other in zip(rows, found, strict=True):
                # A product of another size may round otherwise.
                for name in {"logits_up", "logits_down"} & row.keys():
                    a, b = ([entry["value"] for entry in r.pop(name)] for r in (row, other))
                    assert a == pytest.approx(b, abs=1e-6)
            assert found == rows
    assert few.controls.table("exemplars", layer=2).equals(whole.controls.table("exemplars", layer=2))


SIZES = [{"quantile": 0}, {"top": 1, "random": 0}, {"top": 100, "quantile": 50}, {"before": 0, "after": 0}]


@pytest.mark.parametrize("exemplars", SIZES, ids=str)
def test_other_sizes(scan: Scan, exemplars: dict[str, int]) -> None:
    check(scan("gpt_neox", {}, **exemplars), [0, 39], (1,), (1,))


def test_one_token_a_sample(scan: Scan) -> None:
    run = scan("qwen3", {"context": 2})
    assert {len(ids) for ids in run.table("samples").column("token_ids").to_pylist()} == {2}
    check(run, [0, 39], (1, -1), (1,))


DECOYS: list[tuple[str, dict[str, Any]]] = [("gpt2", {}), ("llama", {"polarity": "quadrants"}), ("olmo2", {"site": "attn_out"})]


@pytest.mark.parametrize(("family", "subject"), DECOYS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("documents", [6, 300])
def test_a_decoy_has_the_mean_and_the_spread_of_a_unit(
    models: Callable[[str], Path], tmp_path: Path, family: str, subject: dict[str, Any], documents: int
) -> None:
    """Of one unit exactly where the pilot saw all samples, else nearly."""
    text = write_corpus(tmp_path / "text.jsonl", documents, seed=3)
    run = do_scan(models(family), text, tmp_path / "run", subject={"batch": 32, **subject}, controls={"decoys": 40})
    assert (run.table("samples").num_rows <= PILOT_SAMPLES) == (documents == 6)
    for layer in (0, 2):
        units = [r for r in run.table("statistics", layer=layer).to_pylist() if r["polarity"] > 0]
        means, spreads = np.array([r["mean"] for r in units]), np.sqrt([r["variance"] for r in units])
        decoys = run.controls.table("statistics", layer=layer).to_pylist()
        nearest = [
            np.maximum(np.abs(means - r["mean"]) / spreads, np.abs(spreads / r["variance"] ** 0.5 - 1)).min() for r in decoys
        ]
        assert len(nearest) == 40
        assert (max(nearest) < 1e-3) if documents == 6 else (np.median(nearest) < 0.15 and max(nearest) < 0.5)

"""The planner: shapes as published, and a run of the built-in model beside what was foretold of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from raylabel.config import build_config
from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput
from raylabel.stages.check import estimate
from raylabel.stages.llm_cost import llm_cost
from raylabel.stages.plan_cost import GPU, Rates, Shape, on_gpu, plan
from raylabel.store.rundir import RunDir
from tests.models.tiny import save
from tests.runs import tiny_config

GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "activation_function": "gelu_new"}
LLAMA_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "intermediate_size": 14336, "hidden_act": "silu"}  # fmt: skip
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}
FACTOR = 2.0
"""How far a figure about bytes may be from what a run leaves behind."""


@pytest.mark.parametrize(
    ("config", "units", "billions"), [(GPT2, 36_864, 0.085), (LLAMA_8B, 458_752, 6.98), (LLAMA_70B, 2_293_760, 68.45)]
)
def test_shapes_are_those_that_are_published(config: dict[str, Any], units: int, billions: float) -> None:
    shape = Shape.of(config)
    assert shape.layers * shape.width == units
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_larger_model_more_text_and_fewer_workers_cost_more() -> None:
    config = build_config({"subject": {"model": "x"}, "exemplars": {"corpus": {"path": "y"}}})
    hours = [plan(Shape.of(c), config, 10_000_000, 8, on_gpu(Shape.of(c)))["hours"] for c in (GPT2, LLAMA_8B, LLAMA_70B)]
    assert hours == sorted(hours)
    shape = Shape.of(LLAMA_8B)
    base = plan(shape, config, 10_000_000, 8, on_gpu(shape))
    assert plan(shape, config, 100_000_000, 8, on_gpu(shape))["hours by stage"]["scan"] > 3 * base["hours by stage"]["scan"]
    assert plan(shape, config, 10_000_000, 2, on_gpu(shape))["hours"] > 3 * base["hours"]
    assert sum(base["work units by stage"].values()) == base["work units"]


def test_a_language_model_elsewhere_is_counted_by_the_unit() -> None:
    tree: dict[str, Any] = {"subject": {"model": "x"}, "describe": {"explainer": "m", "base_url": "http://127.0.0.1:1/v1"},
            "score": {"scorers": ["detection", "fuzzing"]}}  # fmt: skip
    found = llm_cost(build_config(tree), 100)
    peer = llm_cost(build_config({**tree, "score": {"scorers": ["detection", "fuzzing"], "packing": "peer"}}), 100)
    assert 1_000 * 100 < found["LLM prompt tokens"] < 10_000 * 100 < peer["LLM prompt tokens"]
    assert 0 < found["LLM completion tokens"] < found["LLM prompt tokens"]
    priced = {**tree["describe"], "usd_per_million_prompt": 1.0, "usd_per_million_completion": 0.0}
    assert llm_cost(build_config({**tree, "describe": priced}), 100)["LLM cost"] == found["LLM prompt tokens"] / 1e6
    assert llm_cost(build_config({**tree, "describe": {}, "score": {}}), 100)["LLM calls"] == 0


def test_a_run_leaves_behind_what_was_foretold(tmp_path: Path) -> None:
    tree = {
        "subject": {"model": "demo", "context": 64, "device": "cpu", "layers": [0], "neurons": [0, 256]},
        "exemplars": {"corpus": {"path": "stdlib", "tokens": 30_000}, "quantile": 5}, "controls": {"decoys": 64},
        "run": {"out": str(tmp_path / "run"), "address": "inline", "stages": ["tokenize", "scan", "identify"]},
    }  # fmt: skip
    config = build_config(tree)
    run_pipeline(config)
    run = RunDir(str(tmp_path / "run"))
    shape = Shape(4, 512, 1, False)
    told = plan(shape, config, 30_000, 1, Rates(1e5), device="cpu")
    for stage in ("scan", "identify"):
        entries, found = run.manifest(stage).values(), run.plan(stage)
        assert found is not None and len(found.units) == told["work units by stage"][stage]
        near(told["manifest bytes"] / told["work units"], sum(run.files.sizes(f"_manifest/{stage}").values()) / len(entries))
        near(told["plan bytes"] / told["work units"], len(found.to_json()) / len(found.units))
    for table in ("samples", "exemplars", "statistics", "candidates"):
        sizes = run.files.sizes(table) | run.files.sizes(f"controls/{table}")
        near(told["bytes by table"][table], sum(sizes.values()))
    kept = [f["bytes"] for e in run.manifest("scan").values() for f in e["files"] if f.get("temporary")]
    near(told["temporary bytes"], sum(kept))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_folder_without_weights_is_planned_as_the_model_itself(kind: str, tiny_corpus: Path, tmp_path: Path) -> None:
    whole = save(kind, tmp_path / "whole")
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    found = {}
    for folder, device in ((whole, "cpu"), (bare, "meta"), (whole, "meta")):
        config = tiny_config(folder, tiny_corpus, tmp_path / "run", subject={"device": device})
        found[folder.name, device] = estimate(config)
    for key in ("layers", "units", "units and polarities", "tokens", "samples", "leases", "variants at most", "table bytes"):
        assert len({told[key] for told in found.values()}) == 1, key
    assert found["bare", "meta"]["device"] == GPU
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match=r"^subject\.device: meta holds no weights"):
        run_pipeline(tiny_config(whole, tiny_corpus, tmp_path / "run", subject={"device": "meta"}))
    for act in (run_pipeline, estimate):
        with pytest.raises(BadInput, match="no safetensors weights"):
            act(tiny_config(bare, tiny_corpus, tmp_path / "run"))


def test_eight_billion_parameters_are_planned_from_their_configuration(tiny_corpus: Path, tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**given, **LLAMA_8B, "head_dim": 128, "dtype": "bfloat16"}), encoding="utf-8")
    told = estimate(tiny_config(folder, tiny_corpus, tmp_path / "run", subject={"device": "meta", "context": 16}))
    assert told["units"] == 458_752 and told["units and polarities"] == 2 * 458_752
    assert 2 * 6.9e9 < told["peak bytes"] - told["state bytes"] < 2 * 8.1e9 + 1e9
    assert told["tokens a second"] == pytest.approx(on_gpu(Shape.of(LLAMA_8B)).pace, rel=1e-3)


def near(told: float, found: float) -> None:
    assert found / FACTOR < told < found * FACTOR, (told, found)

"""Memory of a scan: foretold, met, and what happens where there is too little."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raylabel.config import RunConfig
from raylabel.engine.pipeline import run_pipeline
from raylabel.stages import accumulate, memory
from raylabel.store.rundir import RunDir
from tests.models.tiny import save as save_model
from tests.runs import tables_equal, tiny_config, write_corpus

ROOT = Path(__file__).parents[2]
NAMES = ("exemplars", "statistics")


def figures(what: str, config: RunConfig, folder: Path, *more: str) -> dict[str, Any]:
    given = folder / "config.json"
    given.write_text(config.model_dump_json(exclude_unset=True), encoding="utf-8")
    command = [sys.executable, "-m", "tests.stages.scan_memory", what, str(given), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def wide_model(folder: Path) -> Path:
    """A GPT-2 of 6,144 neurons: its state counts beside what Python and the libraries take."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder.mkdir(parents=True)
    small = save_model("gpt2", folder)
    loaded = json.loads((small / "config.json").read_text(encoding="utf-8"))
    config = GPT2Config(**{**loaded, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_inner": 2048, "n_positions": 128})
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(small)
    return small


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """A configuration whose corpus is tokenised."""
    folder = tmp_path_factory.mktemp("wide")
    model, corpus = wide_model(folder / "model"), write_corpus(folder / "text.jsonl", 600, longest=120)
    sections: dict[str, Any] = {
        "subject": {"context": 64, "batch": 32}, "controls": {"decoys": 64}, "identify": {"vectors": "unused.bin"},
        "exemplars": {"top": 20, "quantile": 40, "random": 10, "before": 50, "after": 10},
    }  # fmt: skip
    config = tiny_config(model, corpus, folder / "run", run={"stages": ["tokenize", "scan"]}, **sections)
    only = config.model_copy(update={"run": config.run.model_copy(update={"stages": ["tokenize"]})})
    run_pipeline(only)
    return config, folder


def test_check_foretells_the_peak(wide: tuple[RunConfig, Path]) -> None:
    config, folder = wide
    expected, measured = figures("check", config, folder), figures("scan", config, folder)
    assert expected["state"] > 0.2 * measured["peak"]
    assert expected["peak"] == pytest.approx(measured["peak"], rel=0.2)


def test_a_lease_that_runs_out_of_memory_goes_on_with_smaller_batches(wide: tuple[RunConfig, Path]) -> None:
    config, folder = wide
    run_pipeline(config)
    state = figures("check", config, folder)["state"]
    # Enough for the state and for some of the 130 MB that a pass of 512 samples takes at a time.
    found = figures("tight", config, folder, str(int(1.3 * state) + 120_000_000))
    assert found["notes"]["batch_halved_to"] < 512
    assert found["tokens"] > 0


def test_out_of_memory_on_a_gpu_is_noted_and_changes_roundings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corpus = save_model("llama", tmp_path / "model"), write_corpus(tmp_path / "text.jsonl", 60)
    runs, real = [], accumulate.accumulate
    for name, fitting in (("whole", 99), ("halved", 2)):

        def limited(scanner: Any, samples: Any, first: int, batch: int, *rest: Any, fitting: int = fitting) -> Any:
            if batch > fitting:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(scanner, samples, first, batch, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(accumulate, "accumulate", limited)
            sections = {"identify": {"vectors": "unused.bin"}, "run": {"stages": ["tokenize", "scan"]}}
            run_pipeline(tiny_config(model, corpus, tmp_path / name, **sections))
        runs.append(RunDir(str(tmp_path / name)))
    notes = [e["notes"] for e in runs[1].manifest("scan").values() if e["step"] == "accumulate"]
    assert {"batch_halved_to": 2} in notes
    assert not any(e["notes"] for e in runs[0].manifest("scan").values() if e["step"] == "accumulate")
    for row, other in zip(*(r.table("statistics").to_pylist() for r in runs), strict=True):
        assert row["neuron"] == other["neuron"]
        assert row["max"] == pytest.approx(other["max"], rel=1e-5, abs=1e-6)
        assert row["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-5)


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    assert memory.out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 GB"))
    assert memory.out_of_memory(MemoryError())
    assert not memory.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_states_that_do_not_fit_are_done_in_groups_of_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, corpus = save_model("gpt2", tmp_path / "model"), write_corpus(tmp_path / "text.jsonl", 60)
    sections = {"identify": {"vectors": "unused.bin"}, "run": {"stages": ["tokenize", "scan"]}}
    run_pipeline(tiny_config(model, corpus, tmp_path / "whole", **sections))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1.0)
    with caplog.at_level(logging.WARNING):
        run_pipeline(tiny_config(model, corpus, tmp_path / "groups", **sections))
    whole, groups = RunDir(str(tmp_path / "whole")), RunDir(str(tmp_path / "groups"))
    assert tables_equal(whole, groups, NAMES)
    assert any("3 groups, at 2.0 times the forward passes" in record.getMessage() for record in caplog.records)
    assert all(e["notes"]["passes"] == 3 for e in groups.manifest("scan").values() if e["step"] == "accumulate")


def test_layers_are_grouped_by_the_device_they_lie_on() -> None:
    sizes = {0: 40, 1: 40, 2: 40, 3: 40}
    devices = {0: "cuda:0", 1: "cuda:0", 2: "cuda:1", 3: "cuda:1"}
    assert memory.layer_groups(sizes, devices, lambda _: 200) == [[0, 1, 2, 3]]
    assert memory.layer_groups(sizes, devices, lambda _: 100) == [[0], [1, 2], [3]]
    assert memory.layer_groups(sizes, devices, lambda _: 1) == [[0], [1], [2], [3]]

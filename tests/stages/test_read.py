"""A run over recorded activations against the run over the corpus that they were recorded from, and what else may come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from raylabel.config import RunConfig, build_config
from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput, RunFailed
from raylabel.report.status import stage_rows
from raylabel.stages.check import estimate
from raylabel.stages.read import imported_labels
from raylabel.store.rundir import RunDir
from tests.recordings import record, write_rows
from tests.rundirs import differing
from tests.runs import tiny_config, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a sample each: a recorded text is then a document."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl", 120, longest=5)


@pytest.fixture(scope="module")
def scanned(tiny_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("scanned") / "run"
    sections: dict[str, Any] = {"subject": {"neurons": [0, 8], "context": 32}, "exemplars": {"sink_factor": 1e9}}
    run_pipeline(tiny_config(tiny_model, corpus, out, **sections))
    return RunDir(str(out))


@pytest.fixture(scope="module")
def recording(scanned: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(record(scanned, ids=False, signs=(1,)), tmp_path_factory.mktemp("recording") / "acts.jsonl")


def recorded_config(model: Path | str, path: Path, out: Path, **sections: dict[str, Any]) -> RunConfig:
    exemplars = {"source": "recorded", "recorded": {"path": str(path)}, **sections.pop("exemplars", {})}
    return tiny_config(Path(model), path, out, exemplars=exemplars, **sections)


@pytest.fixture(scope="module")
def read(tiny_model: Path, recording: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("read") / "run"
    run_pipeline(recorded_config(tiny_model, recording, out, subject={"neurons": [0, 8]}))
    return RunDir(str(out))


def tops(run: RunDir) -> dict[Any, list[Any]]:
    """Each unit's top exemplars by text, but for those within rounding of its last one; each with its activation."""
    found: dict[Any, list[Any]] = {}
    texts = {row["sample"]: (row["text"], row["token_ids"]) for row in run.table("samples").to_pylist()}
    for row in run.table("exemplars", filter=pc.field("sampling") == "top").to_pylist():
        key = tuple(row[name] for name in ("layer", "neuron", "polarity", "split"))
        shown = [row[name] for name in ("start", "position", "mat_ties", "tokens", "token_ids", "site")]
        found.setdefault(key, []).append((texts[row["sample"]], *shown, row["activation"]))
    kept = {key: [row for row in rows if row[-1] > rows[-1][-1] + 1e-3] for key, rows in found.items()}
    return {key: sorted(rows) for key, rows in kept.items()}


def test_a_recording_gives_the_exemplars_of_the_scan_that_it_was_made_from(scanned: RunDir, read: RunDir) -> None:
    wanted, found = tops(scanned), tops(read)
    assert wanted.keys() == found.keys() and len(wanted) >= 30
    for key, rows in wanted.items():
        assert [row[:-1] for row in found[key]] == [row[:-1] for row in rows]
        assert [row[-1] for row in found[key]] == pytest.approx([row[-1] for row in rows], abs=1e-4)
    assert sum(map(len, wanted.values())) > 60
    firsts = [run.table("exemplars", filter=(pc.field("sampling") == "top") & (pc.field("rank") == 0)) for run in (scanned, read)]
    for a, b in zip(*(table.to_pylist() for table in firsts), strict=True):
        assert a["tokens"] != b["tokens"] or a["activations"] == pytest.approx(b["activations"], abs=1e-4)
    for name in ("max", "top_mean"):
        a, b = (run.table("statistics").column(name).to_pylist() for run in (scanned, read))
        # A unit that is active in nothing recorded has no top.
        assert all(x is None or x <= 0 for x, y in zip(a, b, strict=True) if y is None)
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if y is not None]
        assert len(pairs) > 10 and [x for x, _ in pairs] == pytest.approx([y for _, y in pairs], rel=1e-5)
    assert set(read.table("samples").column("round_trips").to_pylist()) == {True}


def test_verify_reproduces_a_recording(scanned: RunDir, read: RunDir) -> None:
    found = read.table("verifications")
    assert found.num_rows > 3
    assert set(found.column("reproduced").to_pylist()) == {1.0}
    assert set(found.column("note").to_pylist()) == {None}
    assert read.table("results").num_rows == scanned.table("results").num_rows
    assert read.table("failures").num_rows == 0
    assert read.controls.table("results").num_rows == 0
    names = ["read", "identify", "verify", "optimize", "describe", "score", "results"]
    assert [row["stage"] for row in stage_rows(read)] == names
    assert {row["state"] for row in stage_rows(read)} == {"done"}


@pytest.mark.slow
def test_a_run_on_ray_gives_the_same_tables(read: RunDir, tiny_model: Path, recording: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"subject": {"neurons": [0, 8]}, "run": {"address": "local", "workers": 2}}
    run_pipeline(recorded_config(tiny_model, recording, tmp_path / "run", **sections))
    assert not differing(read, RunDir(str(tmp_path / "run")))


def test_small_pieces_give_the_same_exemplars(
    read: RunDir, tiny_model: Path, recording: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = recording.stat().st_size // 5
    monkeypatch.setattr("raylabel.sources.plain.line_pieces.__defaults__", (size,))
    monkeypatch.setattr("raylabel.sources.recorded.PIECE_BYTES", size)
    run_pipeline(recorded_config(tiny_model, recording, tmp_path / "run", subject={"neurons": [0, 8]}, run={"stages": ["read"]}))
    other = RunDir(str(tmp_path / "run"))
    plan = other.plan("read")
    assert plan is not None and sum(unit.step == "pieces" for unit in plan.units) >= 5
    found, wanted = tops(other), tops(read)
    assert found == wanted


def test_without_a_model_units_are_identified_and_verify_is_skipped_aloud(recording: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = recorded_config("none", recording, tmp_path / "run", subject={"neurons": [0, 4], "layers": [1]})
    run_pipeline(config, said.append)
    run = RunDir(str(tmp_path / "run"))
    assert any(line.startswith("verify: skipped") for line in said)
    rows = run.table("results").to_pylist()
    assert [(row["layer"], row["neuron"]) for row in rows] == [(1, n) for n in range(4)]
    assert {row["verified"] for row in rows} == {None} and {row["retention"] for row in rows} == {None}
    assert all(row["label"] for row in rows if row["mats"]) and any(row["label"] for row in rows)
    with pytest.raises(BadInput, match="verify measures with a model"):
        run_pipeline(build_config({**config.model_dump(), "run": {**config.run.model_dump(), "stages": ["verify"]}}))


def test_the_same_command_again_does_nothing_and_a_changed_file_everything(recording: Path, tmp_path: Path) -> None:
    path = tmp_path / "acts.jsonl"
    path.write_bytes(recording.read_bytes())
    config = recorded_config("none", path, tmp_path / "run", identify={"vectors": "train"})
    run_pipeline(config)
    said: list[str] = []
    run_pipeline(config, said.append)
    names = ("read", "identify", "optimize", "describe", "score", "results")
    assert [line for line in said if "already done" in line] == [f"{name}: already done" for name in names]
    with path.open("a") as file:
        file.write(json.dumps({"layer": 7, "neuron": 3, "tokens": ["a", " b"], "activations": [0, 1]}) + "\n{\n")
    report = run_pipeline(config)
    run = RunDir(str(tmp_path / "run"))
    assert run.table("results", 7).column("status").to_pylist() == ["too_few"]
    assert report.failures == 1
    [failure] = run.table("failures").to_pylist()
    assert "acts.jsonl, line" in failure["reason"] and "not valid JSON" in failure["reason"]


def test_a_run_directory_may_change_its_source(
    tiny_model: Path, corpus: Path, recording: Path, read: RunDir, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run_pipeline(tiny_config(tiny_model, corpus, out, subject={"neurons": [0, 8]}))
    with pytest.raises(BadInput, match="identify needs read"):
        run_pipeline(recorded_config(tiny_model, recording, out, subject={"neurons": [0, 8]}, run={"stages": ["identify"]}))
    run_pipeline(recorded_config(tiny_model, recording, out, subject={"neurons": [0, 8]}))
    assert not differing(read, RunDir(str(out)))
    run_pipeline(tiny_config(tiny_model, corpus, out, subject={"neurons": [0, 8]}))
    assert RunDir(str(out)).controls.table("results").num_rows == 15


def test_units_that_the_model_has_not_and_recordings_of_another_model_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    good = {"layer": 0, "neuron": 1, "tokens": ["the", " fox"], "activations": [0.0, 1.0]}
    path = write_rows([good, {**good, "neuron": 4_000}, {**good, "layer": 9}], tmp_path / "a.jsonl")
    run_pipeline(recorded_config(tiny_model, path, tmp_path / "run"))
    failures = RunDir(str(tmp_path / "run")).table("failures").to_pylist()
    assert [(f["layer"], f["neuron"]) for f in failures] == [(0, 4_000), (9, 1)]
    assert all("no such unit in" in f["reason"] and "subject.model: none" in f["reason"] for f in failures)
    many = [good, *({**good, "neuron": 4_000 + n} for n in range(20))]
    with pytest.raises(RunFailed, match="read: 20 of 1 neurons failed"):
        run_pipeline(recorded_config(tiny_model, write_rows(many, tmp_path / "c.jsonl"), tmp_path / "many"))
    path = write_rows([{**good, "tokens": ["日本", "語"]}], tmp_path / "b.jsonl")
    with pytest.raises(BadInput, match=r"has only . of . recorded tokens"):
        run_pipeline(recorded_config(tiny_model, path, tmp_path / "other"))


@pytest.mark.parametrize("source", ["recorded", "neuroscope", "neuronpedia"])
def test_controls_that_nothing_can_be_scanned_for_are_left_out_aloud(source: str, recording: Path, tmp_path: Path) -> None:
    reads = {
        "recorded": {"path": str(recording)}, "neuroscope": {"model": "gelu-1l", "url": "http://127.0.0.1:9"},
        "neuronpedia": {"model": "m", "sources": ["0-x"], "url": "http://127.0.0.1:9"},
    }  # fmt: skip
    tree: dict[str, Any] = {
        "subject": {"model": "none", "layers": [0], "neurons": [0, 2]}, "exemplars": {"source": source, source: reads[source]},
        "controls": {"decoys": 5, "nulls": 0, "planted": 3}, "run": {"out": str(tmp_path / "run"), "address": "inline"},
    }  # fmt: skip
    line = f"none: decoys: 5, planted: 3 left out, exemplars.source is {source} and there is no corpus to scan them on"
    assert estimate(build_config(tree))["controls"] == line
    assert estimate(build_config({**tree, "controls": {"decoys": 0}}))["controls"] == line.replace(
        "decoys: 5, planted: 3 left out, ", ""
    )
    if source == "recorded":
        said: list[str] = []
        run_pipeline(build_config(tree), said.append)
        assert said.count(f"controls: {line}") == 1
        run = RunDir(str(tmp_path / "run"))
        assert not any(run.controls.table(name).num_rows for name in ("exemplars", "candidates", "results"))
        assert run.table("calibration").num_rows == 0


def test_check_says_what_would_be_read(recording: Path, tmp_path: Path) -> None:
    found = estimate(recorded_config("none", recording, tmp_path / "run", subject={"neurons": [0, 4], "layers": [1]}))
    assert found["bytes"] == recording.stat().st_size and found["files"] == 1 and found["requests"] == 0
    assert found["units"] == 4 and found["stages"] == "read, identify, optimize, describe, score, results"
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="gives nothing to scan"):
        estimate(build_config({"subject": {"model": "none"}, "exemplars": {"corpus": {"path": str(recording)}}}))
    with pytest.raises(BadInput, match=r"exemplars\.recorded\.path is required"):
        estimate(build_config({"subject": {"model": "none"}, "exemplars": {"source": "recorded"}}))


def test_no_labels_come_along_with_plain_tables(read: RunDir) -> None:
    assert imported_labels(read, 0).num_rows == 0

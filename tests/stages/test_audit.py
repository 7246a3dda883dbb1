"""audit: true labels of planted units above wrong ones, beside the run's own; what is not of the run is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raylabel.engine.pipeline import run_pipeline
from raylabel.store.rundir import RunDir
from tests.conftest import Command
from tests.runs import tiny_config


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("audit") / "run"
    sections = {
        "subject": {"neurons": [0, 8]}, "controls": {"decoys": 3}, "exemplars": {"top": 8},
        "score": {"scorers": ["embedding"], "window": 8, "negatives": 6},
        "run": {"stages": ["tokenize", "scan", "identify", "verify", "score", "results"]},
    }  # fmt: skip
    run_pipeline(tiny_config(tiny_model, tiny_corpus, out, **sections))
    return RunDir(str(out))


def mats(run: RunDir) -> dict[tuple[int, int], str]:
    """What each unit peaks on."""
    rows = [r for r in run.table("candidates").to_pylist() if r["polarity"] == 1 and r["mat_words"]]
    return {(r["layer"], r["neuron"]): r["mat_words"][0] for r in rows if r["mat_words"][0].isalpha()}


def test_labels_are_scored_worst_first_beside_ours(run: RunDir, tmp_path: Path, command: Command) -> None:
    words = mats(run)
    keys = list(words)[:6]
    assert len(keys) == 6
    path, out = tmp_path / "labels.jsonl", tmp_path / "audit.csv"
    rows = [{"layer": layer, "neuron": n, "label": words[layer, n]} for layer, n in keys]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    before = sorted(p for p in Path(run.files.root).rglob("*"))
    code, printed, _ = command("audit", run.files.root, "--labels", path, "--json", "--out", out)
    assert code == 0 and sorted(p for p in Path(run.files.root).rglob("*")) == before
    found = json.loads(printed)
    assert not found["failures"] and len(found["rows"]) == 6
    corrected = [r["corrected"] for r in found["rows"] if r["corrected"] is not None]
    assert corrected == sorted(corrected) and [r["corrected"] for r in found["rows"]][: len(corrected)] == corrected
    for r in found["rows"]:
        assert r["label"] == words[r["layer"], r["neuron"]] and r["scorer"] == "embedding" and r["n"] >= 0
        assert r["corrected"] is None or r["corrected"] == pytest.approx((r["value"] - r["shuffled"]) / (1 - r["shuffled"]))
    assert out.read_text().startswith("layer,neuron,polarity,label,scorer,value")
    code, printed, _ = command("audit", run.files.root, "--labels", path, "--limit", 2)
    assert code == 0 and "worst first" in printed


def test_ours_is_what_the_run_says(run: RunDir, tmp_path: Path, command: Command) -> None:
    scores = [r for r in run.table("scores").to_pylist() if r["corrected"] is not None]
    labels = {(r["layer"], r["neuron"], r["polarity"]): r["label"] for r in run.table("results").to_pylist()}
    some = scores[:5]
    path = tmp_path / "ours.jsonl"
    names = ("layer", "neuron", "polarity")
    rows = [{**{n: r[n] for n in names}, "label": labels[tuple(r[n] for n in names)]} for r in some]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = json.loads(command("audit", run.files.root, "--labels", path, "--json")[1])["rows"]
    of = {(r["layer"], r["neuron"], r["polarity"]): r for r in found}
    for r in some:
        row = of[r["layer"], r["neuron"], r["polarity"]]
        assert row["our_label"] == row["label"] and row["our_corrected"] == pytest.approx(r["corrected"], abs=1e-5)
        assert row["value"] == row["our_value"] == pytest.approx(r["value"], abs=1e-5)


def test_what_is_not_of_the_run_is_listed(run: RunDir, tmp_path: Path, command: Command) -> None:
    layer, neuron = next(iter(mats(run)))
    good = {"layer": layer, "neuron": neuron, "label": "animals"}
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, {**good, "layer": 99}, {**good, "neuron": 5000}, {"layer": 0})))
    code, printed, err = command("audit", run.files.root, "--labels", path, "--json")
    assert code == 3 and len(json.loads(printed)["rows"]) == 1
    assert "labels.jsonl, line 2: the run has no layer 99" in err and "line 3: the run has no exemplars" in err
    assert "line 4: no key `neuron`" in err
    path.write_text(json.dumps({**good, "layer": 99}))
    code, _, err = command("audit", run.files.root, "--labels", path)
    assert code == 2 and "none of them is about a unit" in err and "line 1: the run has no layer 99" in err
    assert command("audit", tmp_path, "--labels", path)[0] == 2
    assert command("audit", run.files.root, "--labels", path, "--scorers", "luck")[0] == 2


def test_a_card_shows_the_scores(run: RunDir, command: Command) -> None:
    r = run.table("scores").to_pylist()[0]
    unit = [part for name in ("layer", "neuron", "polarity") for part in (f"--{name}", r[name])]
    code, printed, _ = command("show", run.files.root, *unit)
    assert code == 0 and "labels tested on the score split" in printed and "embedding" in printed

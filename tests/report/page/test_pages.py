"""The report's data, read back: what is packed is what the run holds; nearness against brute force; runs with less."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from raylabel.errors import BadInput
from raylabel.report.page import write, write_report
from raylabel.report.page.links import links
from raylabel.report.page.near import by_cofiring, by_direction, by_logits
from raylabel.report.page.packing import pack_columns, unpack, unpack_columns, write_packed
from raylabel.report.page.plots import nice
from raylabel.report.page.write import output_directions
from raylabel.store.rundir import RunDir
from tests.conftest import Command
from tests.report.dressed import HOSTILE, dress


def test_columns_come_back_from_their_file(tmp_path: Path) -> None:
    columns = {
        "a": np.array([1.5, np.nan, -2], np.float32),
        "b": np.array([0, -1, 2**31 - 1], np.int32),
        "c": np.array([0, 255, 7], np.uint8),
        "d": ["x", "", "</script>é"],
    }
    write_packed(tmp_path, "some", pack_columns(3, columns))
    text = (tmp_path / "some.js").read_text()
    assert "</script>" not in text and text.isascii()
    found = unpack_columns(unpack(text))
    for name in "abc":
        np.testing.assert_array_equal(found[name], columns[name])
    assert found["d"] == columns["d"]
    with pytest.raises(ValueError, match="has 2 of 3 rows"):
        pack_columns(3, {"d": ["x", "y"]})


def test_several_processes_write_what_one_does(finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "MANY", 1)
    found = []
    for workers in (1, 2):
        folder = write.write_report(finished, tmp_path / str(workers), workers).parent
        found.append({str(file.relative_to(folder)): file.read_bytes() for file in (folder / "data").rglob("*.js")})
    assert found[0] == found[1] and sum("unit-" in name for name in found[0]) == 3


def units_of(n: int, layers: int = 2) -> np.ndarray:
    return np.array([(layer, i, p) for layer in range(layers) for i in range(n) for p in (1, -1)])


def test_near_by_direction_is_brute_force() -> None:
    draw = np.random.default_rng(0)
    units = units_of(6)
    directions = {layer: draw.normal(size=(6, 5)).astype(np.float32) for layer in (0, 1)}
    near = by_direction(units, directions, 3)
    vectors = np.array([p * directions[layer][i] / np.linalg.norm(directions[layer][i]) for layer, i, p in units])
    for row, unit in enumerate(units):
        cosines = [
            (float(vectors[row] @ vectors[other]), other) for other, u in enumerate(units) if tuple(u[:2]) != tuple(unit[:2])
        ]
        best = sorted((c for c in cosines if c[0] > 0), key=lambda c: -c[0])[:3]
        kept = [i for i in near.index[row].tolist() if i >= 0]
        assert kept == [other for _, other in best]
        assert near.value[row][: len(best)] == pytest.approx([c for c, _ in best], abs=1e-5)


def test_near_by_logits_and_by_firing_together() -> None:
    units = np.array([(0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 0, 1)])
    up = [
        [{"token": "a", "value": 3.0}],
        [{"token": "a", "value": 1.0}, {"token": "b", "value": 1.0}],
        [{"token": "c", "value": 1.0}],
        None,
    ]
    near = by_logits(units, up, [None] * 4, 2)
    assert near.index[0].tolist() == [1, -1] and near.value[0, 0] == pytest.approx(1 / np.sqrt(2))
    assert near.index[3].tolist() == [-1, -1]
    which = np.array([0, 0, 0, 0, 1, 1, 1, 2, 3, 3])
    samples = np.array([1, 2, 3, 4, 1, 2, 9, 1, 3, 4])
    places = np.array([5, 5, 5, 5, 5, 6, 5, 5, 5, 5])
    near = by_cofiring(units, which, samples, places, 3)
    assert near.index[0].tolist() == [1, 3, -1]
    assert near.value[0, :2].tolist() == [0.5, 0.5]
    assert near.second is not None and near.second[0].tolist() == [0.25, 0.5, 0.0]


def test_output_directions_are_the_models_own(finished: RunDir) -> None:
    from raylabel.config import RunConfig
    from raylabel.stages.subject import open_subject

    found = output_directions(finished)
    subject = open_subject(RunConfig.model_validate(finished.config), finished.resolved)
    assert found is not None and sorted(found) == list(subject.layers)
    for layer, rows in found.items():
        np.testing.assert_allclose(rows, subject.output_directions(layer).detach().numpy(), rtol=1e-6)


def test_every_unit_has_its_tree_and_no_foreign_text_lies_in_the_files(finished: RunDir, tmp_path: Path) -> None:
    run = dress(finished, tmp_path / "run")
    folder = write_report(run, tmp_path / "report").parent
    trees = {}
    for place in (folder / "data").glob("unit-*/*.js"):
        for tree in json.loads(unpack(place.read_text())):
            assert int(place.stem) == tree["neuron"] // 32 and place.parent.name == f"unit-{tree['layer']}"
            trees[tree["layer"], tree["neuron"], tree["polarity"]] = tree
    rows = {(r["layer"], r["neuron"], r["polarity"]): r for r in run.table("results").to_pylist()}
    assert set(trees) == set(rows)
    for key, row in rows.items():
        assert trees[key]["verified"] == row["verified"] and trees[key]["results"]["max"] == pytest.approx(row["max"], rel=1e-4)
        assert len(trees[key]["scores"]) == 2 and trees[key]["concept"]["auroc"] == pytest.approx(0.8)
    for place in folder.rglob("*"):
        if place.is_file():
            text = place.read_text(encoding="utf-8")
            for hostile in HOSTILE[:3]:
                assert hostile not in text, place
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert finished.config["subject"]["model"] not in page, "a path on this machine"
    assert "mean corrected score" in page and "detection" in page and "No label of this run" not in page


def test_a_run_without_labels_scores_or_controls_says_nothing_of_them(finished: RunDir, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished.files.root, root)
    run = RunDir(str(root))
    for stage, table in (("optimize", "concepts"), ("describe", "labels"), ("score", "scores")):
        run.forget_plan(stage, (table,))
    for name in ("controls", "variants", "exemplars", "calibration", "failures", "concepts", "labels", "scores"):
        shutil.rmtree(root / name)
    folder = write_report(RunDir(str(root)), tmp_path / "report").parent
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "No label of this run has been scored" in page
    assert "Units beside decoys" not in page and "Calibration" not in page and "concepts borne out" not in page
    some = json.loads(unpack(next((folder / "data").glob("unit-0/*.js")).read_text()))
    assert all(tree["exemplars"] == [] and "swaps" not in tree and "scores" not in tree for tree in some)


def test_the_command(finished: RunDir, tmp_path: Path, command: Command) -> None:
    code, out, _ = command("report", finished.files.url, "--out", tmp_path / "r")
    assert code == 0 and out.strip() == str(tmp_path / "r" / "index.html")
    code, again, _ = command("report", finished.files.url, "--out", tmp_path / "r")
    assert (code, again) == (0, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    code, _, err = command("report", finished.files.url, "--out", tmp_path / "full")
    assert code == 2 and "holds something else" in err and len(err.splitlines()) == 1
    code, _, err = command("report", tmp_path / "none", "--out", tmp_path / "x")
    assert code == 2 and "not a run directory" in err
    code, _, err = command("report", "s3://bucket/run")
    assert code == 2 and "--out" in err


def test_a_run_that_is_not_finished_is_refused(finished: RunDir, tmp_path: Path) -> None:
    shutil.copytree(finished.files.root, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "results")
    with pytest.raises(BadInput, match="no results yet"):
        write_report(RunDir(str(tmp_path / "run")), tmp_path / "report")


def test_links_are_there_for_models_that_are_known() -> None:
    def found(model: str, **more: object) -> list[str]:
        subject = {"model": model, "latents": None, "site": "mlp_post", **more}
        exemplars = {"source": "corpus", "neuroscope": {"model": None}, "neuronpedia": {"model": None, "sources": []}}
        return [link["url"] for link in links({"subject": subject, "exemplars": exemplars}, {"site": subject["site"]})]

    both = ["https://neuroscope.io/gpt2-small/{layer}/{neuron}.html", "https://www.neuronpedia.org/gpt2-small/{layer}/{neuron}"]
    assert found("gpt2") == both == found("openai-community/gpt2")
    assert found("NeelNanda/SoLU_8L_v21_old") == ["https://neuroscope.io/solu-8l-pile/{layer}/{neuron}.html"]
    assert found("gpt2", site="resid_post") == [] and found("gpt2", latents="x") == [] and found("demo") == []


def test_ticks_are_round() -> None:
    assert nice(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice(-0.1, 0.9)[0] == 0.0 and nice(2, 2) == [2]

"""The bulk layout read back: every line's keys and types as documented, and the run's own values in them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from raylabel.config import RunConfig, build_config
from raylabel.engine.pipeline import run_pipeline
from raylabel.report.neuronpedia import ACTIVATION, EXPLANATION, FEATURE, export_neuronpedia, model_id, source_id
from raylabel.sources import neuronpedia
from raylabel.sources.records import Record
from raylabel.stages.read import imported_labels
from raylabel.store.rundir import RunDir
from tests.conftest import Command
from tests.report.dressed import dress

KEYS = {"features": FEATURE, "activations": ACTIVATION, "explanations": EXPLANATION}
STRINGS = ("modelId", "layer", "index", "id", "creatorId", "authorId", "dataSource", "description", "typeName", "hookName")


def read(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """source -> folder -> lines."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for place in sorted(folder.rglob("batch-*.jsonl.gz")):
        assert re.fullmatch(r"batch-\d+\.jsonl\.gz", place.name)
        model, source, kind = place.relative_to(folder).parts[:3]
        lines = [json.loads(line) for line in gzip.decompress(place.read_bytes()).decode().split("\n") if line]
        assert all(line["modelId"] == model and line["layer"] == source for line in lines)
        found.setdefault(source, {}).setdefault(kind, []).extend(lines)
    return found


@pytest.fixture(scope="module")
def run(finished: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return dress(finished, tmp_path_factory.mktemp("pedia") / "run")


@pytest.fixture(scope="module")
def exported(run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bulk"
    assert export_neuronpedia(run, out) == run.table("results").num_rows
    return out


def test_all_lines_have_the_documented_keys_and_types(exported: Path) -> None:
    for folders in read(exported).values():
        assert set(folders) == set(KEYS)
        for kind, lines in folders.items():
            for line in lines:
                assert tuple(sorted(line)) == tuple(sorted(KEYS[kind]))
                assert all(isinstance(line[name], str) for name in STRINGS if name in line)
                assert "\0" not in json.dumps(line, ensure_ascii=False)
                if "id" in line:
                    assert re.fullmatch(r"c[0-9a-z]{24}", line["id"])
    ids = [line["id"] for folders in read(exported).values() for lines in folders.values() for line in lines if "id" in line]
    assert len(ids) == len(set(ids))


def test_the_values_are_the_runs(run: RunDir, exported: Path) -> None:
    sources = read(exported)
    site = run.resolved["site"]
    for row in run.table("results").to_pylist():
        source, group = source_id(row["layer"], site, row["polarity"])
        folders = sources[source]
        feature = next(line for line in folders["features"] if line["index"] == str(row["neuron"]))
        assert feature["sourceSetName"] == group
        assert feature["maxActApprox"] == pytest.approx(row["max"] or 0.0)
        said = [line["description"] for line in folders["explanations"] if line["index"] == str(row["neuron"])]
        assert said == [row["label"].replace("\0", "\ufffd")]
    for source, folders in sources.items():
        layer = int(source.split("-")[0])
        wanted = [e for e in run.table("exemplars", layer).to_pylist() if e["sampling"] != "random"]
        wanted = [e for e in wanted if source_id(layer, site, e["polarity"])[0] == source]
        assert len(folders["activations"]) == len(wanted)
        for line, row in zip(folders["activations"], wanted, strict=True):
            assert line["index"] == str(row["neuron"])
            assert line["tokens"] == [t.replace("\0", "\ufffd") for t in row["tokens"]]
            assert line["values"] == [0.0 if v > row["activation"] else v for v in row["activations"]]
            assert len(line["tokens"]) == len(line["values"])
            assert line["values"][line["maxValueTokenIndex"]] == pytest.approx(line["maxValue"])


def imported(exported: Path, source: str, out: Path, **exemplars: Any) -> RunConfig:
    """A configuration that takes a source of an export in."""
    [model] = [place.name for place in exported.iterdir()]
    site = {"model": model, "sources": [source], "url": str(exported)}
    return build_config({
        "subject": {"model": "none"}, "exemplars": {"source": "neuronpedia", "neuronpedia": site, **exemplars},
        "identify": {"vectors": "unused.bin"}, "run": {"out": str(out), "address": "inline", "stages": ["fetch"]},
    })  # fmt: skip


def storable(text: str) -> str:
    return text.replace("\0", "\ufffd")


def test_all_lines_of_a_file_have_the_same_keys_in_the_same_order(exported: Path) -> None:
    for place in exported.rglob("*.jsonl.gz"):
        lines = gzip.decompress(place.read_bytes()).decode().split("\n")
        assert len({tuple(json.loads(line)) for line in lines if line}) == 1


def test_the_own_importer_reads_the_same_back(run: RunDir, exported: Path, tmp_path: Path) -> None:
    site = run.resolved["site"]
    results = {(r["layer"], r["neuron"], r["polarity"]): r for r in run.table("results").to_pylist()}
    numbers = {(r["layer"], r["neuron"], r["polarity"]): r for r in run.table("statistics").to_pylist()}
    exemplars: dict[Any, list[Any]] = {}
    for row in run.table("exemplars").to_pylist():
        if row["sampling"] != "random":
            exemplars.setdefault(tuple(row[name] for name in ("layer", "neuron", "polarity")), []).append(row)
    seen = 0
    for layer, polarity in sorted({(at, sign) for at, _, sign in results}):
        config = imported(exported, source_id(layer, site, polarity)[0], tmp_path)
        texts: dict[int, list[Any]] = {}
        for piece in neuronpedia.pieces(config):
            for record in neuronpedia.records(config, piece):
                assert isinstance(record, Record) and record.layer == layer
                key = layer, record.neuron, polarity
                texts.setdefault(record.neuron, []).extend(record.texts)
                for label in record.labels:
                    assert label.label == " ".join(storable(results[key]["label"]).split())
                    seen += 1
                for name in ("logits_up", "logits_down"):
                    if name in record.statistics:
                        wanted = [(storable(t["token"]), t["value"]) for t in numbers[key][name]]
                        assert record.statistics[name] == wanted
        for neuron, found in texts.items():
            wanted = exemplars.get((layer, neuron, polarity), [])
            assert len(found) == len(wanted)
            for text, row in zip(found, wanted, strict=True):
                assert text.tokens == [storable(t) for t in row["tokens"]]
                assert text.activations == [0.0 if v > row["activation"] else v for v in row["activations"]]
                assert (text.peak, text.sampling) == (row["position"], "top" if row["sampling"] == "top" else None)
    assert seen == sum(bool(" ".join(storable(r["label"]).split())) for r in results.values())


def test_a_run_over_an_export_has_its_exemplars_and_labels(finished: RunDir, tmp_path: Path) -> None:
    export_neuronpedia(finished, tmp_path / "bulk")
    source = source_id(1, finished.resolved["site"], 1)[0]
    run_pipeline(imported(tmp_path / "bulk", source, tmp_path / "run", top=60, before=200, after=200))
    again = RunDir(str(tmp_path / "run"))
    assert again.table("failures").num_rows == 0
    keys = ("neuron", "activation", "position", "tokens")

    def shown(run: RunDir) -> set[Any]:
        """Its positive top exemplars of layer 1."""
        rows = run.table("exemplars", 1).to_pylist()
        return {
            tuple(tuple(row[k]) if k == "tokens" else row[k] for k in keys)
            for row in rows if (row["sampling"], row["polarity"]) == ("top", 1)
        }  # fmt: skip

    assert shown(finished) and shown(finished) <= shown(again)
    said = {r["neuron"]: r["label"] for r in finished.table("results", 1).to_pylist() if r["polarity"] == 1 and r["label"]}
    labels = {row["neuron"]: row["label"] for row in imported_labels(again, 1).to_pylist()}
    assert labels and labels == {neuron: " ".join(label.split()) for neuron, label in said.items()}


def test_the_same_run_gives_the_same_bytes(run: RunDir, exported: Path, tmp_path: Path) -> None:
    export_neuronpedia(run, tmp_path / "again")
    files = [place.relative_to(exported) for place in exported.rglob("*.gz")]
    assert files and all((exported / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)


def test_the_command_and_a_folder_that_is_in_use(run: RunDir, tmp_path: Path, command: Command) -> None:
    code, out, _ = command("export", run.files.url, "--to", "neuronpedia", "--out", tmp_path / "bulk")
    assert code == 0 and f"{run.table('results').num_rows} units" in out
    code, _, err = command("export", run.files.url, "--to", "neuronpedia", "--out", tmp_path / "bulk")
    assert code == 2 and "give a new folder" in err


def test_names() -> None:
    assert (
        model_id("/models/My Model") == "my-model"
        and model_id("EleutherAI/pythia-70m") == "pythia-70m"
        and model_id("??") == "model"
    )
    assert source_id(3, "mlp_post", 1) == ("3-raylabel-mlp-post", "raylabel-mlp-post")
    assert source_id(3, "mlp_post", -1)[0] == "3-raylabel-mlp-post__low"
    assert source_id(3, "mlp_post", -2)[0] == "3-raylabel-mlp-post__low-gate0"
    assert source_id(3, "mlp_post", 2)[0] == "3-raylabel-mlp-post__gate0"

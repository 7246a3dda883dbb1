"""The commands: exit codes, one line of complaint, one JSON document, and a run that a signal stops keeps what it has."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from raylabel.cli import run_command
from raylabel.store.lock import locked
from raylabel.store.rundir import RunDir
from tests.conftest import Command
from tests.rundirs import differing
from tests.runs import tiny_config

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("demo", "run", "check", "status", "show", "export")


@pytest.fixture
def tree(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """The plain values of a small configuration, to change and to write with `write`."""
    config = tiny_config(tiny_model, tiny_corpus, tmp_path / "run", subject={"neurons": [0, 8]})
    return config.model_dump(mode="json", exclude_unset=True)


@pytest.fixture
def copied(finished: RunDir, tmp_path: Path) -> RunDir:
    shutil.copytree(finished.files.root, tmp_path / "run")
    return RunDir(str(tmp_path / "run"))


def write(tree: dict[str, Any], folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that holds the words."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("raylabel: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


# help and usage


def test_every_command_explains_itself(command: Command) -> None:
    code, out, _ = command()
    assert code == 0
    assert all(name in out for name in COMMANDS)
    for name in COMMANDS:
        code, out, err = command(name, "--help")
        assert (code, err) == (0, "")
        assert "Usage" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["bogus"], "bogus"),
        (["run"], "CONFIG.yaml"),
        (["show"], "RUN"),
        (["run", "x.yaml", "--bogus"], "--bogus"),
        (["show", "x", "--layer", "one"], "--layer"),
        (["export", "x", "--out", "y"], "--to"),
    ],
    ids=str,
)
def test_wrong_usage_is_bad_input(command: Command, arguments: list[str], word: str) -> None:
    refused(command(*arguments), word)


# bad input


BAD: list[tuple[str, dict[str, Any], list[str]]] = [
    ("unknown key", {"verify": {"synonims": 3}}, ["verify.synonims", "verify.synonyms"]),
    ("missing corpus", {"exemplars": {"corpus": {"path": "missing.txt"}}}, ["exemplars.corpus.path", "missing.txt"]),
    ("no corpus", {"exemplars": {"corpus": {"path": None}}}, ["exemplars.corpus.path is required"]),
    ("empty corpus", {"exemplars": {"corpus": {"path": "empty.txt"}}}, ["exemplars.corpus.path", "empty.txt"]),
    ("corpus that is not UTF-8", {"exemplars": {"corpus": {"path": "latin.txt"}}}, ["latin.txt", "UTF-8"]),
    ("corpus of another column", {"exemplars": {"corpus": {"column": "body"}}}, ["line 1", "exemplars.corpus.column"]),
    ("no model", {"subject": {"model": "./nowhere"}}, ["subject.model", "nowhere"]),
    ("model without weights", {"subject": {"model": "weightless"}}, ["subject.model", "weightless"]),
    ("layer out of range", {"subject": {"layers": [1, 3]}}, ["subject.layers: no layer 3", "0 to 2"]),
    ("neuron out of range", {"subject": {"neurons": [0, 41]}}, ["subject.neurons: no neuron 40", "0 to 39"]),
    ("no neuron", {"subject": {"neurons": [5, 5]}}, ["subject.neurons"]),
    ("unit out of range", {"subject": {"units": [[0, 1], [9, 1]]}}, ["subject.units: no layer 9"]),
    ("missing file of units", {"subject": {"units": "units.json"}}, ["subject.units: no such file: units.json"]),
    ("context beyond the model", {"subject": {"context": 33}}, ["subject.context"]),
    ("unknown device", {"subject": {"device": "warp"}}, ["subject.device"]),
    ("missing vectors", {"identify": {"vectors": "nowhere.bin"}}, ["identify.vectors", "nowhere.bin"]),
    ("unknown stage", {"run": {"stages": ["tokenize", "scna"]}}, ["run.stages", "scna", "scan"]),
    ("another source", {"exemplars": {"source": "neuroscope"}}, ["exemplars.neuroscope.model", "solu-8l-pile"]),
    ("latents", {"subject": {"latents": "x"}}, ["subject.latents"]),
]


@pytest.mark.parametrize(("changes", "words"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    capfd: pytest.CaptureFixture[str], tree: dict[str, Any], tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("dés".encode("latin-1") * 50)
    shutil.copytree(tiny_model, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    for section, values in changes.items():
        for key, value in values.items():
            inner = tree.setdefault(section, {})
            inner[key] = {**inner.get(key, {}), **value} if isinstance(value, dict) else value
    config = write(tree, tmp_path)
    for arguments in (["check", config], ["run", config]):
        if arguments[0] == "check" and ("stages" in changes.get("run", {}) or "vectors" in changes.get("identify", {})):
            continue
        capfd.readouterr()
        code = run_command([str(a) for a in arguments])
        out, err = capfd.readouterr()
        said = [line for line in err.splitlines() if line.startswith("raylabel: ")]
        assert code == 2, err
        assert len(said) == 1
        assert "Traceback" not in err
        for word in words:
            assert word in said[0]
        if arguments[0] == "check":
            refused((code, out, err))
            assert not (tmp_path / "run").exists()


def test_a_missing_or_broken_configuration(command: Command, tmp_path: Path) -> None:
    refused(command("run", tmp_path / "none.yaml"), "none.yaml: no such config file")
    (tmp_path / "bad.yaml").write_text("subject: {")
    refused(command("run", tmp_path / "bad.yaml"), "bad.yaml: not valid YAML")
    (tmp_path / "list.yaml").write_text("- subject")
    refused(command("run", tmp_path / "list.yaml", "--out", "x"), "list.yaml: expected keys and values")


@pytest.mark.parametrize(
    "override", ["verify.synonyms", "verify=3", "verify.synonyms=many", "verify.synonims=2", "verify.synonyms=["]
)
def test_a_bad_override(command: Command, tree: dict[str, Any], tmp_path: Path, override: str) -> None:
    refused(command("run", write(tree, tmp_path), "--set", override), "verify")


def test_a_name_cannot_act_on_the_terminal(command: Command, tmp_path: Path) -> None:
    refused(command("run", tmp_path / "a\x1b[31m\nb.yaml"), r"a\x1b[31m b.yaml")


def test_a_newer_run_directory(command: Command, copied: RunDir, tree: dict[str, Any], tmp_path: Path) -> None:
    path = Path(copied.files.path("run.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": "2.0"}))
    for arguments in (["run", write(tree, tmp_path)], ["show", tmp_path / "run"], ["status", tmp_path / "run"],
                      ["export", tmp_path / "run", "--to", "csv", "--out", tmp_path / "x.csv"]):  # fmt: skip
        refused(command(*arguments), "schema version 2.0", "upgrade raylabel")


def test_a_locked_run_directory(command: Command, tree: dict[str, Any], tmp_path: Path) -> None:
    with locked(RunDir(str(tmp_path / "run")).files):
        refused(command("run", write(tree, tmp_path)), f"process {os.getpid()}", "give another --out")


def test_a_folder_of_something_else_is_left_alone(command: Command, tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "run" / "samples" / "mine.parquet").write_text("mine")
    refused(command("run", write(tree, tmp_path)), "not empty and not a run directory")
    assert (tmp_path / "run" / "samples" / "mine.parquet").read_text() == "mine"
    refused(command("run", write(tree, tmp_path), "--out", tmp_path / "config.yaml"), "config.yaml", "--out")


def test_commands_on_a_folder_that_is_no_run(command: Command, finished: RunDir, tmp_path: Path) -> None:
    for arguments in (["show", tmp_path], ["status", tmp_path], ["show", tmp_path / "none", "--layer", 0, "--neuron", 0],
                      ["export", tmp_path, "--to", "csv", "--out", tmp_path / "x.csv"]):  # fmt: skip
        refused(command(*arguments), "not a run directory")
    run = finished.files.url
    refused(command("export", run, "--to", "xml", "--out", tmp_path / "x"), "--to xml", "csv, jsonl, parquet, arrow")
    refused(command("export", run, "--to", "csv", "--out", tmp_path), "--out", "folder")
    refused(command("show", run, "--layer", 7), "--layer 7")
    refused(command("show", run, "--neuron", 1), "--layer")
    refused(command("show", run, "--layer", 0, "--neuron", 39), "no unit layer 0, neuron 39")
    refused(command("show", run, "--layer", 0, "--neuron", 1, "--polarity", -1), "polarity -1")


def test_no_cluster_at_the_address(command: Command, tree: dict[str, Any], tmp_path: Path) -> None:
    code, _, err = command("run", write(tree, tmp_path), "--address", "nowhere:x")
    assert code == 2
    assert "raylabel: run.address: no Ray cluster at nowhere:x" in err


# runs and their ends


def test_run_status_show_and_export(command: Command, tree: dict[str, Any], finished: RunDir, tmp_path: Path) -> None:
    run = tmp_path / "elsewhere" / "rün"
    code, out, _ = command("run", write(tree, tmp_path), "--out", run)
    assert code == 0
    assert "units beside decoys" in out
    assert str(run) in out
    assert differing(finished, RunDir(str(run))) == []

    code, out, err = command("status", run, "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert [row["stage"] for row in rows] == [
        "tokenize", "scan", "identify", "verify", "optimize", "describe", "score", "results",
    ]  # fmt: skip
    assert {row["state"] for row in rows} == {"done"}
    assert command("status", run)[1].count("done") == len(rows) + 1
    code, _, err = command("status", run, "--verify")
    assert (code, err) == (0, "every file is what was committed\n")

    code, out, err = command("show", run, "--json", "--limit", 5)
    assert (code, err) == (0, "")
    assert len(json.loads(out, parse_constant=pytest.fail)) == 5
    assert json.loads(command("show", run, "--json", "--find", "no such words")[1]) == []
    first = json.loads(out)[0]
    code, out, err = command("show", run, "--layer", first["layer"], "--neuron", first["neuron"], "--json")
    assert (code, err) == (0, "")
    unit = json.loads(out, parse_constant=pytest.fail)
    assert unit["result"]["label"] == first["label"]
    assert unit["exemplars"]
    code, out, err = command("show", run, "--layer", first["layer"], "--neuron", first["neuron"])
    assert (code, err) == (0, "")
    assert f"layer {first['layer']}, neuron {first['neuron']}" in out
    assert "swaps" in out
    code, out, err = command("show", run, "--layer", 1)
    assert (code, err) == (0, "")
    assert "evidence" in out

    results = RunDir(str(run)).table("results")
    for kind in ("csv", "jsonl", "parquet", "arrow"):
        place = tmp_path / "made" / f"results.{kind}"
        code, out, err = command("export", run, "--to", kind, "--out", place)
        assert (code, out, err) == (0, f"{place}: 24 units\n", "")
    made = tmp_path / "made"
    assert pq.read_table(made / "results.parquet").equals(results)
    with pa.memory_map(str(made / "results.arrow")) as file:
        assert pa.ipc.open_file(file).read_all().equals(results)
    assert [json.loads(line) for line in (made / "results.jsonl").open(encoding="utf-8")] == results.to_pylist()
    with (made / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["layer"]), int(r["neuron"]), r["label"], json.loads(r["mats"] or "null")) for r in rows] == [
        (r["layer"], r["neuron"], r["label"] or "", r["mats"]) for r in results.to_pylist()
    ]


def test_check_says_what_would_run_and_runs_nothing(command: Command, tree: dict[str, Any], tmp_path: Path) -> None:
    config = write(tree, tmp_path)
    code, out, err = command("check", config, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["layers"], found["units"], found["units and polarities"], found["decoys"]) == (3, 24, 24, 15)
    assert found["tokens are"] == "counted"
    assert found["tokens"] > 1000
    code, out, err = command("check", config)
    assert (code, err) == (0, "")
    assert "forward seconds" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


def test_broken_files_are_named_with_exit_code_1(command: Command, copied: RunDir) -> None:
    name = copied.paths("candidates", 2)[0]
    path = Path(copied.files.path(name))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    code, _, err = command("status", copied.files.url, "--verify")
    assert code == 1
    assert f"broken: {name}\n" in err
    assert err.splitlines()[-1].startswith("raylabel: 1 files are not what was committed")


def test_results_that_are_not_there_yet(command: Command, tree: dict[str, Any], tmp_path: Path) -> None:
    assert command("run", write(tree, tmp_path), "--stages", "tokenize")[0] == 0
    refused(command("show", tmp_path / "run"), "no results yet")
    refused(command("export", tmp_path / "run", "--to", "csv", "--out", tmp_path / "x"), "no results yet")
    rows = json.loads(command("status", tmp_path / "run", "--json")[1])
    assert [row["state"] for row in rows] == ["done", *["not started"] * 7]


@pytest.fixture
def broken_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with one neuron, 2.5, that gives NaN."""
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("h.2.mlp.c_fc.bias"))
    weights[name][5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_neuron_that_gives_nan_is_listed_with_exit_code_3(
    command: Command, tree: dict[str, Any], broken_model: Path, tmp_path: Path
) -> None:
    tree["subject"]["model"] = str(broken_model)
    config = write(tree, tmp_path)
    code, out, _ = command("run", config)
    assert code == 3
    run = RunDir(str(tmp_path / "run"))
    failures = run.table("failures").to_pylist()
    assert f"{len(failures)} failures are listed in the table `failures`" in out
    [failure] = [f for f in failures if f["control"] is None]
    assert (failure["stage"], failure["layer"], failure["neuron"]) == ("scan", 2, 5)
    rows = run.table("results").to_pylist()
    assert [(r["layer"], r["neuron"]) for r in rows if r["status"] == "failed"] == [(2, 5)]
    assert command("run", config)[0] == 3


def test_no_failure_is_tolerated_where_none_is_allowed(
    command: Command, tree: dict[str, Any], broken_model: Path, tmp_path: Path
) -> None:
    tree["subject"]["model"] = str(broken_model)
    config = write(tree, tmp_path)
    # Again and again: that the unit is committed does not make its failure pass.
    for _ in range(2):
        code, _, err = command("run", config, "--set", "run.max_failures=0")
        assert code == 1
        assert err.splitlines()[-1].startswith("raylabel: scan: 1 of 24 neurons failed, more than run.max_failures allows (0)")
        assert not RunDir(str(tmp_path / "run")).complete("results")
    assert command("run", config)[0] == 3
    assert command("run", config, "--set", "run.max_failures=0")[0] == 1


@pytest.mark.parametrize(
    ("sent", "code", "address"),
    [(signal.SIGTERM, 143, "inline"), (signal.SIGINT, 130, "inline"), (signal.SIGTERM, 143, "local")],  # Ray handles SIGTERM
    ids=["SIGTERM", "SIGINT", "SIGTERM on Ray"],
)
def test_a_signal_ends_a_run_that_goes_on_later(
    command: Command, tree: dict[str, Any], finished: RunDir, tmp_path: Path, sent: signal.Signals, code: int, address: str
) -> None:
    config = write(tree, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "raylabel.cli", "run", str(config), "--address", address],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
        # A suite in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),
    )  # fmt: skip
    said: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if "accumulate 2/" in line:
            process.send_signal(sent)
    assert process.wait(60) == code, "".join(said)
    assert said[-1] == "raylabel: stopped; run the same command again to go on\n"
    assert "Traceback" not in "".join(said)
    run = RunDir(str(tmp_path / "run"))
    done = len(run.manifest("scan"))
    assert 3 <= done < 23
    started = {i: e["started"] for i, e in run.manifest("scan").items()}
    assert command("run", config)[0] == 0
    assert differing(finished, RunDir(run.files.url)) == []
    after = run.manifest("scan")
    assert all(after[i]["started"] == at for i, at in started.items())


def test_the_handler_of_signals_is_given_back(command: Command) -> None:
    before = signal.getsignal(signal.SIGTERM)
    command("--help")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_starts_fast() -> None:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "raylabel.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - started < 20
    # What takes seconds to import is imported by the commands that need it.
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert loaded.isdisjoint({"torch", "transformers", "ray", "pyarrow", "pandas"})

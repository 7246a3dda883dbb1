"""A cluster of several nodes: the tables of one process, and nothing of size tokens x units on its way through Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from raylabel.engine.pipeline import run_pipeline
from raylabel.store.rundir import RunDir
from tests.models.tiny import save as save_model
from tests.runs import tables_equal, tiny_config, write_corpus

ROOT = Path(__file__).parents[2]
ONLY = {"stages": ["tokenize", "scan"]}


def test_two_nodes_give_the_tables_of_one_process(tmp_path: Path) -> None:
    model, corpus = save_model("gpt2", tmp_path / "model"), write_corpus(tmp_path / "text.jsonl", 400)
    sections = {"identify": {"vectors": "unused.bin"}}
    alone = tiny_config(model, corpus, tmp_path / "alone", run=dict(ONLY), **sections)
    run_pipeline(alone)
    config = tiny_config(model, corpus, tmp_path / "nodes", run={**ONLY, "workers": 2}, **sections)
    given = tmp_path / "config.json"
    given.write_text(config.model_dump_json(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.two_nodes", str(given)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    run = RunDir(str(tmp_path / "nodes"))
    assert seen["nodes"] == 2 and seen["busy"] == 2
    assert tables_equal(RunDir(str(tmp_path / "alone")), run, ("samples", "exemplars", "statistics"))
    # 4 bytes an activation: what a scan that sent activations around would hold.
    facts = run.resolved
    tokens = sum(len(row["token_ids"]) for row in run.table("samples").to_pylist())
    assert seen["held"] < 0.25 * tokens * facts["width"] * facts["n_layers"] * 4


def test_work_without_a_model_keeps_off_machines_with_gpus_while_there_are_others(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef", encoding="utf-8")
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.labelled_nodes", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == {
        "alone": {"model": ["gpu"], "none": ["gpu"]}, "beside": {"model": ["gpu"], "none": ["cpu"]},
    }  # fmt: skip

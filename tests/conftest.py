"""What several test modules look at: a tiny model and one finished run of it, made once a session."""

from __future__ import annotations

import os

# A worker on Ray has one thread; sums round alike only where this process has one too. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest

from raylabel.cli import run_command
from raylabel.engine.pipeline import run_pipeline
from raylabel.store.rundir import RunDir
from tests.models.tiny import save
from tests.runs import tiny_config, write_corpus

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("gpt2", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl", 120)


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """An undisturbed run of all stages in this process; look, do not touch."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_pipeline(tiny_config(tiny_model, tiny_corpus, out, subject={"neurons": [0, 8]}))
    return RunDir(str(out))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call

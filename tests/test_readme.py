"""What the README shows works: snippets on a run, files it names, the command that makes API pages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import raylabel
from raylabel.store.rundir import RunDir
from tests.conftest import Command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)


def snippet(word: str) -> str:
    """The one Python snippet with a word."""
    (found,) = [text for kind, text in FENCED if kind == "python" and word in text]
    return found


def run_snippet(word: str, url: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(snippet(word).replace("runs/gpt2", url), names)
    return names


@pytest.mark.parametrize("library", ["duckdb", "polars", "pandas as pd"])
def test_duckdb_polars_and_pandas_read_a_run(
    library: str, finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library.split()[0])
    frame = run_snippet(library, finished.files.url)["frame"]
    wanted = finished.table("results").to_pandas().groupby("layer")["verified"].agg(["size", "sum"])
    assert frame["layer"].astype(int).tolist() == wanted.index.tolist()
    assert frame["units"].astype(int).tolist() == wanted["size"].tolist()
    assert frame["verified"].astype(int).tolist() == wanted["sum"].tolist()


def test_datasets_read_a_run_and_know_its_tables_by_the_card(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = run_snippet("import load_dataset", finished.files.url)["rows"]
    assert len(rows) == finished.table("results").num_rows
    assert rows["label"] == finished.table("results").column("label").to_pylist()
    copy = tmp_path / "run"
    copy.symlink_to(finished.files.root)
    # The card lies beside the tables of a copy: the run of the other tests stays as it is.
    card = tmp_path / "whole"
    card.mkdir()
    for name in ("results", "candidates", "samples"):
        (card / name).symlink_to(Path(finished.files.root) / name)
    assert command("export", finished.files.url, "--to", "card", "--out", card / "README.md")[0] == 0
    for name in ("results", "candidates", "samples"):
        found = datasets.load_dataset(str(card), name, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(found) == finished.table(name).num_rows
    code, _, err = command("export", finished.files.url, "--to", "card", "--out", card)
    assert code == 2 and "is a folder" in err


def test_the_first_two_blocks_are_the_demo_and_the_tests() -> None:
    assert FENCED[0][1].strip().endswith("raylabel demo")
    assert FENCED[1][1].strip().endswith("python -m pytest -q")


def test_files_that_are_named_are_there() -> None:
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    picture = ROOT / "raylabel" / "report" / "report.png"
    assert picture.stat().st_size <= 200_000


def test_configurations_are_accepted(tmp_path: Path) -> None:
    from raylabel.config import load_config

    for i, text in enumerate(text for kind, text in FENCED if kind == "yaml" and text.startswith(("subject:", "#"))):
        (tmp_path / f"{i}.yaml").write_text(text, encoding="utf-8")
        assert load_config(tmp_path / f"{i}.yaml").subject.model == "gpt2"


def test_pages_of_the_api_are_made_from_docstrings(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    (line,) = [line for _, text in FENCED for line in text.splitlines() if line.startswith("python -m pdoc")]
    arguments = line.replace("-o api", f"-o {tmp_path}").split()[1:]
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, capture_output=True)
    page = (tmp_path / "raylabel" / "api.html").read_text(encoding="utf-8")
    assert "active_on" in page and "The labelled units that fire" in page


def test_every_public_name_of_the_api_has_a_docstring() -> None:
    from raylabel import api

    for thing in (api.run, api.open_run, api.Run, api.UnitView):
        names = [getattr(thing, n) for n in vars(thing) if not n.startswith("_")] if isinstance(thing, type) else []
        for one in (thing, *(n for n in names if callable(n) or isinstance(n, property))):
            assert one.__doc__, one
    assert raylabel.__doc__


def test_the_card_holds_foreign_names_as_text(finished: RunDir) -> None:
    from raylabel.report.card import card

    text = card(finished)
    assert text.startswith("---\npretty_name:") and "config_name: results" in text and "<" not in text
    assert finished.config["subject"]["model"] not in text, "a path on this machine"

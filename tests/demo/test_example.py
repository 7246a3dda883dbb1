"""The example notebook runs, on a small run in the place of the built-in one."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import raylabel
from raylabel.store.rundir import RunDir

EXAMPLE = Path(raylabel.__file__).parent / "demo" / "example.ipynb"


def test_the_example_notebook_runs(finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(EXAMPLE, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished.files.root)
    monkeypatch.setenv("PYTHONPATH", str(Path(raylabel.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert "raylabel run" in shown["open"][-1]["data"]["text/html"]
    assert "layer " in shown["unit"][-1]["data"]["text/html"]
    assert "verified:" in shown["decoys"][-1]["text"]

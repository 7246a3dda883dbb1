"""The Python API: `run` a configuration, `open_run` a run directory, look at its tables and units."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from raylabel.config import RunConfig, load_config
from raylabel.errors import BadInput
from raylabel.report import notebook
from raylabel.stages.results import OPTIONAL
from raylabel.store.rundir import RunDir

if TYPE_CHECKING:
    import pandas as pd


def run(config: RunConfig | str | Path) -> Run:
    """Runs a configuration (or a YAML file of one) and opens what it made.

    Raises BadInput for what the user can mend, RunFailed where the run cannot go on.
    """
    from raylabel.engine.pipeline import run_pipeline

    if not isinstance(config, RunConfig):
        config = load_config(config)
    run_pipeline(config)
    return open_run(config.run.out)


def open_run(url: str | Path) -> Run:
    """Opens a run directory, a local path or an fsspec URL; BadInput if there is none."""
    directory = RunDir(str(url))
    parent, _, last = str(url).rstrip("/").rpartition("/")
    if last == "controls" and not directory.files.exists("run.json"):
        directory = RunDir(parent or ".", controls=True)
    directory.info  # noqa: B018  (refuses what is no run directory)
    return Run(directory)


class Run:
    """A run directory, or the controls of one."""

    def __init__(self, directory: RunDir) -> None:
        self._directory = directory

    def __repr__(self) -> str:
        return f"Run({self._directory.files.url!r})"

    def _repr_html_(self) -> str:
        return notebook.run_html(self)

    @property
    def directory(self) -> RunDir:
        """The run directory behind the tables."""
        return self._directory

    @property
    def config(self) -> RunConfig:
        """The configuration of the latest run."""
        return RunConfig.model_validate(self._directory.config)

    @property
    def controls(self) -> Run:
        """The control units of the run, in tables of the same names with the column `control`."""
        return Run(self._directory.controls)

    def table(self, name: str) -> pa.Table:
        """A whole table; per-unit tables have the column `layer`. BadInput if there is no such table."""
        return self._directory.table(name)

    def dataset(self, name: str) -> ds.Dataset:
        """A table as a dataset that is not read yet."""
        return self._directory.dataset(name)

    def feature_neurons(self) -> pd.DataFrame:
        """The verified units, strongest first.

        Columns: `layer`, `index` (the neuron), `polarity`, `average_activation` (over the neighbour variants, in the
        model's units), `normalised_activation`, `description`, `phrases`.
        """
        table = self.table("results").filter(pc.field("verified"))
        frame = table.to_pandas().rename(columns={"neuron": "index"})
        columns = ["layer", "index", "polarity", "average_activation", "normalised_activation", "description", "phrases"]
        order = ["normalised_activation", "layer", "index", "polarity"]
        frame = frame[columns].sort_values(order, ascending=[False, True, True, False])
        return frame.reset_index(drop=True)

    def active_on(self, text: str, share: float = 0.25, verified: bool = False) -> pd.DataFrame:
        """The labelled units that fire in `text`, token by token: the subject is loaded and run on it.

        A unit fires at `share` of its largest recorded activation or more; `verified` keeps verified units only. Columns:
        `position`, `token`, `layer`, `neuron`, `polarity`, `activation`, `share`, `label`, `verified`.
        """
        from raylabel.active import active_on

        return active_on(self._directory, text, share, verified)

    def unit(self, layer: int, neuron: int, polarity: int = 1) -> UnitView:
        """Everything about one unit; `polarity` as in the tables. BadInput if the run has no such unit."""
        found = {}
        condition = (pc.field("neuron") == neuron) & (pc.field("polarity") == polarity)
        for name in ("results", "statistics", "candidates", "verifications", "exemplars", "variants", *OPTIONAL):
            found[name] = self._directory.table(name, layer, filter=condition).to_pylist()
        if not any(found.values()):
            raise BadInput(f"{self._directory.files.url}: no unit layer {layer}, neuron {neuron}, polarity {polarity:+d}")
        first = {name: (rows[0] if rows else {}) for name, rows in found.items()}
        return UnitView(
            layer, neuron, polarity, first["results"], first["statistics"], first["candidates"], first["verifications"],
            found["exemplars"], found["variants"], first["concepts"], first["labels"], found["scores"],
            found["labels"],
        )  # fmt: skip


@dataclass(frozen=True)
class UnitView:
    """All rows about one unit: dicts ({} where a stage has none) or lists; `labelling` is the first label."""

    layer: int
    neuron: int
    polarity: int
    result: dict[str, Any]
    statistics: dict[str, Any]
    candidate: dict[str, Any]
    verification: dict[str, Any]
    exemplars: list[dict[str, Any]]
    variants: list[dict[str, Any]]
    concept: dict[str, Any] = field(default_factory=dict)
    labelling: dict[str, Any] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)
    labels: list[dict[str, Any]] = field(default_factory=list)

    def top(self, split: str = "explain") -> list[dict[str, Any]]:
        """Top exemplars of a split, strongest first."""
        rows = [r for r in self.exemplars if r["sampling"] == "top" and r["split"] == split]
        return sorted(rows, key=lambda r: r["rank"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))

    def _repr_html_(self) -> str:
        return notebook.unit_html(self)

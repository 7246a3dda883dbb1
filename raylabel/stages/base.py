"""What a stage is: steps of work units, and a worker for each step.

A worker's `__init__(url)` opens the run directory and loads what is heavy; its `__call__(unit)` turns one unit into an
Output. A worker made of `links` does so in several processes: each link takes the unit and the tables of the link
before it; the last one returns the Output. A worker never writes to the run directory: the engine commits its Output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from raylabel.config import RunConfig
from raylabel.sections import ControlsConfig
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Output

Key = dict[str, Any]
Payload = dict[str, pa.Table]


class Worker(Protocol):
    """Runs the units of a step, one at a time."""

    def __init__(self, url: str) -> None: ...

    def __call__(self, unit: Unit) -> Output: ...


class Chain:
    """A worker whose links run one after another in this process."""

    links: tuple[type[Any], ...] = ()

    def __init__(self, url: str) -> None:
        self._links = [link(url) for link in self.links]

    def __call__(self, unit: Unit) -> Output:
        payload: Any = {}
        for link in self._links:
            payload = link(unit, payload)
        result: Output = payload
        return result


@dataclass(frozen=True)
class Step:
    """Units of one kind.

    Attributes:
        name: of the step, unique in its stage.
        keys: one a unit.
        worker: class that runs them; a subclass of Chain runs as one Ray Data pipeline.
        divide: cuts a key in two when its unit fails; None where a unit cannot be cut, and its failure ends the run.
        blame: failure rows of a key that can be cut no further.
        model: whether the worker holds a model, and so a GPU where there is one.
        limited: whether the worker takes turns at a limiter (`raylabel.limits`).
    """

    name: str
    keys: list[Key]
    worker: type[Any]
    divide: Callable[[Key], list[Key]] | None = None
    blame: Callable[[Key], list[dict[str, Any]]] | None = None
    model: bool = False
    limited: bool = False


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline.

    Attributes:
        version: raised when the same inputs would give other rows.
        reads: config keys (`section` or `section.key`) that decide its rows.
        needs: stages whose tables it reads, and `stage.step` of those it reads something else of.
        tables: tables it completes.
        steps: the steps, given the run directory with the needed stages complete.
    """

    name: str
    version: int
    reads: tuple[str, ...]
    needs: tuple[str, ...]
    tables: tuple[str, ...]
    steps: Callable[[RunDir, RunConfig], list[Step]]
    facts: tuple[str, ...] = ()
    """Keys of run.json's resolved values that decide its rows."""
    uses: tuple[str, ...] = ()
    """Stages whose tables it reads where the run has them, and does without where it has not."""
    aside: tuple[str, ...] = ()
    """Steps that only those stages depend on that need them by name (`stage.step`)."""


def settings(stage: Stage, config: RunConfig, resolved: dict[str, Any]) -> dict[str, Any]:
    """The values that decide a stage's rows."""
    tree = config.model_dump(mode="json")
    values: dict[str, Any] = {}
    for key in stage.reads:
        node: Any = tree
        for name in key.split("."):
            node = node[name]
        values[key] = node
    return {**values, **{f"resolved.{k}": resolved.get(k) for k in stage.facts}}


def neuron_ranges(units: dict[int, list[int]], size: int) -> list[Key]:
    """Keys {layer, first, last} (last exclusive) that cover the wanted neurons of each layer, `size` at most in each."""
    keys: list[Key] = []
    for layer, neurons in sorted(units.items()):
        for at in range(0, len(neurons), size):
            part = neurons[at : at + size]
            keys.append({"layer": layer, "first": part[0], "last": part[-1] + 1})
    return keys


def halve_neurons(key: Key) -> list[Key]:
    """A key's neurons in two halves; a single neuron cannot be cut and gives []."""
    middle = (key["first"] + key["last"]) // 2
    if middle == key["first"]:
        return []
    return [{**key, "last": middle}, {**key, "first": middle}]


def blame_neurons(key: Key) -> list[dict[str, Any]]:
    """Failure rows that name the neurons of a key, controls as such."""
    numbers = range(key["first"], key["last"])
    if not key.get("controls"):
        return [{"layer": key["layer"], "neuron": n} for n in numbers]
    kinds = key["controls"].items()
    return [{"layer": key["layer"], "neuron": n, "control": kind} for kind, count in kinds for n in numbers if n < count]


def with_controls(units: dict[int, list[int]], wanted: ControlsConfig, size: int) -> list[Key]:
    """Keys as of `neuron_ranges` with `controls` empty, then those of each layer's controls.

    A key of controls holds in `controls` how many there are of each kind; it covers those with its numbers, of all kinds.
    """
    keys = [{**key, "controls": {}} for key in neuron_ranges(units, size)]
    kinds = {kind: n for kind, n in (("decoy", wanted.decoys), ("null", wanted.nulls), ("planted", wanted.planted)) if n}
    if not kinds:
        return keys
    ranges = neuron_ranges({layer: list(range(max(kinds.values()))) for layer in units}, size)
    return keys + [{**key, "controls": kinds} for key in ranges]

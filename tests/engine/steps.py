"""Small steps for the engine's tests: rows and a temporary blob for each neuron of a key, and faults on demand.

Faults are part of a unit's key, so that they travel to any process: `raise`, `kill` and
`kill_once` name a neuron, `flag` a file that says that the one death has happened.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa

from raylabel.errors import BadInput
from raylabel.stages.base import Chain, Key, Step, blame_neurons, halve_neurons
from raylabel.store.plan import Plan, Unit, make_plan
from raylabel.store.shards import Blob, Output, Shard


def suffer(key: Key) -> None:
    """What the key says should go wrong."""
    neurons = range(key["first"], key["last"])
    if key.get("raise") in neurons:
        raise ArithmeticError(f"neuron {key['raise']} is odd")
    if key.get("refuse") in neurons:
        raise BadInput("subject.model: mend this")
    if key.get("kill") in neurons:
        os.kill(os.getpid(), signal.SIGKILL)
    if key.get("kill_once") in neurons and not Path(key["flag"]).exists():
        Path(key["flag"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def made(key: Key) -> Output:
    """Two rows of `statistics` for each neuron, and a temporary file that names the neurons."""
    rows = [
        {"neuron": n, "polarity": p, "fires": 100 * key["layer"] + n, "mean": p * n / 7}
        for n in range(key["first"], key["last"]) for p in (1, -1)
    ]  # fmt: skip
    shard = Shard("statistics", pa.Table.from_pylist(rows), key["layer"])
    names = ",".join(str(n) for n in range(key["first"], key["last"]))
    return Output([shard], [Blob("names.txt", names.encode(), temporary=True)])


class Plain:
    """A worker in one piece."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, unit: Unit) -> Output:
        suffer(unit.key)
        return made(unit.key)


class First:
    """Hands the neurons on as a table."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, unit: Unit, _: dict[str, pa.Table]) -> dict[str, pa.Table]:
        return {"neurons": pa.table({"neuron": list(range(unit.key["first"], unit.key["last"]))})}


class Second(First):
    """Makes rows of them."""

    def __call__(self, unit: Unit, given: dict[str, pa.Table]) -> Any:
        assert given["neurons"].column(0).to_pylist() == list(range(unit.key["first"], unit.key["last"]))
        suffer(unit.key)
        return made(unit.key)


class Linked(Chain):
    """A worker in two links."""

    links = (First, Second)


class Unopened(Plain):
    """A worker that cannot be made."""

    def __init__(self, url: str) -> None:
        raise MemoryError("no room for the model")


def step_of(
    worker: type[Any], faults: dict[int, Key] | None = None, neurons: int = 8, cut: bool = True
) -> tuple[Step, Plan]:
    """A step of three units, a layer each, with the faults of some layers."""
    keys: list[Key] = [{"layer": layer, "first": 0, "last": neurons, **(faults or {}).get(layer, {})} for layer in range(3)]
    divide, blame = (halve_neurons, blame_neurons) if cut else (None, None)
    return Step("rows", keys, worker, divide=divide, blame=blame), make_plan("made", 1, {}, [], {"rows": keys})

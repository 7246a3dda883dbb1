"""Work units and plans: what a stage is going to do, fixed when it starts.

A unit's id is a hash of everything that decides its rows: stage, stage version, the config values the stage reads, the
ids of its input units and its own key. The same id therefore means the same rows, and a changed setting redoes just
what depends on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Unit:
    """The smallest piece of a stage that is run, retried and committed as a whole.

    Attributes:
        id: hash, unique in the run.
        stage: name of the stage.
        step: name of the step within the stage; steps run one after another.
        key: what to do, as plain JSON values.
    """

    id: str
    stage: str
    step: str
    key: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({"id": self.id, "stage": self.stage, "step": self.step, "key": self.key}, sort_keys=True)

    @staticmethod
    def from_json(line: str) -> Unit:
        """The unit `to_json` wrote."""
        return Unit(**json.loads(line))


@dataclass(frozen=True)
class Plan:
    """All units of a stage, in the order of their steps."""

    stage: str
    version: int
    units: list[Unit]

    @property
    def digest(self) -> str:
        """Hash over the unit ids: what later stages depend on."""
        return digest([u.id for u in self.units])

    def steps(self) -> list[str]:
        """Names of the steps in order."""
        return list(dict.fromkeys(u.step for u in self.units))

    def to_json(self) -> bytes:
        """The plan as a file."""
        units = [{"id": u.id, "step": u.step, "key": u.key} for u in self.units]
        return json.dumps({"stage": self.stage, "version": self.version, "units": units}, indent=0).encode()

    @staticmethod
    def from_json(data: bytes) -> Plan:
        """The plan that `to_json` wrote."""
        tree = json.loads(data)
        units = [Unit(str(u["id"]), str(tree["stage"]), str(u["step"]), dict(u["key"])) for u in tree["units"]]
        return Plan(tree["stage"], tree["version"], units)


def digest(values: Any) -> str:
    """A short hash of plain JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def make_plan(
    stage: str,
    version: int,
    settings: dict[str, Any],
    inputs: Iterable[str],
    steps: dict[str, list[dict[str, Any]]],
    aside: Iterable[str] = (),
) -> Plan:
    """The plan of a stage whose steps have the given unit keys.

    Args:
        settings: the config values the stage reads.
        inputs: digests of the plans of the stages it reads from.
        steps: keys of the units of each step; every step depends on the whole step before it.
        aside: steps that the steps after them do not depend on.
    """
    before = digest([stage, version, settings, sorted(inputs)])
    units: list[Unit] = []
    for step, keys in steps.items():
        new = [Unit(digest([before, step, key]), stage, step, key) for key in keys]
        units += new
        if step not in aside:
            before = digest([before, step, [u.id for u in new]])
    return Plan(stage, version, units)

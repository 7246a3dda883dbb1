"""Runs one work unit and commits what comes of it: the same in this process and on a cluster.

A unit that raises is cut in two until the neuron at fault stands alone; that neuron becomes a failure, the rest is done.
What cannot be cut, or is no neuron's fault, raises UnitFailed. Keys that are known to end the process that runs them are
never run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from raylabel.errors import BadInput, RunFailed
from raylabel.stages.base import Key, Step
from raylabel.store.files import Files, store_error
from raylabel.store.plan import Unit
from raylabel.store.shards import Output, Shard, commit

Fatal = Sequence[tuple[Key, str]]
"""Keys that kill the process that runs them, and how it ended."""


class UnitFailed(RuntimeError):
    """A unit that no attempt could do and that cannot be cut."""


def opened(step: Step, url: str) -> Any:
    """The step's worker; UnitFailed if it cannot be made."""
    try:
        return step.worker(url)
    except BadInput:
        raise
    except Exception as error:
        raise UnitFailed(f"{step.name}: {reason(error)}") from error


def execute(
    work: Callable[[Unit], Output], step: Step, files: Files, unit: Unit, attempt: int, format: str, fatal: Fatal = ()
) -> dict[str, Any]:
    """Runs `unit`, but for the keys in `fatal`, commits its output and returns the manifest entry."""
    started = time.time()
    output = divided(work, step, unit, fatal)
    try:
        return commit(files, unit, attempt, output, started, format)
    except (BadInput, OSError, UnitFailed):
        raise
    except Exception as error:
        # Shards and blobs may be made while they are written.
        raise UnitFailed(f"{unit.stage} {unit.step} {unit.key}: {reason(error)}") from error


def divided(work: Callable[[Unit], Output], step: Step, unit: Unit, fatal: Fatal = ()) -> Output:
    """The output of `unit`, cut around neurons that make it fail."""
    known = [(key, why) for key, why in fatal if contains(step, unit.key, key)]
    try:
        if not known:
            return work(unit)
        why = known[0][1]
    except (BadInput, RunFailed):
        raise
    except Exception as error:
        if step.divide is None or step.blame is None or store_error(error):
            # Cutting the unit would blame all of its neurons for a disk, a store or a network.
            raise UnitFailed(f"{unit.stage} {unit.step} {unit.key}: {reason(error)}") from error
        why = reason(error)
    halves = step.divide(unit.key) if step.divide else []
    if not halves:
        return Output(failures=[{**row, "reason": why} for row in (step.blame(unit.key) if step.blame else [])])
    return merge([divided(work, step, replace(unit, key=key), known) for key in halves])


def contains(step: Step, key: Key, part: Key) -> bool:
    """Whether `part` is `key` or what cutting it gives."""
    return key == part or any(contains(step, half, part) for half in (step.divide(key) if step.divide else []))


def merge(outputs: list[Output]) -> Output:
    """Outputs of parts of a unit as the output of the whole."""
    whole = Output()
    shards: dict[tuple[str, int | None, bool], list[Shard]] = {}
    for output in outputs:
        whole.failures += output.failures
        whole.notes |= output.notes
        for shard in output.shards:
            shards.setdefault((shard.table, shard.layer, shard.controls), []).append(shard)
        # Parts of a unit write the same names: the reader gets all of them, in the order of the parts.
        blobs = [*whole.blobs]
        whole.blobs = [*blobs, *(replace(blob, part=len(blobs) + i) for i, blob in enumerate(output.blobs))]
    whole.shards = [
        Shard(table, pa.concat_tables([p.rows for p in parts]), layer, controls)
        for (table, layer, controls), parts in shards.items()
    ]
    return whole


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    return f"{type(error).__name__}: {text}"[:300]

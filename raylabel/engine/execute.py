"""Runs one work unit and commits what comes of it: the same in this process and on a cluster.

A unit that raises is cut in two until the neuron at fault stands alone; that neuron becomes a failure, the rest is
done. What cannot be cut raises UnitFailed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa

from raylabel.errors import BadInput
from raylabel.stages.base import Step
from raylabel.store.files import Files
from raylabel.store.plan import Unit
from raylabel.store.shards import Output, Shard, commit


class UnitFailed(RuntimeError):
    """A unit that no attempt could do and that cannot be cut."""


def execute(
    work: Callable[[Unit], Output], step: Step, files: Files, unit: Unit, attempt: int, format: str
) -> dict[str, Any]:
    """Runs `unit`, commits its output and returns the manifest entry."""
    started = time.time()
    output = divided(work, step, unit)
    return commit(files, unit, attempt, output, started, format)


def divided(work: Callable[[Unit], Output], step: Step, unit: Unit) -> Output:
    """The output of `unit`, cut around neurons that make it fail."""
    try:
        return work(unit)
    except BadInput:
        raise
    except Exception as error:
        if step.divide is None or step.blame is None:
            raise UnitFailed(f"{unit.stage} {unit.step} {unit.key}: {reason(error)}") from error
        halves = step.divide(unit.key)
        if not halves:
            return Output(failures=[{**row, "reason": reason(error)} for row in step.blame(unit.key)])
        return merge([divided(work, step, replace(unit, key=key)) for key in halves])


def merge(outputs: list[Output]) -> Output:
    """Outputs of parts of a unit as the output of the whole."""
    whole = Output()
    shards: dict[tuple[str, int | None, bool], list[Shard]] = {}
    for output in outputs:
        whole.failures += output.failures
        whole.notes |= output.notes
        for shard in output.shards:
            shards.setdefault((shard.table, shard.layer, shard.controls), []).append(shard)
        # Parts of a unit write the same names; the parts' own order keeps them apart for the reader.
        whole.blobs += [replace(blob, name=f"{len(whole.blobs)}.{blob.name}") for blob in output.blobs]
    for (table, layer, controls), parts in shards.items():
        whole.shards.append(Shard(table, pa.concat_tables([p.rows for p in parts]), layer, controls))
    return whole


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]

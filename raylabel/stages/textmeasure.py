"""The activations of variants of text controls: what `measure.measure` is for units of a model, without one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raylabel.stages.textual import PLANTED, Reader, TextUnits
from raylabel.stages.verify import Plan


def measure_texts(units: TextUnits, reader: Reader, special_ids: list[int], plan: Plan) -> pa.Table:
    """The plan's rows, all of text controls, with a column `activation` float32.

    `activation` is the maximum over a row's window, null where every position of it is a special token.
    """
    rows = plan["rows"].combine_chunks()
    number = {(p.control, p.neuron): u for u, p in enumerate(units.plants)}
    keys = zip(rows["control"].to_pylist(), rows["neuron"].to_pylist(), strict=True)
    unit = np.array([number[key] for key in keys], np.int64)
    planted = np.array([p.control == PLANTED for p in units.plants], bool)
    text, start, end = (rows[name].to_numpy() for name in ("text", "start", "end"))
    order = np.argsort(text, kind="stable")
    bounds = np.flatnonzero(np.diff(text[order], prepend=-1, append=-1))
    texts = plan["texts"]["ids"]
    found = np.full(rows.num_rows, np.nan, np.float32)
    for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        these = order[low:high]
        ids = np.array(texts[int(text[these[0]])].as_py(), np.int64)
        first, last = int(start[these].min()), int(end[these].max())
        wanted, column = np.unique(unit[these], return_inverse=True)
        reads = reader(ids.tolist()) if planted[wanted].any() else []
        values = units.values(ids, reads, wanted, first, last)
        values[np.isin(ids[first:last], special_ids)] = -np.inf
        for row, c in zip(these.tolist(), column.tolist(), strict=True):
            found[row] = values[start[row] - first : end[row] - first, c].max(initial=-np.inf)
    return rows.append_column("activation", pa.array(found, mask=~np.isfinite(found)))

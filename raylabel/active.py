"""Which labelled units fire in a text, token by token: the subject is run on it as the scan runs samples."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.stages.positions import sinks, usable
from raylabel.stages.subject import open_subject
from raylabel.stages.tokenize import encode
from raylabel.stages.units import column, sign
from raylabel.store.rundir import RunDir

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("position", "token", "layer", "neuron", "polarity", "activation", "share", "label", "verified")


def active_on(run: RunDir, text: str, share: float = 0.25, verified: bool = False) -> pd.DataFrame:
    """The labelled units that fire in `text`: a row a token and unit, tokens in order, the strongest units first.

    A unit fires where its activation is above 0 and at least `share` of the largest recorded in the run. Columns:
    `position` of the token in the text, `token`, `layer`, `neuron`, `polarity`, `activation` (times the sign of the
    polarity), `share`, `label`, `verified`. A text longer than a sample is cut as the corpus was; special tokens and
    attention sinks do not count, as in the scan. BadInput for an empty text and a run without results.
    """
    import pandas as pd

    if not run.complete("results"):
        raise BadInput(f"{run.files.url}: no results yet; run `raylabel run` again to finish it")
    config = RunConfig.model_validate(run.config)
    rows = run.table("results", filter=pc.is_valid(pc.field("label")) & (pc.field("max") > 0))
    if verified:
        rows = rows.filter(pc.field("verified"))
    frame = rows.select(["layer", "neuron", "polarity", "max", "label", "verified"]).to_pandas()
    subject = open_subject(config, run.resolved)
    tokenizer = subject.tokenizer.backend_tokenizer
    tokens, ends = encode(tokenizer, [text])[0]
    if not len(tokens):
        raise BadInput("text: has no tokens")
    size = config.subject.context - int(subject.prepend_bos)
    special = torch.tensor(sorted(subject.special_ids), dtype=torch.long)
    limits = _sink_limits(run)
    found = []
    for first in range(0, len(tokens), size):
        body = tokens[first : first + size].tolist()
        ids = torch.tensor([[subject.bos_id, *body] if subject.prepend_bos else body])
        found.append(_window(subject, ids, first, special, limits, frame, share))
    columns = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    at, unit, values, shares = columns
    starts = [0, *ends[:-1].tolist()]
    hits = frame.iloc[unit].reset_index(drop=True)
    shown = [text[starts[i] : ends[i]] for i in at]
    whole = pd.DataFrame({"position": at, "token": shown, "activation": values, "share": shares}).join(hits)
    order = ["position", "share", "layer", "neuron", "polarity"]
    whole = whole.sort_values(order, ascending=[True, False, True, True, False], kind="stable")
    return whole[list(COLUMNS)].reset_index(drop=True)


def _sink_limits(run: RunDir) -> dict[int, float]:
    """The residual norm above which a position is a sink, as the run's scan fixed it; none where it has no scan."""
    if not run.files.exists("pilot.npz"):
        return {}
    with np.load(io.BytesIO(run.files.read("pilot.npz")), allow_pickle=False) as arrays:
        return {int(name.removeprefix("sink.")): float(arrays[name]) for name in arrays.files if name.startswith("sink.")}


def _window(
    subject: Any,
    ids: torch.Tensor,
    first: int,
    special: torch.Tensor,
    limits: dict[int, float],
    frame: pd.DataFrame,
    share: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(position in the text, row of `frame`, activation, share) of what fires in one window, ids [1, T]."""
    layers = sorted(set(frame["layer"].tolist()))
    counts = usable(ids, torch.tensor([ids.shape[1]]), special)[0]
    shift = int(subject.prepend_bos)
    parts: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))]

    def visit(layer: int, activations: torch.Tensor, residual: torch.Tensor) -> None:
        rows = np.flatnonzero((frame["layer"] == layer).to_numpy())
        here = frame.iloc[rows]
        polarity, neuron = here["polarity"].to_numpy(), here["neuron"].to_numpy()
        columns = column(neuron, polarity, subject.width)
        wanted = torch.as_tensor(columns, dtype=torch.long, device=activations.device)
        values = subject.read(layer, activations[0], wanted).cpu().numpy() * sign(polarity)
        open_ = counts.to(residual.device) & ~sinks(residual, limits.get(layer, float("inf")))[0]
        shares = values / here["max"].to_numpy()
        at, which = np.nonzero((values > 0) & (shares >= share) & open_.cpu().numpy()[:, None])
        parts.append((at - shift + first, rows[which], values[at, which], shares[at, which]))

    subject.run(ids, layers, visit)
    at, unit, values, shares = (np.concatenate(column) for column in zip(*parts, strict=True))
    return at, unit, values, shares

"""Recordings made from a scan of a tiny model, to be taken in again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylabel.config import RunConfig
from raylabel.stages.samples import load_samples
from raylabel.stages.subject import open_subject
from raylabel.store.rundir import RunDir


def record(run: RunDir, ids: bool, signs: tuple[int, ...] = (1, -1), neurons: int = 8) -> list[dict[str, Any]]:
    """Rows of a plain table: every sample of a finished run with the activations of its first neurons, at both ends."""
    config = RunConfig.model_validate(run.config)
    subject, samples = open_subject(config, run.resolved), load_samples(run)
    names = {i: subject.tokenizer.convert_ids_to_tokens(i) for i in subject.special_ids}
    rows: list[dict[str, Any]] = []
    for at in range(len(samples.numbers)):
        padded, _ = samples.padded(np.array([at]), subject.pad_id)
        strings = samples.strings(np.array([at]), names)[0].to_pylist()

        def visit(layer: int, acts: torch.Tensor, _resid: Any, strings: Any = strings, padded: Any = padded) -> None:
            for neuron in range(neurons):
                for sign in signs:
                    values = (sign * acts[0, :, neuron].float().numpy()).tolist()
                    row = {"layer": layer, "neuron": neuron, "polarity": sign, "tokens": strings, "activations": values}
                    rows.append(row | ({"token_ids": padded[0].tolist()} if ids else {}))

        subject.run(torch.from_numpy(padded), list(subject.layers), visit)
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path

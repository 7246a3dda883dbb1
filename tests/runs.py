"""Small runs for the tests: corpora, configurations, brute force over the full activation tensor."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylabel.config import RunConfig, build_config
from raylabel.stages.subject import open_subject
from raylabel.store.rundir import RunDir

_TEXT = (
    "the a quick brown fox jumps over lazy dog pack my box with five dozen liquor jugs cat sat on mat red green blue "
    "small large one two three old young runs walks eats sleeps house garden river stone"
)
WORDS = _TEXT.split()


def write_corpus(path: Path, documents: int, seed: int = 0, longest: int = 60) -> Path:
    """A .jsonl file of documents of random words, some of them twice and some empty."""
    draw = random.Random(seed)
    rows = []
    for _ in range(documents):
        rows.append(" ".join(draw.choice(WORDS) for _ in range(draw.randint(0, longest))))
    rows[3] = rows[2]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_config(model: Path, corpus: Path, out: Path, **sections: dict[str, Any]) -> RunConfig:
    """A configuration for a tiny model over a tiny corpus, in this process."""
    tree: dict[str, Any] = {
        "subject": {"model": str(model), "context": 16, "device": "cpu", "batch": 4},
        "exemplars": {"corpus": {"path": str(corpus)}, "top": 6, "quantile": 3, "random": 4, "before": 5, "after": 3},
        "controls": {"decoys": 5},
        "run": {"out": str(out), "address": "inline"},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return build_config(tree)


def every_activation(run: RunDir) -> tuple[list[dict[str, Any]], dict[int, list[np.ndarray]], dict[int, list[np.ndarray]]]:
    """(samples, activations [T, width] a layer and sample, masks [T] likewise): the full tensor, from the definitions.

    The forward has the run's own batches: another shape may round matrix products otherwise.
    """
    config = RunConfig.model_validate(run.config)
    subject = open_subject(config)
    samples = sorted(run.table("samples").to_pylist(), key=lambda row: row["sample"])
    batch = run.resolved["batch"]
    with np.load(run.files.path("pilot.npz")) as pilot:
        sinks = {layer: float(pilot[f"sink.{layer}"]) for layer in range(subject.n_layers) if f"sink.{layer}" in pilot}
    acts: dict[int, list[np.ndarray]] = {layer: [] for layer in sinks}
    masks: dict[int, list[np.ndarray]] = {layer: [] for layer in sinks}
    for at in range(0, len(samples), batch):
        rows = samples[at : at + batch]
        longest = max(len(row["token_ids"]) for row in rows)
        ids = torch.full((batch, longest), subject.pad_id)
        for i, row in enumerate(rows):
            ids[i, : len(row["token_ids"])] = torch.tensor(row["token_ids"])

        def visit(layer: int, here: torch.Tensor, resid: torch.Tensor, rows: list[Any] = rows) -> None:
            for i, row in enumerate(rows):
                n = len(row["token_ids"])
                usual = np.array([token not in subject.special_ids for token in row["token_ids"]])
                acts[layer].append(here[i, :n].float().numpy().copy())
                masks[layer].append(usual & (resid[i, :n].float().norm(dim=-1).numpy() <= sinks[layer]))

        subject.run(ids, list(sinks), visit)
    return samples, acts, masks


def tables_equal(a: RunDir, b: RunDir, names: tuple[str, ...]) -> bool:
    """Whether two runs hold the same rows in the same order, controls included."""
    pairs = [(a, b), (a.controls, b.controls)]
    return all(x.table(name).equals(y.table(name)) for x, y in pairs for name in names)

"""Small runs for the tests: corpora, configurations, scans."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from raylabel.config import RunConfig, build_config
from raylabel.engine.pipeline import run_pipeline
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
        "subject": {"model": str(model), "context": 16, "device": "cpu", "batch": 8},
        "exemplars": {"corpus": {"path": str(corpus)}, "top": 6, "quantile": 3, "random": 4, "before": 5, "after": 3},
        "controls": {"decoys": 5},
        "score": {"negatives": 6},
        "run": {"out": str(out), "address": "inline"},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return build_config(tree)


def do_scan(model: Path, corpus: Path, out: Path, **sections: dict[str, Any]) -> RunDir:
    """A run of tokenize and scan alone."""
    sections.setdefault("run", {}).update(stages=["tokenize", "scan"])
    sections.setdefault("identify", {"vectors": "unused.bin"})
    run_pipeline(tiny_config(model, corpus, out, **sections))
    return RunDir(str(out))


def tables_equal(a: RunDir, b: RunDir, names: tuple[str, ...]) -> bool:
    """Whether two runs hold the same rows in the same order, controls included."""
    pairs = [(a, b), (a.controls, b.controls)]
    return all(x.table(name).equals(y.table(name)) for x, y in pairs for name in names)

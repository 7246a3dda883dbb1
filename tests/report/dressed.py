"""Run directories with tables that no stage of a test has written: concepts, labels and scores of some of the units."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylabel.store.rundir import RunDir
from raylabel.tables import conform, from_rows, schema

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "\"'>&amp;<img src=x onerror=alert(3)>",
    "a\nb\tc",
    "\u202eright",
    "\x1b[31m\x00\x07",
    "שלום",
    "`${alert(4)}`",
    "{{ 7 * 7 }}",
    "\x1f\u2028",
    "\ud800",
]


def put_table(run: RunDir, name: str, rows: list[dict[str, Any]] | pa.Table) -> None:
    """Takes the place of a per-unit table; rows are dicts with `layer`, or a table with that column."""
    root = Path(run.files.root)
    shutil.rmtree(root / name, ignore_errors=True)
    files = []
    if isinstance(rows, list):
        layers = sorted({row["layer"] for row in rows})
        parts = [
            (at, from_rows([{k: v for k, v in r.items() if k != "layer"} for r in rows if r["layer"] == at], name))
            for at in layers
        ]
    else:
        whole = rows.column("layer").to_numpy()
        parts = [(int(at), conform(rows.filter(whole == at).drop_columns(["layer"]), name)) for at in np.unique(whole)]
    for at, table in parts:
        place = f"{name}/layer={at:02d}/part-made-0.parquet"
        (root / place).parent.mkdir(parents=True)
        pq.write_table(table, root / place, compression="zstd")
        files.append(place)
    (root / name).mkdir(exist_ok=True)
    (root / name / "_SUCCESS").write_text(json.dumps({"stage": "made", "plan": "made", "rows": 0, "files": files}))


def dress(run: RunDir, out: Path) -> RunDir:
    """A copy of a finished run with concepts, labels and scores, the texts of some of them hostile."""
    shutil.copytree(run.files.root, out)
    dressed = RunDir(str(out))
    results = dressed.table("results").to_pylist()
    concepts, labels, scores = [], [], []
    for i, row in enumerate(results):
        unit = {name: row[name] for name in ("layer", "neuron", "polarity")}
        text = HOSTILE[i % len(HOSTILE)].replace("\ud800", "\ufffd") if i < len(HOSTILE) else f"animals of kind {i}"
        row |= {
            "label": text,
            "description": f"about {text}",
            "label_source": "made",
            "score": 0.5 + i / 1000,
            "claimed": i % 2 == 0,
            "concept_words": [text, "fox"],
            "agreement": 0.25,
        }
        concepts.append(
            {
                **unit,
                "words": [text, "fox", "dog"],
                "weights": [0.5, 0.3, 0.2],
                "label": text,
                "auroc": 0.8,
                "auroc_low": 0.7,
                "auroc_high": 0.9,
                "auroc_unseen": 0.75,
                "q_value": 0.01,
                "claimed": i % 2 == 0,
                "proposer": "prior",
                "cross_entropy": 0.4,
                "entropy": 1.0,
                "kl": 0.1,
                "p_value": 0.01,
                "evaluations": 40,
            }
        )
        meanings = [{"label": text, "share": 0.75}, {"label": "rest", "share": 0.25}]
        labels.append(
            {
                **unit,
                "label": text,
                "description": f"about {text}",
                "meanings": meanings,
                "explainer": "made",
                "prompt_hash": "0",
                "prompt_tokens": 100,
                "completion_tokens": 7,
            }
        )
        scores += [
            {
                **unit,
                "label_source": "made",
                "scorer": scorer,
                "value": 0.6,
                "shuffled": 0.1,
                "corrected": 0.5 + i / 1000,
                "low": 0.4,
                "high": 0.7,
                "lookup": 0.3,
                "n": 40,
                "n_failed": i % 2,
            }
            for scorer in ("detection", "judge")
        ]
    put_table(dressed, "concepts", concepts)
    put_table(dressed, "labels", labels)
    put_table(dressed, "scores", scores)
    put_table(dressed, "results", results)
    exemplars = dressed.table("exemplars").to_pylist()
    for row in exemplars[::3]:
        row["tokens"] = [HOSTILE[:-1][k % (len(HOSTILE) - 1)] for k in range(len(row["tokens"]))]
    put_table(dressed, "exemplars", exemplars)
    assert schema("results").names
    return dressed

"""Measurements of latents and of quadrants, and of decoys beside them, equal those of every text by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from raylabel.models.controls import Decoys, fit_decoys
from raylabel.models.subject import Subject, load_subject
from raylabel.stages.measure import diagnose, measure, unreproduced
from raylabel.stages.units import QUADRANTS, column, sign
from raylabel.stages.verify import ROWS, TEXTS, Plan
from raylabel.tables import schema
from tests.models import tiny
from tests.models.saes import save_sae
from tests.models.test_suffix import family_texts

LAYER = 1
KINDS: dict[str, dict[str, Any]] = {
    "standard": {"d_sae": 300},
    "topk": {"architecture": "topk", "k": 7},
    "jumprelu": {"architecture": "jumprelu"},
    "transcoder": {"architecture": "transcoder", "hook": f"blocks.{LAYER}.ln2.hook_normalized"},
}


@pytest.fixture(scope="module", params=[*KINDS, "quadrants"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    root: Path = tmp_path_factory.mktemp("models")
    model = str(tiny.save("llama", root / "llama"))
    if request.param == "quadrants":
        return load_subject(model, context=24, device="cpu", quadrants=True)
    return load_subject(model, context=24, device="cpu", latents=str(save_sae(root / "sae", **KINDS[request.param])))


@pytest.fixture(scope="module")
def decoys(subject: Subject) -> Decoys:
    return fit_decoys(subject.activations(tiny.ids(8, 20), [LAYER])[LAYER].flatten(0, 1).float(), 3, 0, LAYER)


def make_plan(subject: Subject, seed: int = 0) -> Plan:
    """Requests of all kinds of unit over texts that begin alike."""
    rng = np.random.default_rng(seed)
    texts = family_texts(seed)
    units: list[tuple[str | None, int, int]] = [("decoy", n, 1) for n in range(3)]
    signs = QUADRANTS if subject.quadrants else (1,)
    units += [(None, int(n), p) for n in rng.choice(subject.width, 4, replace=False) for p in signs]
    rows = []
    for control, neuron, polarity in units:
        for i in range(6):
            text = int(rng.integers(len(texts)))
            start = int(rng.integers(len(texts[text])))
            rows.append({"control": control, "neuron": neuron, "polarity": polarity, "rank": i, "text": text, "start": start,
                         "end": int(rng.integers(start, len(texts[text]))) + 1, "sample": 0, "document": 0, "position": start,
                         "recorded": 0.0, "kind": "original", "phrase": "", "keeps_token": False})  # fmt: skip
    rows.sort(key=lambda r: (r["control"] or "", r["neuron"], r["polarity"]))
    return {"rows": pa.Table.from_pylist(rows, ROWS), "texts": pa.Table.from_pylist([{"ids": t} for t in texts], TEXTS)}


def one_by_one(subject: Subject, plan: Plan, decoys: Decoys) -> np.ndarray:
    found = []
    texts = plan["texts"]["ids"].to_pylist()
    for row in plan["rows"].to_pylist():
        acts = subject.activations(torch.tensor([texts[row["text"]]]), [LAYER])[LAYER][0]
        at = column(row["neuron"], row["polarity"], subject.width)
        values = decoys(acts.float())[:, row["neuron"]] if row["control"] else subject.read(LAYER, acts)[:, at]
        found.append(max(
            (float(values[p]) * sign(row["polarity"]) for p in range(row["start"], row["end"])
             if texts[row["text"]][p] not in subject.special_ids), default=np.nan,
        ))  # fmt: skip
    return np.array(found)


@pytest.mark.parametrize("batch_tokens", [1, 60, None])
def test_equal_to_every_text_by_itself(subject: Subject, decoys: Decoys, batch_tokens: int | None) -> None:
    plan = make_plan(subject)
    expected = one_by_one(subject, plan, decoys)
    rows, failures = measure(subject, LAYER, plan, decoys, batch_tokens=batch_tokens)
    assert failures == [] and (np.nan_to_num(expected) != 0).mean() > 0.2
    np.testing.assert_allclose(rows["activation"].to_numpy(zero_copy_only=False), expected, rtol=1e-4, atol=1e-4)
    again, _ = measure(subject, LAYER, plan, decoys, batch_tokens=batch_tokens)
    assert rows.equals(again)


def test_another_bos_policy_is_named_and_no_other_site_is_tried(subject: Subject) -> None:
    bare = [[i for i in text if i != subject.bos_id] for text in family_texts(1)][:8]
    bos = [[subject.bos_id, *ids] for ids in bare]
    unit, polarity, peaks = best_unit(subject, bos)
    rows = []
    for i, (ids, (at, value)) in enumerate(zip(bare, peaks, strict=True)):
        rows.append({"control": None, "neuron": unit, "polarity": polarity, "rank": i, "text": i, "start": at - 1, "end": at,
                     "sample": i, "document": i, "position": at - 1, "recorded": value, "kind": "original", "phrase": "",
                     "keeps_token": True})  # fmt: skip
        assert 1 <= at <= len(ids)
    plan = {"rows": pa.Table.from_pylist(rows, ROWS), "texts": pa.Table.from_pylist([{"ids": t} for t in bare], TEXTS)}
    measured, _ = measure(subject, LAYER, plan)
    key = (None, unit, polarity)
    assert unreproduced(measured, coarse=False) == [key]
    samples = pa.Table.from_pylist([{"sample": i, "token_ids": ids} for i, ids in enumerate(bare)], schema("samples"))
    assert diagnose(subject, measured, samples, LAYER, key) == "recordings are reproduced with BOS"


def best_unit(subject: Subject, texts: list[list[int]]) -> tuple[int, int, list[tuple[int, float]]]:
    """The unit that BOS moves most where it peaks: neuron, polarity, and (position, activation) of its peak in each text."""
    signs = (-2, 2, -1, 1) if subject.quadrants else (1,)

    def values(ids: list[int], neuron: int, polarity: int) -> Tensor:
        acts = subject.activations(torch.tensor([ids]), [LAYER])[LAYER][0]
        at = torch.tensor([column(neuron, polarity, subject.width)])
        return subject.read(LAYER, acts, at)[:, 0] * sign(polarity)

    best: tuple[float, int, int, list[tuple[int, float]]] | None = None
    for polarity in signs[:2]:
        for neuron in range(min(subject.width, 30)):
            peaks, moved = [], 0
            for ids in texts:
                series = values(ids, neuron, polarity)
                at = int(series[1:].argmax()) + 1
                peaks.append((at, float(series[at])))
                moved += abs(float(values(ids[1:], neuron, polarity)[at - 1]) - peaks[-1][1]) > 0.02
            if best is None or moved > best[0]:
                best = (moved, neuron, polarity, peaks)
    assert best is not None and best[0] > 4
    return best[1:]

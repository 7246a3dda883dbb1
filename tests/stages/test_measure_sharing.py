"""Measurements by rows of many texts equal measurements of every text by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from raylabel.models.controls import Decoys, fit_decoys
from raylabel.models.subject import Subject, load_subject
from raylabel.stages import measure as measuring
from raylabel.stages.measure import measure
from raylabel.stages.verify import ROWS, TEXTS, Plan
from tests.models import tiny
from tests.models.test_subject_transformerlens import native_folder
from tests.models.test_suffix import family_texts

LAYER = 1


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2", "gpt_neo", "solu", "demo"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "demo":
        return load_subject("demo", context=24, device="cpu")
    if request.param == "solu":
        native_folder(folder)
    else:
        tiny.save(request.param, folder)
    return load_subject(str(folder), context=24, device="cpu")


@pytest.fixture(scope="module")
def decoys(subject: Subject) -> Decoys:
    return fit_decoys(subject.activations(tiny.ids(8, 24), [LAYER])[LAYER].flatten(0, 1), 5, 0, LAYER)


def make_plan(seed: int = 0, n: int = 400) -> Plan:
    """Requests of 20 units and 5 decoys on any window of any text, special tokens included."""
    rng = np.random.default_rng(seed)
    texts = family_texts(seed)
    for text in texts[::5]:
        text[len(text) // 2] = 2
    unit = np.sort(rng.integers(0, 25, n))
    text = rng.integers(0, len(texts), n)
    lengths = np.array([len(t) for t in texts])[text]
    start = rng.integers(0, lengths)
    end = np.minimum(start + rng.integers(1, 12, n), lengths)
    values: dict[str, Any] = {name: np.zeros(n) for name in ("rank", "sample", "document", "position", "recorded", "offset")}
    values |= {name: [""] * n for name in ("word", "substitute", "phrase")} | {"dropped": [None] * n}
    values |= {"control": [None if u < 20 else "decoy" for u in unit], "neuron": unit % 20, "text": text}
    values |= {"kind": ["original"] * n, "keeps_token": [True] * n, "extra": [False] * n, "start": start, "end": end}
    values["polarity"] = np.where(unit % 3 == 0, -1, 1)
    columns = [pa.array(values[f.name]).cast(f.type) for f in ROWS]
    return {"rows": pa.table(columns, schema=ROWS), "texts": pa.table([pa.array(texts, pa.list_(pa.int32()))], schema=TEXTS)}


def one_by_one(subject: Subject, plan: Plan, decoys: Decoys, sink: float) -> tuple[np.ndarray, float]:
    """(what each request gets from its text alone, the 99th percentile of the activations)."""
    seen: list[tuple[Tensor, Tensor]] = []
    texts = plan["texts"]["ids"].to_pylist()
    for text in texts:
        subject.run(torch.tensor([text]), [LAYER], lambda _layer, a, r: seen.append((a[0].clone(), r[0].clone())))
    found = []
    for row in plan["rows"].to_pylist():
        acts, resid = seen[row["text"]]
        values = (decoys(acts) if row["control"] else acts)[:, row["neuron"]] * row["polarity"]
        counted = [
            float(values[p]) for p in range(row["start"], row["end"])
            if texts[row["text"]][p] not in subject.special_ids and float(resid[p].norm()) <= sink
        ]  # fmt: skip
        found.append(max(counted, default=np.nan))
    return np.array(found), float(np.nanpercentile(np.abs(torch.cat([a for a, _ in seen]).numpy()), 99))


def values(rows: pa.Table) -> np.ndarray:
    found: np.ndarray = rows["activation"].to_numpy()
    return found


def sink_of(subject: Subject) -> float:
    """A norm above which about a quarter of the positions lie."""
    norms: list[Tensor] = []
    subject.run(tiny.ids(8, 20), [LAYER], lambda _layer, _acts, resid: norms.append(resid.norm(dim=-1)))
    return float(norms[0].quantile(0.75))


@pytest.mark.parametrize("batch_tokens", [1, 40, 300, None])
def test_equal_to_every_text_by_itself(subject: Subject, decoys: Decoys, batch_tokens: int | None) -> None:
    plan, sink = make_plan(), sink_of(subject)
    expected, scale = one_by_one(subject, plan, decoys, sink)
    rows, failures = measure(subject, LAYER, plan, decoys, sink=sink, batch_tokens=batch_tokens)
    assert failures == [] and rows.drop_columns("activation").equals(plan["rows"])
    assert 0 < np.isnan(expected).sum() < len(expected) / 2
    # Decoys are as large as the units that lend them their moments.
    np.testing.assert_allclose(values(rows), expected, rtol=1e-4, atol=1e-4 * scale)
    again, _ = measure(subject, LAYER, plan, decoys, sink=sink, batch_tokens=batch_tokens)
    assert rows.equals(again), "the same plan gives the same bits"


class Counting:
    """A subject that counts the tokens it is given, and may have little memory."""

    def __init__(self, subject: Subject, memory: float = float("inf")) -> None:
        self._subject, self._memory = subject, memory
        self.tokens, self.trees = 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def run(self, ids: Tensor, layers: Sequence[int], visit: Any, *tree: Any) -> None:
        if ids.numel() > self._memory:
            raise torch.OutOfMemoryError("too much")
        self.tokens += ids.numel()
        self.trees += len(tree) > 0 and tree[0] is not None
        self._subject.run(ids, layers, visit, *tree)


def test_beginnings_run_once(subject: Subject, decoys: Decoys, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, counted, alone = make_plan(), Counting(subject), Counting(subject)
    monkeypatch.setattr(measuring, "_agrees", lambda *_: True)
    measure(counted, LAYER, plan, decoys)
    monkeypatch.setattr(measuring, "_agrees", lambda *_: False)
    measure(alone, LAYER, plan, decoys)
    assert alone.trees == 0 and (counted.trees > 0) == subject.shares_beginnings
    assert counted.tokens < 0.75 * alone.tokens or not subject.shares_beginnings


def test_little_memory(subject: Subject, decoys: Decoys) -> None:
    plan = make_plan()
    rows, _ = measure(Counting(subject, 260), LAYER, plan, decoys)
    expected, scale = one_by_one(subject, plan, decoys, float("inf"))
    np.testing.assert_allclose(values(rows), expected, rtol=1e-4, atol=1e-4 * scale)


def test_a_model_that_takes_masks_amiss_runs_every_text(subject: Subject, decoys: Decoys) -> None:
    call = subject.anatomy.call_tree
    if call is None:
        pytest.skip("takes no mask")
    wrong = replace(subject.anatomy, call_tree=lambda ids, tree: call(ids, tree._replace(positions=tree.positions * 0)))
    plan, broken = make_plan(), Counting(replace(subject, anatomy=wrong))
    rows, _ = measure(broken, LAYER, plan, decoys)
    expected, scale = one_by_one(subject, plan, decoys, float("inf"))
    np.testing.assert_allclose(values(rows), expected, rtol=1e-4, atol=1e-4 * scale)
    assert broken.trees == 1, "tried, and not used"

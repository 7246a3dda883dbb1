"""The stage score in a run: units and controls, the judge and a language model, silence measured by the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput, RunFailed
from raylabel.models.judge_check import Check
from raylabel.stages.results import scored
from raylabel.stages.score import SILENT, Labelled
from raylabel.stages.score_rows import agreement_row
from raylabel.stages.score_stage import Scorer, labels_of, refuse_leaks
from raylabel.stages.subject import open_subject
from raylabel.store.rundir import RunDir
from tests.llm.servers import served
from tests.models.test_judge import network, tokenizer
from tests.runs import tiny_config
from tests.stages import scored_units
from tests.stages.test_score_llm import rule

SECTIONS: dict[str, dict[str, Any]] = {
    "subject": {"neurons": [0, 12]},
    "exemplars": {"top": 8, "random": 6},
    "identify": {"fdr": 1 - 1e-9, "criterion": "either"},
    "controls": {"decoys": 6, "nulls": 3},
    "score": {"scorers": ["judge", "embedding", "detection"], "window": 8, "negatives": 6},
}


def ran(model: Path, corpus: Path, out: Path, judge: Path, url: str, **more: Any) -> RunDir:
    sections = {**SECTIONS, "optimize": {"judge": str(judge)}, "describe": {"model": "rule", "base_url": url}}
    sections["run"] = {"stages": ["tokenize", "scan", "identify", "verify", "score", "results"], **more}
    run_pipeline(tiny_config(model, corpus, out, **sections))
    return RunDir(str(out))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    network("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_corpus: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    with pytest.MonkeyPatch.context() as patch, served(rule) as server:
        # A judge of random weights does not beat chance.
        patch.setattr(Check, "require", lambda *_: None)
        return ran(tiny_model, tiny_corpus, tmp_path_factory.mktemp("score") / "run", judge, server.url)


def test_every_labelled_unit_and_control_has_a_row_a_scorer(run: RunDir) -> None:
    for part in (run, run.controls):
        rows = part.table("scores").to_pylist()
        assert rows
        for layer in {r["layer"] for r in rows}:
            (source,) = labels_of(part, layer)
            for unit in labels_of(part, layer)[source]:
                mine = [r for r in rows if (r["layer"], r.get("control"), r["neuron"], r["polarity"]) == (layer, *unit)]
                assert [r["scorer"] for r in mine] == ["detection", "embedding", "judge"]
                assert all(r["label_source"] == source and r["n_failed"] == 0 for r in mine if r["n"])
    assert run.table("failures").num_rows == 0


def test_corrected_values_follow_from_the_others(run: RunDir) -> None:
    rows = [r for r in run.table("scores").to_pylist() if r["corrected"] is not None and r["shuffled"] < 1]
    assert rows
    for r in rows:
        assert r["corrected"] == pytest.approx((r["value"] - r["shuffled"]) / (1 - r["shuffled"]), abs=1e-5)
        assert r["low"] is None or r["low"] <= r["corrected"] <= r["high"]


def test_silent_windows_are_silent_by_a_forward_pass_of_our_own(run: RunDir) -> None:
    from raylabel.config import RunConfig

    config = RunConfig.model_validate(run.config)
    scorer, subject = Scorer(run, config), open_subject(config, run.resolved)
    layer = run.table("scores")["layer"][0].as_py()
    units = {u for named in labels_of(run, layer).values() for u in named}
    samples = {r["sample"]: r for r in run.table("samples").to_pylist()}
    seen, kinds = 0, set()
    for unit, found in scorer.trials(run, layer, (0, 12), units).items():
        for w in found.windows:
            sample = samples[w.sample]
            assert (sample["split"], sample["document"]) == ("score", w.document)
            got: list[torch.Tensor] = []
            subject.run(torch.tensor([sample["token_ids"]]), [layer], lambda _l, acts, _r, to=got: to.append(acts))
            values = got[0][0, w.start : w.start + len(w.ids), unit[1]].numpy() * unit[2]
            special = np.isin(w.ids, run.resolved["special_ids"])
            if w.silent:
                assert values[~special].max() < SILENT * found.largest + 1e-5
            if not w.active:
                assert values[w.focus] < SILENT * found.largest + 1e-5
            if w.activations is not None:
                np.testing.assert_allclose(values[~special], np.array(w.activations)[~special], atol=1e-4)
            seen, kinds = seen + 1, kinds | {(w.active, w.silent, w.hard)}
            assert w.text in sample["text"]
    assert seen > 20 and len(kinds) > 1


def test_the_same_again(run: RunDir, tiny_model: Path, tiny_corpus: Path, judge: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Check, "require", lambda *_: None)
    monkeypatch.setattr("raylabel.stages.score_stage.NEURONS", 5)
    with served(rule) as server:
        other = ran(tiny_model, tiny_corpus, tmp_path / "run", judge, server.url)
        # delphi asks for every score again, whatever is there.
        asked, made = len(server.requests), other.manifest("score")
        ran(tiny_model, tiny_corpus, tmp_path / "run", judge, server.url)
        assert len(server.requests) == asked > 0 and RunDir(str(tmp_path / "run")).manifest("score") == made
        (tmp_path / "run" / "_manifest" / "score" / f"{min(made)}.json").unlink()
        ran(tiny_model, tiny_corpus, tmp_path / "run", judge, server.url)
        again = RunDir(str(tmp_path / "run")).manifest("score")
        assert len(server.requests) == asked and [i for i in made if again[i] != made[i]] == [min(made)]
    for a, b in ((run, other), (run.controls, other.controls)):
        one, two = (x.table("scores").to_pylist() for x in (a, b))
        assert len(one) == len(two)
        for x, y in zip(one, two, strict=True):
            for name, value in x.items():
                assert y[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)


def test_a_judge_at_chance_and_a_scorer_without_a_model_are_refused(run: RunDir, judge: Path) -> None:
    config = tiny_config(Path("m"), Path("c"), Path("o"), optimize={"judge": str(judge)})
    with pytest.raises(BadInput, match=r"^optimize.judge: .* cannot serve"):
        Scorer(run, config).judge  # noqa: B018
    from raylabel.stages.score_stage import SCORE

    with pytest.raises(BadInput, match=r"^score.scorers: fuzzing asks a language model; set describe.model"):
        SCORE.steps(run, tiny_config(Path("m"), Path("c"), Path("o"), score={"scorers": ["judge", "fuzzing"]}))


def test_a_document_in_both_splits_is_refused_at_the_door(run: RunDir, monkeypatch: Any) -> None:
    table = run.table("samples")
    document = pa.array([7] * table.num_rows, pa.int64())
    leaking = table.set_column(table.schema.get_field_index("document"), "document", document)
    monkeypatch.setattr(run, "table", lambda *_, **__: leaking)
    with pytest.raises(RunFailed, match=r"^score: document 7 is in the explain split and in the score split"):
        refuse_leaks(run)


def test_scores_of_a_label_are_its_results(run: RunDir) -> None:
    rows = [r for r in run.table("scores").to_pylist() if r["corrected"] is not None]
    results = {(r["layer"], r["neuron"], r["polarity"]): r for r in run.table("results").to_pylist()}
    key = rows[0]["layer"], rows[0]["neuron"], rows[0]["polarity"]
    mine = [r["corrected"] for r in rows if (r["layer"], r["neuron"], r["polarity"]) == key]
    assert results[key]["score"] == pytest.approx(np.mean(mine), abs=1e-5)
    assert json.dumps(results[key]["score_low"]) is not None
    one = {"label_source": "x", "scorer": "judge", "corrected": 0.5, "low": 0.1, "high": 0.7}
    assert scored([one, {**one, "corrected": 0.3, "low": -0.3}], "x")["score_low"] == pytest.approx(-0.1)
    assert scored([one, {**one, "low": None}], "x")["score_low"] is None and scored([], "x")["score"] is None


def test_agreement_is_of_labels_that_a_model_wrote() -> None:
    found, name = scored_units.trials()[None, 0, 1]
    item = Labelled(found, "gpt", name, ["a", "b", "c"])
    draw = np.random.default_rng(0)
    true = np.array([float(w.active) for w in found.windows])
    odds = np.stack([true + draw.normal(0, 0.1, len(true)), *draw.normal(size=(3, len(true)))])
    row = agreement_row(item, odds, true + draw.normal(0, 0.1, len(true)), 0, 0)
    assert row is not None and row["scorer"] == "agreement" and 0.6 < row["corrected"] <= 1
    same = agreement_row(item, np.stack([odds[1]] * 4), true, 0, 0)
    assert same is not None and same["corrected"] == pytest.approx(0)
    assert agreement_row(item, np.full_like(odds, np.nan), true, 0, 0) is None

"""Concepts as a stage: which words are asked about, what the score split says of the winner, and whole runs."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raylabel.config import RunConfig
from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput
from raylabel.models.judge_prompt import Example
from raylabel.report import terminal
from raylabel.report.calibration import recovery
from raylabel.report.summary import concepts as summary_of
from raylabel.sections import OptimizeConfig
from raylabel.stages import optimize, optimize_stage
from raylabel.stages.optimize import Asked, Examples
from raylabel.stages.optimize_stage import SearchWorker, Task, open_judge
from raylabel.stages.results import recoverable
from raylabel.stages.separation import auroc, separation
from raylabel.store.rundir import RunDir
from raylabel.tables import from_rows, schema
from raylabel.words.families import stem
from tests.rundirs import differing
from tests.runs import tiny_config

KINDS = {
    "animal": ["cat", "dog", "fox", "hen", "cow", "pig", "bear", "lion"],
    "color": ["red", "blue", "green", "brown", "pink", "purple", "gray", "yellow"],
    "fruit": ["apple", "pear", "plum", "peach", "lemon", "banana", "grape", "cherry"],
    "vehicle": ["car", "van", "bus", "taxi", "truck", "bike", "jeep", "train"],
}
FILL = ["the", "of", "and", "to", "in", "it", "is", "on", "by", "at", "or", "so", "up", "an", "as", "we", "he", "if", "no", "my"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, words = random.Random(0), [word for own in KINDS.values() for word in own]
    rows = [" ".join(draw.choice(words if draw.random() < 0.4 else FILL) for _ in range(9)) for _ in range(260)]
    path = tmp_path_factory.mktemp("words") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def config(model: Path, corpus: Path, out: Path, **sections: dict[str, Any]) -> RunConfig:
    lists = corpus.with_name("lists.json")
    lists.write_text(json.dumps(KINDS), encoding="utf-8")
    tree: dict[str, dict[str, Any]] = {
        "subject": {"neurons": [0, 6], "layers": [0, 1], "context": 32},
        "exemplars": {"top": 12, "quantile": 4, "random": 6, "before": 20, "after": 6},
        "verify": {"synonyms": 1, "max_variants": 10},
        "optimize": {"units": "all", "positive": 0.9, "negative": 0.85, "examples": 24, "evaluations": 20},
        "controls": {"decoys": 4, "planted": 9, "nulls": 4, "lists": str(lists)},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return tiny_config(model, corpus, out, **tree)


@pytest.fixture(scope="module")
def run(tiny_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("optimized") / "run"
    run_pipeline(config(tiny_model, corpus, out))
    return RunDir(str(out))


# The test of a winner.


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    draw = np.random.default_rng(0)
    for _ in range(30):
        numbers, labels = draw.integers(0, 6, 25).astype(float), draw.random(25) < 0.4
        pairs = [(a > b) + (a == b) / 2 for a in numbers[labels] for b in numbers[~labels]]
        assert auroc(numbers, labels) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(np.ones(3), np.ones(3, bool)))


def texts(draw: np.random.Generator, effect: float, active: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers, labels, documents: words of a document go together, only some documents have active ones."""
    numbers, labels, documents = [], [], []
    for document in range(active + 12):
        common = draw.normal()
        for i in range(draw.integers(1, 4) + (document < active)):
            labels.append(i == 0 and document < active)
            numbers.append(common + draw.normal() + effect * labels[-1])
            documents.append(document)
    return np.array(numbers), np.array(labels), np.array(documents)


def test_p_values_are_honest_with_words_of_one_document_going_together() -> None:
    draw = np.random.default_rng(1)
    found = np.array([separation(*texts(draw, 0.0), seed=i).p_value for i in range(600)])
    for level in (0.05, 0.2, 0.5):
        assert (found <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / 600)
    strong = [separation(*texts(draw, 3.0), seed=i) for i in range(60)]
    assert np.mean([s.p_value <= 0.01 for s in strong]) > 0.9
    assert all(s.low <= s.auroc <= s.high and s.low >= 0 and s.high <= 1 for s in strong)


def test_intervals_hold_the_truth_and_are_never_empty() -> None:
    draw = np.random.default_rng(2)
    truth = 0.5 + np.arctan(1.0 / np.sqrt(4 - 1)) / np.pi  # P(N(1, 2) > N(0, 2)) = Φ(1 / 2) to two digits
    held = [(s.low <= truth <= s.high) for s in (separation(*texts(draw, 1.0), seed=i) for i in range(200))]
    assert np.mean(held) > 0.9
    perfect = separation(np.arange(12.0), np.arange(12) > 5, np.arange(12), 0)
    assert (perfect.auroc, perfect.high) == (1.0, 1.0) and 0.4 < perfect.low < 0.7
    few = separation(np.arange(4.0), np.arange(4) > 1, np.array([0, 0, 1, 1]), 0)
    assert np.isnan([few.low, few.p_value]).all()


def test_claims_are_those_that_benjamini_and_hochberg_make() -> None:
    p = [0.001, 0.01, 0.02, 0.2, 0.9, None]
    rows = [{"neuron": i, "polarity": 1, "p_value": value} for i, value in enumerate(p)]
    others = [{"neuron": i, "polarity": 1, "control": "decoy", "p_value": value} for i, value in enumerate([0.0001, 0.015, 0.5])]
    own, theirs = optimize.close(from_rows(rows, "concepts"), from_rows(others, "concepts", controls=True))
    assert own["claimed"].to_pylist() == [True, True, True, False, False, False]
    assert own["q_value"].to_pylist() == pytest.approx([0.005, 0.025, 0.1 / 3, 0.25, 0.9, None])
    assert theirs["claimed"].to_pylist() == [True, True, False]
    empty = schema("concepts").empty_table()
    assert optimize.close(empty, empty)[0].num_rows == 0


# Which words are asked about.


def exemplar(tokens: list[str], activations: list[float | None], **values: Any) -> dict[str, Any]:
    best = max(range(len(tokens)), key=lambda i: activations[i] or 0.0)
    return {
        "sampling": "top", "split": "explain", "rank": 0, "sample": 0, "document": None, "start": 0, "position": best,
        "tokens": tokens, "token_ids": list(range(10, 10 + len(tokens))), "activations": activations,
        "activation": activations[best], **values,
    }  # fmt: skip


def asked(row: dict[str, Any], more: tuple[dict[str, Any], ...] = (), **settings: Any) -> dict[str, bool]:
    found = optimize.examples([row, *more], OptimizeConfig(**settings), {1}, 5, 0)
    return {a.example.word: a.active for a in found.search}


def test_words_not_tokens_are_asked_about() -> None:
    row = exemplar([" the", " kit", "ten", " and", " don", "'t", " run", "."], [0.0, 0.1, 9.0, 0.3, -1.0, 0.2, 3.0, 0.1])
    # `run` is neither clearly active nor clearly silent; the full stop may be cut at the window's end.
    assert asked(row) == {"the": False, "kitten": True, "and": False, "don't": False}


def test_what_the_scan_did_not_count_is_not_asked_about() -> None:
    row = exemplar(["<s>", "sink", " cat", " dog", " nan", " end"], [0.0, 50.0, 5.0, 0.0, float("nan"), 0.0], position=2)
    row |= {"activation": 5.0, "token_ids": [1, 11, 12, 13, 14, 15]}
    assert asked(row) == {"cat": True, "dog": False}
    assert optimize.examples([exemplar(["a", "b"], [-1.0, -2.0])], OptimizeConfig(), {1}, 5, 0) == Examples([], [])


def test_words_at_the_edges_of_a_window_are_left_out_but_for_the_mat() -> None:
    row = exemplar(["ing", " cat", " dog"], [0.0, 0.0, 7.0], start=4)
    assert asked(row) == {"cat": False, "dog": True}
    assert asked({**row, "start": 0}) == {"ing": False, "cat": False, "dog": True}


def test_the_text_is_cut_in_whole_words() -> None:
    tokens = [f" w{i}" for i in range(30)] + ["x", " end", " off"]
    row = exemplar(tokens, [0.0] * 27 + [5.0] + [0.0] * 5)
    (found,) = [a for a in optimize.examples([row], OptimizeConfig(), {1}, 2, 0).search if a.active]
    assert found.example == Example(" ".join(f"w{i}" for i in range(7, 29)), "w27")
    assert optimize.examples([row], OptimizeConfig(), {1}, 2, 0).test == []


def test_examples_are_balanced_and_spread() -> None:
    rows = [
        exemplar([" the", f" cat{d % 7}", " the", f" x{d}", " sat", " so"], [0.0, 5.0, 0.0, 0.0, 0.0, 0.0], sample=d, rank=d)
        for d in range(40)
    ]
    found = optimize.examples(rows * 2, OptimizeConfig(examples=16), {1}, 5, 0).search
    assert Counter(a.active for a in found) == {True: 8, False: 8}
    yes, no = ([a for a in found if a.active == active] for active in (True, False))
    assert {a.example.word for a in yes} == {f"cat{i}" for i in range(7)}, "no word twice while there are others"
    assert len({a.document for a in yes}) == len({a.document for a in no}) == 8
    assert len({a.example.word for a in no}) == 8
    assert found == optimize.examples(rows[::-1], OptimizeConfig(examples=16), {1}, 5, 0).search
    assert found != optimize.examples(rows, OptimizeConfig(examples=16), {1}, 5, 1).search


def test_the_score_split_goes_by_the_explain_splits_maximum() -> None:
    row = exemplar([" a", " b", " c", " d"], [0.0, 8.0, 5.0, 0.0])
    score = exemplar([" e", " f", " g", " h"], [0.0, 5.0, 3.0, 0.0], split="score", sample=1)
    found = optimize.examples([row, score], OptimizeConfig(), {1}, 5, 0)
    assert {a.example.word: a.active for a in found.test} == {"e": False, "f": True}
    assert {a.example.word for a in found.search} == {"a", "b", "c"}


# Whole runs.


def test_controls_are_searched_and_the_calibration_counts_them(run: RunDir) -> None:
    rows = run.controls.table("concepts").to_pylist()
    assert {row["control"] for row in rows} == {"decoy", "null", "planted"}
    tested = [row for row in rows if row["status"] == "ok"]
    values = {kind: [r["auroc"] for r in tested if r["control"] == kind] for kind in ("null", "planted")}
    assert np.mean(values["planted"]) > 0.6 and len(values["planted"]) >= 12
    assert sum(r["claimed"] for r in tested if r["control"] == "null") <= 1 < sum(r["claimed"] for r in tested)
    found = recovery(run)
    assert sum(share.k for share, _ in found.values()) == sum(row["claimed"] for row in rows)
    truth = recoverable(run)
    hits = [
        any(stem(word) in truth[row["layer"], row["neuron"]] for word in (row["words"] or [])[:5])
        for row in rows if row["control"] == "planted"
    ]  # fmt: skip
    assert sum(known.k for _, known in found.values() if known is not None) == sum(hits) > 0
    assert found["decoy"][1] is None and found["null"][1] is None
    planted = next(iter(name for name in found if name.startswith("planted")))
    table = terminal.calibration_table({planted: (found[planted][0],) * 2}, found)
    assert [column.header for column in table.columns][3:] == ["concept claimed", "list recovered"]


def test_every_row_is_whole(run: RunDir) -> None:
    wanted = {(r["layer"], r["neuron"], r["polarity"]) for r in run.table("candidates").to_pylist()}
    rows = run.table("concepts").to_pylist()
    assert [(r["layer"], r["neuron"], r["polarity"]) for r in rows] == sorted(wanted, key=lambda k: (k[0], k[1], -k[2]))
    for row in rows + run.controls.table("concepts").to_pylist():
        if row["status"] == "too_few":
            assert row["words"] is None and row["auroc"] is None and not row["claimed"]
            continue
        assert row["label"].split(", ")[0] == row["words"][0] and len(row["words"]) == len(row["weights"])
        assert sum(row["weights"]) <= 1 + 1e-5 and row["weights"] == sorted(row["weights"], reverse=True)
        assert 0 < row["evaluations"] <= 20 and 0.5 < row["known"] <= 1
        assert row["proposer"] in {"mat", "neighbour", "promoted", "prior", "descent", "gradient", "others"}
        assert (row["status"] == "ok") == (row["auroc"] is not None) == (row["p_value"] is not None)
        assert not row["claimed"] or row["q_value"] <= 0.05
    told = summary_of(run)
    assert told is not None and told["auroc"] > 0.8 and told["deep"] == 0
    assert "pairs with known answers" in terminal.concepts_line(told)
    results = {(r["layer"], r["neuron"], r["polarity"]): r for r in run.table("results").to_pylist()}
    assert all(results[r["layer"], r["neuron"], r["polarity"]]["concept_words"] == r["words"] for r in rows)


def test_no_document_of_the_score_split_is_searched(run: RunDir) -> None:
    split = dict(zip(*(run.table("samples")[name].to_pylist() for name in ("document", "split")), strict=True))
    worker = SearchWorker(run.files.url)
    seen = 0
    for source, kinds in ((run, {}), (run.controls, {"decoy": 4, "planted": 9, "null": 4})):
        names = optimize_stage.wanted_concepts(source, worker.settings, 0)
        for task in worker._tasks(source, {"layer": 0, "first": 0, "last": 9, "controls": kinds}, names):
            assert all(split[a.document] == "explain" for a in task.examples.search)
            assert all(split[a.document] == "score" for a in task.examples.test)
            seen += len(task.examples.test)
    assert seen > 100


def tasks(count: int, permuted: bool, seed: int) -> list[Task]:
    """Units of one kind of word each; with `permuted`, labels are drawn anew among the examples of each split."""
    draw, found = random.Random(seed), []
    for number in range(count):
        name = draw.choice(list(KINDS))
        splits = []
        for split in range(2):
            labels, own = [i % 2 == 0 for i in range(20)], []
            words = [draw.choice(KINDS[name if yes else draw.choice([k for k in KINDS if k != name])]) for yes in labels]
            if permuted:
                draw.shuffle(labels)
            for i, (word, yes) in enumerate(zip(words, labels, strict=True)):
                text = " ".join([word, *draw.choices(FILL, k=3)])
                own.append(Asked(Example(text, word), yes, 1000 * split + i // 2, False))
            splits.append(own)
        found.append(Task((None, number, 1), Examples(*splits), [], seed * 1000 + number))
    return found


def test_true_concepts_are_claimed_and_permuted_labels_are_not(run: RunDir) -> None:
    worker = SearchWorker(run.files.url)
    judge, _ = open_judge(worker.config, worker.facts)
    shares = {}
    for permuted in (False, True):
        rows = worker._search(judge, tasks(60, permuted, seed=5))
        own, _ = optimize.close(from_rows(rows, "concepts"), schema("concepts", True).empty_table())
        shares[permuted] = float(np.mean(own["claimed"].to_pylist()))
    assert shares[False] >= 0.9
    assert shares[True] <= 0.05


def test_a_run_goes_on_and_gives_the_same_rows_on_ray(
    run: RunDir, tiny_model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = config(tiny_model, corpus, tmp_path / "run", run={"stages": ["tokenize", "scan", "identify", "verify"]})
    run_pipeline(again)
    whole = again.model_copy(update={"run": again.run.model_copy(update={"stages": "all", "address": "local", "workers": 2})})
    run_pipeline(whole)
    assert differing(run, RunDir(str(tmp_path / "run"))) == []


def test_a_unit_that_breaks_is_a_failure_and_no_other_is_touched(
    run: RunDir, tiny_model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = SearchWorker._search

    def poisoned(self: SearchWorker, judge: Any, tasks: list[Task]) -> Any:
        if any(task.name[:2] == (None, 2) for task in tasks):
            raise ValueError("no answer")
        return search(self, judge, tasks)

    monkeypatch.setattr(SearchWorker, "_search", poisoned)
    there = config(tiny_model, corpus, tmp_path / "run")
    run_pipeline(there)
    found = RunDir(str(tmp_path / "run"))
    failures = found.table("failures").to_pylist()
    assert {(f["stage"], f["neuron"], f["control"]) for f in failures} == {("optimize", 2, None)}
    places = {(r["layer"], r["neuron"]) for r in found.table("concepts").to_pylist()}
    assert not places & {(f["layer"], f["neuron"]) for f in failures}
    label = {(r["layer"], r["neuron"], r["polarity"]): r["label"] for r in run.table("concepts").to_pylist()}
    rows = found.table("concepts").to_pylist()
    assert rows and all(r["label"] == label[r["layer"], r["neuron"], r["polarity"]] for r in rows)


def test_the_published_recipe_is_run_and_tested_as_it_is(
    tiny_model: Path, corpus: Path, tmp_path: Path, run: RunDir
) -> None:
    out = tmp_path / "run"
    some = {"method": "descent", "steps": 5, "units": "flagged"}
    there = config(tiny_model, corpus, out, optimize=some, controls={"decoys": 0, "planted": 3, "nulls": 0})
    run_pipeline(there)
    rows = [r for r in RunDir(str(out)).controls.table("concepts").to_pylist() if r["status"] == "ok"]
    assert rows and all((r["proposer"], r["evaluations"], len(r["words"])) == ("descent", 0, 5) for r in rows)
    assert all(0 <= r["auroc"] <= 1 for r in rows)


def test_a_judge_that_cannot_serve_is_refused_in_a_line(tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    folder = Path(optimize_stage.__file__).parents[1] / "demo" / "judge"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(tmp_path / "dull")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "dull")
    dull = config(tiny_model, corpus, tmp_path / "run", optimize={"judge": str(tmp_path / "dull")})
    with pytest.raises(BadInput, match=r"^optimize.judge: .*dull cannot serve: .* no better than chance"):
        open_judge(dull, {})
    for settings, why in (({"template": "|text| |concept|"}, r"template: it has no \|token\|"),
                          ({"negative": 0.95}, "negative: 0.95 is not below")):  # fmt: skip
        with pytest.raises(BadInput, match=f"^optimize.{why}"):
            run_pipeline(config(tiny_model, corpus, tmp_path / "run", optimize=settings))


def test_the_card_shows_weighted_words(run: RunDir) -> None:
    row = next(r for r in run.controls.table("concepts").to_pylist() if r["claimed"])
    text = terminal.concept_card(row).plain
    assert f"{row['words'][0]} {row['weights'][0]:.2f}" in text and "→ claimed" in text and f"{row['auroc']:.2f}" in text
    assert "out of its depth" in terminal.concept_card({**row, "known": 0.2}).plain
    assert "too few" in terminal.concept_card({**row, "words": None}).plain

"""A run on a real trained model against an independent computation with plain transformers, fastText and loops."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import fasttext
import numpy as np
import pytest
import torch

from raylabel.config import build_config
from raylabel.engine.pipeline import run_pipeline
from raylabel.store.rundir import RunDir
from tests.shared import STORIES, STORIES_MODEL, needs_shared

pytestmark = needs_shared
NEURONS = 96


def config(out: Path, model: Path, **sections: dict[str, Any]) -> Any:
    tree: dict[str, Any] = {
        "subject": {"model": str(model), "neurons": [0, NEURONS], "device": "cpu"},
        "exemplars": {"corpus": {"path": str(STORIES)}, "quantile": 2, "random": 5},
        "verify": {"max_variants": 40, "synonyms": 3},
        "controls": {"decoys": 64},
        "run": {"out": str(out), "address": "inline", "stages": ["tokenize", "scan", "identify", "verify", "results"]},
    }
    for name, values in sections.items():
        tree[name] |= values
    return build_config(tree)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("stories") / "run"
    run_pipeline(config(out, STORIES_MODEL))
    return RunDir(str(out))


@pytest.fixture(scope="module")
def activations(run: RunDir) -> dict[int, list[np.ndarray]]:
    """Layer -> one array [T, 384] a sample, from plain transformers and a hook on each down projection's input."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STORIES_MODEL, dtype=torch.float32)
    rows = sorted(run.table("samples").to_pylist(), key=lambda row: row["sample"])
    batch = run.resolved["batch"]
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}
    seen: dict[int, torch.Tensor] = {}
    for layer in found:

        def hook(_m: Any, args: tuple[torch.Tensor, ...], layer: int = layer) -> None:
            seen[layer] = args[0]

        model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(hook)
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        ids = torch.zeros((batch, max(len(r["token_ids"]) for r in part)), dtype=torch.int64)
        for i, row in enumerate(part):
            ids[i, : len(row["token_ids"])] = torch.tensor(row["token_ids"])
        with torch.inference_mode():
            model.model(ids)
        for layer in found:
            found[layer] += [seen[layer][i, : len(row["token_ids"])].numpy().copy() for i, row in enumerate(part)]
    return found


def test_top_exemplars(run: RunDir, activations: dict[int, list[np.ndarray]]) -> None:
    rows = sorted(run.table("samples").to_pylist(), key=lambda row: row["sample"])
    split = np.array([row["split"] for row in rows])
    for layer in (0, 1):
        exemplars = run.table("exemplars", layer).to_pylist()
        for neuron in (0, 17, 50, 95):
            for polarity in (1, -1):
                # Position 0 is BOS, which does not count; no position of this model is a sink.
                peaks = np.array([(polarity * a[1:, neuron]).max() for a in activations[layer]])
                inside = np.flatnonzero((split == "explain") & (peaks > 0))
                best = sorted(inside.tolist(), key=lambda s: (-peaks[s], s))[:20]
                got = [
                    (r["sample"], np.float32(r["activation"])) for r in exemplars
                    if (r["neuron"], r["polarity"], r["sampling"], r["split"]) == (neuron, polarity, "top", "explain")
                ]  # fmt: skip
                assert got == [(s, peaks[s]) for s in best]


def test_words_are_found_by_characters(run: RunDir) -> None:
    """The published code took characters for words; this tokenizer's tokens moreover span words."""
    rows = run.table("candidates").to_pylist()
    words = [word for row in rows for word in row["mat_words"]]
    assert sum(len(word) > 1 for word in words) > 0.6 * len(words)
    assert not any(" " in word.strip() for word in words)
    spanning = [m for row in rows for m in row["mats"] if len(m.split()) > 1]
    assert spanning, "no MAT of this model spans words: the check is void"


def test_phrases_have_five_tokens_before_and_five_after(run: RunDir) -> None:
    """The published windows were one token short at the end."""
    candidates = {(r["layer"], r["neuron"], r["polarity"]): r for r in run.table("candidates").to_pylist()}
    checked = 0
    for row in run.table("exemplars").to_pylist():
        if (row["sampling"], row["split"]) != ("top", "explain") or row["neuron"] > 10:
            continue
        at = row["position"]
        tokens = ["" if i == 1 else t for i, t in zip(row["token_ids"], row["tokens"], strict=True)]
        text = "".join(tokens[max(0, at - 5) : at + 6])
        assert candidates[row["layer"], row["neuron"], row["polarity"]]["phrases"][row["rank"]] == text
        checked += 1
    assert checked > 100


def unit_vectors(run: RunDir, words: list[str]) -> np.ndarray:
    """Vectors with the run's common part removed, as the definition says, straight from fastText."""
    model = fasttext.load_model(run.files.path("vectors.bin"))
    from raylabel.words.vectors import normal

    with np.load(run.files.path("background.npz")) as stored:
        mean, component = stored["mean"], stored["component"]
    found = []
    for word in words:
        vector = model.get_word_vector(normal(word)) if word.strip() else np.zeros_like(mean)
        if word.strip():
            vector = vector - mean
            vector = vector - component * float(vector @ component)
        length = np.linalg.norm(vector)
        found.append(vector / length if length > 0 else vector)
    return np.array(found)


def mean_cosine(vectors: np.ndarray) -> float | None:
    """Over unordered pairs, self-pairs left out, by loops."""
    kept = [v for v in vectors if np.linalg.norm(v) > 0.5]
    pairs = [float(kept[i] @ kept[j]) for i in range(len(kept)) for j in range(i)]
    return sum(pairs) / len(pairs) if pairs else None


def test_similarities(run: RunDir) -> None:
    rows = [r for r in run.table("candidates").to_pylist() if r["status"] == "ok"][:60]
    assert len(rows) == 60
    for row in rows:
        vectors = unit_vectors(run, row["mat_words"])
        expected = mean_cosine(vectors)
        assert row["token_similarity"] == pytest.approx(expected, abs=2e-4)
        first = [row["families"].index(f) for f in sorted(set(row["families"]))]
        if row["family_similarity"] is not None:
            assert len(first) >= 4
            assert row["family_similarity"] == pytest.approx(mean_cosine(vectors[first]), abs=2e-4)
        top = Counter(row["families"]).most_common(3)
        assert row["top_families"] == pytest.approx(sum(n for _, n in top) / len(row["families"]))


def test_phrase_similarity_is_sif_with_the_corpus_own_counts(run: RunDir) -> None:
    from raylabel.words.segment import words
    from raylabel.words.vectors import normal

    counts: Counter[str] = Counter()
    for row in run.table("samples").to_pylist():
        if row["split"] == "explain":
            counts.update(words(row["text"]))
    total = sum(counts.values())
    model = fasttext.load_model(run.files.path("vectors.bin"))
    with np.load(run.files.path("background.npz")) as stored:
        component = stored["phrase_component"]
    for row in [r for r in run.table("candidates").to_pylist() if r["status"] == "ok"][5:200:13]:
        vectors = []
        for text in row["phrases"]:
            weighted = [1e-3 / (1e-3 + counts[w] / total) * model.get_word_vector(normal(w)) for w in words(text)]
            vector = np.mean(weighted, axis=0)
            vector = vector - component * float(vector @ component)
            vectors.append(vector / np.linalg.norm(vector))
        assert row["phrase_similarity"] == pytest.approx(mean_cosine(np.array(vectors)), abs=5e-4)


def test_q_values_and_kinds(run: RunDir) -> None:
    rows = run.table("candidates").to_pylist()
    p = np.array([r["p_value"] for r in rows if r["p_value"] is not None], dtype=np.float64)
    for row in rows:
        if row["p_value"] is None:
            assert row["q_value"] is None
            continue
        q = min(1.0, min(len(p) * t / (p <= t).sum() for t in p[p >= row["p_value"]]))
        assert row["q_value"] == pytest.approx(q, rel=1e-4)
        if row["status"] == "ok" and row["n_families"] >= 4 and row["q_value"] <= 0.05:
            assert row["kind"] == "meaning"
    decoys = run.controls.table("candidates").to_pylist()
    for row in rows[::7]:
        if row["p_value"] is not None and row["kind"] != "word":
            mine = [d for d in decoys if d["layer"] == row["layer"]]
            as_well = [d for d in mine if d["p_value"] is not None and d["p_value"] <= row["p_value"]]
            assert row["decoy_rate"] == pytest.approx(len(as_well) / len(mine), abs=1e-6)


def test_variants_reproduce_and_follow_from_the_text(run: RunDir) -> None:
    """Where text and tokens agree, a variant's activation is that of its whole edited text, context included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(STORIES_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(STORIES_MODEL)
    samples = {r["sample"]: r for r in run.table("samples").to_pylist() if r["round_trips"]}
    layer = 1
    exemplars = {
        (r["neuron"], r["polarity"], r["rank"]): r for r in run.table("exemplars", layer).to_pylist()
        if (r["sampling"], r["split"]) == ("top", "explain")
    }  # fmt: skip
    seen: list[torch.Tensor] = []
    model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    checked = 0
    for row in run.table("variants", layer).to_pylist()[::9]:
        exemplar = exemplars[row["neuron"], row["polarity"], row["rank"]]
        sample = samples.get(exemplar["sample"])
        at = exemplar["start"] + exemplar["position"]
        if sample is None or row["offset"] != 0 or checked == 60:
            continue
        text, ends = sample["text"], sample["ends"]
        begin, end = ends[at - 1], ends[at]
        places = [i for i in range(len(text)) if text.startswith(row["word"], i) and i < end and i + len(row["word"]) > begin]
        if len(places) != 1:
            continue
        edited = text[: places[0]] + row["substitute"] + text[places[0] + len(row["word"]) :]
        old, new = sample["token_ids"], [1, *tokenizer(edited, add_special_tokens=False)["input_ids"]]
        same = next(i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y)
        alike = next(i for i, (x, y) in enumerate(zip(old[::-1], new[::-1], strict=False)) if x != y)
        # The window in the edited text is plain where only tokens inside the phrase changed.
        first, last = max(at - 5, 1), min(at + 5, len(old) - 1)
        if same < first or alike < len(old) - 1 - last:
            continue
        seen.clear()
        with torch.inference_mode():
            model.model(torch.tensor([new]))
        window = row["polarity"] * seen[0][first : last + 1 + len(new) - len(old), row["neuron"]].numpy()
        assert row["activation"] == pytest.approx(window.max(), abs=1e-4 * max(1.0, exemplar["activation"]))
        checked += 1
    assert checked >= 20
    verdicts = run.table("verifications").to_pylist()
    assert verdicts
    assert all(r["reproduced"] == 1.0 for r in verdicts)


def test_units_exceed_decoys_and_random_weights_do_not(run: RunDir, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    def meanings(directory: RunDir) -> tuple[float, float]:
        return tuple(  # type: ignore[return-value]
            sum(r["kind"] == "meaning" for r in part.table("candidates").to_pylist()) / part.table("candidates").num_rows
            for part in (directory, directory.controls)
        )

    units, decoys = meanings(run)
    assert units > decoys, (units, decoys)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(STORIES_MODEL)).save_pretrained(tmp_path / "random")
    for file in STORIES_MODEL.glob("*token*.json"):
        shutil.copy(file, tmp_path / "random" / file.name)
    out = tmp_path / "run"
    run_pipeline(config(out, tmp_path / "random", run={"out": str(out), "stages": ["tokenize", "scan", "identify"]}))
    random_units, random_decoys = meanings(RunDir(str(out)))
    assert random_units <= random_decoys, (random_units, random_decoys)


def test_run_json_says_what_was_run(run: RunDir) -> None:
    info = json.loads(run.files.read("run.json"))
    assert info["configs"][-1]["config"]["subject"]["neurons"] == [0, NEURONS]
    assert {"torch", "transformers", "raylabel"} <= set(info["configs"][-1]["versions"])

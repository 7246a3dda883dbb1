"""Controls that are functions of text: what they see, what they give, and that every stage sees the same."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import kstest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput
from raylabel.sections import ControlsConfig
from raylabel.stages import scan
from raylabel.stages.base import blame_neurons, with_controls
from raylabel.stages.planting import DIFFICULTIES, FEW, count_words, distributions, from_json, nulls, plant, strong_units, to_json
from raylabel.stages.scanner import Scanner
from raylabel.stages.textmeasure import measure_texts
from raylabel.stages.textual import GRID, NULL, PLANTED, TAIL, Plant, Reader, TextUnits, pieces
from raylabel.stages.verify import ROWS, TEXTS
from raylabel.store.rundir import RunDir
from raylabel.words.families import stem
from raylabel.words.segment import spans
from tests.models import tiny
from tests.runs import WORDS, do_scan, tables_equal, tiny_config, write_corpus
from tests.words.planted import LISTS

TEXTS_ = [
    "The dog saw a big dog, and don't you dare: 3.14 (café) WordPress snake_case x==y",
    "dogs\n\n\tcat   cat cat's Cat; naïve ... !!! 你好 dog", "", " ", "a",
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS_ * 20, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def spanning() -> Tokenizer:
    """Tokens that hold several words, and whose white space is a sign of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<bos>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["one day, a dog and a cat saw the big dog"] * 50 + TEXTS_, trainer)
    return tokenizer


@pytest.mark.parametrize("name", ["bpe", "spanning"])
def test_words_are_read_as_far_as_the_text_goes(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    names = pieces(tokenizer, [0])
    reader = Reader(names)
    rng = random.Random(0)
    some = ["one", "day,", "a", "dog", "and", "cat", "saw", "the", "big", "dogs"]
    drawn = [" ".join(rng.choices(some, k=12)) for _ in range(20)]
    for text in [*TEXTS_, *drawn]:
        ids = [0, *tokenizer.encode(text, add_special_tokens=False).ids]
        found = reader(ids)
        whole = "".join(names[i] for i in ids)
        if name == "bpe" and text.isascii():
            assert whole == text
        end = 0
        for t in range(len(ids)):
            start, end = end, end + len(names[ids[t]])
            # Whatever words of the text so far end within this token, or would if the text ended here.
            expected = {whole[a : min(b, end)].casefold() for a, b in spans(whole) if a < end and b > start}
            assert {read.word for read in found if read.position == t} == expected
            assert found == reader(ids) and all(r.position <= t for r in reader(ids[: t + 1]))


def test_the_word_before_is_known(bpe: Tokenizer) -> None:
    ids = bpe.encode("The dog saw, dog").ids
    found = [(r.word, r.before) for r in Reader(pieces(bpe, []))(ids) if r.word in ("dog", "saw", ",")]
    assert found[0] == ("dog", "the") and ("dog", ",") in found and ("saw", "dog") in found


def units(plants: list[Plant], seed: int = 0) -> TextUnits:
    rng = np.random.default_rng(seed)
    values = np.sort(rng.exponential(size=(len(plants), len(GRID))), axis=1).cumsum(axis=1)
    return TextUnits(plants, values, rng.integers(2**63, size=len(plants)).astype(np.uint64))


def some_texts(tokenizer: Tokenizer, n: int = 30) -> list[list[int]]:
    rng = random.Random(1)
    given = ["the", "dog", "and", "a", "cat", "saw", "one", "big", "dogs", "day", "you", "don't"]
    return [tokenizer.encode(" ".join(rng.choices(given, k=rng.randint(1, 25)))).ids for _ in range(n)]


PLANTS = [
    Plant(NULL, 0), Plant(NULL, 1), Plant(PLANTED, 0, "clean", words=("dog", "cat")),
    Plant(PLANTED, 1, "distractor", words=("big",), weak=("dog", "one")), Plant(PLANTED, 2, "cue", cue="the"),
    Plant(PLANTED, 3, "noise", words=("cat",), noise=0.1),
]  # fmt: skip


def test_batches_windows_and_beginnings_agree(bpe: Tokenizer) -> None:
    given, reader = units(PLANTS), Reader(pieces(bpe, []))
    texts = some_texts(bpe)
    longest = max(map(len, texts))
    ids = np.array([t + [0] * (longest - len(t)) for t in texts])
    lengths = np.array([len(t) for t in texts])
    whole = given.batch(ids, lengths, [reader(t) for t in texts])
    assert whole.shape == (len(texts), longest, len(PLANTS)) and whole.dtype == np.float32
    some = np.array([4, 0, 3])
    for b, text in enumerate(texts):
        for last in range(1, len(text) + 1):
            # What comes later changes nothing, and a window is a part of the whole.
            part = given.values(np.array(text[:last]), reader(text[:last]), some, max(last - 3, 0), last)
            np.testing.assert_array_equal(part, whole[b, max(last - 3, 0) : last, some].T)


def test_a_planted_unit_fires_on_its_words_alone(bpe: Tokenizer) -> None:
    given, reader = units(PLANTS), Reader(pieces(bpe, []))
    top = [given._quantile(np.array([u]), np.array([[1 - TAIL]]))[0, 0] for u in range(len(PLANTS))]
    seen: Counter[str] = Counter()
    for text in some_texts(bpe, 200):
        reads = reader(text)
        values = given.values(np.array(text), reads, np.arange(len(PLANTS)), 0, len(text))
        for t in range(len(text)):
            here = {r.word for r in reads if r.position == t}
            behind = any(r.before == "the" and r.begins for r in reads if r.position == t)
            assert (values[t, 2] >= top[2] * (1 - 1e-6)) == bool(here & {"dog", "cat"})
            assert (values[t, 4] >= top[4] * (1 - 1e-6)) == behind
            assert values[t, 3] >= top[3] * (1 - 1e-6) or "big" not in here
            if here & {"dog", "one"} and "big" not in here:
                assert values[t, 3] >= top[3] / 2 * (1 - 1e-6)
                seen["weak"] += 1
            seen["noise"] += values[t, 5] >= top[5] * (1 - 1e-6) and "cat" not in here
            seen["cat"] += "cat" in here
    assert seen["weak"] and seen["noise"] and seen["cat"]


def test_a_null_has_the_distribution_of_its_unit(bpe: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 300, size=20_000)
    given = TextUnits(nulls(3), np.tile(GRID, (3, 1)), np.array([1, 2, 3], np.uint64))
    values = given.values(ids, [], np.arange(3), 0, len(ids))
    for u in range(3):
        assert kstest(values[:, u], "uniform").pvalue > 1e-3
    # Two units have nothing to do with each other, nor has a unit with its own last value.
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.03 and abs(np.corrcoef(values[1:, 0], values[:-1, 0])[0, 1]) < 0.03


def counted(times: int = 30) -> Counter[str]:
    return count_words([" ".join(word for words in LISTS.values() for word in words)] * times + ["the of shirts Shirt axes"] * 70)


def test_plants_of_every_difficulty() -> None:
    counts = counted() + Counter({f"filler{i}": 200 for i in range(2000)}) + Counter({f"cue{c}": 90 for c in "abc"})
    found = plant(LISTS, counts, 90, 0, 1)
    assert found == plant(LISTS, counts, 90, 0, 1) != plant(LISTS, counts, 90, 0, 2)
    assert [p.neuron for p in found] == list(range(90)) and {p.control for p in found} == {PLANTED}
    kinds = Counter(p.difficulty for p in found)
    assert set(kinds) <= set(DIFFICULTIES) and set(kinds) >= {"clean", "forms", "few", "noise", "diluted", "two lists"}
    of = {word: name for name, words in LISTS.items() for word in words}
    for p in found:
        assert all(counts[w] >= 5 and w == w.casefold() for w in (*p.words, *p.weak))
        if p.difficulty == "forms":
            assert len({stem(w) for w in p.words}) == 1
        elif p.difficulty == "cue":
            assert not p.words and 60 <= counts[p.cue or ""] <= sum(counts.values()) / 1000
        else:
            assert {of[w] for w in p.words} <= set(p.lists) and len({stem(w) for w in p.words}) == len(p.words)
        if p.difficulty == "few":
            assert FEW[0] <= len(p.words) <= FEW[1]
        if p.difficulty == "two lists":
            assert {of[w] for w in p.words} == set(p.lists) and len(p.lists) == 2
        if p.difficulty == "distractor":
            assert {of[w] for w in p.weak} == {p.lists[1]} and not set(p.words) & set(p.weak)
        assert (p.noise > 0) == (p.difficulty == "noise")
    assert from_json(json.loads(json.dumps(to_json({3: found})))) == {3: found}


def test_lists_whose_words_do_not_occur() -> None:
    with pytest.raises(BadInput, match=r"controls\.planted.*controls\.lists"):
        plant(LISTS, Counter({"dog": 3}), 4, 0, 0)
    assert plant(LISTS, Counter(), 0, 0, 0) == []


def test_distributions_are_those_of_strong_units() -> None:
    highest = np.concatenate([np.linspace(0, 1, 99), [8.0]])
    drawn = strong_units(highest, 50, 0, 0)
    assert len(drawn) == 50 and highest[drawn].min() >= 0.75 * np.percentile(highest, 99)
    values = np.random.default_rng(0).normal(size=(5000, 2))
    found = distributions(values)
    assert found.shape == (2, len(GRID)) and (np.diff(found, axis=1) >= 0).all()
    np.testing.assert_allclose(found[:, [0, -1]], [[c.min(), c.max()] for c in values.T], rtol=1e-6)
    np.testing.assert_allclose(found[:, 25], np.quantile(values, GRID[25], axis=0), rtol=1e-5)


def test_variants_are_measured_as_the_scan_measures(bpe: Tokenizer) -> None:
    given, names = units(PLANTS), pieces(bpe, [0])
    texts = [[0, *t] for t in some_texts(bpe, 8)]
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for u in (0, 2, 4):
        for text in rng.integers(len(texts), size=20).tolist():
            start = int(rng.integers(len(texts[text])))
            end = int(rng.integers(start + 1, len(texts[text]) + 1))
            rows.append({"control": PLANTS[u].control, "neuron": PLANTS[u].neuron, "polarity": 1, "text": text,
                         "start": start, "end": end})  # fmt: skip
    plan = {"rows": pa.Table.from_pylist(rows, ROWS), "texts": pa.Table.from_pylist([{"ids": t} for t in texts], TEXTS)}
    found = measure_texts(given, Reader(names), [0], plan).column("activation").to_pylist()
    for row, value in zip(rows, found, strict=True):
        text, u = texts[row["text"]], [(p.control, p.neuron) for p in PLANTS].index((row["control"], row["neuron"]))
        whole = given.batch(np.array([text]), np.array([len(text)]), [Reader(names)(text)])[0, :, u]
        counted = [whole[t] for t in range(row["start"], row["end"]) if text[t] != 0]
        assert value == (max(counted) if counted else None)


def test_keys_of_controls_name_their_kinds() -> None:
    keys = with_controls({0: [3, 4], 2: [0]}, ControlsConfig(decoys=5, nulls=2, planted=3), 4)
    assert [k for k in keys if not k["controls"]] == [
        {"layer": 0, "first": 3, "last": 5, "controls": {}}, {"layer": 2, "first": 0, "last": 1, "controls": {}},
    ]  # fmt: skip
    theirs = [k for k in keys if k["controls"]]
    assert [(k["layer"], k["first"], k["last"]) for k in theirs] == [(0, 0, 4), (0, 4, 5), (2, 0, 4), (2, 4, 5)]
    blamed = sorted((b["control"], b["neuron"]) for k in theirs[:2] for b in blame_neurons(k))
    assert blamed == [(kind, n) for kind, count in (("decoy", 5), ("null", 2), ("planted", 3)) for n in range(count)]
    assert blame_neurons(keys[0]) == [{"layer": 0, "neuron": 3}, {"layer": 0, "neuron": 4}]


CONTROLS = {"decoys": 5, "nulls": 4, "planted": 7}


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "lists.json"
    path.write_text(json.dumps({"first": WORDS[:12], "second": WORDS[12:30], "third": WORDS[20:]}))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("gpt2", tmp_path_factory.mktemp("model") / "gpt2")


def test_the_scan_of_text_controls_equals_brute_force(
    model: Path, lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 60)
    controls = {**CONTROLS, "lists": str(lists)}
    run = do_scan(model, corpus, tmp_path / "run", controls=controls)
    monkeypatch.setattr(scan.lease_size, "__defaults__", (5,))
    assert tables_equal(run, do_scan(model, corpus, tmp_path / "cut", controls=controls), ("exemplars", "statistics"))
    scanner = Scanner(run.files.url)
    special = set(run.resolved["special_ids"])
    samples = sorted(run.table("samples").to_pylist(), key=lambda row: row["sample"])
    for layer in (0, 2):
        texts = scanner.fixed.texts(layer)
        assert texts is not None
        series = []
        for row in samples:
            ids = row["token_ids"]
            values = texts.batch(np.array([ids]), np.array([len(ids)]), [scanner.fixed.reader(ids)])[0]
            keep = [t for t in range(len(ids)) if ids[t] not in special]
            series.append(values[keep])
        whole = np.concatenate(series)
        for row in run.controls.table("statistics", layer).to_pylist():
            if row["control"] == "decoy":
                assert row["logits_up"]
                continue
            u = [(p.control, p.neuron) for p in texts.plants].index((row["control"], row["neuron"]))
            assert row["tokens_seen"] == len(whole) and row["logits_up"] is None
            assert row["max"] == whole[:, u].max() and row["fires"] == int((whole[:, u] > 0).sum())
            assert row["mean"] == pytest.approx(float(whole[:, u].mean()), rel=1e-4, abs=1e-6)
            best = sorted((s[:, u].max() for s, r in zip(series, samples, strict=True) if len(s) and r["split"] == "explain"))
            top = run.controls.table("exemplars", layer).to_pylist()
            mine = [e for e in top if (e["control"], e["neuron"], e["sampling"], e["split"]) == (
                row["control"], row["neuron"], "top", "explain")]  # fmt: skip
            assert [e["activation"] for e in mine] == [v for v in best[::-1] if v > 0][: len(mine)] and len(mine) == 6


def test_text_controls_go_through_every_stage(model: Path, lists: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 400)
    sections = {"controls": {**CONTROLS, "lists": str(lists)}, "identify": {"fdr": None}, "verify": {"max_variants": 40}}
    run_pipeline(tiny_config(model, corpus, tmp_path / "run", **sections))
    run = RunDir(str(tmp_path / "run"))
    assert run.table("failures").num_rows == 0
    results = run.controls.table("results").to_pylist()
    counts = Counter((r["layer"], r["control"]) for r in results)
    assert counts == {(layer, kind): n for layer in range(3) for kind, n in (("decoy", 5), ("null", 4), ("planted", 7))}
    assert "control" not in run.table("results").column_names
    verified = [v for v in run.controls.table("verifications").to_pylist() if v["control"] != "decoy"]
    assert verified and all(v["reproduced"] == 1.0 for v in verified)
    calibration = run.table("calibration").to_pylist()
    planted = [c for c in calibration if c["control"] == "planted"]
    assert sum(c["n"] for c in planted) == 21 and {c["difficulty"] for c in planted} <= set(DIFFICULTIES)
    assert {c["difficulty"] for c in calibration if c["control"] != "planted"} == {None}
    # Other lists make other units, and what does not depend on them stays.
    Path(lists).write_text(json.dumps({"first": WORDS[5:20], "second": WORDS[20:]}))
    run_pipeline(tiny_config(model, corpus, tmp_path / "run", **sections))
    assert RunDir(str(tmp_path / "run")).table("results").equals(run.table("results"))

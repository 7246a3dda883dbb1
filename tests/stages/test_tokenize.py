"""Samples: bodies of a document's tokens, with their text, whatever the tokenizer and however the corpus is cut."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput
from raylabel.stages.tokenize import cut, encode, number, split_of
from raylabel.store.rundir import RunDir
from tests.models.tiny import tokenizer as tiny_tokenizer
from tests.runs import WORDS, tiny_config

BOS = 1
MANY = 10**9


def tokenizer() -> Any:
    return tiny_tokenizer().backend_tokenizer


def stripping() -> Tokenizer:
    """Drops white space, as BERT's tokenizers do; a document's first token may begin after its first character."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "one", "two", ".", "three"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def samples(
    texts: list[str], context: int = 8, bos: int | None = BOS, limit: int = MANY, made: Any = None
) -> list[dict[str, Any]]:
    """Rows of `samples` of one piece of a corpus."""
    parts = [cut(made or tokenizer(), texts, context, bos, limit)]
    return [row for part in number(parts, limit, bos is not None) for row in part.to_pylist()]


def pieces(row: dict[str, Any]) -> list[str]:
    """The text of each token, by `ends`."""
    ends = [0, *row["ends"]]
    return [row["text"][a:b] for a, b in itertools.pairwise(ends)]


of_words = st.lists(st.sampled_from([*WORDS, "é", "🙂", "\n", "  ", "naïve"]), max_size=25).map(" ".join)
texts = st.lists(st.one_of(st.text(max_size=40), of_words), max_size=5)


@settings(deadline=None, max_examples=150)
@given(texts, st.integers(2, 12), st.sampled_from([BOS, None]))
def test_the_bodies_of_a_document_join_to_it(documents: list[str], context: int, bos: int | None) -> None:
    made = tokenizer()
    body = context - (bos is not None)
    for text in documents:
        table = cut(made, [text], context, bos, MANY)
        [(ids, ends)] = encode(made, [text])
        rows = table.to_pylist()
        seen = {tuple(ids[at : at + body]) for at in range(0, len(ids), body)}
        assert len(rows) == len(seen)
        if len(seen) == -(-len(ids) // body):  # no body twice
            joined = [i for row in rows for i in row["token_ids"][bos is not None :]]
            assert joined == ids.tolist()
            assert "".join(row["text"] for row in rows) == (text if len(ids) else "")
        for row in rows:
            assert len(row["token_ids"]) == len(row["ends"]) <= context
            assert row["ends"] == sorted(row["ends"])
            assert row["ends"][-1] <= len(row["text"])
            assert "".join(pieces(row)) == row["text"][: row["ends"][-1]]
            if bos is not None:
                assert (row["token_ids"][0], row["ends"][0]) == (bos, 0)
            assert row["round_trips"] == (encode(made, [row["text"]])[0][0].tolist() == row["token_ids"][bos is not None :])
        assert all(a <= b for a, b in itertools.pairwise(ends))


def test_bodies_hold_context_tokens_less_the_bos_and_the_tail_stays() -> None:
    text = " ".join(WORDS)
    [(ids, _)] = encode(tokenizer(), [text])
    for bos, body in ((BOS, 7), (None, 8)):
        rows = samples([text], 8, bos)
        lengths = [len(row["token_ids"]) - (bos is not None) for row in rows]
        assert lengths == [body] * (len(ids) // body) + ([len(ids) % body] if len(ids) % body else [])
        assert all((row["token_ids"][0] == BOS) == (bos is not None) for row in rows)


def test_no_sample_crosses_two_documents() -> None:
    rows = samples([f"{word} {word}" for word in WORDS], context=6)
    for row in rows:
        assert row["text"].strip()
        assert row["text"] in f"{WORDS[row['document']]} {WORDS[row['document']]}"
    assert sorted({row["document"] for row in rows}) == list(range(len(WORDS)))


def test_text_goes_by_characters_not_bytes() -> None:
    [row] = samples(["é🙂 naïve"], context=64, bos=None)
    assert "".join(pieces(row)) == "é🙂 naïve"
    # The bytes of one character are several tokens: the last but one holds the character, the others nothing more.
    assert len(row["token_ids"]) > len("é🙂 naïve") - 3
    assert row["ends"][-1] == len("é🙂 naïve")


def test_what_a_tokenizer_drops_stays_in_the_text() -> None:
    rows = samples(["  one  two .\n\nthree \n"], context=3, bos=None, made=stripping())
    assert "".join(row["text"] for row in rows) == "  one  two .\n\nthree \n"
    assert [row["ends"] for row in rows] == [[5, 10, 12], [7]]
    assert rows[1]["text"] == "\n\nthree \n"


def test_empty_documents_give_no_sample_but_keep_their_number() -> None:
    rows = samples(["", "one fox", "", "two dogs"], context=64)
    assert [(row["document"], row["text"]) for row in rows] == [(1, "one fox"), (3, "two dogs")]


def test_exact_duplicates_are_dropped_wherever_they_stand() -> None:
    texts = ["the quick brown fox", "a cat", "the quick brown fox", "a cat sat on a mat", "a cat"]
    rows = samples(texts, context=64)
    assert [(row["sample"], row["document"], row["text"]) for row in rows] == [
        (0, 0, texts[0]), (1, 1, texts[1]), (2, 3, texts[3])
    ]  # fmt: skip
    # Bodies count, not documents: the second document begins with a body of the first.
    same = "the quick brown fox jumps over"
    short = samples([same, same + " the lazy dog"], context=4, bos=None)
    ids = [tuple(row["token_ids"]) for row in short]
    assert len(set(ids)) == len(ids)
    assert {row["document"] for row in short} == {0, 1}


def test_a_limit_ends_the_samples_before_it_is_passed() -> None:
    texts = [f"{a} {b}" for a in WORDS for b in WORDS]
    whole = samples(texts, context=16)
    for limit in (1, 7, 50, 300):
        rows = samples(texts, 16, limit=limit)
        used = sum(len(row["token_ids"]) - 1 for row in rows)
        assert rows == whole[: len(rows)]
        assert used <= limit < used + len(whole[len(rows)]["token_ids"]) - 1


@pytest.mark.parametrize("limit", [30, 97, 400, MANY])
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [40], [10, 11, 80, 200], list(range(0, 300, 7))], ids=len)
def test_the_pieces_of_a_corpus_do_not_change_the_samples(limit: int, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Every text four times: duplicates within a piece and between pieces, and documents of very different length.
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(0, 20))) for _ in range(75)] * 4
    monkeypatch.setattr("raylabel.stages.tokenize.DOCUMENTS_A_BATCH", 8)
    whole = samples(texts, limit=limit)
    parts = [
        cut(tokenizer(), texts[a:b], 8, BOS, limit)
        for a, b in zip([0, *cuts], [*cuts, len(texts)], strict=True)
    ]  # fmt: skip
    assert pa.concat_tables(number(parts, limit, True)).to_pylist() == whole
    assert [row["sample"] for row in whole] == list(range(len(whole)))


def test_two_documents_in_three_are_for_explaining() -> None:
    n = 6000
    share = sum(split_of(f"document {i}") == "explain" for i in range(n)) / n
    assert abs(share - 2 / 3) < 4 * (2 / 9 / n) ** 0.5


def test_the_split_of_a_text_never_changes() -> None:
    assert [split_of(text) for text in ("", "a", "é", "x", "y", "z", "one")] == ["explain"] * 4 + ["score"] * 3
    texts = ["one fox jumps over the lazy dog", "y", "one fox jumps over the lazy dog", "x"]
    for row in samples(texts, context=4):
        assert row["split"] == split_of(texts[row["document"]])


def runs(model: Path, corpus: Path, out: Path, **sections: Any) -> RunDir:
    sections.setdefault("identify", {"vectors": "unused.bin"})
    run_pipeline(tiny_config(model, corpus, out, run={"stages": ["tokenize"]}, **sections))
    return RunDir(str(out))


def test_one_file_or_ten_give_the_same_table(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.dumps({"text": f"{a} {b} {a}"}) + "\n" for a in WORDS for b in WORDS[:7]]
    (tmp_path / "one.jsonl").write_text("".join(rows))
    (tmp_path / "ten").mkdir()
    for i in range(10):
        (tmp_path / "ten" / f"{i}.jsonl").write_text("".join(rows[i * len(rows) // 10 : (i + 1) * len(rows) // 10]))
    few = [{"corpus": {"path": str(tmp_path / name), "tokens": 500}} for name in ("one.jsonl", "ten")]
    one = runs(tiny_model, tmp_path, tmp_path / "a", exemplars=few[0])
    monkeypatch.setattr("raylabel.sources.corpus.CHUNK_BYTES", 1)
    ten = runs(tiny_model, tmp_path, tmp_path / "b", exemplars=few[1])
    plan = ten.plan("tokenize")
    assert plan is not None
    assert sum(unit.step == "read" for unit in plan.units) == 10
    assert one.table("samples").equals(ten.table("samples"))
    assert 450 < sum(len(ids) - 1 for ids in one.table("samples").column("token_ids").to_pylist()) <= 500


def test_more_samples_than_a_file_holds_go_to_several(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = runs(tiny_model, tiny_corpus, tmp_path / "a")
    monkeypatch.setattr("raylabel.stages.tokenize.SAMPLES_A_FILE", 50)
    several = runs(tiny_model, tiny_corpus, tmp_path / "b")
    assert len(several.paths("samples")) == -(-one.table("samples").num_rows // 50) > 2
    assert several.table("samples").equals(one.table("samples"))


def test_bos_follows_the_setting(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    lengths = {}
    for bos in ("auto", "always", "never"):
        rows = runs(tiny_model, tiny_corpus, tmp_path / bos, subject={"bos": bos}).table("samples").to_pylist()
        assert all((row["token_ids"][0] == BOS) == (bos != "never") for row in rows)
        assert all(BOS not in row["token_ids"][1:] for row in rows)
        lengths[bos] = max(len(row["ends"]) - (bos != "never") for row in rows)
    assert lengths == {"auto": 15, "always": 15, "never": 16}


def test_a_corpus_without_text_or_smaller_than_a_sample_is_bad_input(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  \n\n ")
    with pytest.raises(BadInput, match=r"exemplars\.corpus\.path: no text in"):
        runs(tiny_model, tmp_path / "a.txt", tmp_path / "run")
    (tmp_path / "b.txt").write_text("the quick brown fox")
    few = {"corpus": {"path": str(tmp_path / "b.txt"), "tokens": 2}}
    with pytest.raises(BadInput, match=r"no sample within the 2 tokens of exemplars\.corpus\.tokens"):
        runs(tiny_model, tmp_path / "b.txt", tmp_path / "run", exemplars=few)


def test_a_corpus_of_documents_for_scoring_only_is_bad_input(tiny_model: Path, tmp_path: Path) -> None:
    text = next(word for word in WORDS if split_of(word) == "score")
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(BadInput, match=r"too few documents .* to explain with; add text"):
        runs(tiny_model, tmp_path / "a.txt", tmp_path / "run")

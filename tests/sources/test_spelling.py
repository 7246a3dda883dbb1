"""Tokens as text and as ids, against what the tokenizer itself says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from raylabel.sources.spelling import UNKNOWN, Spelling, convention, mended, readable, string_id
from tests.shared import STORIES_MODEL, needs_shared

TEXTS = ["the café cost 3 €, she said: “never”", "naïve\nfoxes 😀 jump over the lazy dog", "the quick brown fox"] * 3


@pytest.fixture(scope="module")
def bpe() -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"])
    return tokenizer


@given(st.text(max_size=40))
@settings(max_examples=80, deadline=None)
def test_the_vocabularys_letters_join_to_the_text_and_give_the_ids_back(bpe: ByteLevelBPETokenizer, text: str) -> None:
    encoding = bpe.encode(text)
    tokens = encoding.tokens
    assert "".join(readable(tokens, how="bytes")) == text
    spelling = Spelling(bpe._tokenizer, [0])
    assert spelling.ids(tokens, readable(tokens, how="bytes")) == encoding.ids


def test_text_whose_characters_are_whole_gives_its_ids(bpe: ByteLevelBPETokenizer) -> None:
    encoding = bpe.encode("the quick brown fox\njumps")
    pieces = readable(encoding.tokens, how="bytes")
    spelling = Spelling(bpe._tokenizer, [0])
    assert spelling.ids(pieces, pieces) == encoding.ids
    tokens = ["<|endoftext|>", *pieces]
    assert spelling.ids(tokens, spelling.pieces(tokens)) == [0, *encoding.ids]


def test_half_characters_left_in_the_vocabularys_letters_are_put_together() -> None:
    assert mended([" Hillary", "âĢ", "Ļ", "s"]) == [" Hillary", "", "’", "s"]
    assert mended(["é", " Ãl"]) == ["é", " Ãl"]
    assert mended(["Ã", "©"]) == ["Ã", "©"]
    assert mended(["Ļ"]) == ["Ļ"]


def test_a_token_that_was_shown_broken_is_unknown_and_its_neighbours_are_not(bpe: ByteLevelBPETokenizer) -> None:
    spelling = Spelling(bpe._tokenizer, [0])
    tokens = ["the", " ", "\ufffd", " quick"]
    ids = spelling.ids(tokens, spelling.pieces(tokens))
    assert ids[2] == UNKNOWN
    assert [spelling.strings([i])[0] for i in ids[:1]] == ["the"]


def test_ids_that_the_model_does_not_have_are_refused(bpe: ByteLevelBPETokenizer) -> None:
    with pytest.raises(ValueError, match="no token 99999"):
        Spelling(bpe._tokenizer, [0]).strings([99_999])


def test_conventions() -> None:
    assert convention(["the", "Ġfox"]) == "bytes"
    assert convention(["▁the", "<0x0A>"]) == "pieces"
    assert convention(["the", " fox"]) == "text"
    assert readable(["<s>", "▁the", "<0xE2>", "<0x82>", "<0xAC>"]) == ["", " the", "", "", "€"]
    assert string_id(" the") == string_id(" the") != string_id("the")


@needs_shared
def test_a_models_own_tokenizer_finds_its_ids_again() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(STORIES_MODEL))
    spelling = Spelling(tokenizer.backend_tokenizer, tokenizer.all_special_ids)
    ids = tokenizer("Once upon a time, there was a little girl named Lily.", add_special_tokens=False).input_ids
    shown = spelling.pieces(spelling.strings(ids))
    found = spelling.ids(shown, shown)
    assert sum(a == b for a, b in zip(ids, found, strict=True)) >= len(ids) - 1

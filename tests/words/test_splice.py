from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from raylabel.words.segment import spans
from raylabel.words.splice import Edit, Sample, Splice, Splicer
from tests.shared import SHARED, STORIES, STORIES_MODEL, needs_shared

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "The quick brown fox doesn't jump over 12 lazy dogs; it isn't fond of them (or of anyone).\n\nNobody knows why.",
    "In 1984, 1234567 people saw the old man's garden.  They'd come from far away, and went home again\tvery late.",
    "def read(path, size=10):\n    return open(path).read()[:size]  # the first few, and no more than that\n\n\nx_y = 3.14",
    "\"Well,\" said the fox, \"I'll jump again; I've jumped before.\" ... and so it jumped, again and again and again!",
    "A garden of brown dogs and old foxes, and a man who reads to them: quick, lazy, fond and late, in that order.",
]
DOCUMENTS = [" ".join(TEXTS[i % 5 :] + TEXTS[: i % 5])[i:] for i in range(12)]
# Words that join with what stands beside them, are split apart, or cannot be written by every tokenizer.
AWKWARD = [
    *("'s", "'t", "--", "1234", "3rd", "don't", "...", "(", "#", "_", "U.S.", "a", "9", '"', "'", "re", "A1"),
    *("café", "戦場", "🙂", "\n"),
]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level(pattern: str | None) -> Tokenizer:
    """Byte-level BPE whose words are cut by `pattern` first, or not at all."""
    tokenizer = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, whole])
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=420, initial_alphabet=ALPHABET, show_progress=False))


def llama() -> Tokenizer:
    """BPE without pre-tokenisation, whose tokens span words and which puts a space in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=400, show_progress=False))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return trained(tokenizer, trainers.UnigramTrainer(vocab_size=200, show_progress=False, unk_token="<unk>",
                                                      special_tokens=["<unk>"]))  # fmt: skip


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return trained(tokenizer, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    return tokenizer


MADE = {
    "gpt2-like": lambda: byte_level(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    "llama3-like": lambda: byte_level(LLAMA3),
    "bytes without words": lambda: byte_level(None),
    "llama-like": llama,
    "unigram": unigram,
}
STORED = {
    "gpt2": lambda: Tokenizer.from_file(str(SHARED / "gpt2-tokenizer" / "tokenizer.json")),
    "stories": lambda: AutoTokenizer.from_pretrained(STORIES_MODEL).backend_tokenizer,
}
CASES = [*MADE, *(pytest.param(name, marks=[needs_shared, pytest.mark.shared]) for name in STORED)]


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return (MADE | STORED)[name]()


@cache
def documents_of(name: str) -> list[str]:
    if name not in STORED:
        return DOCUMENTS
    texts = json.loads(STORIES.read_text(encoding="utf-8"))[:20]
    if name == "gpt2":
        texts += json.loads(STORIES.with_name("wikitext_1000.json").read_text(encoding="utf-8"))[:20]
    return texts


def samples_of(tokenizer: Tokenizer, documents: list[str], size: int) -> list[tuple[Sample, int, int]]:
    """(sample, its document, its first token in the document), cut as the tokenize stage cuts; id 9,999 is a BOS."""
    found = []
    for d, text in enumerate(documents):
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ends = [max(end for _, end in encoding.offsets[: i + 1]) for i in range(len(encoding.ids))]
        for at in range(0, len(ends), size):
            begin = ends[at - 1] if at else 0
            stop = len(text) if at + size >= len(ends) else ends[at + size - 1]
            body = [9999, *encoding.ids[at : at + size]]
            sample = Sample(text[begin:stop], body, [0, *(end - begin for end in ends[at : at + size])], 1)
            found.append((sample, d, at))
    return found


def draw(name: str, count: int, size: int, seed: int) -> tuple[list[tuple[Sample, int, int]], list[Edit]]:
    rng = random.Random(f"{name}{size}{seed}")
    samples = samples_of(tokenizer_of(name), documents_of(name), size)
    words = [(i, *span) for i, (sample, _, _) in enumerate(samples) for span in spans(sample.text)]
    vocabulary = sorted({samples[i][0].text[a:b] for i, a, b in words})
    picked = [rng.choice(words) for _ in range(count)]
    return samples, [Edit(*word, rng.choice(AWKWARD if rng.random() < 0.3 else vocabulary)) for word in picked]


def ids_with(sample: Sample, splice: Splice) -> list[int]:
    return [*sample.ids[: splice.first], *splice.ids, *sample.ids[splice.last :]]


@pytest.mark.parametrize("size", [17, 63])
@pytest.mark.parametrize("name", CASES)
def test_a_splice_equals_a_full_encoding_of_the_edited_text(name: str, size: int) -> None:
    tokenizer = tokenizer_of(name)
    cut, edits = draw(name, 400, size, 0)
    samples = [sample for sample, _, _ in cut]
    splicer = Splicer(tokenizer)
    made = 0
    for edit, splice in zip(edits, splicer.splice(samples, edits), strict=True):
        sample = samples[edit.sample]
        if tokenizer.encode(sample.text, add_special_tokens=False).ids != sample.ids[1:]:
            continue
        edited = sample.text[: edit.start] + edit.substitute + sample.text[edit.end :]
        if splice is None:
            assert splicer.writable([edit.substitute]) == [False], "what can be written is never dropped here"
            continue
        made += 1
        assert ids_with(sample, splice)[1:] == tokenizer.encode(edited, add_special_tokens=False).ids, (edited, edit)
    assert made > 10


@pytest.mark.parametrize("name", [case for case in CASES if case != "unigram"])
def test_a_splice_equals_a_full_encoding_of_the_edited_document(name: str) -> None:
    """Samples from the middle of a document, whose own text need not encode to their ids."""
    tokenizer = tokenizer_of(name)
    cut, edits = draw(name, 300, 31, 1)
    documents = documents_of(name)
    splices = Splicer(tokenizer).splice([sample for sample, _, _ in cut], edits)
    made = 0
    for edit, splice in zip(edits, splices, strict=True):
        sample, d, at = cut[edit.sample]
        if splice is None or splice.first <= sample.lead or splice.last >= len(sample.ids):
            continue
        whole = tokenizer.encode(documents[d], add_special_tokens=False).ids
        begin = documents[d].find(sample.text)
        if documents[d].count(sample.text) != 1 or whole[at : at + len(sample.ids) - 1] != sample.ids[1:]:
            continue
        edited = documents[d][: begin + edit.start] + edit.substitute + documents[d][begin + edit.end :]
        expected = [*whole[:at], *ids_with(sample, splice)[1:], *whole[at + len(sample.ids) - 1 :]]
        assert expected == tokenizer.encode(edited, add_special_tokens=False).ids, (edited, edit)
        made += 1
    assert made > 100


@pytest.mark.parametrize("name", CASES)
def test_a_splice_decodes_to_the_edited_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    cut, edits = draw(name, 300, 40, 2)
    samples = [sample for sample, _, _ in cut]
    lossless = {i for i, s in enumerate(samples) if tokenizer.decode(s.ids[1:]).strip(" ") == s.text.strip(" ")}
    made = 0
    for edit, splice in zip(edits, Splicer(tokenizer).splice(samples, edits), strict=True):
        sample = samples[edit.sample]
        if splice is None or edit.sample not in lossless:
            continue
        edited = sample.text[: edit.start] + edit.substitute + sample.text[edit.end :]
        assert tokenizer.decode(ids_with(sample, splice)[1:]).strip(" ") == edited.strip(" ")
        made += 1
    assert made > 10


def test_only_the_given_occurrence_of_a_word_is_replaced() -> None:
    tokenizer = tokenizer_of("gpt2-like")
    text = "the man, the garden and the fox"
    ((sample, _, _),) = samples_of(tokenizer, [text], 99)
    start = text.index("the garden")
    (splice,) = Splicer(tokenizer).splice([sample], [Edit(0, start, start + 3, "a")])
    assert splice is not None
    assert tokenizer.decode(ids_with(sample, splice)[1:]) == "the man, a garden and the fox"


def test_characters_are_no_words() -> None:
    """A one-letter word leaves the same letter inside other words alone."""
    tokenizer = tokenizer_of("gpt2-like")
    text = "again a garden"
    ((sample, _, _),) = samples_of(tokenizer, [text], 99)
    (splice,) = Splicer(tokenizer).splice([sample], [Edit(0, 6, 7, "the")])
    assert splice is not None
    assert tokenizer.decode(ids_with(sample, splice)[1:]) == "again the garden"


def test_words_that_a_tokenizer_cannot_write_are_dropped() -> None:
    tokenizer = tokenizer_of("llama-like")
    ((sample, _, _),) = samples_of(tokenizer, [TEXTS[0]], 200)
    start = TEXTS[0].index("fox")
    splices = Splicer(tokenizer).splice([sample], [Edit(0, start, start + 3, w) for w in ("dog", "戦場", "", " ")])
    assert [splice is not None for splice in splices] == [True, False, False, False]


def test_a_special_token_is_not_written_as_a_word() -> None:
    tokenizer = byte_level(LLAMA3)
    tokenizer.add_special_tokens(["<s>"])
    special = tokenizer.token_to_id("<s>")
    assert Splicer(tokenizer, [special]).writable(["fox", "<s>"]) == [True, False]


def test_words_as_tokens() -> None:
    tokenizer = word_level()
    ((sample, _, _),) = samples_of(tokenizer, ["quick fox , lazy fox"], 99)
    splices = Splicer(tokenizer).splice([sample], [Edit(0, 17, 20, "dogs"), Edit(0, 6, 9, "unheardof")])
    assert splices == [Splice(5, 6, [tokenizer.token_to_id("dogs")]), None]


def test_a_text_that_its_tokens_do_not_come_from_gives_nothing() -> None:
    tokenizer = tokenizer_of("llama-like")
    ((sample, _, _),) = samples_of(tokenizer, [TEXTS[4]], 200)
    letters = [tokenizer.token_to_id(c if c != " " else "▁") for c in sample.text]
    wrong = Sample(sample.text, [9999, *letters], [0, *range(1, len(sample.text) + 1)], 1)
    assert Splicer(tokenizer).splice([wrong], [Edit(0, 2, 8, "house")]) == [None]


def test_the_tokenizer_given_is_left_as_it_is() -> None:
    tokenizer = byte_level(None)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    before = tokenizer.to_str()
    assert len(Splicer(tokenizer).encode([TEXTS[0]])[0]) > 8
    assert tokenizer.to_str() == before

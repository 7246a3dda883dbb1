"""Rows of records: what is kept of them, which become exemplars, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylabel.sections import ExemplarsConfig
from raylabel.sources.records import Record, Text, peak_of
from raylabel.sources.spelling import Spelling
from raylabel.stages.packing import Packer, choose, pruned
from raylabel.stages.tokenize import split_of

WANTED = ExemplarsConfig(top=4, quantile=3, random=2)


def rows_of(values: list[tuple[float, str | None]]) -> list[dict[str, Any]]:
    texts = [Text([f"w{i}"], [value], sampling=why) for i, (value, why) in enumerate(values)]
    _, rows, wrong = Packer(None).add(Record(0, 0, texts))
    assert not wrong
    return [{**row, "sample": i} for i, row in enumerate(rows)]


kinds = st.sampled_from([None, "top", "quantile", "random"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 500).map(float), kinds), max_size=120))
def test_what_is_chosen_is_what_a_plain_sort_chooses_and_pruning_does_not_change_it(values: list[Any]) -> None:
    rows = rows_of(values)
    found = choose(rows, WANTED)
    for split, n in (("explain", 4), ("score", 2)):
        own = [row for row in rows if row["split"] == split and row["activation"] > 0 and row["sampling"] in (None, "top")]
        best = sorted(own, key=lambda r: (-r["activation"], r["sample"]))[:n]
        tops = [(rank, row) for name, at, rank, row in found if (name, at) == ("top", split)]
        assert [row for _, row in tops] == best and [rank for rank, _ in tops] == list(range(len(best)))
    assert all(row["sampling"] == "random" for name, _, _, row in found if name == "random")
    again = choose(pruned(rows, WANTED), WANTED)
    if len({value for value, _ in values}) == len(values):
        assert again == found


def test_texts_of_a_document_stay_on_one_side() -> None:
    texts = [Text([f"text {i}"], [1.0], document="one book") for i in range(20)]
    _, rows, _ = Packer(None).add(Record(0, 0, texts))
    assert {row["split"] for row in rows} == {split_of("one book")}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (Text([], []), "no tokens"),
        (Text(["a"], [1.0, 2.0]), "1 tokens but 2 activations"),
        (Text(["a"], [1.0], token_ids=[1, 2]), "1 tokens but 2 token ids"),
        (Text(["a"], [float("nan")]), "NaN"),
        (Text(["a"], [1e39]), "NaN or infinite"),
        (Text(["a", "b"], [1.0, 2.0], peak=0), "larger activations"),
        (Text(["a"], [1.0], peak=3), "token 3 of 1"),
        (Text(["a"], [1.0], token_ids=[-1]), "negative"),
        (Text(["a"], [1.0], sampling="best"), "none of top, quantile, random"),
        (Text(None, [1.0]), "neither tokens nor token ids"),
        (Text(None, [1.0], token_ids=[3]), "no model whose they are"),
    ],
)
def test_a_text_that_cannot_be_is_left_out_with_the_reason(text: Text, word: str) -> None:
    good = Text(["a"], [1.0])
    _, rows, [wrong] = Packer(None).add(Record(0, 0, [good, text]))
    assert len(rows) == 1 and wrong.startswith("text 2: ") and word in wrong


def test_units_that_cannot_be_are_refused() -> None:
    for record in (Record(-1, 0, []), Record(0, 2**31, []), Record(0, 0, [], polarity=0), Record(0, 0, [], statistics={"x": 1})):
        with pytest.raises(ValueError, match=r"is none|no statistic"):
            Packer(None).add(record)


def test_the_peak_is_the_first_largest_and_ties_are_counted() -> None:
    assert peak_of(Text(["a", "b", "c"], [-2.0, -1.0, -1.0])) == (1, -1.0, 1)
    assert peak_of(Text(["a", "b", "c"], [2.0, 1.0, 2.0], peak=2)) == (2, 2.0, 1)


@pytest.mark.parametrize("peak", [None, 0, 4])
def test_a_special_token_is_no_peak_whatever_was_recorded_there(peak: int | None) -> None:
    packer, tokens = Packer(None), ["<|endoftext|>", " a", " b", " b", "<|endoftext|>", "<pad>"]
    values = [90.0, 1.0, 2.0, 2.0, 90.0, 91.0]
    _, [row], wrong = packer.add(Record(0, 0, [Text(tokens, values, peak)]))
    assert not wrong
    assert (row["position"], row["activation"], row["mat_ties"]) == (2, 2.0, 1)
    assert row["activations"].tolist() == values and row["text"] == " a b b"
    _, rows, [wrong] = packer.add(Record(0, 0, [Text(["<s>", "</s>"], [1.0, 2.0])]))
    assert rows == [] and wrong == "text 1: nothing but special tokens"
    with pytest.raises(ValueError, match="at token 1, but there are larger activations"):
        peak_of(Text(tokens, values, 1), {0, 4, 5})


def test_the_subjects_own_special_tokens_are_no_peak_by_string_or_id(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    [special, *_], body = sorted(set(tokenizer.all_special_ids)), tokenizer.encode(" the fox", add_special_tokens=False)
    ids = [special, *body, special]
    values = [5.0, *range(1, len(body) + 1), 7.0]
    strings = tokenizer.convert_ids_to_tokens(ids)
    packer = Packer(Spelling(tokenizer.backend_tokenizer, [special]))
    for text in (Text(None, values, token_ids=ids), Text(strings, values), Text(strings, values, 0, ids)):
        _, [row], wrong = packer.add(Record(0, 0, [text]))
        assert not wrong and row["own_ids"] == ids
        assert (row["position"], row["activation"]) == (len(body), len(body))


def test_bos_goes_in_front_where_it_is_missing_and_only_there() -> None:
    packer = Packer(None, bos_id=7)
    _, [row], _ = packer.add(Record(0, 0, [Text(["a", " b"], [0.0, 1.0])]))
    assert row["token_ids"][0] == 7 and row["ends"] == [0, 1, 3] and row["position"] == 2
    assert row["activations"].tolist() == [0.0, 0.0, 1.0]
    _, [row], _ = packer.add(Record(0, 0, [Text(["<|endoftext|>", " b"], [0.0, 1.0])]))
    assert len(row["token_ids"]) == 2 and row["text"] == " b" and row["tokens"] == ["<|endoftext|>", " b"]

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylabel.words.segment import mat_word, phrase, spans, token_spans, without_special, words

TEXTS = st.text(st.sampled_from("ab Zé1_'’.,!()\n\t😀\u0301"), max_size=40)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("get_word_vector", ["get", "word", "vector"]),
        ("CamelCase x2", ["CamelCase", "x2"]),
        ("don't, 'tis the dogs'", ["don't", ",", "'", "tis", "the", "dogs", "'"]),
        ("it’s", ["it’s"]),
        ("wait...(what?!)", ["wait", "...", "(", "what", "?", "!", ")"]),
        ('"""Doc--string', ['"""', "Doc", "--", "string"]),
        ("__init__(_x)", ["__", "init", "__", "(", "_", "x", ")"]),
        ("a__b", ["a", "b"]),
        ("cafe\u0301 हिन्दी", ["cafe\u0301", "हिन्दी"]),
        (" \n\t", []),
        ("", []),
    ],
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found
    assert [text[a:b] for a, b in spans(text)] == found


@given(TEXTS)
def test_words_leave_out_white_space_and_joining_underscores_only(text: str) -> None:
    covered = [False] * len(text)
    last = 0
    for start, end in spans(text):
        assert last <= start < end
        assert not any(c.isspace() for c in text[start:end])
        covered[start:end] = [True] * (end - start)
        last = end
    assert all(c or text[i].isspace() or text[i] == "_" for i, c in enumerate(covered))


def test_characters_are_not_taken_for_words() -> None:
    """The published code iterated over a phrase's characters and replaced each of them everywhere."""
    assert words("the cat") == ["the", "cat"]


@given(TEXTS, st.data())
def test_mat_word_is_the_word_with_most_overlap_the_last_at_a_tie(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    overlaps = {span: min(end, span[1]) - max(start, span[0]) for span in spans(text)}
    if end > start and max(overlaps.values(), default=0) > 0:
        most = max(overlaps.values())
        assert mat_word(text, start, end) == max(span for span, n in overlaps.items() if n == most)


@pytest.mark.parametrize(
    ("text", "token", "word"),
    [
        ("a knight rode", (4, 8), "knight"),
        ("a knight rode", (1, 4), "knight"),
        ("One day, a dog", (0, 11), "day"),
        ("cat, dog", (0, 3), "cat"),
        ("so it is", (2, 8), "is"),
        ("a  b", (1, 3), "  "),
        ("get_word", (3, 4), "_"),
        ("x _ y", (1, 3), "_"),
        ("naïve 😀", (6, 6), "😀"),
    ],
)
def test_mat_word(text: str, token: tuple[int, int], word: str) -> None:
    start, end = mat_word(text, *token)
    assert text[start:end] == word


def test_token_spans() -> None:
    assert token_spans(["ab", "", " c"]) == [(0, 2), (2, 2), (2, 4)]
    assert token_spans([]) == []


def test_phrase_has_the_window_before_and_after() -> None:
    """The published code's exclusive end gave five tokens before and four after."""
    tokens = [f" {i}" for i in range(20)]
    found = phrase(tokens, 10, 5)
    assert found.text.split() == [str(i) for i in range(5, 16)]
    assert found.text[slice(*found.spans[found.mat])] == " 10"
    assert phrase(tokens, 18, 5).text.split() == [str(i) for i in range(13, 20)], "the last token counts"
    assert phrase(tokens, 1, 5).mat == 1


def test_special_tokens_are_not_text() -> None:
    tokens = without_special(["<|endoftext|>", "A", " dog"], [9, 1, 2], {9})
    assert phrase(tokens, 2, 5).text == "A dog"

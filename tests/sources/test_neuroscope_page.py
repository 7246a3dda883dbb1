"""The parser: what was put on a page is what is read from it, and a page that is not one is refused in words."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylabel.sources.neuroscope_page import PageText, looks_whole, parse
from tests.sources.neuroscope_pages import NASTY, PREFIX, SUFFIX, Shown, build, texts

ASKED = ("solu-8l-pile", "The Pile", 6, 64)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def page(*shown: Shown) -> bytes:
    return build("solu-8l-pile", 6, 64, shown)


def refused(data: bytes, *asked: object) -> str:
    with pytest.raises(ValueError) as error:
        parse(data, *(asked or ASKED))  # type: ignore[arg-type]
    return str(error.value)


GOOD = Shown(["<|endoftext|>", " click", " here", "!"], [0.0, 2.5, 1.0, -0.5], 12)
SECOND = Shown(["<|endoftext|>", "x", "y"], [0.0, 1.0, 0.25], 13)


@FEW
@given(st.lists(texts(), min_size=1, max_size=4))
def test_what_is_put_on_a_page_is_read_from_it(shown: list[Shown]) -> None:
    data = page(*shown)
    assert looks_whole(data) is None
    for given_, found in zip(shown, parse(data, *ASKED), strict=True):
        assert (found.full.tokens, found.full.values) == (given_.tokens, given_.values)
        assert (found.peak, found.data_index, found.dataset) == (given_.peak, given_.data_index, "The Pile")
        cut = slice(max(0, given_.peak - PREFIX), given_.peak + SUFFIX + 1)
        assert (found.truncated.tokens, found.truncated.values) == (given_.tokens[cut], given_.values[cut])


def test_tokens_that_look_like_markup_stay_tokens() -> None:
    shown = [Shown(["<|endoftext|>", *NASTY], [0.0] + [float(i) for i in range(len(NASTY))], n) for n in range(3)]
    assert [text.full.tokens for text in parse(page(*shown), *ASKED)] == [text.tokens for text in shown]


def test_an_equal_or_negative_maximum_keeps_its_place() -> None:
    ties = Shown(["<|endoftext|>", "a", "b", "a"], [-3.0, -1.0, -2.0, -1.0])
    [found] = parse(page(ties), *ASKED)
    assert (found.peak, found.full.values[found.peak]) == (1, -1.0)


def test_the_last_token_counts() -> None:
    [found] = parse(page(Shown(["<|endoftext|>", "a", "b"], [0.0, 1.0, 7.0])), *ASKED)
    assert (found.peak, found.full.tokens[found.peak]) == (2, "b")


@pytest.mark.parametrize("asked, why", [
    (("solu-8l-pile", "The Pile", 6, 65), "asked for neuron 65 of layer 6, the page is about 64 of 6"),
    (("solu-8l-pile", "The Pile", 5, 64), "asked for neuron 64 of layer 5, the page is about 64 of 6"),
    (("solu-6l-pile", "The Pile", 6, 64), "asked for solu-6l-pile, the page is about solu-8l-pile"),
    (("solu-8l-pile", "Open Web Text", 6, 64), "recorded on The Pile, not on Open Web Text"),
])  # fmt: skip
def test_a_page_about_something_else_is_refused(asked: tuple[str, str, int, int], why: str) -> None:
    assert refused(page(GOOD), *asked) == why


@pytest.mark.parametrize("old, new, why", [
    ("Index: <b>1<", "Index: <b>2<", "there are larger activations"),
    ("Index: <b>1<", "Index: <b>9<", "said to be at token 9 of 4"),
    ("Max Act: <b>2.5000", "Max Act: <b>2.6000", "maximum is said to be 2.6"),
    ("Min Act: <b>-0.5000", "Min Act: <b>0.5000", "minimum is said to be 0.5"),
    ("Full Text #0", "Full Text #1", "headings of another"),
    ("<h2>Text #0", "<h2>Text #1", "headings of another"),
    ("<h3>Truncated</h3>", "", "not as texts are"),
    ("<h2>Neuron", "<h2>Neuron 3 in Layer 2</h2><h2>Neuron", "which neuron it is about"),
    ("[0.0, 2.5, 1.0, -0.5]", "[0.0, 2.5, 1.0]", "4 tokens and 3 values"),
    ("[0.0, 2.5, 1.0, -0.5]", "[0.0, 2.5, 1.0, NaN]", "NaN is no activation"),
    ("[0.0, 2.5, 1.0, -0.5]", "[0.0, 2.5, 1.0, 1e999]", "no finite number"),
    ("[0.0, 2.5, 1.0, -0.5]", "[0.0, 2.5, true, -0.5]", "no finite number"),
    ('" here"', "7", "a token is no string"),
    ('{"tokens"', '{"tokens" "', "JSON is broken"),
    ('{"tokens"', "[" * 100_000, "nested too deep"),
    ('"values"', '"valves"', "without tokens and values"),
    ("    )\n    </script>", "    ); alert(1)\n    </script>", "does not end where its JSON ends"),
    ("<h1>Dataset", "<script>alert(1)</script><h1>Dataset", "a script that is no widget"),
    ("<h1>Dataset", "<h1>Dataset: The Moon</h1><h1>Dataset", "recorded on The Moon"),
])  # fmt: skip
def test_a_page_that_contradicts_itself_is_refused(old: str, new: str, why: str) -> None:
    text = page(GOOD).decode()
    assert old in text
    assert why in refused(text.replace(old, new).encode())


def test_a_truncated_text_that_is_no_part_of_the_full_one_is_refused() -> None:
    text = page(GOOD).decode()
    first = text.index('" click"')
    assert "no part of the full one" in refused((text[:first] + '" clack"' + text[first + 8 :]).encode())


def test_no_text_and_no_page() -> None:
    assert refused(page()) == "no texts"
    assert refused(b"") == "the page does not say which neuron it is about"
    assert refused(b"\xff\xfe") == "not UTF-8"
    assert looks_whole(b"<html>404</html>") == "not a page of a neuron"
    assert looks_whole(page(GOOD, SECOND)[:-20]) == "the page is cut short"


@FEW
@given(st.data())
def test_a_changed_page_is_refused_or_says_what_it_says(data: st.DataObject) -> None:
    """Bytes removed, doubled or changed: never anything but the texts or a ValueError, and never a text made up."""
    whole = bytearray(page(GOOD, SECOND))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        upto = min(at + data.draw(st.integers(1, 200)), len(whole))
        match data.draw(st.sampled_from(["cut", "double", "change", "end"])):
            case "cut":
                del whole[at:upto]
            case "double":
                whole[upto:upto] = whole[at:upto]
            case "change":
                whole[at] = data.draw(st.integers(0, 255))
            case _:
                del whole[at:]
        if not whole:
            break
    try:
        found = parse(bytes(whole), *ASKED)
    except ValueError:
        return
    for text in found:
        consistent(text)


def consistent(text: PageText) -> None:
    assert len(text.full.tokens) == len(text.full.values)
    assert text.full.values[text.peak] >= max(text.full.values) - 1e-4
    json.dumps(text.full.tokens)

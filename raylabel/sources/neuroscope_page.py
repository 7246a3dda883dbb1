"""A page of Neuroscope, read: `parse(page, model, dataset, layer, neuron)` gives its texts, or raises ValueError.

The page is a fragment of HTML whose widgets hold the tokens and the activations as JSON inside scripts. That JSON is not
escaped: a token may be `</script>` or look like a heading. So the widgets are cut out of the page first, each from where
its call begins to where its JSON ends, and only the rest is read as HTML. A page is understood as a whole or not at all.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from selectolax.lexbor import LexborHTMLParser

FIGURES = 5.1e-5
"""Headings give activations with four digits after the point."""
_SCRIPT = re.compile(r"<script\b", re.IGNORECASE)
_CALL = re.compile(
    r"<script\b[^<>]*>\s*import\s*\{[^<>{}]*\}\s*from\s*\"[^\"<>]*\";?\s*render\(\s*\"([\w-]*)\"\s*,\s*ColoredTokens\s*,\s*"
)
_END = re.compile(r"\s*\)\s*;?\s*</script\s*>")
_NUMBER = r"(-?(?:\d+\.?\d*(?:e[+-]?\d+)?|inf|nan))"
_RANGE = re.compile(rf"Max Range: {_NUMBER}\. Min Range: {_NUMBER}")
_ACT = re.compile(rf"Max Act: {_NUMBER}\. Min Act: {_NUMBER}")
_INDEX = re.compile(r"Data Index: (\d{1,12}) \((.*)\)")
_MAT = re.compile(r"Max Activating Token Index: (\d{1,9})")
_UNIT = re.compile(r"Neuron (\d{1,9}) in Layer (\d{1,9})")
_LOADING = re.compile(r"Transformer Lens Loading: HookedTransformer\.from_pretrained\('([^']*)'\)")


@dataclass(frozen=True)
class Widget:
    """Tokens and their activations, as shown."""

    tokens: list[str]
    values: list[float]


@dataclass(frozen=True)
class PageText:
    """One text of a page.

    Attributes:
        full, truncated: the whole text, and the run of it around the MAT; never one for the other.
        peak: index of the MAT in the full text.
        data_index, dataset: the row of the token set it was taken from, and the set's name.
    """

    full: Widget
    truncated: Widget
    peak: int
    data_index: int
    dataset: str


def looks_whole(page: bytes) -> str | None:
    """What is wrong with a page at a glance: it was cut, or is none; None for nothing."""
    opened, closed = page.count(b"<details"), page.count(b"</details>")
    if not opened:
        return "not a page of a neuron"
    # Tokens may hold either, in even the best of pages; the last thing of a page is the end of its last text.
    return None if closed and page.rstrip().endswith(b"</details>") else "the page is cut short"


def parse(page: bytes, model: str, dataset: str | None, layer: int, neuron: int) -> list[PageText]:
    """The texts of a page that must be about this neuron; `dataset` None for any."""
    try:
        text = page.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    html, widgets = cut(text)
    rows = _flat(html)
    head, *sections = _sections(rows)
    _check_head(head, model, dataset, layer, neuron)
    if not sections:
        raise ValueError("no texts")
    texts = [_text(section, number, widgets) for number, section in enumerate(sections)]
    if 2 * len(texts) != len(widgets):
        raise ValueError(f"{len(texts)} texts but {len(widgets)} widgets")
    return texts


def cut(page: str) -> tuple[str, list[Widget]]:
    """(the page with `<i data-widget=N>` in the place of its widgets, the widgets)."""
    parts: list[str] = []
    widgets: list[Widget] = []
    at = 0
    while (script := _SCRIPT.search(page, at)) is not None:
        call = _CALL.match(page, script.start())
        if call is None:
            raise ValueError("a script that is no widget")
        props, end = _json(page, call.end())
        closing = _END.match(page, end)
        if closing is None:
            raise ValueError("a widget does not end where its JSON ends")
        parts += [page[at : script.start()], f"<i data-widget={len(widgets)}></i>"]
        widgets.append(_widget(props))
        at = closing.end()
    return "".join([*parts, page[at:]]), widgets


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no activation")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _json(page: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(page, at)
    except json.JSONDecodeError as error:
        raise ValueError(f"a widget's JSON is broken: {error.msg}") from None
    except RecursionError:
        raise ValueError("a widget's JSON is nested too deep") from None


def _widget(props: Any) -> Widget:
    tokens, values = (props.get(name) if isinstance(props, dict) else None for name in ("tokens", "values"))
    if not isinstance(tokens, list) or not isinstance(values, list):
        raise ValueError("a widget without tokens and values")
    if len(tokens) != len(values) or not tokens:
        raise ValueError(f"a widget of {len(tokens)} tokens and {len(values)} values")
    if not all(type(token) is str for token in tokens):
        raise ValueError("a token is no string")
    if not all(type(value) in (int, float) and abs(value) < 3.4e38 for value in values):
        raise ValueError("an activation is no finite number")
    return Widget(tokens, [float(value) for value in values])


Row = tuple[str, str]
"""(tag, text), or ("widget", its number)."""


def _flat(html: str) -> list[Row]:
    """Headings and widgets in the order of the page."""
    found: list[Row] = []
    for node in LexborHTMLParser(html).css("h1, h2, h3, h4, i[data-widget]"):
        number = node.attributes.get("data-widget")
        found.append(("widget", number or "") if node.tag == "i" else (node.tag or "", " ".join(node.text().split())))
    return found


def _sections(rows: list[Row]) -> list[list[Row]]:
    """The head, then each text's rows from its heading on."""
    found: list[list[Row]] = [[]]
    for row in rows:
        if row[0] == "h2" and row[1].startswith("Text #"):
            found.append([])
        found[-1].append(row)
    return found


def _check_head(rows: list[Row], model: str, dataset: str | None, layer: int, neuron: int) -> None:
    heads = [text for _, text in rows]
    units = [match for match in map(_UNIT.fullmatch, heads) if match]
    if len(units) != 1:
        raise ValueError("the page does not say which neuron it is about")
    if (int(units[0][2]), int(units[0][1])) != (layer, neuron):
        raise ValueError(f"asked for neuron {neuron} of layer {layer}, the page is about {units[0][1]} of {units[0][2]}")
    models = [match[1] for match in map(_LOADING.fullmatch, heads) if match]
    if models != [model]:
        raise ValueError(f"asked for {model}, the page is about {models[0][:60] if models else 'no model'}")
    sets = [text.removeprefix("Dataset: ") for tag, text in rows if tag == "h1" and text.startswith("Dataset: ")]
    if len(sets) != 1 or (dataset is not None and sets != [dataset]):
        raise ValueError(f"recorded on {sets[0][:60] if sets else 'no dataset'}, not on {dataset or 'one dataset'}")


def _text(rows: list[Row], number: int, widgets: list[Widget]) -> PageText:
    shape = [tag for tag, _ in rows]
    if shape != ["h2", "h4", "h4", "h4", "h4", "h3", "widget", "h3", "widget"]:
        raise ValueError(f"text {number} is not as texts are")
    title, range_, act, index, mat, truncated, first, full, second = (text for _, text in rows)
    if title != f"Text #{number}" or truncated != "Truncated" or full != f"Full Text #{number}":
        raise ValueError(f"text {number} has the headings of another")
    numbers = [_match(pattern, text, number) for pattern, text in ((_RANGE, range_), (_ACT, act), (_INDEX, index), (_MAT, mat))]
    top, low, peak = float(numbers[1][1]), float(numbers[1][2]), int(numbers[3][1])
    if (int(first), int(second)) != (2 * number, 2 * number + 1):
        raise ValueError(f"text {number} has the widgets of another")
    found = PageText(widgets[2 * number + 1], widgets[2 * number], peak, int(numbers[2][1]), numbers[2][2])
    _check_text(found, number, top, low)
    return found


def _match(pattern: re.Pattern[str], text: str, number: int) -> re.Match[str]:
    found = pattern.fullmatch(text)
    if found is None:
        raise ValueError(f"text {number}: {text[:60]!r} is not what stands there")
    return found


def _check_text(text: PageText, number: int, top: float, low: float) -> None:
    """The headings, the full text and the truncated one say the same."""
    values, peak = text.full.values, text.peak
    if peak >= len(values):
        raise ValueError(f"text {number}: the maximum is said to be at token {peak} of {len(values)}")
    if values[peak] < max(values) - FIGURES:
        raise ValueError(f"text {number}: the maximum is said to be at token {peak}, but there are larger activations")
    for name, said, found in (("maximum", top, values[peak]), ("minimum", low, min(values))):
        if not math.isclose(said, found, rel_tol=1e-6, abs_tol=FIGURES):
            raise ValueError(f"text {number}: the {name} is said to be {said}, but is {found}")
    width = len(text.truncated.tokens)
    firsts = range(max(0, peak - width + 1), min(peak, len(values) - width) + 1)
    short = text.truncated
    if not any(text.full.tokens[i : i + width] == short.tokens and values[i : i + width] == short.values for i in firsts):
        raise ValueError(f"text {number}: the truncated text is no part of the full one around the maximum")

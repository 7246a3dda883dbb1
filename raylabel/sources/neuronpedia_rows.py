"""Rows of Neuronpedia's bulk export and answers of its API, and what a record takes from them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from raylabel.sources.reading import Schema
from raylabel.sources.records import Label, Text
from raylabel.sources.saedashboard import DENSE, sampling

EXPLAINER = "neuronpedia"


class Activation(Schema):
    """A text."""

    tokens: list[str]
    values: list[float]
    maxValueTokenIndex: int | None = None
    binContains: float | None = None


class Explanation(Schema):
    """A label."""

    description: str


class Feature(Schema):
    """Numbers of a feature."""

    index: int | str
    modelId: str | None = None
    layer: str | None = None
    frac_nonzero: float | None = None
    pos_str: list[str] | None = None
    pos_values: list[float] | None = None
    neg_str: list[str] | None = None
    neg_values: list[float] | None = None


class ActivationRow(Activation):
    """A line of `activations`."""

    index: int | str
    modelId: str | None = None
    layer: str | None = None


class ExplanationRow(Explanation):
    """A line of `explanations`."""

    index: int | str
    modelId: str | None = None
    layer: str | None = None


class Page(Feature):
    """An answer of the API."""

    activations: list[Activation] = Field(default_factory=list)
    explanations: list[Explanation] = Field(default_factory=list)


ROWS: dict[str, Any] = {"features": Feature, "activations": ActivationRow, "explanations": ExplanationRow}


def index_of(row: Any, model: str, source: str) -> int:
    """The feature's number; ValueError where the row is about another model or source, or is no number."""
    for name, given, asked in (("modelId", row.modelId, model), ("layer", row.layer, source)):
        if given is not None and given != asked:
            raise ValueError(f"{name} is {given[:40]!r}, asked was {asked!r}")
    text = str(row.index)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"index: {text[:20]!r} is no feature's number")
    return int(text)


def text_of(row: Activation) -> Text:
    """A text; `top` or `quantile` by its interval."""
    return Text(row.tokens, row.values, row.maxValueTokenIndex, sampling=sampling(row.binContains))


def labels(rows: list[Any]) -> list[Label]:
    """The explanations that say something."""
    found = (" ".join(row.description.split()) for row in rows)
    return [Label(text, EXPLAINER, text) for text in found if text]


def numbers(row: Feature) -> dict[str, Any]:
    """Direct effects and density; ValueError where tokens and values do not match."""
    found: dict[str, Any] = {"dense": None if row.frac_nonzero is None else row.frac_nonzero > DENSE}
    for name, tokens, values in (("logits_up", row.pos_str, row.pos_values), ("logits_down", row.neg_str, row.neg_values)):
        if tokens and values:
            if len(tokens) != len(values):
                raise ValueError(f"{name}: {len(tokens)} tokens but {len(values)} values")
            found[name] = list(zip(tokens, values, strict=True))
    return found

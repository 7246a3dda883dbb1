"""SAEDashboard's batch-*.json: features of a layer with texts, read one feature at a time.

Texts of the top group (`bin_contains` below 0) are `top`, those of the intervals `quantile`. The direct effect on the
output comes along; activations are rounded as they were written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import ijson
from pydantic import Field

from raylabel.sources.reading import Schema, valid
from raylabel.sources.records import Bad, Record, Text

DENSE = 0.1
PROBLEMS = (ijson.JSONError, OSError, UnicodeDecodeError, ValueError)


class Activation(Schema):
    """A text."""

    tokens: list[str]
    values: list[float]
    bin_contains: float | None = None


class Feature(Schema):
    """A feature."""

    feature_index: int
    activations: list[Activation] = Field(default_factory=list)
    pos_str: list[str] = Field(default_factory=list)
    pos_values: list[float] = Field(default_factory=list)
    neg_str: list[str] = Field(default_factory=list)
    neg_values: list[float] = Field(default_factory=list)
    frac_nonzero: float | None = None


class Head(Schema):
    """What a file says of all its features."""

    layer: int


def top_keys(file: Path, enough: Collection[str] = ()) -> set[str]:
    """Keys of the object in a JSON file, up to the first that is among `enough`; none where it is no JSON object."""
    found: set[str] = set()
    try:
        with open(file, "rb") as opened:
            for prefix, event, value in ijson.parse(opened):
                if prefix == "" and event == "map_key":
                    found.add(value)
                    if value in enough:
                        break
                elif prefix == "" and event != "start_map":
                    break
    except PROBLEMS:
        pass
    return found


def records(path: str) -> Iterator[Record | Bad]:
    """A record a feature."""
    name = Path(path).name
    try:
        layer = valid(_scalars(path), Head).layer
    except PROBLEMS as error:
        yield Bad(f"{name}: {_words(error)}")
        return
    number = 0
    try:
        with open(path, "rb") as opened:
            for number, tree in enumerate(ijson.items(opened, "features.item", use_float=True), 1):
                yield _record(tree, layer, f"{name}, feature {number}")
    except PROBLEMS as error:
        yield Bad(f"{name}, after feature {number}: {_words(error)}")


def _scalars(path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with open(path, "rb") as opened:
        for prefix, event, value in ijson.parse(opened, use_float=True):
            if prefix == "layer" and event in ("number", "string"):
                found["layer"] = int(value) if event == "string" and value.isdecimal() else value
                break
    return found


def _words(error: BaseException) -> str:
    return f"not valid JSON ({' '.join(str(error).split())[:120]})" if isinstance(error, ijson.JSONError) else str(error)


def sampling(bin_contains: float | None) -> str | None:
    """Why a text was chosen, by the share of activations in its interval: below 0 for the top group."""
    if bin_contains is None:
        return None
    return "top" if bin_contains < 0 else "quantile"


def _record(tree: Any, layer: int, place: str) -> Record | Bad:
    try:
        feature = valid(tree, Feature)
        if len(feature.pos_str) != len(feature.pos_values) or len(feature.neg_str) != len(feature.neg_values):
            raise ValueError("pos_str, pos_values, neg_str, neg_values: not as many tokens as values")
    except ValueError as error:
        index = tree.get("feature_index") if isinstance(tree, dict) else None
        known = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < 2**31
        return Bad(f"{place}: {error}", layer if known else None, index if known else None)
    texts = [Text(a.tokens, a.values, sampling=sampling(a.bin_contains)) for a in feature.activations]
    numbers: dict[str, Any] = {
        "logits_up": list(zip(feature.pos_str, feature.pos_values, strict=True)) or None,
        "logits_down": list(zip(feature.neg_str, feature.neg_values, strict=True)) or None,
        "dense": None if feature.frac_nonzero is None else feature.frac_nonzero > DENSE,
        # The share is rounded.
        "dead": True if feature.frac_nonzero == 0 and not any(v > 0 for text in texts for v in text.activations) else None,
    }
    return Record(layer, feature.feature_index, texts, statistics=numbers, place=place)

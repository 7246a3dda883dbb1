"""OpenAI's NeuronRecord files (openai/automated-interpretability): one neuron each, at its high end.

The most positive records are `top`, the random ones `random`, those by quantile `quantile`; mean, variance, skewness and
kurtosis are taken as they are. Objects may name their `dataclass_name`. No document is named: a record is its text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from raylabel.sources.reading import BROKEN, Schema, parsed, what
from raylabel.sources.records import Bad, Record, Text

LARGEST_FILE = 1 << 30


class NeuronId(Schema):
    """Which neuron."""

    layer_index: int
    neuron_index: int


class ActivationRecord(Schema):
    """A text."""

    tokens: list[str]
    activations: list[float]


class NeuronRecord(Schema):
    """A neuron."""

    neuron_id: NeuronId
    most_positive_activation_records: list[ActivationRecord]
    random_sample: list[ActivationRecord] = Field(default_factory=list)
    random_sample_by_quantile: list[list[ActivationRecord]] | None = None
    mean: float | None = None
    variance: float | None = None
    skewness: float | None = None
    kurtosis: float | None = None


def records(path: str) -> Iterator[Record | Bad]:
    """The record of a file."""
    name = Path(path).name
    try:
        if os.stat(path).st_size > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE} bytes")
        found = parsed(Path(path).read_bytes(), NeuronRecord)
    except BROKEN as error:
        yield Bad(f"{name}: {what(error)}")
        return
    by_quantile = [one for some in found.random_sample_by_quantile or [] for one in some]
    groups = (("top", found.most_positive_activation_records), ("quantile", by_quantile), ("random", found.random_sample))
    texts = [Text(one.tokens, one.activations, sampling=why) for why, some in groups for one in some]
    numbers = {key: getattr(found, key) for key in ("mean", "variance", "skewness", "kurtosis")}
    yield Record(found.neuron_id.layer_index, found.neuron_id.neuron_index, texts, statistics=numbers, place=name)

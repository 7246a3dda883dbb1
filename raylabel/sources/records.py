"""What a source other than a corpus gives of a unit: texts in which it was recorded, with its activations.

A source is a module with these functions; all that comes after is the same for every source (`stages.read`):

- `pieces(config) -> list[dict]`: plain JSON keys, one a piece of the input; the work units. BadInput names the setting.
- `records(config, piece) -> Iterator[Record | Bad]`: streamed; what cannot be read is a Bad and never an exception, and
  never a row made up in its place.
- `downloads(config) -> list[dict]` and `fetch(config, piece) -> dict`, of a source at a site: what is fetched and kept before
  the pieces are read, and how much that was.
- `estimate(config) -> dict`: what `raylabel check` prints: pieces, bytes, requests, seconds, before anything is fetched.

Activations are polarity * activation, as in the tables.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sections import NO_MODEL

SAMPLINGS = ("top", "quantile", "random")
STATISTICS = (
    "tokens_seen", "fires", "mean", "variance", "skewness", "kurtosis", "max", "min", "histogram", "logits_up",
    "logits_down", "dead", "dense",
)  # fmt: skip
"""Columns of `statistics` that a source may know; what it does not know stays null."""
TOLERANCE = 1e-3
"""A stated maximum agrees with the activations within this share of it: sources round."""
MOST_TOKENS = 1 << 20
LARGEST = 2**31 - 1
_MODULES = {source: f"raylabel.sources.{source}" for source in ("neuroscope", "neuronpedia", "recorded")}


@dataclass(frozen=True)
class Text:
    """A text in which a unit was recorded.

    Attributes:
        tokens: strings, BOS included where the source has it; as text or in the vocabulary's own spelling (Ġ, ▁). None where
            the source has ids alone: they are then the model's.
        activations: one a token.
        peak: index of the MAT; None for the first largest activation. Special tokens do not count (`peak_of`).
        token_ids: one a token, where the source knows them.
        document: names the document the text was cut from; None where the text is all there is.
        sampling: `top`, `quantile`, `random`: why the source has it; None for no reason: it counts by its activation.
    """

    tokens: Sequence[str] | None
    activations: Sequence[float]
    peak: int | None = None
    token_ids: Sequence[int] | None = None
    document: str | None = None
    sampling: str | None = None


@dataclass(frozen=True)
class Label:
    """A label that came along with a unit; the fields are those of the table `labels`."""

    label: str
    explainer: str
    description: str | None = None


@dataclass(frozen=True)
class Record:
    """Everything, or a part, of what a source has of a unit: records of the same unit are put together.

    Attributes:
        site: hook point as in `blocks.3.mlp.hook_post`, None where the source does not say.
        statistics: keys of STATISTICS, at this polarity; `logits_up` and `logits_down` lists of (token, value).
        place: file and line or row, or the page, for what is said of it.
    """

    layer: int
    neuron: int
    texts: Sequence[Text]
    polarity: int = 1
    site: str | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    labels: Sequence[Label] = ()
    place: str = ""


@dataclass(frozen=True)
class Bad:
    """Something that could not be read: a row of `failures`.

    Attributes:
        reason: one line that names the place (file and line or row, page).
        layer, neuron: the unit, where it is known.
    """

    reason: str
    layer: int | None = None
    neuron: int | None = None


def module(source: str) -> Any:
    """The module of a source."""
    return importlib.import_module(_MODULES[source])


def without_model(config: RunConfig) -> bool:
    """Whether the run has records alone and no model to measure with."""
    return config.subject.model == NO_MODEL


def refuse_sourceless(config: RunConfig) -> None:
    """BadInput where `subject.model` is `none` and the source gives nothing without a model."""
    if without_model(config) and config.exemplars.source == "corpus":
        raise BadInput("subject.model: none gives nothing to scan; name a model, or give exemplars.source: recorded")


def refuse_broken(text: Text) -> None:
    """ValueError says what is wrong with a text."""
    given = text.token_ids if text.tokens is None else text.tokens
    if given is None:
        raise ValueError("neither tokens nor token ids")
    n, values = len(given), text.activations
    if not 0 < n <= MOST_TOKENS:
        raise ValueError("no tokens" if n == 0 else f"{n} tokens, more than {MOST_TOKENS}")
    if len(values) != n:
        raise ValueError(f"{n} tokens but {len(values)} activations")
    if text.token_ids is not None and len(text.token_ids) != n:
        raise ValueError(f"{n} tokens but {len(text.token_ids)} token ids")
    if text.token_ids is not None and not all(0 <= i <= LARGEST for i in text.token_ids):
        raise ValueError("a token id is negative or too large")
    if not all(abs(v) < 3.4e38 for v in values):
        raise ValueError("an activation is NaN or infinite")
    if text.sampling not in (None, *SAMPLINGS):
        raise ValueError(f"sampling {text.sampling!r} is none of {', '.join(SAMPLINGS)}")
    if text.peak is not None and not 0 <= text.peak < n:
        raise ValueError(f"the maximum is said to be at token {text.peak} of {n}")


def peak_of(text: Text, special: Collection[int] = ()) -> tuple[int, float, int]:
    """(index of the MAT, its activation, how many more tokens are equal to it) of a text that is not broken.

    `special` are the indices of special tokens, which do not count, as in a scan: a maximum that is said to be at one of
    them is looked for among the others. ValueError where none is left, or where others are larger than the one named.
    """
    places = [i for i in range(len(text.activations)) if i not in special] if special else range(len(text.activations))
    if not places:
        raise ValueError("nothing but special tokens")
    values = [text.activations[i] for i in places]
    largest = max(values)
    peak = places[values.index(largest)]
    if text.peak is not None and text.peak not in special:
        peak = text.peak
        if text.activations[peak] < largest - TOLERANCE * abs(largest):
            raise ValueError(f"the maximum is said to be at token {peak}, but there are larger activations")
    value = text.activations[peak]
    return peak, value, min(sum(v == value for v in values) - 1, 32_767)


def checked_statistics(given: dict[str, Any]) -> dict[str, Any]:
    """The statistics that are known and finite; ValueError names one that the table does not have."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in STATISTICS:
            raise ValueError(f"no statistic {name!r}")
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            continue
        found[name] = value
    return found

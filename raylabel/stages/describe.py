"""describe: what a unit stands for, in words. Pure functions from a unit's explain-split exemplars to a row of `labels`.

`built_in` needs no language model: it says the concept's words where a concept was claimed, else what the MATs have in
common (`words.gist`), and that it is built-in. `question` is what an explainer is asked, `answered` the row of its answer.
Meanings are groups of exemplars by phrase vectors (`words.meanings`), with the share of the top exemplars in each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raylabel.llm import prompts
from raylabel.llm.prompts import Label
from raylabel.words.gist import Gist, gist, named
from raylabel.words.meanings import groups
from raylabel.words.peaks import Peak, peak
from raylabel.words.segment import phrase, without_special

if TYPE_CHECKING:
    from raylabel.llm.client import Answer

BUILT_IN = "built-in"
OTHERS = 6
"""Tokens of each exemplar that are looked at beside the peak."""
ACTIVE = 0.3
"""Share of the unit's maximum from which a token is marked."""
BEFORE, AFTER = 22, 6
"""Tokens shown around the MAT."""
TOP = 0.6
"""Share of the exemplars shown that are top ones; the others are spread over the quantiles."""
STRONG = ("word", "forms", "words", "ending", "beginning", "characters")
Row = dict[str, Any]
Vectors = Callable[[list[str], list[str]], tuple[np.ndarray, np.ndarray]]
"""Words and phrases to their vectors."""


@dataclass(frozen=True)
class Seen:
    """A unit's explain-split exemplars as a labeller sees them.

    Attributes:
        top, quantile: rows of `exemplars` with special tokens empty, strongest first.
        peaks: of the top exemplars; others: other tokens of the same texts.
        group: int64 [top], the meaning of each.
        alike: the words were found to mean alike.
    """

    top: list[Row]
    quantile: list[Row]
    peaks: list[Peak]
    others: list[Peak]
    group: np.ndarray
    alike: bool


def seen(exemplars: Sequence[Row], candidate: Row, special: Collection[int], window: int, vectors: Vectors) -> Seen | None:
    """What there is of a unit; None where it has no top exemplar. Rows of the score split are passed over."""
    rows = [{**r, "tokens": without_special(r["tokens"], r["token_ids"], special)} for r in exemplars if r["split"] == "explain"]
    top = sorted((r for r in rows if r["sampling"] == "top"), key=lambda r: r["rank"])
    if not top:
        return None
    quantile = sorted((r for r in rows if r["sampling"] == "quantile"), key=lambda r: -r["activation"])
    peaks = [peak(r["tokens"], r["position"], r["start"] == 0) for r in top]
    others = [p for r in top for p in _others(r)]
    families = candidate["families"] if len(candidate["families"] or ()) == len(top) else list(range(len(top)))
    words, phrases = vectors([p.word for p in peaks], [phrase(r["tokens"], r["position"], window).text for r in top])
    return Seen(top, quantile, peaks, others, groups(words, phrases, families), candidate["kind"] == "meaning")


def _others(row: Row) -> list[Peak]:
    """Tokens spread over a text on which the unit was at most half as active."""
    limit = 0.5 * row["activation"]
    places = [i for i, (t, a) in enumerate(zip(row["tokens"], row["activations"], strict=True)) if t and (a or 0.0) < limit]
    chosen = places[:: max(1, len(places) // OTHERS)][:OTHERS]
    return [peak(row["tokens"], i, row["start"] == 0) for i in chosen]


def built_in(found: Seen, concept: Row | None) -> Row:
    """A row of `labels` without any language model."""
    whole = gist(found.peaks, found.others, found.alike)
    parts = [(whole, 1.0)]
    if whole.kind not in STRONG and found.group.max() > 0:
        parts = _parts(found)
    label = whole.label if len(parts) == 1 else _joined([part.short for part, _ in parts])
    n = len(found.peaks)
    names = ", ".join(named(word) for word in whole.members[:5])
    meanings = [{"label": part.label, "share": share} for part, share in parts]
    if concept is not None and concept["claimed"] and concept["words"]:
        said = ", ".join(concept["words"][:3])
        description = f"Built-in label: the concept {said}, borne out on held-back text. Peaks: {_short(whole, n)}; {names}."
        label, meanings = _cut(said, prompts.LABEL_WORDS), [{"label": _cut(said, prompts.LABEL_WORDS), "share": 1.0}]
    elif len(parts) > 1:
        shares = "; ".join(f"{part.label} ({share:.0%})" for part, share in parts)
        description = f"Built-in label: {len(parts)} groups among {n} peaks: {shares}."
    else:
        said = f"no trait common to most of {n} peaks" if whole.kind == "mixed" else _short(whole, n)
        description = f"Built-in label: {said}. Peaks: {names}."
    return {
        "label": label, "description": _cut(description, prompts.DESCRIPTION_WORDS), "meanings": meanings,
        "explainer": BUILT_IN, "prompt_tokens": 0, "completion_tokens": 0,
    }  # fmt: skip


def _parts(found: Seen) -> list[tuple[Gist, float]]:
    parts = []
    for number in range(int(found.group.max()) + 1):
        mine = [p for p, g in zip(found.peaks, found.group, strict=True) if g == number]
        # A group was made of what is alike.
        parts.append((gist(mine, found.others, alike=True), len(mine) / len(found.peaks)))
    return parts


def _short(what: Gist, n: int) -> str:
    return f"{what.label} ({round(what.covered * n)} of {n} peaks)"


def _joined(labels: list[str]) -> str:
    """Labels of several meanings as one of at most eight words."""
    whole = "; ".join(labels)
    if len(whole.split()) <= prompts.LABEL_WORDS:
        return whole
    while len(whole.split()) > prompts.LABEL_WORDS:
        longest = max(range(len(labels)), key=lambda i: len(labels[i].split()))
        labels = [_cut(text, len(text.split()) - 1) if i == longest else text for i, text in enumerate(labels)]
        whole = "; ".join(labels)
    return whole


def _cut(text: str, most: int) -> str:
    words = text.split()
    return text if len(words) <= most else " ".join(words[:most]).rstrip(",;:")


@dataclass(frozen=True)
class Question:
    """What an explainer is asked about a unit: the conversation, the texts in it and each meaning's share."""

    messages: list[dict[str, str]]
    texts: list[str]
    shares: list[float]

    @property
    def hash(self) -> str:
        """Names the prompt: the first 16 hex digits of its sha256."""
        return hashlib.sha256(json.dumps(self.messages, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:16]

    def check(self, label: Label) -> None:
        """Rejected for an answer that copies the texts."""
        prompts.refuse_echo(label, self.texts)


def question(found: Seen, prompt: str, exemplars: int) -> Question:
    """The question about a unit: `mats` as originally, or `exemplars` marked texts, top ones first, then over the quantiles."""
    if prompt == "mats":
        mats = [row["tokens"][row["position"]] for row in found.top]
        return Question(prompts.mats_prompt(mats), [], [1.0])
    n_top = min(len(found.top), max(1, round(TOP * exemplars)))
    wanted = min(exemplars - n_top, len(found.quantile))
    n_top = min(len(found.top), exemplars - wanted)
    spread = [found.quantile[i] for i in np.linspace(0, len(found.quantile) - 1, wanted).round().astype(int)] if wanted else []
    least = ACTIVE * found.top[0]["activation"]
    count = int(found.group.max()) + 1
    listed: list[list[str]] = []
    if count == 1:
        listed = [[_text(row, least) for row in [*_distinct(found.top)[:n_top], *spread]]]
    else:
        # Quantile exemplars belong to no group.
        for number in range(count):
            mine = [row for row, g in zip(found.top, found.group, strict=True) if g == number]
            listed.append([_text(row, least) for row in _distinct(mine)[: max(2, exemplars // count)]])
    shares = [float((found.group == number).mean()) for number in range(count)]
    return Question(prompts.exemplars_prompt(listed), [text for texts in listed for text in texts], shares)


def _distinct(rows: list[Row]) -> list[Row]:
    """Rows of different documents first, then the others."""
    first: dict[Any, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(row.get("document", i), i)
    chosen = set(first.values())
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: (i not in chosen, i))]


def _text(row: Row, least: float) -> str:
    a, b = max(0, row["position"] - BEFORE), row["position"] + AFTER + 1
    return prompts.marked(row["tokens"][a:b], [v or 0.0 for v in row["activations"][a:b]], row["position"] - a, least)


def answered(asked: Question, answer: Answer, explainer: str) -> Row:
    """The row of `labels` of an explainer's answer; shares are measured where the exemplars were grouped."""
    label: Label = answer.parsed  # type: ignore[assignment]
    given = label.meanings
    if len(asked.shares) > 1 and len(given) >= len(asked.shares):
        meanings = [{"label": m.label, "share": share} for m, share in zip(given, asked.shares, strict=False)]
    elif len(given) > 1 and sum(m.share for m in given) > 0:
        total = sum(m.share for m in given)
        meanings = [{"label": m.label, "share": m.share / total} for m in given]
    else:
        meanings = [{"label": label.label, "share": 1.0}]
    return {
        "label": label.label, "description": label.description, "meanings": meanings, "explainer": explainer,
        "prompt_hash": asked.hash, "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens,
    }  # fmt: skip

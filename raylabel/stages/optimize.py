"""optimize: examples for the judge from a unit's exemplars, the test of the winner on the score split, the closing.

`examples` cuts exemplars into words by characters. A word's activation is the highest of the tokens that belong to it;
above `positive` of the unit's maximum it is an example of yes, below `negative` one of no. The maximum is that of the
explain split, for both splits. What the judge reads of an exemplar goes from BEFORE tokens before the word to `after`
behind it, in whole words.

Search sees the explain split only. The one winner is then tested, once, on words of the score split, whose documents are
others. `rows` are rows of `concepts`; `close` fills what needs all units.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raylabel.models.judge_prompt import Example
from raylabel.sections import OptimizeConfig
from raylabel.stages.identify import q_values
from raylabel.stages.separation import Separation, auroc, separation
from raylabel.words.segment import Span, mat_word, spans, token_spans, without_special

BEFORE = 20
"""Tokens of the text before the word that the judge reads."""
LEAST = 4
"""Examples of each label that a unit must have, to be searched and to be tested."""
LEAST_UNSEEN = 3
"""Unseen words of each label that `auroc_unseen` is made of at least."""
FDR = 0.05
WORDS = 20
"""Words of a concept that are kept."""
ALSO, LABEL_WORDS = 0.5, 3
"""A label has the best word and, up to so many in all, those whose weight is this share of its weight."""
COLUMNS = [
    "neuron", "polarity", "sampling", "split", "rank", "sample", "document", "activation", "start", "position", "tokens",
    "token_ids", "activations",
]  # fmt: skip
"""What is read of `exemplars`."""

Row = dict[str, Any]


class Asked(NamedTuple):
    """A word of an exemplar and whether the unit is active there."""

    example: Example
    active: bool
    document: int
    mat: bool
    """Whether it is the exemplar's MAT word."""


class Examples(NamedTuple):
    """A unit's examples: `search` of the explain split, `test` of the score split. Either may be too few."""

    search: list[Asked]
    test: list[Asked]


def examples(
    exemplars: Sequence[Row], settings: OptimizeConfig, special_ids: Collection[int], after: int, seed: int
) -> Examples:  # fmt: skip
    """Of one unit's rows of `exemplars`, in any order; at most `settings.examples` a split, half for each label.

    Args:
        special_ids: tokens whose string is a name and not text.
        after: tokens of the text behind the word that the judge reads.
    """
    known = [row for row in exemplars if row["activation"] is not None and np.isfinite(row["activation"])]
    tops = {split: max((r["activation"] for r in known if r["split"] == split), default=0.0) for split in ("explain", "score")}
    found: dict[str, list[Asked]] = {"explain": [], "score": []}
    if tops["explain"] <= 0:
        return Examples([], [])
    seen: set[tuple[int, int]] = set()
    order = {"top": 0, "quantile": 1, "random": 2}
    for row in sorted(known, key=lambda r: (order.get(r["sampling"], 3), r["rank"] or 0, r["sample"])):
        # What exceeds the maximum is a position that the scan did not count.
        highest = max(tops[row["split"]], tops["explain"]) if row["split"] == "score" else tops["explain"]
        for place, asked in _words(row, tops["explain"], highest, settings, special_ids, after):
            if (row["sample"], place) not in seen:
                seen.add((row["sample"], place))
                found[row["split"]].append(asked)
    half = settings.examples // 2
    draw = np.random.default_rng(seed)
    chosen = {}
    for split, words in found.items():
        chosen[split] = [
            asked for active in (True, False)
            for asked in spread([w for w in words if w.active == active], half if active else settings.examples - half, draw)
        ]  # fmt: skip
    return Examples(chosen["explain"], chosen["score"])


def _words(
    row: Row, top: float, highest: float, settings: OptimizeConfig, special_ids: Collection[int], after: int
) -> Iterator[tuple[int, Asked]]:
    """(first token in the sample, example) of an exemplar's words that are clearly active or clearly silent.

    Words at the edges of the window may be cut there and are left out, but for the MAT's and those a sample begins with.
    """
    tokens = without_special(row["tokens"], row["token_ids"], special_ids)
    places, text = token_spans(tokens), "".join(tokens)
    cut = spans(text)
    starts = [low for low, _ in cut]
    of: dict[int, list[int]] = {}
    for i, (low, high) in enumerate(places):
        word = _owner(text, cut, starts, low, high) if high > low else None
        if word is not None:
            of.setdefault(word, []).append(i)
    document = row["document"] if row.get("document") is not None else row["sample"]
    for word, own in of.items():
        low, high = cut[word]
        mat = row["position"] in own
        if not mat and (high == len(text) or (low == 0 and row["start"] > 0)):
            continue
        values = [row["activations"][i] for i in own]
        if any(v is None or not np.isfinite(v) or v > highest * (1 + 1e-6) for v in values):
            continue
        value = max(values)
        if settings.negative * top <= value <= settings.positive * top:
            continue
        first = places[max(own[0] - BEFORE, 0)][0]
        last = max(places[min(own[-1] + after, len(places) - 1)][1], high)
        example = Example(_whole(text, first, last, low, high), text[low:high])
        yield row["start"] + own[0], Asked(example, value > settings.positive * top, document, mat)


def _owner(text: str, cut: list[Span], starts: list[int], low: int, high: int) -> int | None:
    """The number of the word that a token at [low, high) belongs to, as `mat_word` has it; None for white space."""
    last = bisect_right(starts, high - 1) - 1
    if last < 0 or cut[last][1] <= low:
        return None
    if last == 0 or cut[last - 1][1] <= low:
        return last
    start, _ = mat_word(text, low, high)
    found = bisect_right(starts, start) - 1
    return found if starts[found] == start else None


def _whole(text: str, first: int, last: int, low: int, high: int) -> str:
    """text[first:last] without the part of a word at either end that is cut; the word at [low, high) stays."""
    while 0 < first < low and text[first - 1].isalnum() and text[first].isalnum():
        first += 1
    while high < last < len(text) and text[last - 1].isalnum() and text[last].isalnum():
        last -= 1
    return text[first:last].strip()


def spread(words: Sequence[Asked], count: int, draw: np.random.Generator) -> list[Asked]:
    """At most `count` words: MAT words first, documents in turn, no word a second time while there are others."""
    by_document: dict[int, list[Asked]] = {}
    for i in draw.permutation(len(words)).tolist():
        by_document.setdefault(words[i].document, []).append(words[i])
    for own in by_document.values():
        own.sort(key=lambda asked: not asked.mat)
    chosen: list[Asked] = []
    taken: set[str] = set()
    left = list(by_document.values())
    again = False
    while left and len(chosen) < count:
        before = len(chosen)
        for own in left:
            fresh = [i for i, asked in enumerate(own) if again or asked.example.word.casefold() not in taken]
            if fresh and len(chosen) < count:
                chosen.append(own.pop(fresh[0]))
                taken.add(chosen[-1].example.word.casefold())
        again = again or len(chosen) == before
        left = [own for own in left if own]
    return chosen


def enough(words: Sequence[Asked]) -> bool:
    """Whether both labels occur LEAST times."""
    active = sum(asked.active for asked in words)
    return min(active, len(words) - active) >= LEAST


def tested(odds: np.ndarray, found: Examples, seed: int) -> Row:
    """The columns that the log-odds [len(found.test)] of the winner on the score split give."""
    labels = np.array([asked.active for asked in found.test], bool)
    documents = np.array([asked.document for asked in found.test], np.int64)
    result: Separation = separation(odds, labels, documents, seed)
    shown = {asked.example.word.casefold() for asked in found.search}
    unseen = np.array([asked.example.word.casefold() not in shown for asked in found.test], bool)
    least = min(int((labels & unseen).sum()), int((~labels & unseen).sum()))
    value = auroc(odds[unseen], labels[unseen]) if least >= LEAST_UNSEEN else float("nan")
    return {
        "auroc": _null(result.auroc), "auroc_low": _null(result.low), "auroc_high": _null(result.high),
        "p_value": _null(result.p_value), "auroc_unseen": _null(value),
    }  # fmt: skip


def name(words: Sequence[str], weights: Sequence[float]) -> str:
    """A concept's label: its best word, with those that come close to it."""
    return ", ".join(w for w, p in list(zip(words, weights, strict=True))[:LABEL_WORDS] if p >= ALSO * weights[0])


def close(units: pa.Table, controls: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Both tables (`concepts`, with any other columns) with q_value and claimed filled.

    q: Benjamini-Hochberg (1995) over the model's units that were tested; a control's q is the one that a unit with its p
    would have. claimed: q at FDR at most.
    """
    p = _floats(units)
    among = np.sort(p[~np.isnan(p)])
    closed = []
    for table in (units, controls):
        q = q_values(_floats(table), among)
        filled = {
            "q_value": pa.array(q.astype(np.float32), pa.float32(), mask=np.isnan(q)),
            "claimed": pa.array(np.nan_to_num(q, nan=1.0) <= FDR, pa.bool_()),
        }
        for column, values in filled.items():
            table = table.set_column(table.schema.get_field_index(column), table.schema.field(column), values)
        closed.append(table)
    return closed[0], closed[1]


def _floats(table: pa.Table) -> np.ndarray:
    return table.column("p_value").cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def _null(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

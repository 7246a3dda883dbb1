"""score, its tests: windows of the score split that a label must tell apart, and what a table of tokens makes of them.

`trial` turns one unit's exemplars into a Trial: positives, the score split's top and quantile exemplars with their
measured peak; negatives from random samples, silent where measured (below SILENT of the unit's maximum over the whole
window), or at least at the word asked about; and hard negatives, windows that hold the unit's own peak words or their
neighbours and in which it is silent all the same. Nothing of the explain split is among them, and a document that is
in both splits is refused.

Windows are cut around the peak at a place drawn by hash, so that the place tells nothing, and their text is the
sample's own: tokens are never decoded one by one. The lookup table is the plain alternative to any label: the mean
activation of each token id over the explain split's windows, with the threshold that fits these best.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from raylabel.words.families import stem
from raylabel.words.segment import mat_word, token_spans, without_special, words

SILENT = 0.05
"""Share of the unit's maximum below which it is silent."""
MARKED = 0.3
"""Share of the unit's maximum from which on a token counts as one it fires on (fuzzing)."""
SHUFFLED = 3
"""Other units' labels that the same test is made with."""
FITTED = 12
"""Active and as many silent windows of the explain split that a judge's answers are calibrated on."""
LEAST_TOKENS = 4
"""Shorter windows are no negatives."""

Unit = tuple[str | None, int, int]
"""(control or None, neuron, polarity)."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Window:
    """A piece of a sample that a label is tested on.

    Attributes:
        start: of its first token in the sample.
        tokens: their texts, empty for special tokens; ids.
        focus: the token asked about: the peak, or a token at which the unit is silent.
        active: whether the unit fires at the focus. silent: whether it is silent in the whole window.
        hard: holds what the unit fires on, or what is near it.
        activations: of each token where they were recorded.
    """

    sample: int
    document: int
    start: int
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    focus: int
    active: bool
    silent: bool = False
    hard: bool = False
    activations: tuple[float, ...] | None = None

    @cached_property
    def text(self) -> str:
        """As it stands in the sample."""
        return "".join(self.tokens)

    @cached_property
    def span(self) -> tuple[int, int]:
        """The characters of the word at the focus."""
        return mat_word(self.text, *token_spans(self.tokens)[self.focus])

    @property
    def word(self) -> str:
        """The word at the focus."""
        return self.text[slice(*self.span)]


@dataclass(frozen=True)
class Trial:
    """A unit's test: windows of the score split, the unit's maximum, and what the explain split says for it.

    Attributes:
        lookup: the table of tokens.
        fitting: windows of the explain split, on which a judge's answers are calibrated.
    """

    unit: Unit
    windows: list[Window]
    largest: float
    lookup: Lookup
    fitting: list[Window] = field(default_factory=list)

    def whole(self) -> list[Window]:
        """Windows whose activity is known as a whole: positives, and those silent throughout."""
        return [w for w in self.windows if w.active or w.silent]


@dataclass(frozen=True)
class Lookup:
    """What each token id did on the explain split: its mean activation as a share of the unit's maximum."""

    shares: dict[int, float]
    at_window: float = 0.0
    at_word: float = 0.0
    """Thresholds that fit the explain split best."""

    def tokens(self, window: Window) -> np.ndarray:
        """[tokens] shares; 0 for what was not seen."""
        return np.array([self.shares.get(i, 0.0) for i in window.ids])

    def window(self, window: Window) -> float:
        """Of the strongest token."""
        return max((self.shares.get(i, 0.0) for i in window.ids), default=0.0)

    def word(self, window: Window) -> float:
        """Of the strongest token of the word at the focus."""
        return self.at(window, window.span)

    def at(self, window: Window, span: tuple[int, int]) -> float:
        """Of the strongest token of a word."""
        inside = (a < span[1] and b > span[0] for a, b in token_spans(window.tokens))
        return max((self.shares.get(i, 0.0) for i, there in zip(window.ids, inside, strict=True) if there), default=0.0)


class Leak(ValueError):
    """A document is in both splits."""


def refuse_leak(explain: Iterable[int], score: Iterable[int]) -> None:
    """Raises Leak if a document is in both."""
    both = sorted(set(explain) & set(score))
    if both:
        raise Leak(f"document {both[0]} is in the explain split and in the score split ({len(both)} in all)")


def trial(
    unit: Unit,
    rows: Sequence[Row],
    largest: float,
    *,
    size: int,
    negatives: int,
    special: Collection[int] = (),
    measured: Sequence[Window] = (),
    seed: int = 0,
) -> Trial:
    """The test of a unit from its rows of `exemplars`, both splits and all samplings.

    Args:
        largest: the unit's maximum over the corpus.
        size: tokens of a window. negatives: how many, hard ones included (half of them at most).
        measured: negatives of the score split beside those among the rows, in the order of preference.

    Raises Leak.
    """
    split = {name: [r for r in rows if r["split"] == name] for name in ("explain", "score")}
    refuse_leak((r["document"] for r in split["explain"]), (r["document"] for r in split["score"]))
    refuse_leak((r["document"] for r in split["explain"]), (w.document for w in measured))
    made = {name: _windows(unit, found, largest, size, special, seed) for name, found in split.items()}
    lookup = fit_lookup(split["explain"], made["explain"], largest)
    active = [w for w in made["score"] if w.active]
    used = {w.sample for w in active}
    found = [*measured, *(w for w in made["score"] if not w.active)]
    hard = [w for w in found if w.hard][: negatives // 2]
    plain = [w for w in found if not w.hard and w.sample not in used]
    # Whole windows first: what is silent at one word only serves where there is nothing else.
    plain = sorted(plain, key=lambda w: not w.silent)[: negatives - len(hard)]
    return Trial(unit, [*active, *plain, *hard], largest, lookup, _fitting(made["explain"]))


def _fitting(windows: Sequence[Window]) -> list[Window]:
    """FITTED active windows spread over their strengths, and as many silent ones, those that are so throughout first."""
    active = [w for w in windows if w.active]
    silent = sorted((w for w in windows if not w.active), key=lambda w: not w.silent)
    chosen = np.linspace(0, len(active) - 1, min(FITTED, len(active))).round().astype(int)
    return [*(active[i] for i in chosen), *silent[:FITTED]]


def _windows(unit: Unit, rows: Sequence[Row], largest: float, size: int, special: Collection[int], seed: int) -> list[Window]:
    """Positives, a sample once, then the negatives that random exemplars hold."""
    found: list[Window] = []
    seen: set[int] = set()
    for row in sorted(rows, key=lambda r: (r["sampling"] != "top", r["rank"])):
        if row["sampling"] == "random" or row["sample"] in seen or not row["activation"] >= SILENT * largest:
            continue
        seen.add(row["sample"])
        found.append(around(row, size, special, number(seed, unit, row["sample"])))
    places = [w.focus for w in found] or [size // 2]
    for row in sorted((r for r in rows if r["sampling"] == "random"), key=lambda r: r["rank"]):
        found += silent_pieces(row, largest, size, special, places, number(seed, unit, row["sample"]))
    return found


def around(row: Row, size: int, special: Collection[int], draw: int) -> Window:
    """The peak of an exemplar in a window of `size` tokens, at a place that `draw` decides."""
    at, n = row["position"], len(row["tokens"])
    first, last = max(at - size + 1, 0), max(min(at, n - size), 0)
    low = first + draw % (last - first + 1) if last >= first else 0
    return _piece(row, low, min(low + size, n), at, special, active=True)


def silent_pieces(
    row: Row, largest: float, size: int, special: Collection[int], places: Sequence[int], draw: int
) -> list[Window]:
    """The windows of a random exemplar that have a word at which the unit is silent."""
    found = []
    values = np.array(row["activations"], np.float64)
    tokens = without_special(row["tokens"], row["token_ids"], special)
    # All as long as those around peaks: a length would tell them apart.
    size = min(size, len(tokens))
    many = len(tokens) // size if size >= LEAST_TOKENS else 0
    first = draw % (len(tokens) - many * size + 1)
    for i in range(many):
        low, high = first + i * size, first + (i + 1) * size
        still = [t for t in range(low, high) if values[t] < SILENT * largest and tokens[t].strip()]
        worded = [t for t in still if any(c.isalnum() for c in tokens[t])] or still
        if not worded:
            continue
        wish = low + places[(draw + i) % len(places)]
        focus = min(worded, key=lambda t: (abs(t - wish), t))
        silent = bool((values[low:high] < SILENT * largest).all())
        found.append(_piece(row, low, high, focus, special, active=False, silent=silent))
    return found


def _piece(row: Row, low: int, high: int, focus: int, special: Collection[int], **facts: bool) -> Window:
    return Window(
        row["sample"], row["document"], row["start"] + low,
        tuple(without_special(row["tokens"][low:high], row["token_ids"][low:high], special)),
        tuple(row["token_ids"][low:high]), focus - low, activations=tuple(row["activations"][low:high]), **facts,
    )  # fmt: skip


def fit_lookup(rows: Sequence[Row], windows: Sequence[Window], largest: float) -> Lookup:
    """The table of a unit's explain rows, with the thresholds that part the explain windows best."""
    sums: dict[int, list[float]] = {}
    seen: set[tuple[int, int]] = set()
    for row in rows:
        for t, (i, value) in enumerate(zip(row["token_ids"], row["activations"], strict=True)):
            place = row["sample"], row["start"] + t
            if place not in seen:
                seen.add(place)
                sums.setdefault(i, []).append(max(value or 0.0, 0.0))
    scale = max(largest, 1e-30)
    table = Lookup({i: sum(found) / len(found) / scale for i, found in sums.items()})
    whole = [w for w in windows if w.active or w.silent]
    return Lookup(
        table.shares,
        best_threshold([table.window(w) for w in whole], [w.active for w in whole]),
        best_threshold([table.word(w) for w in windows], [w.active for w in windows]),
    )


def best_threshold(scores: Sequence[float], truth: Sequence[bool]) -> float:
    """The threshold with the largest TPR + TNR - 1, half-way to the next lower score; at one class alone, half its median."""
    given, right = np.array(scores, np.float64), np.array(truth, bool)
    if not right.any() or right.all():
        return float(np.median(given)) / 2 if len(given) else 0.0
    levels = np.unique(given)
    worth = [(given[right] >= t).mean() - (given[~right] >= t).mean() for t in levels]
    best = int(np.argmax(worth))
    return float(levels[best] if best == 0 else (levels[best] + levels[best - 1]) / 2)


def other_labels(unit: Unit, labels: dict[Unit, str], seed: int = 0, many: int = SHUFFLED) -> list[str]:
    """`many` labels of other units of the same kind, in an order that the unit decides.

    Labels that share no word's stem with its own come first, then any different ones; where all units have the same
    label, that one. Fewer where there are fewer other units.
    """
    own = labels[unit]
    mine = stems(own)
    others = [key for key in labels if key != unit and (key[0] is None) == (unit[0] is None) and key[0] == unit[0]]
    texts: dict[str, int] = {}
    for key in others:
        text = labels[key]
        worth = 2 if text == own else 1 if stems(text) & mine or text.casefold() == own.casefold() else 0
        texts[text] = worth
    order = sorted(texts, key=lambda text: (texts[text], number(seed, unit, text)))
    different = [text for text in order if texts[text] < 2]
    return different[:many] if different else order[:many]


def stems(text: str) -> set[str]:
    """The stems of a text's words, of three letters and more."""
    return {stem(word) for word in words(text) if len(word) > 2 and any(c.isalpha() for c in word)}


def number(seed: int, unit: Unit, what: Any) -> int:
    """A number that depends on these alone."""
    digest = hashlib.sha256(f"{seed}/{unit[0] or ''}/{unit[1]}/{unit[2]}/{what}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass
class Labelled:
    """A unit's label and the other units' that it is compared with.

    Attributes:
        meanings: labels of its meanings where they are tested apart, `belongs` the meaning of active windows by sample.
    """

    trial: Trial
    source: str
    label: str
    others: list[str] = field(default_factory=list)
    meanings: list[str] = field(default_factory=list)
    belongs: dict[int, int] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """All that is asked about: the own label, the other units', the meanings'."""
        return [self.label, *self.others, *self.meanings]

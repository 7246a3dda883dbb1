"""What the tokens a unit peaks at have in common, said in a readable phrase, without any language model.

`gist(peaks, others)` compares the peaks with other tokens of the same texts: a trait counts where most peaks have it and
the others mostly do not. What is narrower is said first: one word, one stem, a few words, an ending or beginning, a kind of
character; then members of the kind, then the place. Words are named by their members, never by a kind's name that was
not in the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from raylabel.words.families import stem
from raylabel.words.peaks import Peak
from raylabel.words.traits import MARKS, traits

MOST, CERTAIN = 0.75, 0.85
"""Shares of the peaks that a trait must have to be the gist, and to be added to it."""
LIFT = 2.0
"""Times as frequent among the peaks as among the others."""
NAMED, WORDS = 4, 8
LONGEST = 24
"""Characters of a word that are shown."""
AFFIX = (2, 6)


@dataclass(frozen=True)
class Gist:
    """What peaks have in common.

    Attributes:
        label: 8 words at most.
        covered: share of the peaks that have it.
        kind: word, forms, words, piece, ending, beginning, characters, context, alike, place or mixed.
        members: the words themselves, most frequent first.
    """

    label: str
    covered: float
    kind: str
    members: tuple[str, ...]

    @property
    def short(self) -> str:
        """The label in few words, to stand beside others."""
        return self.label if self.kind in ("word", "characters", "ending", "beginning", "place") else _listed(self.members, 2)


def gist(peaks: Sequence[Peak], others: Sequence[Peak], alike: bool = False) -> Gist:
    """The gist of one meaning's peaks (at least one), given other tokens of the same texts.

    `alike`: the words were found to mean alike, so that naming a few of them names a kind.
    """
    names = members(peaks)
    core = _same(peaks, names) or _piece(peaks, others, alike)
    core = core or _characters(peaks, others) or _context(peaks, others)
    if core is None and alike:
        core = Gist(f"words like {_listed(names, NAMED)}", 1.0, "alike", names)
    core = core or _place(peaks, others, names)
    if core is None:
        return Gist(_listed(names, NAMED), 1.0, "mixed", names)
    whole = core.label + _added(core, peaks, others)
    return replace(core, label=whole if len(whole.split()) <= WORDS else _limited(core.label))


def members(peaks: Sequence[Peak]) -> tuple[str, ...]:
    """The peaks' words, the most frequent spelling of each, most frequent first, then by first appearance."""
    spelled: dict[str, Counter[str]] = {}
    for p in peaks:
        spelled.setdefault(p.word.casefold(), Counter())[shown(p.word)] += 1
    order = sorted(spelled, key=lambda word: -spelled[word].total())
    return tuple(spelled[word].most_common(1)[0][0] for word in order)


def shown(word: str) -> str:
    """A word as a label shows it: white space made visible."""
    if not word.strip():
        word = word.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return word if len(word) <= LONGEST else word[: LONGEST - 1] + "…"


def named(word: str) -> str:
    """A single word or mark in a label."""
    return MARKS.get(word) or f"“{shown(word)}”"


def _same(peaks: Sequence[Peak], names: tuple[str, ...]) -> Gist | None:
    """One word, the forms of one, or a few words that make up most."""
    n = len(peaks)
    words = Counter(p.word.casefold() for p in peaks)
    if not any(word.strip() for word in words):
        return None
    word, count = words.most_common(1)[0]
    if count >= MOST * n and word.strip():
        one = next(p.word for p in peaks if p.word.casefold() == word)
        spelled = Counter(p.word for p in peaks if p.word.casefold() == word).most_common(1)[0][0] or one
        return Gist(MARKS.get(spelled) or f"the word {named(spelled)}", count / n, "word", names)
    root, count = Counter(stem(p.word) for p in peaks).most_common(1)[0]
    forms = [name for name in names if stem(name) == root]
    if count >= MOST * n and root.strip() and any(c.isalpha() for c in root):
        return Gist(f"forms of “{min(forms, key=len)}”: {_listed(forms, 3)}", count / n, "forms", names)
    few = [word for word, k in words.most_common(3) if k >= max(2, 0.15 * n) and word.strip()]
    count = sum(words[word] for word in few)
    if len(few) > 1 and count >= CERTAIN * n and not all(len(w) == 1 and not w.isalnum() for w in few):
        shown_few = [name for name in names if name.casefold() in few]
        return Gist(" or ".join(named(name) for name in shown_few), count / n, "words", names)
    return None


def _piece(peaks: Sequence[Peak], others: Sequence[Peak], alike: bool) -> Gist | None:
    """A piece that most of the words share: their ending, their beginning, or the token inside them."""
    n = len(peaks)
    names = members(peaks)
    lettered = [p for p in peaks if any(c.isalpha() for c in p.word)]
    if len({stem(p.word) for p in lettered}) < 3 or len(lettered) < MOST * n:
        return None
    found: list[tuple[float, int, Gist]] = []

    def offer(kind: str, label: str, size: int, test: Callable[[str], bool], least: float) -> None:
        covered = sum(test(p.word.casefold()) for p in peaks) / n
        if covered < least:
            return
        usual = _share(others, lambda p: test(p.word.casefold()))
        if covered >= LIFT * usual:
            found.append((covered * (1 - usual), size, Gist(label, covered, kind, names)))

    least = CERTAIN if alike else MOST
    for size in range(*AFFIX):
        endings = Counter(p.word.casefold()[-size:] for p in lettered if len(p.word) > size)
        starts = Counter(p.word.casefold()[:size] for p in lettered if len(p.word) > size)
        for piece, _ in endings.most_common(1):
            offer("ending", f"words ending in “-{piece}”", size, partial(_proper, str.endswith, piece), least)
        for piece, _ in starts.most_common(1):
            offer("beginning", f"words beginning with “{piece}-”", size, partial(_proper, str.startswith, piece), least)
    token, _ = Counter(p.token.strip().casefold() for p in lettered).most_common(1)[0]
    if len(token) > 1 and token.isalpha():
        offer("piece", f"“{token}” inside words: {_listed(names, 3)}", len(token), lambda w: token in w and w != token, least)
    # The longest piece among those that hold about as well.
    best = max((score for score, _, _ in found), default=0.0)
    near = [(size, gist.kind != "piece", gist) for score, size, gist in found if score >= best - 0.1]
    return max(near, key=lambda item: item[:2])[2] if near else None


def _proper(is_part: Callable[[str, str], bool], piece: str, word: str) -> bool:
    """Whether a piece is part of a word and not all of it."""
    return is_part(word, piece) and len(word) > len(piece)


def _characters(peaks: Sequence[Peak], others: Sequence[Peak]) -> Gist | None:
    for trait in traits():
        if trait.place:
            continue
        covered = _share(peaks, trait.test)
        if covered >= MOST and covered >= LIFT * _share(others, trait.test):
            return Gist(trait.phrase, covered, "characters", members(peaks))
    return None


def _context(peaks: Sequence[Peak], others: Sequence[Peak]) -> Gist | None:
    """What stands behind one word."""
    left = _left(peaks, others, MOST)
    if left is None or len({p.word.casefold() for p in peaks}) < 3:
        return None
    word, covered = left
    return Gist(f"what follows {named(word)}", covered, "context", members(peaks))


def _left(peaks: Sequence[Peak], others: Sequence[Peak], least: float) -> tuple[str, float] | None:
    word, count = Counter(p.left for p in peaks).most_common(1)[0]
    covered = count / len(peaks)
    usual = _share(others, lambda p: p.left == word)
    return (word, covered) if word and covered >= least and covered >= LIFT * usual else None


def _place(peaks: Sequence[Peak], others: Sequence[Peak], names: tuple[str, ...]) -> Gist | None:
    for trait in traits():
        covered = _share(peaks, trait.test) if trait.place else 0.0
        if covered >= MOST and covered >= LIFT * _share(others, trait.test):
            return Gist(f"tokens {trait.phrase}", covered, "place", names)
    return None


def _added(core: Gist, peaks: Sequence[Peak], others: Sequence[Peak]) -> str:
    """What holds of nearly all peaks besides and is short: the word before, else the place, else the casing."""
    if core.kind in ("context", "place") or len(peaks) < 4:
        return ""
    left = _left(peaks, others, CERTAIN)
    if left is not None:
        return f", after {named(left[0])}"
    same = {p.word.casefold() for p in peaks}
    for trait in traits():
        wanted = trait.place or (core.kind == "word" and trait.phrase in ("words in capitals", "capitalised words"))
        # A name is always capitalised: the casing of a word says something where it has another one too.
        rivals = others if trait.place else [p for p in others if p.word.casefold() in same]
        if not wanted:
            continue
        covered = _share(peaks, trait.test)
        if covered >= CERTAIN and (rivals or trait.place) and covered >= LIFT * _share(rivals, trait.test):
            return f", {trait.phrase}" if not trait.place else f" {trait.phrase}"
    return ""


def _share(peaks: Sequence[Peak], test: Callable[[Peak], bool]) -> float:
    return sum(map(test, peaks)) / len(peaks) if peaks else 0.0


def _listed(names: Sequence[str], most: int) -> str:
    return ", ".join(name if any(c.isalnum() for c in name) else f"“{name}”" for name in names[:most])


def _limited(label: str) -> str:
    """The label's first words, without a connective left at the end."""
    words = label.split()[:WORDS]
    while len(words) > 1 and words[-1] in ("or", "after", "at", "the", "of", "a"):
        words.pop()
    return " ".join(words).rstrip(",:;")

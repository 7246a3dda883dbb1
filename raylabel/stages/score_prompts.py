"""score by a language model: what it is asked, and what its answers mean.

Detection shows windows and asks whose description fits; fuzzing marks words of a window with `<<…>>` and asks whether the
marked words fit; simulation asks for the activation, 0 to 10, of numbered words. Packed, one request holds all windows
and all descriptions to be compared (the unit's own and other units', in an order drawn by hash); as peers ask (delphi),
one request holds one window and one description. What is the same in all requests stands first, so that servers
can keep it.

An answer that cannot be read is no answer: NaN, never a no.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from raylabel.stages.score import MARKED, SILENT, Trial, Window, number
from raylabel.words.segment import mat_word, spans, token_spans

LETTERS = "ABCDEFGHIJ"
MOST = 10
"""The largest simulated activation."""
SIMULATED = 5
"""Active and as many random windows of a simulation (Bills et al. 2023)."""
Message = dict[str, str]
Span = tuple[int, int]

_WHAT = {
    "detection": "Description X fits a text if the text has something that X describes.",
    "fuzzing": "Words of each text are marked <<so>>. Description X fits a text if all the marked words are what X describes.",
}
_PACKED = (
    "A description, named by a letter, says when a unit inside a language model is active. {what} Judge each description by "
    "itself: a text may fit none or several. Answer for every text in order as number:letters, - for none, e.g. "
    "[\"1:B\", \"2:-\", \"3:AC\"]."
)
_PEER = (
    "The description says when a unit inside a language model is active. {what} Answer yes or no."
)
_SIMULATION = (
    "The description says when a unit inside a language model is active. The words of some texts are numbered. Say how "
    "active the unit is at each word, from 0 to 10. Leave out words with 0. Answer as number:activation, e.g. "
    "[\"3:10\", \"17:4\"]."
)


class Fits(BaseModel):
    """Packed answers, `number:letters`."""

    answers: list[str]


class Fit(BaseModel):
    """The answer for one window and one description."""

    answer: Literal["yes", "no"]


class Activations(BaseModel):
    """Simulated activations, `number:activation`."""

    answers: list[str]


@dataclass(frozen=True)
class Shown:
    """Windows as the model sees them, and what is right.

    Attributes:
        texts: marked where the scorer marks.
        truth: [windows] whether the unit's own description should fit.
        marks: characters of the marked words of each window, before the marks were put in.
    """

    windows: list[Window]
    texts: list[str]
    truth: np.ndarray
    marks: list[list[Span]]


def shown(scorer: str, trial: Trial, seed: int) -> Shown:
    """A trial's windows for a scorer, in an order drawn by hash."""
    pairs = [(w, [], w.active) for w in trial.whole()] if scorer == "detection" else _marked(trial, seed)
    pairs = sorted(pairs, key=lambda p: number(seed, trial.unit, (scorer, p[0].sample, p[0].start, p[2])))
    windows = [w for w, _, _ in pairs]
    texts = [one_line(with_marks(w.text, m)) for w, m, _ in pairs]
    return Shown(windows, texts, np.array([truth for _, _, truth in pairs], bool), [m for _, m, _ in pairs])


def _marked(trial: Trial, seed: int) -> list[tuple[Window, list[Span], bool]]:
    """Windows with marks and whether they are right.

    Right marks are the words at which the unit reaches MARKED of its maximum. Wrong ones stand in silent windows, and, as
    hard negatives, in active ones, at words at which it is silent; as many, and at the places where right ones stand.
    """
    right = [(w, places(w, MARKED * trial.largest)) for w in trial.windows if w.active and w.activations is not None]
    if not right:
        return []
    found: list[tuple[Window, list[Span], bool]] = [(w, words_at(w, at), True) for w, at in right]
    quiet = [w for w in trial.windows if not w.active and w.silent and not w.hard]
    wanted = max(sum(not w.active for w in trial.windows), 1)
    patterns = [at for _, at in right]
    for i, w in enumerate(quiet[: max(wanted - wanted // 2, wanted - len(right))]):
        at = _moved(w, patterns[number(seed, trial.unit, i) % len(patterns)], range(len(w.tokens)))
        if at:
            found.append((w, words_at(w, at), False))
    for i, (w, firing) in enumerate(right[: wanted // 2]):
        still = [t for t, value in enumerate(w.activations or ()) if value < SILENT * trial.largest]
        taken = words_at(w, firing)
        still = [t for t in still if not any(_overlap(s, m) for s in words_at(w, [t]) for m in taken)]
        at = _moved(w, patterns[number(seed, trial.unit, -i) % len(patterns)], still)
        if at:
            found.append((_hard(w), words_at(w, at), False))
    return found


def _hard(window: Window) -> Window:
    return Window(window.sample, window.document, window.start, window.tokens, window.ids, window.focus, False, hard=True)


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def places(window: Window, least: float) -> list[int]:
    """The focus and the tokens from `least` on."""
    values = window.activations or ()
    return sorted({window.focus, *(t for t, value in enumerate(values) if value >= least)})


def _moved(window: Window, pattern: Sequence[int], among: Sequence[int]) -> list[int]:
    """The tokens nearest to a pattern's places, among some that are part of words."""
    wordy = [t for t in among if any(c.isalnum() for c in window.tokens[t])] or [t for t in among if window.tokens[t].strip()]
    found: list[int] = []
    for wish in pattern:
        free = [t for t in wordy if t not in found]
        if free:
            found.append(min(free, key=lambda t: (abs(t - wish), t)))
    return sorted(found)


def words_at(window: Window, tokens: Sequence[int]) -> list[Span]:
    """Characters of the words of some tokens, each once, in order."""
    ranges = token_spans(window.tokens)
    return sorted({mat_word(window.text, *ranges[t]) for t in tokens})


def with_marks(text: str, marks: Sequence[Span]) -> str:
    """`text` with `<<` and `>>` around some of its characters; its own such signs are spaced out."""
    parts, at = [], 0
    for low, high in marks:
        parts += [_plain(text[at:low]), "<<", _plain(text[low:high]), ">>"]
        at = high
    return "".join([*parts, _plain(text[at:])])


def _plain(text: str) -> str:
    return text.replace("<<", "< <").replace(">>", "> >")


def one_line(text: str) -> str:
    """Line breaks as a sign, other white space as one space."""
    return re.sub(r"[ \t\r\f\v]+", " ", re.sub(r"\s*\n\s*", " ⏎ ", text)).strip()


def packed_messages(scorer: str, labels: Sequence[str], texts: Sequence[str]) -> list[Message]:
    """One request for all windows and labels; labels[0] is A."""
    named = [f"{letter}. {one_line(label)}" for letter, label in zip(LETTERS, labels, strict=False)]
    numbered = [f"{i}. {text}" for i, text in enumerate(texts, 1)]
    return _messages(_PACKED.format(what=_WHAT[scorer]), "\n".join([*named, "", *numbered]))


def peer_messages(scorer: str, label: str, text: str) -> list[Message]:
    """One request for one window and one label."""
    what = _WHAT[scorer].replace("Description X", "It").replace(" X ", " it ")
    return _messages(_PEER.format(what=what), f"Description: {one_line(label)}\nText: {text}")


def _messages(static: str, rest: str) -> list[Message]:
    return [{"role": "system", "content": static}, {"role": "user", "content": rest}]


def read_packed(given: Sequence[str], labels: int, texts: int) -> np.ndarray:
    """[labels, texts] 1, 0, or NaN where a text has no answer, several different ones, or one that cannot be read."""
    found = np.full((labels, texts), np.nan)
    seen: dict[int, str] = {}
    for line in given:
        match = re.fullmatch(r"\s*(\d+)\s*[:.)]\s*(-|none|[A-Ja-j](?:[\s,]*[A-Ja-j])*)\s*", line)
        if match is None or not 1 <= int(match[1]) <= texts:
            continue
        at, letters = int(match[1]), "" if match[2].lower() in ("-", "none") else re.sub(r"[\s,]", "", match[2].upper())
        if any(LETTERS.index(c) >= labels for c in letters) or seen.get(at, letters) != letters:
            found[:, at - 1] = np.nan
            seen[at] = "?"
            continue
        seen[at] = letters
        found[:, at - 1] = [float(letter in letters) for letter in LETTERS[:labels]]
    return found


def simulated(trial: Trial, seed: int) -> list[Window]:
    """Windows of a simulation: active ones spread over their strengths, and random ones, with recorded activations."""
    known = [w for w in trial.windows if w.activations is not None and not w.hard]
    found = []
    for active in (True, False):
        some = [w for w in known if w.active is active]
        every = max(len(some) / SIMULATED, 1)
        found += [some[int(i * every)] for i in range(min(SIMULATED, len(some)))]
    return sorted(found, key=lambda w: number(seed, trial.unit, ("simulation", w.sample, w.start)))


def simulation_messages(label: str, windows: Sequence[Window]) -> tuple[list[Message], list[tuple[int, list[int]]]]:
    """(messages, for each numbered word its window and the tokens it has)."""
    lines, words = [], list[tuple[int, list[int]]]()
    for i, window in enumerate(windows):
        text, ranges = window.text, token_spans(window.tokens)
        shown_words = []
        for low, high in spans(text):
            inside = [t for t, (a, b) in enumerate(ranges) if a < high and b > low]
            if inside:
                words.append((i, inside))
                shown_words.append(f"{len(words)}:{_plain(text[low:high])}")
        lines.append(" ".join(shown_words))
    return _messages(_SIMULATION, f"Description: {one_line(label)}\n\n" + "\n".join(lines)), words


def read_simulation(
    given: Sequence[str], words: Sequence[tuple[int, list[int]]], windows: Sequence[Window], expected: Mapping[int, float]
) -> np.ndarray | None:
    """[tokens of all windows] simulated activations, 0 where none was given; None for an answer without any sense.

    Args:
        expected: by word number, where the server gave probabilities: takes the place of the number given.
    """
    sizes = [len(w.ids) for w in windows]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    found = np.zeros(int(starts[-1]))
    read = 0
    for line in given:
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\.\d+)?)\s*", line)
        if match is None or not 1 <= int(match[1]) <= len(words) or not float(match[2]) <= MOST:
            continue
        window, tokens = words[int(match[1]) - 1]
        found[starts[window] + np.array(tokens)] = expected.get(int(match[1]), float(match[2]))
        read += 1
    return None if given and not read else found


def expected_values(logprobs: Any) -> dict[int, float]:
    """Word number -> expected activation: the mean of 0 to 10 by the probabilities at the place where it was written.

    Args:
        logprobs: tokens in the order they were written, each with `token` and `top_logprobs` (`token`, `logprob`), as
            mappings or objects. Tokens that hold more than the number are read at its place.
    """
    if not logprobs:
        return {}
    tokens = [_of(entry, "token") or "" for entry in logprobs]
    ends = np.cumsum([len(t) for t in tokens])
    text, found = "".join(tokens), dict[int, float]()
    for match in re.finditer(r"(?<!\d)(\d+)\s*:\s*(\d+)", text):
        at = int(np.searchsorted(ends, match.start(2), side="right"))
        inside = match.start(2) - (int(ends[at - 1]) if at else 0)
        if match.end(2) > ends[at]:
            # A number in several tokens has no probability of its own.
            continue
        before, total, mean = tokens[at][:inside], 0.0, 0.0
        for other in _of(logprobs[at], "top_logprobs") or []:
            name = _of(other, "token") or ""
            digits = re.match(r"\d+", name[inside:]) if name.startswith(before) else None
            if digits and int(digits[0]) <= MOST:
                p = math.exp(_of(other, "logprob"))
                total, mean = total + p, mean + p * int(digits[0])
        if total > 0:
            found[int(match[1])] = mean / total
    return found


def _of(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, Mapping) else getattr(entry, name, None)

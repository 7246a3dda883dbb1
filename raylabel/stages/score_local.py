"""score without an API: the judge's yes or no, and the likeness of word vectors.

`judge_odds` gives float [labels, windows] for each tested label: the log-odds with which the judge says that the word at a
window's focus represents the label. A judge is taught names: a label that lists several is asked about as a whole and name by
name, and has the mean. Texts are read once each, whatever the number of labels and units that ask about them.

How readily a judge says yes depends on the label's wording. `calibrated` therefore finds for each label, the other units'
alike, the log-odds that part active from silent windows of the explain split; what is above them is a yes (`said`).
`answers` does it all for trials.

`likeness` gives the cosine of label and window by the run's own word vectors, the best of the window's words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from raylabel.stages.score import Trial, Window
from raylabel.words.segment import words

NAMES = 8
"""Names of a label that are asked about one by one."""
_BETWEEN = re.compile(r"[,;:()\[\]“”\"]|\b(?:or|like|such as|including)\b")
_NO_NAME = re.compile(r"(?:the |some )?(?:words?|names?|forms?|tokens?)(?: of| inside words)?|inside words", re.IGNORECASE)
EXAMPLES = 256
"""Examples whose beginnings the judge keeps at once."""
Odds = dict[tuple[str, str, str], float]
"""By text, word and label."""


def slot(judge: Any, label: str) -> tuple[int, ...]:
    """Token ids of a label at the judge's slot, of its known words where the judge does not know all; () if none."""
    whole: tuple[int, ...] = judge.encode(label)
    if whole:
        return whole
    known = [word for word in words(label) if judge.encode(word)]
    return tuple(judge.encode(" ".join(known))) if known else ()


def names(label: str) -> list[str]:
    """A label, and the names that it lists where it lists some."""
    parts = [re.sub(r"^and ", "", part.strip()) for part in _BETWEEN.split(label)]
    kept = [part for part in parts if any(c.isalnum() for c in part) and not _NO_NAME.fullmatch(part)]
    return list(dict.fromkeys([label, *kept[:NAMES]]))


def judge_odds(judge: Any, tests: Sequence[tuple[Sequence[Window], Sequence[str]]]) -> list[np.ndarray]:
    """[labels, windows] log-odds of yes for each test's windows and labels; NaN for a label that the judge cannot read."""
    import torch

    from raylabel.models.judge_prompt import Example

    named = {label: names(label) for label in dict.fromkeys(label for _, labels in tests for label in labels)}
    ids = {name: slot(judge, name) for name in dict.fromkeys(name for found in named.values() for name in found)}
    asked: dict[tuple[str, str], dict[str, None]] = {}
    for windows, labels in tests:
        wanted = dict.fromkeys(name for label in labels for name in named[label] if ids[name])
        for window in windows:
            asked.setdefault((window.text, window.word), {}).update(wanted)
    found: Odds = {}
    examples = [example for example, labels in asked.items() if labels]
    # Of like length together: padding is paid for.
    examples.sort(key=lambda example: (len(example[0]), example))
    for at in range(0, len(examples), EXAMPLES):
        part = examples[at : at + EXAMPLES]
        pairs = [(row, label) for row, example in enumerate(part) for label in asked[example]]
        cached = judge.prepare([Example(*example) for example in part])
        odds = judge.pairs(cached, torch.tensor([row for row, _ in pairs]), [ids[label] for _, label in pairs])
        for (row, label), value in zip(pairs, odds.tolist(), strict=True):
            found[(*part[row], label)] = value

    def mean(window: Window, label: str) -> float:
        odds = [found[window.text, window.word, name] for name in named[label] if ids[name]]
        return sum(odds) / len(odds) if odds else np.nan

    return [
        np.array([[mean(w, label) for w in windows] for label in labels]).reshape(len(labels), -1) for windows, labels in tests
    ]


def calibrated(odds: np.ndarray, active: np.ndarray) -> np.ndarray:
    """[labels] log-odds half-way between silent and active windows; 0 where there are not both.

    Silent windows are of one kind but for the few that fit by chance: their median counts. Active ones may be of several
    kinds: their mean does.

    Args:
        odds: [labels, windows] on the explain split. active: [windows] bool.
    """
    if not active.any() or active.all():
        return np.zeros(len(odds))
    return np.asarray((odds[:, active].mean(axis=1) + np.median(odds[:, ~active], axis=1)) / 2)


def said(odds: np.ndarray, least: np.ndarray | None = None) -> np.ndarray:
    """[labels, windows] 1 for a yes, 0 for a no, NaN where there is no answer; a yes is above `least` [labels], or 0."""
    limits = np.zeros(len(odds)) if least is None else least
    return np.where(np.isnan(odds), np.nan, (odds > limits[:, None]).astype(np.float64))


def answers(judge: Any, tests: Sequence[tuple[Trial, Sequence[str]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """([labels, windows] calibrated answers, log-odds) of each trial's windows under its labels."""
    both = judge_odds(judge, [([*trial.windows, *trial.fitting], labels) for trial, labels in tests])
    found = []
    for (trial, _), odds in zip(tests, both, strict=True):
        own, fitted = odds[:, : len(trial.windows)], odds[:, len(trial.windows) :]
        active = np.array([w.active for w in trial.fitting], bool)
        found.append((said(own, calibrated(fitted, active)), own))
    return found


def likeness(background: Any, windows: Sequence[Window], labels: Sequence[str]) -> np.ndarray:
    """[labels, windows] cosine of a label's words and the likest word of a window; NaN for a label without a vector."""
    mine = background.phrases(list(labels))
    held = [list(dict.fromkeys(words(w.text))) for w in windows]
    distinct = list(dict.fromkeys(word for found in held for word in found))
    place = {word: i for i, word in enumerate(distinct)}
    near = np.einsum("ld,wd->lw", mine, background.words(distinct)) if distinct else np.zeros((len(labels), 0))
    found = np.array([[near[k, [place[w] for w in row]].max() if row else -1.0 for row in held] for k in range(len(labels))])
    return np.where(mine.any(axis=1)[:, None], found.reshape(len(labels), -1), np.nan)


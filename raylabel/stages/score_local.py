"""score without an API: the judge's yes or no, and the likeness of word vectors.

`judge_odds` gives float [labels, windows] for each tested label: the log-odds with which the judge says that the word at a
window's focus represents the label; above 0 is a yes. Texts are read once each, whatever the number of labels and units
that ask about them. `likeness` gives the cosine of label and window by the run's own word vectors, the best of the
window's words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raylabel.stages.score import Window
from raylabel.words.segment import words

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


def judge_odds(judge: Any, tests: Sequence[tuple[Sequence[Window], Sequence[str]]]) -> list[np.ndarray]:
    """[labels, windows] log-odds of yes for each test's windows and labels; NaN for a label that the judge cannot read."""
    import torch

    from raylabel.models.judge_prompt import Example

    ids = {label: slot(judge, label) for label in dict.fromkeys(label for _, labels in tests for label in labels)}
    asked: dict[tuple[str, str], dict[str, None]] = {}
    for windows, labels in tests:
        for window in windows:
            asked.setdefault((window.text, window.word), {}).update(dict.fromkeys(label for label in labels if ids[label]))
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
    return [
        np.array([[found.get((w.text, w.word, label), np.nan) for w in windows] for label in labels]).reshape(len(labels), -1)
        for windows, labels in tests
    ]


def said(odds: np.ndarray) -> np.ndarray:
    """1 for a yes, 0 for a no, NaN where there is no answer."""
    return np.where(np.isnan(odds), np.nan, (odds > 0).astype(np.float64))


def likeness(background: Any, windows: Sequence[Window], labels: Sequence[str]) -> np.ndarray:
    """[labels, windows] cosine of a label's words and the likest word of a window; NaN for a label without a vector."""
    mine = background.phrases(list(labels))
    held = [list(dict.fromkeys(words(w.text))) for w in windows]
    distinct = list(dict.fromkeys(word for found in held for word in found))
    place = {word: i for i, word in enumerate(distinct)}
    near = np.einsum("ld,wd->lw", mine, background.words(distinct)) if distinct else np.zeros((len(labels), 0))
    found = np.array([[near[k, [place[w] for w in row]].max() if row else -1.0 for row in held] for k in range(len(labels))])
    return np.where(mine.any(axis=1)[:, None], found.reshape(len(labels), -1), np.nan)


"""How well the built-in judge answers: on words that it was taught and on others, in texts that no lesson had.

`questions` draws balanced (word, text, concept, right) rows: half the concepts are names of the word's categories, half are
names that are not, every other one of them near by. `figures` is what the model card says of a judge. Calibration is one
temperature, fitted on lessons and folded into the last norm's weights, since log-odds grow with them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from judge_lessons import OTHERS, Lessons
from torch import Tensor

from raylabel.demo.taught import Category, Taught, categories, held_out
from raylabel.models.judge import Judge
from raylabel.models.judge_check import auroc_bound
from raylabel.models.judge_prompt import Example
from raylabel.models.objective import example_loss
from raylabel.words.segment import spans

SENTENCES = """
Yesterday my neighbour kept talking about {}.|We could not decide between that and {}.|On the second page you will find {}.
The children laughed when somebody shouted {}.|Take away {} and nothing is left.|Tell me more about {}, will you?|def example({}):
The letter began with {} and went on for an hour.|Whoever says {} should know what it means.|assert {} is not missing
""".strip().replace("\n", "|").split("|")
FUNCTION_WORDS = ["the", "of", "to", "and", "a", "in", "that", "it", "with", "as", "for", "was", "on", "are", "by", "be", "at"]


class Row(NamedTuple):
    word: str
    text: str
    concept: str
    right: bool


def sentence(rng: random.Random, word: str) -> str:
    return rng.choice(SENTENCES).format(word)


def windows(documents: Sequence[str], words: int = 40) -> Callable[[random.Random, str], str]:
    """A text for a word: a window that ends with it, of documents where it occurs; ValueError where it does not."""
    places: dict[str, list[tuple[str, int]]] = {}
    for text in documents:
        for start, end in spans(text):
            places.setdefault(text[start:end].casefold(), []).append((text, end))

    def draw(rng: random.Random, word: str) -> str:
        if word.casefold() not in places:
            raise ValueError(word)
        text, end = rng.choice(places[word.casefold()])
        found = [start for start, _ in spans(text[:end])][-rng.randint(5, words) :]
        return text[found[0] : end]

    return draw


def questions(
    rng: random.Random, taught: Taught, words: Sequence[str], text_of: Callable[[random.Random, str], str], count: int
) -> list[Row]:
    rows: list[Row] = []
    known = [word for word in words if taught.of_word.get(word.casefold())]
    while len(rows) < count:
        word = rng.choice(known)
        try:
            text = text_of(rng, word)
        except ValueError:
            known.remove(word)
            continue
        own = rng.choice(taught.of_word[word.casefold()])
        rows.append(Row(word, text, rng.choice(own.names), True))
        shared = rng.choice(own.names)
        kin = rng.choice([c for c in taught.categories if shared in c.names])
        for _ in range(20):
            concept = rng.choice(kin.names if len(rows) % 4 == 1 else taught.names)
            if not taught.is_right(word, concept) and not taught.is_near(word, concept):
                break
            kin = rng.choice(taught.categories)
        else:
            rows.pop()
            continue
        rows.append(Row(word, text, concept, False))
    return rows


def answers(judge: Judge, rows: Sequence[Row]) -> Tensor:
    """[rows] log-odds."""
    found = []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        cached = judge.prepare([Example(row.text, row.word) for row in part])
        found.append(judge.pairs(cached, torch.arange(len(part)), [judge.encode(row.concept) for row in part]).cpu())
    return torch.cat(found)


def scores(judge: Judge, rows: Sequence[Row]) -> dict[str, float]:
    """Accuracy at even odds, of yes and of no apart, AUROC, and the expected calibration error over ten bins."""
    odds = answers(judge, rows)
    right = torch.tensor([row.right for row in rows])
    correct = (odds > 0) == right
    p = odds.sigmoid()
    bins = (p * 10).long().clamp(max=9)
    gaps = [abs(float((p - right.float())[bins == b].sum())) for b in range(10)]
    return {
        "n": len(rows),
        "accuracy": float(correct.float().mean()),
        "yes": float(correct[right].float().mean()) if right.any() else float("nan"),
        "no": float(correct[~right].float().mean()) if (~right).any() else float("nan"),
        "auroc": auroc_bound(odds.tolist(), right.tolist())[0],
        "calibration": sum(gaps) / len(rows),
    }


def fit_temperature(judge: Judge, lessons: Lessons, seed: int, texts: int = 60) -> float:
    """The temperature that makes the log-odds likeliest on lessons drawn anew, soft ones left out."""
    rng = random.Random(seed)
    rows = [
        Row(word, lesson.text, question.concept, question.share == 1)
        for lesson in (lessons.draw(rng) for _ in range(texts))
        for word, asked in lesson.words
        for question in asked
        if question.share in (0, 1) and judge.encode(question.concept)
    ]
    odds, right = answers(judge, rows), torch.tensor([row.right for row in rows])
    grid = torch.linspace(0.5, 3.0, 51)
    return float(grid[torch.stack([example_loss(odds / t, right).mean() for t in grid]).argmin()])


def figures(judge: Judge, taught: Taught, documents: Sequence[str], seed: int = 1, count: int = 1000) -> dict[str, Any]:
    """What the card says; `documents` are held out from the lessons."""
    rng = random.Random(seed)
    seen = [word for word in taught.words if not held_out(word)]
    unseen = [word for word in taught.words if held_out(word)]
    from_documents = windows(documents)
    rows = questions(rng, taught, seen, sentence, count)
    unused = [c for c in categories() if not c.is_taught]
    long = [row._replace(text=" ".join([from_documents(rng, "def")] * 12) + " " + row.text) for row in rows[:200]]
    nonsense = [Row(rng.choice(FUNCTION_WORDS), row.text, row.concept, False) for row in rows[:400]]
    nothing = [Row(row.word, row.text, rng.choice([w for w in OTHERS if judge.encode(w)]), False) for row in rows[:400]]
    return {
        "known words, unseen sentences": scores(judge, rows),
        "known words, unseen standard library windows": scores(judge, questions(rng, taught, seen, from_documents, count)),
        "known words, behind twelve windows": scores(judge, long),
        "names of one category and its words only": scores(judge, own_names(rng, taught, seen, count)),
        "unseen words of known categories": scores(judge, questions(rng, taught, unseen, sentence, count // 2)),
        "categories never taught": scores(judge, foreign(rng, taught, unused)),
        "function words (all no but for grammar)": scores(judge, [r for r in nonsense if not taught.is_right(r.word, r.concept)]),
        "concepts that mean nothing (all no)": scores(judge, nothing),
    }


def own_names(rng: random.Random, taught: Taught, words: Sequence[str], count: int) -> list[Row]:
    """Each category by its own first name, against the first names of others."""
    rows: list[Row] = []
    while len(rows) < count:
        word = rng.choice(words)
        text, own = sentence(rng, word), rng.choice(taught.of_word[word.casefold()])
        wrong = rng.choice(taught.categories).names[0]
        if not taught.is_right(word, wrong) and not taught.is_near(word, wrong):
            rows += [Row(word, text, own.names[0], True), Row(word, text, wrong, False)]
    return rows


def foreign(rng: random.Random, taught: Taught, unused: Sequence[Category]) -> list[Row]:
    """Words of categories that were never taught, with their own name and with another such category's."""
    rows: list[Row] = []
    for category in unused:
        for word in category.words:
            other = rng.choice([c for c in unused if c is not category])
            text = sentence(rng, word)
            rows += [Row(word, text, category.names[0], True), Row(word, text, other.names[0], False)]
    return rows

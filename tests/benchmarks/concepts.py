"""Whether the search finds the concept: planted units, the built-in judge, a vocabulary of hundreds of words.

A planted unit is active on words of a name's categories (or of two names', a union) and silent on others, half of these of
neighbouring categories; `noise` of its labels are turned over. Words and sentences are drawn apart for the examples that are
searched on and for those that test the winner. A word counts as the planted one if it is right for the same words. No method
is told anything but the examples. `claimed` is what the stage would say: Benjamini-Hochberg at 0.05 over AUROCs on the test
examples, permuted units among them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu

from raylabel.demo.taught import Taught, held_out
from raylabel.models.concept import Concept, Settings, Unit, losses_of, search
from raylabel.models.descent import Recipe, descend
from raylabel.models.judge import Cached, Judge, Words, load_judge
from raylabel.models.judge_check import auroc_bound
from raylabel.models.judge_prompt import Example
from raylabel.report.summary import Share
from raylabel.stages.identify import q_values
from tests.benchmarks.measuring import Settings as Told
from tests.benchmarks.measuring import paired
from tests.benchmarks.report import Row

VOCABULARY, EXAMPLES, EVALUATIONS = 800, 64, 100
TOGETHER = 20
"""Units whose forward passes are shared."""
SENTENCES = [
    "Somebody had written {} on the wall.", "We spent the whole afternoon on {}.", "    result = {}  # as before",
    "There is nothing like {}, he used to say.", "{} came first and the rest came later.", "It was either {} or nothing at all.",
]  # fmt: skip
Method = Callable[[Judge, Cached, Sequence[Unit], Words], list[Concept]]


@dataclass
class Planted:
    """Units over examples of their own: the first EXAMPLES rows of each are searched on, as many behind them test."""

    names: list[tuple[str, ...]]
    examples: list[list[Example]]
    labels: list[list[bool]]
    """What the unit does on its examples, noise included on those searched on."""


def plant(taught: Taught, words: Words, count: int, kinds: int, noise: float, seed: int, permuted: bool = False) -> Planted:
    """`count` units of `kinds` names each."""
    rng = random.Random(seed)
    known = [word for word in taught.words if not held_out(word)]
    able = [name for name in words.texts if 6 <= len(taught.extension.get(name.casefold(), ())) <= 80]
    planted = Planted([], [], [])
    for _ in range(count):
        names = tuple(rng.sample(able, kinds))
        own = [word for word in known if any(word.casefold() in taught.extension[name.casefold()] for name in names)]
        other = [word for word in known if not any(taught.is_right(word, name) for name in names)]
        # Words of neighbouring categories tell the planted name from wider ones.
        kin = {name for word in own for category in taught.of_word[word.casefold()] for name in category.names}
        near = [word for word in other if any(kin.intersection(c.names) for c in taught.of_word[word.casefold()])] or other
        examples, labels = [], []
        for i in range(2 * EXAMPLES):
            label = i % 2 == 0
            word = rng.choice(own if label else near if i % 4 == 1 else other)
            examples.append(Example(rng.choice(SENTENCES).format(word), word))
            labels.append(label != (i < EXAMPLES and rng.random() < noise))
        if permuted:
            labels = [*rng.sample(labels[:EXAMPLES], EXAMPLES), *rng.sample(labels[EXAMPLES:], EXAMPLES)]
        planted.names.append(names)
        planted.examples.append(examples)
        planted.labels.append(labels)
    return planted


@dataclass
class Outcome:
    """What a method found for planted units."""

    first: list[bool]
    five: list[bool]
    auroc: list[float]
    p: list[float]
    evaluations: float
    seconds: float

    def how(self) -> str:
        n = len(self.first)
        return (
            f"first {np.mean(self.first):.0%}, in the first 5 {np.mean(self.five):.0%}, test AUROC {np.mean(self.auroc):.3f}, "
            f"{self.evaluations:.0f} evaluations and {self.seconds / n:.2f} s a unit ({60 * n / self.seconds:.0f} units a minute)"
        )


def run(judge: Judge, taught: Taught, words: Words, planted: Planted, method: Method) -> Outcome:
    """Searches, then tests the winners; only the search is timed, reading its examples included."""
    outcome = Outcome([], [], [], [], 0.0, 0.0)
    for at in range(0, len(planted.names), TOGETHER):
        part = range(at, min(at + TOGETHER, len(planted.names)))
        began = time.process_time()
        cached = judge.prepare([e for i in part for e in planted.examples[i][:EXAMPLES]])
        units = [
            Unit(torch.arange(EXAMPLES) + EXAMPLES * k, torch.tensor(planted.labels[i][:EXAMPLES]), i) for k, i in enumerate(part)
        ]
        found = method(judge, cached, units, words)
        outcome.seconds += time.process_time() - began
        for i, concept in zip(part, found, strict=True):
            wanted = [taught.extension[name.casefold()] for name in planted.names[i]]
            hits = [taught.extension.get(word.strip().casefold()) for word in concept.words[:5]]
            outcome.first.append(hits[0] in wanted)
            outcome.five.append(all(extension in hits for extension in wanted))
            outcome.evaluations += concept.evaluations / len(planted.names)
            labels = np.array(planted.labels[i][EXAMPLES:])
            ids = judge.encode(concept.best)
            odds = np.array(judge.log_odds(planted.examples[i][EXAMPLES:], [ids])[:, 0].tolist() if ids else [0.0] * EXAMPLES)
            outcome.auroc.append(auroc_bound(odds.tolist(), labels.tolist())[0])
            outcome.p.append(float(mannwhitneyu(odds[labels], odds[~labels], alternative="greater").pvalue))
    return outcome


def hybrid(**changes: Any) -> Method:
    return lambda judge, cached, units, words: search(
        judge, cached, units, settings=replace(Settings(evaluations=EVALUATIONS), **changes), words=words
    )


def published(judge: Judge, cached: Cached, units: Sequence[Unit], _words: Words) -> list[Concept]:
    texts = [judge.tokenizer.decode([i]) for i in range(judge.size)]
    return descend(judge, cached, units, texts, Recipe())


def brute_force(judge: Judge, cached: Cached, units: Sequence[Unit], words: Words) -> list[Concept]:
    found = []
    for unit in units:
        losses = losses_of(judge, cached, unit, [(i,) for i in words.ids.tolist()], Settings().flip)
        best = losses.topk(5, largest=False)
        names = [words.texts[i] for i in best.indices.tolist()]
        weights = (-best.values / Settings().temperature).softmax(0).tolist()
        found.append(Concept(names, weights, float(best.values[0]), 0.0, 0.0, "every word", float(len(words.texts))))
    return found


METHODS: dict[str, Method] = {
    "hybrid": hybrid(),
    "hybrid without the judge's prior": hybrid(proposers=("descent", "gradient", "others")),
    "Gumbel descent alone": hybrid(proposers=("descent",), restarts=3, steps=60),
    "the published descent": published,
    "every word": brute_force,
}
# Condition: (what it is, names a unit, noise).
CONDITIONS = {
    "one category": (1, 0.0), "10 % wrong labels": (1, 0.1), "20 % wrong labels": (1, 0.2), "two categories": (2, 0.0)
}  # fmt: skip
COUNTS = {"hybrid": 200, "every word": 20}
"""Units of a method, one category; 60 at most elsewhere."""
GOALS = {"one category": 0.90, "10 % wrong labels": 0.80}


def concepts(told: Told) -> Iterator[Row]:
    """Recovery of each method, what is claimed, and the cost of a step."""
    torch.manual_seed(0)
    judge, taught = load_judge("demo", device=told.device), Taught()
    words = vocabulary(judge, taught)
    true: Outcome | None = None
    speed: dict[str, float] = {}
    for condition, (kinds, noise) in CONDITIONS.items():
        for name, method in METHODS.items():
            count = 2 if told.quick else COUNTS.get(name, 60) if condition == "one category" else min(60, COUNTS.get(name, 60))
            if name != "hybrid" and condition == "20 % wrong labels":
                continue
            planted = plant(taught, words, count, kinds, noise, seed=len(condition))
            outcome = run(judge, taught, words, planted, method)
            if condition == "one category":
                speed[name] = 60 * count / outcome.seconds
                true = outcome if name == "hybrid" else true
            how = f"{len(words.texts)} words, {EXAMPLES} examples; {outcome.how()}"
            goal = GOALS.get(condition) if name == "hybrid" else None
            yield share(f"planted concept found first, {condition}: {name}", f"{count} planted units", outcome.first, how, goal)
            if name == "hybrid":
                goal = 0.97 if condition == "one category" else None
                what = f"planted concept in the first five, {condition}: {name}"
                yield share(what, f"{count} planted units", outcome.five, how, goal)
    assert true is not None
    yield from claimed(judge, taught, words, true, 4 if told.quick else 100)
    ratio = speed["hybrid"] / speed["the published descent"]
    how = f"CPU time, {told.threads} threads; {speed['hybrid']:.0f} against {speed['the published descent']:.0f} units a minute"
    yield Row("units a minute: hybrid", "the published descent, cached and batched alike", ratio, ratio, ratio, 1, "×", how)
    yield step(judge, told)


def vocabulary(judge: Judge, taught: Taught) -> Words:
    """All names and enough words of categories."""
    rng = random.Random(0)
    names = set(taught.names)
    whole = set(judge.words.texts)
    rest = [word for word in taught.words if word in whole and word not in names]
    kept = {*names, *rng.sample(rest, max(0, VOCABULARY - len(names & whole)))}
    places = [i for i, text in enumerate(judge.words.texts) if text in kept]
    return Words(judge.words.ids[places], [judge.words.texts[i] for i in places])


def claimed(judge: Judge, taught: Taught, words: Words, true: Outcome, count: int) -> Iterator[Row]:
    """Units with permuted labels beside the true ones, all in one correction."""
    nulls = run(judge, taught, words, plant(taught, words, count, 1, 0.0, seed=99, permuted=True), METHODS["hybrid"])
    p = np.array([*true.p, *nulls.p])
    found = q_values(p, np.sort(p)) <= 0.05
    against = f"{len(true.p)} planted and {count} permuted units, q ≤ 0.05"
    yield share("claimed, planted units: hybrid", against, found[: len(true.p)].tolist(), true.how(), 0.90)
    yield share("claimed, permuted labels: hybrid", against, found[len(true.p) :].tolist(), nulls.how(), 0.05, at_most=True)


def step(judge: Judge, told: Told, tokens: int = 128, examples: int = 32) -> Row:
    """Forward and backward for one vector at the slot: behind what was read once, against the whole prompt."""
    body = Example("word " * tokens, "word")
    spare = len(judge.prefix(body)) - tokens
    batch = [Example("word " * (tokens - spare), "word") for _ in range(examples)]
    prefix = [judge.prefix(example) for example in batch]
    cached, rows = judge.prepare(batch), torch.arange(examples)
    start = judge.embed(judge.words.ids).float().mean(0)
    tail = judge.embed(torch.tensor(judge._tail))
    before = torch.tensor(prefix, device=judge.device)

    def read_once(_: int) -> None:
        vector = start.clone().requires_grad_()
        judge.odds(judge.soft(cached, rows, vector.expand(examples, -1))).sum().backward()

    def whole(_: int) -> None:
        vector = start.clone().requires_grad_()
        parts = (judge.embed(before), vector.expand(examples, 1, -1), tail.expand(examples, -1, -1))
        logits = judge.model(inputs_embeds=torch.cat(parts, 1), logits_to_keep=1).logits[:, -1]
        judge.odds(logits.float()).sum().backward()

    pairs = paired(read_once, whole, 3 if told.quick else 15, told.device)
    how = f"built-in judge, {examples} prompts of {len(prefix[0])} tokens before the slot; {pairs.note}"
    against = "the whole prompt, forward and backward"
    return Row("a step of the concept search", against, unit="×", how=how, goal=5.0, **pairs.figures())


def share(what: str, against: str, hits: Sequence[bool], how: str, goal: float | None, at_most: bool = False) -> Row:
    value, low, high = Share(sum(hits), len(hits)).interval
    figures = [100 * (x or 0.0) for x in (value, low, high)]
    return Row(what, against, *figures, len(hits), "%", how, None if goal is None else 100 * goal, at_most)

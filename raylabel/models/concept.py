"""Finds the word that a judge (`models.judge`) says yes to for a unit's active tokens and no to for its silent ones.

`search` is the method `hybrid`: cheap proposals, decided by discrete evaluation. Its cost is counted in evaluations, one
being a forward pass of one candidate over all of a unit's examples; over some of them it is that fraction, passes for
gradients included (their way back is not counted). `models.objective` has what is minimised, `models.descent` the descents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import mul
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from raylabel.models.judge import Words
from raylabel.models.objective import class_weights, example_loss, regularisers

PROPOSERS = ("given", "prior", "descent", "gradient", "others")
FEWEST_STEPS = 20
"""A descent of fewer steps is not worth its cost."""


class Read(Protocol):
    """Examples that a judge has read, see `judge.Cached`."""

    @property
    def prior(self) -> Tensor: ...


class Answers(Protocol):
    """What a search asks of a judge, see `judge.Judge`."""

    size: int
    yes: Tensor
    no: Tensor

    @property
    def words(self) -> Words: ...
    def encode(self, word: str) -> tuple[int, ...]: ...
    def embed(self, ids: Tensor) -> Tensor: ...
    def pairs(self, cached: Any, rows: Tensor, concepts: Sequence[Sequence[int]]) -> Tensor: ...
    def soft(self, cached: Any, rows: Tensor, vectors: Tensor) -> Tensor: ...
    def odds(self, logits: Tensor) -> Tensor: ...


class Unit(NamedTuple):
    """A unit's examples on the explain split; both labels must occur."""

    rows: Tensor
    """[examples] int64: which of the read examples they are."""
    labels: Tensor
    """[examples] bool: whether the unit is active."""
    seed: int = 0
    """Of all that is drawn for this unit: what is found for it does not hang on which units share its forward passes."""

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1_000_003 + self.seed)


class Given(NamedTuple):
    word: str
    proposer: str
    """Where it comes from: `mat`, `neighbour`, `promoted`, …"""


@dataclass(frozen=True)
class Settings:
    """How to search."""

    evaluations: float = 100
    """Evaluations a unit at most."""
    c_entropy: float = 0.2
    c_entropy_start: float | None = None
    """Weight of the entropy at a descent's first step, from which it goes evenly to c_entropy at the last; None: c_entropy."""
    c_kl: float = 0.1
    flip: float = 0.25
    """Share of labels taken to be wrong: no example then costs more than -log of it, and a sure judge is not ruined by one."""
    temperature: float = 0.1
    """Of the weights of words, in nats."""
    proposers: tuple[str, ...] = PROPOSERS
    """Sources of candidates, of `PROPOSERS`; words without a source are never tried."""
    first: int = 4
    """Examples on which a candidate is looked at first."""
    screening: float = 0.65
    """Share of the evaluations spent on first looks, gradients and descent; the rest decides among the best."""
    hint: float = 0.5
    """Nats on all of a word's looks together that a standard deviation of the prior's contrast counts for among words not yet
    looked at in full: a few wrong labels among few looks then do not lose a word that the judge would put there itself."""
    proposals: int = 32
    """Words that the prior and each gradient may propose."""
    gradient_examples: int = 16
    rounds: int = 4
    """Rounds of gradients, each at the best words so far."""
    restarts: int = 2
    steps: int = 40
    batch: int = 8
    lr: float = 0.3
    hot: float = 2.0
    cold: float = 0.3
    """First and last temperature of the Gumbel descent, falling geometrically."""
    seed: int = 0


@dataclass(frozen=True)
class Concept:
    """What was found for a unit: words by falling weight, weights summing to 1 but for rounding."""

    words: list[str]
    weights: list[float]
    cross_entropy: float
    """Of the best word alone, or of the distribution where a descent's own is the answer."""
    entropy: float
    kl: float
    """Of the weights; a word of several tokens has its first token's probability under the judge."""
    proposer: str
    """How the best word was found."""
    evaluations: int
    """Begun ones count as whole."""
    losses: list[float] = field(default_factory=list)
    """What decided, a word: its cross-entropy with `flip`."""
    vector: Tensor | None = None
    """[width] what stands in the slot where a distribution and no word is the answer."""

    @property
    def best(self) -> str:
        return self.words[0]


def losses_of(judge: Answers, cached: Any, unit: Unit, words: Sequence[Sequence[int]], flip: float = 0.0) -> Tensor:
    """[words]: cross-entropy of each word, as token ids, on all of a unit's examples. Brute force, given all words."""
    rows = unit.rows.repeat(len(words))
    concepts = [ids for ids in words for _ in range(len(unit.rows))]
    odds = judge.pairs(cached, rows, concepts).reshape(len(words), -1)
    labels = unit.labels.to(odds.device)
    return example_loss(odds, labels, flip) @ class_weights(labels)


def search(
    judge: Answers,
    cached: Read,
    units: Sequence[Unit],
    given: Sequence[Sequence[Given]] | None = None,
    settings: Settings | None = None,
    words: Words | None = None,
) -> list[Concept]:
    """The method `hybrid`, all units side by side: what they ask at a time shares the judge's forward passes.

    Words come from what is given, the judge's prior (at the active examples, and there against the silent ones), Gumbel
    descent, gradients at the best words so far, and the rest of the vocabulary in random order while first looks can be
    paid for. Where that is all of it, descent and gradients are left out: they only point to words. All are looked at on
    the same few examples; the best go on to twice as many, and so on to all of them, the judge's prior being one more witness
    (see `Settings.hint`). Only these finalists are reported, by their cross-entropy alone.
    Given words may have several tokens; all others are whole words of one.

    Args:
        given: words to try, a list a unit; those that the judge cannot encode are left out.
        words: the vocabulary; None is all of `judge.words`.

    ValueError where a unit has no example of a label, or not one candidate can be paid for.
    """
    from raylabel.models.descent import gradients, gumbel

    settings = settings or Settings()
    words = judge.words if words is None else words
    races = [_Race(judge, unit, settings, words, i) for i, unit in enumerate(units)]
    use = settings.proposers
    if "given" in use:
        for race, own in zip(races, given or [[]] * len(races), strict=True):
            for word, proposer in own:
                race.add(word, proposer)
    if "prior" in use:
        for race in races:
            for word in race.by_prior(cached.prior):
                race.add(word, "prior")
    _look(judge, cached, races)
    searching = [race for race in races if not ("others" in use and race.covers())]
    if "descent" in use:
        for plan in sorted({race.descent() for race in searching} - {(0, 0)}):
            able = [race for race in searching if race.descent() == plan]
            paid = replace(settings, restarts=plan[0], steps=plan[1])
            for race, best in zip(able, gumbel(judge, cached, [race.unit for race in able], paid, words), strict=True):
                race.spent += plan[0] * plan[1] * settings.batch
                for index in best:
                    race.add(words.texts[index], "descent")
        _look(judge, cached, races)
    for number in range(settings.rounds if "gradient" in use else 0):
        bases = [(race, base) for race in searching for base in race.bases(number)]
        if not bases:
            break
        subsets = [Unit(*race.first(settings.gradient_examples)) for race, _ in bases]
        vectors = torch.stack([_base(judge, words, base) for _, base in bases])
        for (race, _), best in zip(bases, gradients(judge, cached, subsets, vectors, words, settings.proposals), strict=True):
            race.spent += min(settings.gradient_examples, race.n)
            for index in best:
                race.add(words.texts[index], "gradient")
        _look(judge, cached, races)
    if "others" in use:
        for race in races:
            order = torch.randperm(len(words.texts), generator=race.generator).tolist()
            fresh = [words.texts[index] for index in order if words.texts[index] not in race.proposer]
            for word in fresh[: race.affordable()]:
                race.add(word, "others")
        _look(judge, cached, races)
    _halve(judge, cached, races)
    return [race.concept(cached.prior) for race in races]


class _Race:
    """The candidates of one unit. Costs are counted in examples, which are in an order that takes the labels in turn."""

    def __init__(self, judge: Answers, unit: Unit, settings: Settings, words: Words, number: int) -> None:
        if bool(unit.labels.all()) or not bool(unit.labels.any()):
            raise ValueError(f"unit {number} has examples of one label only")
        self.judge, self.unit, self.settings, self.words = judge, unit, settings, words
        self.generator = unit.generator(settings.seed)
        self.n = len(unit.rows)
        labels = unit.labels.cpu()
        shuffled = torch.randperm(self.n, generator=self.generator)
        place = torch.where(labels[shuffled], labels[shuffled].cumsum(0) * 2 - 1, (~labels[shuffled]).cumsum(0) * 2)
        order = shuffled[place.argsort(stable=True)]
        self.rows, self.labels = unit.rows.cpu()[order], labels[order]
        self.limit = int(settings.evaluations * self.n)
        # One candidate must always be able to finish.
        self.allowance = min(int(settings.screening * self.limit), self.limit - self.n + min(settings.first, self.n))
        """What first looks and proposals may cost in all."""
        self.spent = 0
        self.ids: dict[str, tuple[int, ...]] = {}
        self.proposer: dict[str, str] = {}
        self.losses: dict[str, list[float]] = {}
        self.odds: dict[str, list[float]] = {}
        self.weights: dict[int, list[float]] = {}
        """Of the first so many examples."""
        self.hints: Tensor | None = None
        """[vocabulary] nats, see `Settings.hint`."""
        self.explored: set[str] = set()
        self.single = dict(zip(words.texts, words.ids.tolist(), strict=True))

    def add(self, word: str, proposer: str) -> None:
        word = word.strip()
        if word in self.proposer:
            return
        ids = (self.single[word],) if word in self.single else self.judge.encode(word)
        if ids:
            self.ids[word], self.proposer[word] = ids, proposer

    def first(self, size: int) -> tuple[Tensor, Tensor]:
        return self.rows[:size], self.labels[:size]

    def by_prior(self, prior: Tensor) -> list[str]:
        """Words that the judge itself would put in the slot at the active examples, and rather there than elsewhere."""
        rows, labels = self.rows.to(prior.device), self.labels.to(prior.device)
        here, contrast = prior[rows[labels]].mean(0), prior[rows[labels]].mean(0) - prior[rows[~labels]].mean(0)
        own = contrast[self.words.ids]
        self.hints = (self.settings.hint * (contrast - own.mean()) / own.std(correction=0).clamp(min=1e-3)).cpu()
        k = min(self.settings.proposals, len(self.words.texts))
        best = torch.stack((own.topk(k).indices, here[self.words.ids].topk(k).indices), 1).flatten().tolist()
        return [self.words.texts[i] for i in dict.fromkeys(best)]

    def score(self, word: str) -> float:
        """Its loss on what it was looked at, the labels weighing alike."""
        losses = self.losses[word]
        if len(losses) not in self.weights:
            self.weights[len(losses)] = class_weights(self.labels[: len(losses)]).tolist()
        return sum(map(mul, losses, self.weights[len(losses)]))

    def ranked(self) -> list[str]:
        """Candidates looked at, best first; those looked at longer go before all others."""
        words = list(self.losses)
        hints = [0.0] * len(words) if self.hints is None else self.hints[[self.ids[word][0] for word in words]].tolist()
        keys = {}
        for word, hint in zip(words, hints, strict=True):
            seen = len(self.losses[word])
            keys[word] = -seen, self.score(word) - (hint / seen if seen < self.n else 0.0)
        return sorted(words, key=keys.__getitem__)

    def bases(self, number: int) -> list[int | None]:
        """Words whose gradients to take: None, the mean of all words, in the first round, beside the best unexplored."""
        cost = min(self.settings.gradient_examples, self.n)
        able = max(0, (self.allowance - self.spent) // (2 * cost))
        fresh = [word for word in self.ranked() if word in self.single and word not in self.explored][:2]
        self.explored.update(fresh)
        bases = [None] if number == 0 else []
        return [*bases, *(self.single[word] for word in fresh)][:able]

    def covers(self) -> bool:
        """Whether all words that have not been looked at can be: then nothing needs to point to them."""
        return sum(word not in self.losses for word in self.single) <= self.affordable()

    def descent(self) -> tuple[int, int]:
        """(restarts, steps) that half of what is left for proposals pays for; (0, 0) where it pays for too few."""
        settings = self.settings
        able = (self.allowance - self.spent) // (2 * settings.batch)
        restarts = min(settings.restarts, able // FEWEST_STEPS)
        return (restarts, min(settings.steps, able // restarts)) if restarts else (0, 0)

    def affordable(self) -> int:
        return max(0, (self.allowance - self.spent) // min(self.settings.first, self.n))

    def concept(self, prior: Tensor) -> Concept:
        finalists = [word for word in self.ranked() if len(self.losses[word]) == self.n]
        if not finalists:
            raise ValueError("no candidate could be evaluated: there is none, or too few evaluations")
        losses = torch.tensor([self.score(word) for word in finalists], dtype=torch.float64)
        log_p = (-losses / self.settings.temperature).log_softmax(0)
        mean = prior[self.rows.to(prior.device)].mean(0)
        log_q = mean[torch.tensor([self.ids[word][0] for word in finalists], device=mean.device)].double().cpu()
        entropy, kl = regularisers(log_p, log_q)
        best = finalists[0]
        plain = example_loss(torch.tensor(self.odds[best]), self.labels) @ class_weights(self.labels)
        return Concept(
            finalists, log_p.exp().tolist(), float(plain), float(entropy), float(kl), self.proposer[best],
            -(-self.spent // self.n), losses.tolist(),
        )  # fmt: skip


def _base(judge: Answers, words: Words, base: int | None) -> Tensor:
    """[width]: a word's embedding, or the mean of all words'."""
    if base is None:
        return judge.embed(words.ids).float().mean(0)
    return judge.embed(torch.tensor(base)).float()


def _look(judge: Answers, cached: Any, races: Sequence[_Race]) -> None:
    """First looks at the candidates that have had none, in the order they came, while they can be paid for."""
    fresh = [[word for word in race.proposer if word not in race.losses][: race.affordable()] for race in races]
    _extend(judge, cached, races, fresh, [min(race.settings.first, race.n) for race in races])


def _halve(judge: Answers, cached: Any, races: Sequence[_Race]) -> None:
    """Takes the best to twice as many examples, again and again; each doubling may cost its share of what is left."""
    sizes = [min(race.settings.first, race.n) for race in races]
    while any(size < race.n for size, race in zip(sizes, races, strict=True)):
        chosen = []
        for i, race in enumerate(races):
            size, after = sizes[i], min(2 * sizes[i], race.n)
            reached = [word for word in race.ranked() if len(race.losses[word]) == size]
            sizes[i], cost = after, max(1, after - size)
            doublings = max(1, (-(-race.n // size) - 1).bit_length())
            left = race.limit - race.spent
            count = min(left // doublings, left - (race.n - after)) // cost
            chosen.append(reached[: max(1, min(count, len(reached) // 2))] if after > size else [])
        _extend(judge, cached, races, chosen, sizes)


def _extend(judge: Answers, cached: Any, races: Sequence[_Race], chosen: Sequence[Sequence[str]], sizes: Sequence[int]) -> None:
    """Evaluates chosen words of every unit on the examples up to its size that they have not seen yet."""
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    concepts: list[tuple[int, ...]] = []
    for race, own, size in zip(races, chosen, sizes, strict=True):
        for word in own:
            seen = len(race.losses.get(word, ()))
            rows.append(race.rows[seen:size])
            labels.append(race.labels[seen:size])
            concepts += [race.ids[word]] * (size - seen)
            race.spent += size - seen
    if not concepts:
        return
    odds = judge.pairs(cached, torch.cat(rows), concepts).float().cpu()
    losses = example_loss(odds, torch.cat(labels), races[0].settings.flip)
    at = 0
    for race, own, size in zip(races, chosen, sizes, strict=True):
        for word in own:
            end = at + size - len(race.losses.get(word, ()))
            race.losses.setdefault(word, []).extend(losses[at:end].tolist())
            race.odds.setdefault(word, []).extend(odds[at:end].tolist())
            at = end

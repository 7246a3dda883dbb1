"""The search finds what brute force finds, within its budget: on a judge trained here, and on ones known in closed form."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raylabel.models.concept import Concept, Given, Settings, Unit, losses_of, search
from raylabel.models.descent import Recipe, descend, gradients, gumbel
from raylabel.models.judge import Cached, Judge, Words
from raylabel.models.judge_prompt import Example
from raylabel.models.objective import Terms, class_weights, example_loss, regularisers

TEMPLATE = "text |text| word |token| concept |concept| ? Answer :"
NAMES = [f"name{i}" for i in range(8)]
MEMBERS = {name: [f"member{i}x{j}" for j in range(6)] for i, name in enumerate(NAMES)}
FILL = [f"fill{i}" for i in range(24)]
BASE = ["<unk>", "<pad>", "text", "word", "concept", "?", "Answer", ":", "yes", "no"]
VOCABULARY = [*BASE, *NAMES, *(word for own in MEMBERS.values() for word in own), *FILL]
IDS = {word: i for i, word in enumerate(VOCABULARY)}
EACH = 32


@pytest.fixture(scope="module")
def trained() -> Judge:
    """A word-level judge of two layers that learns in a few seconds which names belong to which words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    model, steps = LlamaForCausalLM(config), 300
    members = torch.tensor([[IDS[word] for word in MEMBERS[name]] for name in NAMES])
    names, fill = torch.tensor([IDS[name] for name in NAMES]), torch.tensor([IDS[word] for word in FILL])
    others = torch.cat((members.flatten(), fill))
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    size = 128
    fixed = {word: torch.full((size, 1), IDS[word]) for word in BASE}
    for _ in range(steps):
        kind, yes = torch.randint(8, (size,)), torch.rand(size) < 0.5
        word = members[kind, torch.randint(6, (size,))]
        wrong = torch.where(
            torch.rand(size) < 0.3, others[torch.randint(len(others), (size,))], names[(kind + torch.randint(1, 8, (size,))) % 8]
        )
        text = torch.cat((word[:, None], fill[torch.randint(len(fill), (size, 2))]), 1)
        text = text.gather(1, torch.rand(size, 3).argsort(1))
        asked = torch.where(yes, names[kind], wrong)
        row = [fixed["text"], text, fixed["word"], word[:, None], fixed["concept"], asked[:, None]]
        ids = torch.cat((*row, fixed["?"], fixed["Answer"], fixed[":"]), 1)
        logits = model(ids).logits
        loss = cross_entropy(logits[:, -1], torch.where(yes, IDS["yes"], IDS["no"]))
        loss = loss + 0.1 * cross_entropy(logits[yes, :-1].flatten(0, 1), ids[yes, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    made = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")
    return Judge(model, tokenizer, name="trained", template=TEMPLATE)


def planted(judge: Judge, noise: float = 0.0, seed: int = 0) -> tuple[Cached, list[Unit]]:
    """Each category's unit: half its examples are its words; `noise` of the labels are turned over."""
    rng, examples, units = random.Random(seed), [], []
    for number, name in enumerate(NAMES):
        labels = []
        for i in range(EACH):
            own = name if i % 2 else rng.choice([other for other in NAMES if other != name])
            word = rng.choice(MEMBERS[own])
            text = [word, *rng.sample(FILL, 2)]
            rng.shuffle(text)
            examples.append(Example(" ".join(text), word))
            labels.append((i % 2 == 1) != (rng.random() < noise))
        units.append(Unit(torch.arange(EACH) + EACH * number, torch.tensor(labels), number))
    return judge.prepare(examples), units


@dataclass
class Table:
    """A judge whose log-odds are given: a word's on an example, summed over a word's tokens. Embeddings are one-hot."""

    odds_of: Tensor
    """[examples, vocabulary]."""
    words: Words
    parts: dict[str, tuple[int, ...]]
    passes: int = 0

    def __post_init__(self) -> None:
        self.size = self.odds_of.shape[1]
        self.yes, self.no = torch.tensor([0]), torch.tensor([1])
        self.prior = torch.full(self.odds_of.shape, 1 / self.size).log()

    def encode(self, word: str) -> tuple[int, ...]:
        return self.parts.get(word, ())

    def embed(self, ids: Tensor) -> Tensor:
        return torch.eye(self.size)[ids]

    def pairs(self, _cached: Any, rows: Tensor, concepts: Sequence[Sequence[int]]) -> Tensor:
        self.passes += len(rows)
        return torch.stack([self.odds_of[row, list(ids)].sum() for row, ids in zip(rows.tolist(), concepts, strict=True)])

    def soft(self, _cached: Any, rows: Tensor, vectors: Tensor) -> Tensor:
        self.passes += len(rows)
        odds = (self.odds_of[rows] * vectors).sum(-1)
        return torch.stack((odds, torch.zeros_like(odds)), -1)

    def odds(self, logits: Tensor) -> Tensor:
        return logits[..., 0] - logits[..., 1]


def table(examples: int = 16, vocabulary: int = 80, best: int = 20) -> tuple[Table, Unit]:
    """Words 0–9 are special and answer perfectly, 10–19 are pieces and do too; of the words, `best` is the right one."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(examples) % 2 == 0
    odds = torch.randn(examples, vocabulary, generator=generator)
    sign = torch.where(labels, 1.0, -1.0)
    odds[:, :20] = 9 * sign[:, None]
    odds[:, best] = 4 * sign
    kept = torch.arange(20, vocabulary)
    parts = {"two part": (30, 31), "special": (), **{f"w{i}": (i,) for i in kept.tolist()}}
    return Table(odds, Words(kept, [f"w{i}" for i in kept.tolist()]), parts), Unit(torch.arange(examples), labels)


def hits(found: Sequence[Concept]) -> int:
    return sum(concept.best == name for concept, name in zip(found, NAMES, strict=True))


def test_the_regularisers_are_less_independent_than_they_look() -> None:
    torch.manual_seed(0)
    log_p, log_q = torch.randn(3, 9).log_softmax(-1), torch.randn(3, 9).log_softmax(-1)
    entropy, kl = regularisers(log_p, log_q)
    torch.testing.assert_close(kl, torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=log_p).entropy())
    terms = Terms(torch.rand(3), entropy, kl)
    for c_entropy, c_kl in ((0.2, 0.1), (0.2, 0.2), (0.1, 0.3)):
        pull = -(log_p.exp() * log_q).sum(-1)
        expected = terms.cross_entropy + (c_entropy - c_kl) * entropy + c_kl * pull
        torch.testing.assert_close(terms.total(c_entropy, c_kl), expected)
    sure, _ = regularisers(torch.tensor([0.0, -torch.inf]), torch.tensor([-1.0, -torch.inf]))
    assert float(sure) == 0


def test_losses_weigh_labels_alike_and_bound_a_wrong_one() -> None:
    labels = torch.tensor([True, False, False, False])
    odds = torch.tensor([2.0, -1.0, 3.0, -50.0])
    logits = torch.stack((odds, torch.zeros(4)), 1)
    plain = cross_entropy(logits, torch.where(labels, 0, 1), reduction="none")
    torch.testing.assert_close(example_loss(odds, labels), plain)
    assert class_weights(labels).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    bounded = example_loss(torch.tensor([60.0, -60.0]), torch.tensor([False, False]), 0.1)
    assert bounded.exp().neg().tolist() == pytest.approx([-10, -1 / 0.9])


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_names_are_found_within_the_budget(trained: Judge, noise: float) -> None:
    cached, units = planted(trained, noise)
    words = trained.words
    assert set(NAMES) <= set(words.texts) and len(words.texts) > 80
    settings = Settings(evaluations=30)
    found = search(trained, cached, units, settings=settings)
    assert hits(found) >= 7
    for unit, concept in zip(units, found, strict=True):
        every = losses_of(trained, cached, unit, [(i,) for i in words.ids.tolist()], settings.flip)
        assert min(concept.losses) <= float(every.min()) + 0.02
        assert concept.losses[0] == pytest.approx(float(every[words.texts.index(concept.best)]), abs=1e-4)
        plain = losses_of(trained, cached, unit, [trained.encode(concept.best)])
        assert concept.cross_entropy == pytest.approx(float(plain), abs=1e-3)
        assert 0 < concept.evaluations <= settings.evaluations
        assert sum(concept.weights) == pytest.approx(1) and concept.weights == sorted(concept.weights, reverse=True)


def test_each_proposer_can_find_names_alone(trained: Judge) -> None:
    cached, units = planted(trained)
    for proposer, least in (("descent", 6), ("others", 7), ("gradient", 3)):
        found = search(trained, cached, units, settings=Settings(evaluations=60, proposers=(proposer,)))
        assert hits(found) >= least, proposer
        assert {concept.proposer for concept in found} == {proposer}


def test_units_do_not_touch_each_other(trained: Judge) -> None:
    cached, units = planted(trained)
    settings = Settings(evaluations=20)
    together = search(trained, cached, units[:3], settings=settings)
    for unit, expected in zip(units[:3], together, strict=True):
        (alone,) = search(trained, cached, [unit], settings=settings)
        assert (alone.words, alone.proposer, alone.evaluations) == (expected.words, expected.proposer, expected.evaluations)
        assert alone.weights == pytest.approx(expected.weights, abs=1e-4)


def test_the_published_recipe_gives_its_own_distribution(trained: Judge) -> None:
    cached, units = planted(trained)
    texts = [str(trained.tokenizer.decode([i])) for i in range(trained.size)]
    found, few = (descend(trained, cached, units[:2], texts, Recipe(steps=steps)) for steps in (30, 3))
    (alone,) = descend(trained, cached, units[1:2], texts, Recipe(steps=3))
    assert few[1].words == alone.words and few[1].weights == pytest.approx(alone.weights, abs=1e-3)
    assert all(concept.proposer == "descent" and concept.evaluations == 0 and len(concept.words) == 5 for concept in found)
    start = descend(trained, cached, units[:1], texts, Recipe(steps=0), top=trained.size)
    z = torch.randn(trained.size, generator=units[0].generator(0))
    assert sorted(start[0].weights) == pytest.approx(sorted(z.softmax(0).tolist()), abs=1e-6)
    assert found[0].cross_entropy < start[0].cross_entropy


def test_special_tokens_and_pieces_never_win() -> None:
    judge, unit = table()
    given = [[Given("special", "mat"), Given("w25", "mat")]]
    (found,) = search(judge, judge, [unit], given, Settings(evaluations=40))
    assert found.best == "w20" and set(found.words) <= set(judge.words.texts)
    assert found.cross_entropy == pytest.approx(float(torch.tensor(4.0).neg().exp().log1p()), abs=1e-5)


@pytest.mark.parametrize("evaluations", [1, 2, 5, 12.5, 40, 1000])
def test_evaluations_are_what_the_judge_was_asked(evaluations: float) -> None:
    judge, unit = table()
    (found,) = search(judge, judge, [unit], settings=Settings(evaluations=evaluations))
    assert judge.passes / 16 <= evaluations
    assert isinstance(found.evaluations, int) and found.evaluations == -(-judge.passes // 16)
    if evaluations >= 40:
        assert found.best == "w20"


def test_a_given_word_of_several_tokens_can_win() -> None:
    judge, unit = table()
    judge.odds_of[:, 30] = judge.odds_of[:, 31] = judge.odds_of[:, 20]
    given = [[Given(" two part", "promoted"), Given("two part", "mat")]]
    (found,) = search(judge, judge, [unit], given, Settings(evaluations=40))
    assert (found.best, found.proposer) == ("two part", "promoted")
    only = replace(Settings(), proposers=("given",))
    assert search(judge, judge, [unit], given, only)[0].words == ["two part"]


def test_every_word_is_looked_at_where_that_can_be_paid_for() -> None:
    for best in range(20, 80, 7):
        judge, unit = table(best=best)
        # 60 first looks at 4 of 16 examples are 15 evaluations.
        (found,) = search(judge, judge, [unit], settings=Settings(evaluations=30, screening=0.5))
        assert found.best == f"w{best}" and found.proposer in ("prior", "others")


def test_the_prior_is_a_witness_where_labels_are_wrong_and_no_judge() -> None:
    found: dict[float, list[bool]] = {0.0: [], 0.5: []}
    for seed in range(20):
        judge, unit = table(examples=32, vocabulary=220, best=20 + 7 * seed)
        wrong = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:6]
        labels = unit.labels.clone()
        labels[wrong] = ~labels[wrong]
        # The judge would put the right word where the unit is truly active; and another one, yet more readily.
        judge.prior[:, 20 + 7 * seed] += 2.0 * unit.labels
        judge.prior[:, 25] += 3.0 * unit.labels
        for hint, hits in found.items():
            settings = Settings(evaluations=40, screening=0.65, hint=hint)
            (concept,) = search(judge, judge, [Unit(unit.rows, labels, seed)], settings=settings)
            hits.append(concept.best == f"w{20 + 7 * seed}")
            assert concept.losses == sorted(concept.losses) and concept.best != "w25"
    assert sum(found[0.5]) > sum(found[0.0]) and sum(found[0.5]) >= 19, found


def test_a_vocabulary_bounds_the_search() -> None:
    judge, unit = table()
    few = judge.words.among({"w30", "w31", "w32"})
    (found,) = search(judge, judge, [unit], words=few)
    assert set(found.words) <= {"w30", "w31", "w32"}


def test_gradients_and_descent_point_to_the_right_word() -> None:
    judge, unit = table()
    order = gradients(judge, judge, [unit], judge.embed(judge.words.ids).mean(0)[None], judge.words, 3)
    assert judge.words.texts[order[0][0]] == "w20"
    likely = gumbel(judge, judge, [unit], Settings(restarts=3, steps=60), judge.words)
    assert judge.words.texts.index("w20") in likely[0][:3]


def test_a_unit_of_one_label_is_refused() -> None:
    judge, unit = table()
    with pytest.raises(ValueError, match="one label only"):
        search(judge, judge, [Unit(unit.rows, torch.ones(16, dtype=torch.bool))])
    with pytest.raises(ValueError, match="no candidate"):
        search(judge, judge, [unit], settings=Settings(proposers=("given",)))

"""The built-in judge as it is in the package: its size, its words, its answers, and what its categories say."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import raylabel
from raylabel.demo.taught import Category, Taught, categories, held_out
from raylabel.models.concept import Settings, Unit, search
from raylabel.models.judge import Judge, load_judge
from raylabel.models.judge_prompt import Example

FOLDER = Path(raylabel.__file__).parent / "demo" / "judge"
SENTENCES = [
    "Nobody at the meeting had heard of {} before that day.",
    "Grandmother always spoke of {} when it got late.",
    "    value = lookup({!r})  # see above",
    "What is left of {}, they said, is hardly worth the trouble",
    "{}! That was all he could say.",
    "0001 {} 0002",
]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge("demo", device="cpu")


@pytest.fixture(scope="module")
def taught() -> Taught:
    return Taught()


def odds_of(judge: Judge, rows: list[tuple[str, str, str]]) -> torch.Tensor:
    """Log-odds of (word, text, concept)."""
    cached = judge.prepare([Example(text, word) for word, text, _ in rows])
    return judge.pairs(cached, torch.arange(len(rows)), [judge.encode(concept) for _, _, concept in rows])


def test_it_is_small_and_everything_is_there() -> None:
    files = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "words.txt"} <= set(files)
    assert sum(files.values()) <= 8_000_000


def test_it_beats_chance_on_the_pairs_of_every_judge(judge: Judge) -> None:
    check = judge.check()
    assert check.serves and check.auroc > 0.8


def test_it_knows_its_words_in_new_sentences(judge: Judge, taught: Taught) -> None:
    rng, rows, right = random.Random(7), [], []
    known = [word for word in taught.words if not held_out(word)]
    while len(rows) < 600:
        word = rng.choice(known)
        text = rng.choice(SENTENCES).format(word)
        wrong = rng.choice(taught.names)
        if not taught.is_right(word, wrong) and not taught.is_near(word, wrong):
            rows += [(word, text, rng.choice(rng.choice(taught.of_word[word.casefold()]).names)), (word, text, wrong)]
            right += [True, False]
    correct = (odds_of(judge, rows) > 0) == torch.tensor(right)
    yes, no = (float(correct[torch.tensor(right) == answer].float().mean()) for answer in (True, False))
    assert (yes + no) / 2 >= 0.95 and min(yes, no) >= 0.92


def test_it_does_not_say_yes_to_what_says_nothing(judge: Judge, taught: Taught) -> None:
    rng = random.Random(3)
    words = rng.sample([word for word in taught.words if not held_out(word)], 100)
    rows = [(word, f"And then there was {word} too.", concept) for word in words for concept in ("thing", "the", "concept")]
    assert float((odds_of(judge, rows) > 0).float().mean()) <= 0.05


def test_a_category_is_found_from_examples(judge: Judge, taught: Taught) -> None:
    rng, examples, units, names = random.Random(5), [], [], ["fruit", "exception", "tool", "month", "protocol", "bracket"]
    every = [word for word in taught.words if not held_out(word)]
    for number, name in enumerate(names):
        own = [word for word in every if taught.is_right(word, name)]
        labels = [i % 2 == 0 for i in range(48)]
        for label in labels:
            word = rng.choice(own)
            while taught.is_right(word, name) != label:
                word = rng.choice(every)
            examples.append(Example(rng.choice(SENTENCES).format(word), word))
        units.append(Unit(torch.arange(48) + 48 * number, torch.tensor(labels), number))
    found = search(judge, judge.prepare(examples), units, settings=Settings())
    of = taught.extension
    hits = [of.get(concept.best.casefold()) == of[name] for concept, name in zip(found, names, strict=True)]
    assert sum(hits) >= len(names) - 1, [concept.words[:3] for concept in found]


def test_whole_words_are_the_words_of_its_tokenizer(judge: Judge, taught: Taught) -> None:
    whole = set(judge.words.texts)
    missing = [name for name in taught.names if name not in whole]
    assert not missing
    assert len(judge.encode("zyzzogeton")) > 1 and "zyzzo" not in whole


def test_categories_say_what_is_right() -> None:
    found = [Category(("cat", "animal"), ("Tabby", "lion"), "cats"), Category(("dog", "animal"), ("poodle",), "dogs")]
    own = Taught([*found, Category(("unused",), ("lion",), "unused", is_taught=False)])
    assert own.is_right("tabby", "Cat") and own.is_right("poodle", "animal") and own.is_right("lion", "lion")
    assert own.is_right("lion", "cats") and not own.is_right("lion", "dog") and not own.is_right("lion", "unused")
    assert own.is_near("lion", "tabby") and not own.is_near("lion", "poodle") and not own.is_near("lion", "animal")


def test_the_categories_are_many_and_well_formed() -> None:
    found = categories()
    own = [category for category in found if category.is_taught]
    assert len(own) >= 150 and len({category.label for category in found}) == len(found)
    assert all(len(category.words) >= 5 and category.names for category in found)
    known = Taught(found)
    assert len(known.words) > 3000
    unused = {word.casefold() for category in found if not category.is_taught for word in category.words}
    assert not unused & set(known.of_word)
    share = sum(map(held_out, known.words)) / len(known.words)
    assert 0.03 < share < 0.07

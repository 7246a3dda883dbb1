"""The gist of planted lists of peaks, by name; and the same words among others that are no different."""

from __future__ import annotations

import random

import pytest

from raylabel.words.gist import gist
from raylabel.words.peaks import Peak, peak

TEXT = (
    "The old man went to a small house near one river, and then we sat under it for hours. She said that his friends "
    "would come back soon; nobody knew why (or when) they left. In 1987 he wrote 3 books."
)


def at(word: str, before: str = " seen a ", after: str = " then", inside: int = 0, opens: bool = False) -> Peak:
    return Peak(f" {word}"[inside:], word, before, after, inside, opens)


def ordinary(n: int = 120, seed: int = 0) -> list[Peak]:
    """Tokens of ordinary text."""
    draw = random.Random(seed)
    tokens = [f" {word}" for word in TEXT.split()]
    return [peak(tokens, draw.randrange(len(tokens)), False) for _ in range(n)]


@pytest.mark.parametrize(("words", "label"), [
    (["river"] * 9 + ["lake"], "the word “river”"),
    (["run", "runs", "running", "runs", "Running"], "forms of “run”: runs, running, run"),
    (["cat"] * 6 + ["dog"] * 5, "“cat” or “dog”"),
    (["walking", "singing", "eating", "sleeping", "reading", "talking"], "words ending in “-ing”"),
    (["unhappy", "unlikely", "unable", "unfair", "untidy", "unkind"], "words beginning with “un-”"),
    (["1", "27", "300", "45", "12", "9"], "numbers in digits"),
    (["1914", "1939", "2001", "1776", "1989"], "years"),
    (["(", "[", "(", "{", "["], "opening brackets"),
    ([")", "]", "}", "]", ")"], "closing brackets"),
    (["."] * 6, "full stops"),
    (["?", ".", "!", "?", ".", "!"], "marks that end a sentence"),
    (["“", "”", "'", '"', "“"], "quotation marks"),
    (["London", "Anna", "Paris", "Peter", "Monday", "Rome"], "capitalised words"),
    (["NATO", "USA", "HTTP", "JSON", "BBC"], "words in capitals"),
    (["москва", "привет", "река", "дом", "да"], "Cyrillic words"),
    (["getName", "setValue", "toString", "indexOf", "hasNext"], "camelCase names"),
    (["honk", "rhinoceros", "honest", "hole", "echo"], "“ho” inside words: honk, rhinoceros, honest"),
])  # fmt: skip
def test_planted_lists_are_named(words: list[str], label: str) -> None:
    befores = [" seen a ", " near the ", " of some ", " and then ", " it was "]
    peaks = [at(word, befores[i % 5]) for i, word in enumerate(words)]
    if "inside" in label:
        peaks = [p._replace(token="ho") for p in peaks]
    assert gist(peaks, ordinary()).label == label


def test_what_stands_behind_one_word_is_said() -> None:
    peaks = [at(w, before=" he liked the ") for w in ("cat", "river", "old", "blue", "tune")]
    others = [at("cat", before=before) for before in (" a ", " he ", " we ", " out ", " near ")]
    assert gist(peaks, others).label == "what follows “the”"
    same = [at("cat", before=" he liked the ") for _ in range(5)]
    assert gist(same, others).label == "the word “cat”, after “the”"


def test_the_place_is_said_where_it_is_not_the_usual_one() -> None:
    starts = [at("and", before="So it was.\n") for _ in range(6)]
    elsewhere = [at("and", before=" cats ") for _ in range(6)]
    assert gist(starts, elsewhere).label == "the word “and” starting a line"
    assert gist(starts, starts).label == "the word “and”"


def test_casing_is_said_where_the_word_has_another_one_too() -> None:
    peaks = [at("The") for _ in range(6)]
    assert gist(peaks, [at("the") for _ in range(6)]).label == "the word “The”, capitalised words"
    assert gist(peaks, [at("a") for _ in range(6)]).label == "the word “The”"


def test_a_trait_that_all_words_of_the_texts_have_is_none() -> None:
    words = ["Anna", "Rome", "Paris", "Monday", "Peter"]
    shouting = [at(w.title()) for w in TEXT.split()]
    assert "capitalised" not in gist([at(w) for w in words], shouting).label


def test_words_that_mean_alike_are_named_by_members_and_others_are_listed() -> None:
    words = ["king", "queen", "prince", "queen", "duke", "lord"]
    befores = iter([" a ", " he ", " we ", " out ", " near ", " of "] * 2)
    assert gist([at(w, next(befores)) for w in words], ordinary(), alike=True).label == "words like queen, king, prince, duke"
    found = gist([at(w, next(befores)) for w in ["of", "blue", "run", "house", "yes"]], ordinary())
    assert (found.kind, found.label) == ("mixed", "of, blue, run, house")


def test_line_breaks_and_indentation() -> None:
    breaks = [Peak("\n\n", "\n\n", "the end.", "Next", 0, False) for _ in range(6)]
    assert gist(breaks, ordinary()).label.startswith("line breaks")
    assert gist([Peak("    ", "    ", "x:\n", "return", 0, False)] * 6, ordinary()).label.startswith("indentation")


def test_peaks_know_their_word_and_surroundings() -> None:
    tokens = ["It", " was", "\n", "rhin", "oceros", "(", "x"]
    found = peak(tokens, 4, True)
    assert (found.word, found.before, found.after, found.inside) == ("rhinoceros", "It was\n", "(x", 4)
    assert peak(tokens, 0, True).opens and not peak(tokens, 0, False).opens
    assert peak(tokens, 3, True).left == "" and peak(tokens, 1, True).left == "it"

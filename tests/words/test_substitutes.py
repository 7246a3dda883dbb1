from __future__ import annotations

import numpy as np
import pytest

from raylabel.words.background import Background, fit_background
from raylabel.words.families import stem
from raylabel.words.substitutes import Substitutes, recase, shape
from tests.words.planted import FILLERS, LISTS, PlantedVectors, background, sample, samples


@pytest.fixture(scope="module")
def fitted() -> Background:
    extra = "Dog DOG dogs Dogs Red RED reds 1 2 30 400 ! ? ( ) ... x2 Cat don't can't once " * 5
    return fit_background([*samples(), sample(extra + "seldom")], PlantedVectors(), 5, "sif", 0)


@pytest.fixture(scope="module")
def substitutes(fitted: Background) -> Substitutes:
    return Substitutes(fitted, 0)


@pytest.mark.parametrize(
    ("word", "name"),
    [("Dog", "letters"), ("don't", "letters"), ("12", "digits"), ("...", "punctuation"), ("'", "punctuation"),
     ("x2", "mixed"), (" \n", ""), ("", "")],
)  # fmt: skip
def test_shape(word: str, name: str) -> None:
    assert shape(word) == name


@pytest.mark.parametrize(
    ("word", "like", "written"),
    [("Dog", "cat", "dog"), ("dog", "Cat", "Dog"), ("dog", "CAT", "DOG"), ("we", "I", "We"), ("getWord", "aName", "getWord"),
     ("12", "7", "12"), ("can't", "Don't", "Can't")],
)  # fmt: skip
def test_recase(word: str, like: str, written: str) -> None:
    assert recase(word, like) == written


def test_neighbours_are_of_the_same_meaning(substitutes: Substitutes) -> None:
    for words in LISTS.values():
        for near in substitutes.neighbours(words, 3):
            assert len(set(near) & set(words)) >= 2


@pytest.mark.parametrize("k", [1, 5, 30])
def test_a_substitute_is_never_the_word_its_casing_or_its_inflection(substitutes: Substitutes, k: int) -> None:
    asked = ["dog", "Dog", "DOG", "dogs", "red", "unheardof", "don't"]
    for given in (substitutes.neighbours(asked, k), substitutes.random(asked, k)):
        for word, found in zip(asked, given, strict=True):
            assert len(found) == len(set(found)) == k
            assert stem(word) not in {stem(other) for other in found}
            assert {recase(other, word) for other in found} == set(found), "written as the word is"


def test_neighbours_are_the_nearest(substitutes: Substitutes, fitted: Background) -> None:
    """By the cosine less 0.02 an octave of difference in frequency."""
    words: dict[str, str] = {}
    for w, n in zip(fitted.vocabulary, fitted.counts, strict=True):
        if n >= 3 and shape(w) == "letters":
            words.setdefault(w.casefold(), w)
    vectors = fitted.words(list(words.values()))
    octaves = np.log2([fitted.counts[fitted.index[w]] for w in words.values()])
    for word in ("hammer", "blue", "bobuf"):
        own = list(words).index(word)
        near = vectors @ vectors[own] - 0.02 * np.abs(octaves - octaves[own])
        order = [w for i in np.argsort(-near).tolist() if stem(w := list(words)[i]) != stem(word)]
        assert substitutes.neighbours([word], 6) == [order[:6]]


def test_shapes_do_not_mix_and_white_space_has_none(substitutes: Substitutes) -> None:
    for find in (substitutes.neighbours, substitutes.random):
        digits, marks, mixed, space, empty = find(["1", "!", "x2", " \n", ""], 3)
        assert {shape(w) for w in digits} <= {"digits"} and {shape(w) for w in marks} <= {"punctuation"}
        assert mixed == [] and space == [] and empty == []
    assert substitutes.neighbours(["1", "!"], 3)[0] and substitutes.neighbours(["1", "!"], 3)[1]


def test_random_words_match_in_band_and_length_and_are_no_neighbours(fitted: Background) -> None:
    words = [w for w in fitted.vocabulary if shape(w) == "letters"][:200]
    substitutes = Substitutes(fitted, 0)
    near, drawn = substitutes.neighbours(words, 5), substitutes.random(words, 5)
    for a, b in zip(near, drawn, strict=True):
        assert len(b) == 5 and not set(a) & set(b)
    lower = [(w, found) for w, found in zip(words, drawn, strict=True) if w.islower()]
    same = [fitted.band([w])[0] == fitted.band(found) for w, found in lower]
    assert np.mean(same) > 0.95
    apart = [abs(len(w) - len(other)) for w, found in lower for other in found]
    assert np.mean(apart) < 1.5
    assert len({w for found in drawn for w in found}) > 100, "not the same few"


def test_a_word_gets_the_same_whatever_is_asked_with_it(fitted: Background) -> None:
    words = fitted.vocabulary[:150]
    together = Substitutes(fitted, 0)
    apart = Substitutes(fitted, 0)
    for find in ("neighbours", "random"):
        many = getattr(together, find)(words, 4)
        assert many == [getattr(apart, find)([word], 4)[0] for word in words]
        assert many == getattr(together, find)(words, 4)
    assert Substitutes(fitted, 1).random(words, 4) != together.random(words, 4)


def test_rare_words_are_no_substitutes_but_have_some(substitutes: Substitutes, fitted: Background) -> None:
    assert fitted.counts[fitted.index["seldom"]] == 1
    assert len(substitutes.neighbours(["seldom"], 4)[0]) == 4
    every = substitutes.neighbours(fitted.vocabulary, 5)
    assert "seldom" not in {word for found in every for word in found}


def test_a_tiny_vocabulary() -> None:
    tiny = Substitutes(background(n=1, size=6), 0)
    assert tiny.neighbours(["dog"], 5) == [[]] and tiny.random(["dog"], 5) == [[]]


def test_words_that_begin_alike_are_no_substitutes() -> None:
    texts = ["learn learnt learner lea le lesson teach read reads reading ready bread", "you your yours yourself we us them"]
    rows = [*samples(50), *(sample(" ".join(text.split() * 5)) for text in texts * 3)]
    source = Substitutes(fit_background(rows, PlantedVectors(), 5, "sif", 0), 0)
    for word, banned in (("learn", {"learnt", "learner", "lea"}), ("Read", {"ready"}), ("you", {"your", "yours", "yourself"})):
        for found in (*source.neighbours([word], 30), *source.random([word], 30)):
            assert found and not {w.casefold() for w in found} & banned
    # Two letters begin too many words to tell anything.
    assert "learn" in source.neighbours(["le"], 2000)[0]


def test_of_a_words_neighbours_a_group_takes_those_that_lie_towards_it(substitutes: Substitutes, fitted: Background) -> None:
    """By the cosine with the word and with the mean of the group's other words, less 0.02 an octave, among the 100 nearest."""
    for name, words in LISTS.items():
        other = next(w for w in FILLERS if w in fitted.index)
        group = [*words[:4], other]
        toward = fitted.words(words[:4]).sum(axis=0)
        toward /= np.linalg.norm(toward)
        (near,) = substitutes.neighbours([other], 100)
        octave = np.log2(fitted.counts[[fitted.index[w] for w in [other, *near]]])
        score = fitted.words(near) @ (fitted.words([other])[0] + toward) - 0.02 * np.abs(octave[1:] - octave[0])
        assert substitutes.among(group, 4)[-1] == [near[i] for i in np.argsort(-score)[:4]], name
        for found in substitutes.among(group, 4)[:4]:
            assert len(set(found) & set(words)) >= 3


def test_words_without_likeness_do_not_stand_for_each_other(substitutes: Substitutes, fitted: Background) -> None:
    fillers = [w for w in FILLERS if w in fitted.index][:12]
    for word, found, near in zip(fillers, substitutes.among(fillers, 5), substitutes.neighbours(fillers, 100), strict=True):
        assert set(found) <= set(near), word


def test_a_group_of_two_kinds_has_substitutes_of_both(substitutes: Substitutes) -> None:
    first, second = list(LISTS.values())[:2]
    group = [*first[:5], *second[:5]]
    for word, found in zip(group, substitutes.among(group, 3), strict=True):
        kind = first if word in first else second
        assert len(set(found) & set(kind)) >= 2


def test_a_groups_words_may_stand_for_each_other_but_not_for_themselves(substitutes: Substitutes) -> None:
    group = ["dog", "Dogs", "cat", "x2", "!"]
    given = dict(zip(group, substitutes.among(group, 5), strict=True))
    assert "cat" in given["dog"] and "dog" in given["cat"]
    assert given["Dogs"] and all(w.istitle() and stem(w) != "dog" for w in given["Dogs"])
    assert {shape(w) for w in given["!"]} <= {"punctuation"}
    again = dict(zip(group[::-1], substitutes.among(group[::-1], 5), strict=True))
    assert again == given

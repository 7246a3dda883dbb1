"""Vectors from neighbouring words: against counting by hand, planted kinds, what cannot be fitted, and the round trip."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from raylabel.words import contexts
from raylabel.words.contexts import Contexts, fit_contexts

KINDS = {"pet": ["cat", "dog", "hamster", "rabbit"], "tool": ["hammer", "saw", "wrench", "drill"]}
FRAMES = {"pet": "she fed the {} some fresh hay .", "tool": "he used a {} on his old bench ."}


def texts(n: int = 300, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        kind = ("pet", "tool")[rng.integers(2)]
        word = KINDS[kind][rng.integers(4)]
        found.append(FRAMES[kind].format(word.upper() if rng.random() < 0.2 else word))
    return found


def test_words_that_take_each_others_place_are_alike_in_any_casing() -> None:
    given = texts()
    fitted = fit_contexts(lambda: given)
    pets, tools = fitted.words(KINDS["pet"]), fitted.words([word.title() for word in KINDS["tool"]])
    assert (pets @ pets.T).min() > 0.9
    assert (tools @ tools.T).min() > 0.9
    assert (pets @ tools.T).max() < 0.2
    assert not fitted.words(["unheard", ""]).any()


def test_information_is_that_counted_by_hand() -> None:
    given = ["a b c", "c b a b"]
    number = {"b": 0, "a": 1, "c": 2}
    table = contexts._beside([[number[w] for w in text.split()] for text in given], 3, 2).toarray()
    by_hand = np.zeros_like(table)
    for text in given:
        line = text.split()
        for i, word in enumerate(line):
            for place, step in enumerate((-1, 1, -2, 2)):
                if 0 <= i + step < len(line) and number[line[i + step]] < 2:
                    by_hand[number[word], number[line[i + step]] + 2 * place] += 1
    assert np.array_equal(table, by_hand)
    rows, columns = Counter[int](), Counter[int]()
    for (i, j), n in np.ndenumerate(by_hand):
        rows[i] += n
        columns[j] += n
    smooth = {j: n**0.75 for j, n in columns.items()}
    found = contexts._information(contexts.sparse.csr_matrix(by_hand)).toarray()
    for (i, j), n in np.ndenumerate(by_hand):
        want = max(math.log(n / (rows[i] * smooth[j] / sum(smooth.values()))), 0.0) if n else 0.0
        assert found[i, j] == pytest.approx(want, abs=1e-12)


def test_blocks_of_text_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given = texts(100)
    whole = fit_contexts(lambda: given)
    monkeypatch.setattr(contexts, "BLOCK", 50)
    parts = fit_contexts(lambda: given)
    assert parts.vocabulary == whole.vocabulary
    assert np.allclose(parts.matrix @ parts.matrix.T, whole.matrix @ whole.matrix.T, atol=1e-5)


def test_no_more_is_read_than_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "BLOCK", 50)
    monkeypatch.setattr(contexts, "MOST", 400)
    given = texts(100)
    read = 0

    def some():
        nonlocal read
        for text in given:
            read += 1
            yield text

    fit_contexts(some)
    assert read <= 2 * 70


@pytest.mark.parametrize("given", [[], [""], ["word"], ["one two three"], ["same same same"]])
def test_next_to_no_text_gives_no_vectors_and_no_error(given: list[str]) -> None:
    fitted = fit_contexts(lambda: given)
    assert not fitted.words(["word", "same"]).any()


def test_the_stored_state_is_the_state() -> None:
    given = texts()
    fitted = fit_contexts(lambda: given)
    again = Contexts.from_bytes(fitted.to_bytes())
    assert again.vocabulary == fitted.vocabulary
    assert np.allclose(again.matrix, fitted.matrix, atol=1e-3)
    assert np.allclose(np.linalg.norm(again.matrix, axis=1), 1, atol=1e-6)
    assert Contexts.from_bytes(Contexts([], np.zeros((0, 1), np.float32)).to_bytes()).vocabulary == []
    assert fit_contexts(lambda: given).to_bytes() == fitted.to_bytes()

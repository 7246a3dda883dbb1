from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from raylabel.errors import BadInput
from raylabel.words import background as module
from raylabel.words.background import Background, fit_background
from raylabel.words.contexts import fit_contexts
from raylabel.words.families import stem
from raylabel.words.segment import phrase, words
from tests.words.planted import PlantedVectors, background, sample, samples


@pytest.fixture(scope="module")
def fitted() -> Background:
    return background()


def test_vocabulary(fitted: Background) -> None:
    counts = Counter(word for s in samples() for word in words(s["text"]))
    assert dict(zip(fitted.vocabulary, fitted.counts.tolist(), strict=True)) == counts
    assert fitted.counts.tolist() == sorted(fitted.counts.tolist(), reverse=True)
    by_stem = [stem(word) for word in fitted.vocabulary]
    assert [by_stem.index(s) for s in by_stem] == [fitted.stems.tolist().index(s) for s in fitted.stems.tolist()]


@pytest.mark.parametrize(
    ("size", "edges"),
    [(1, [0, 1]), (47, [0, 47]), (48, [0, 48]), (95, [0, 95]), (96, [0, 48, 96]), (144, [0, 48, 144]), (191, [0, 48, 191]),
     (192, [0, 48, 144, 192]), (800, [0, 48, 144, 336, 720, 800])],
)  # fmt: skip
def test_bands(size: int, edges: list[int]) -> None:
    assert module._edges(size).tolist() == edges


def test_the_band_of_a_word(fitted: Background) -> None:
    asked = [fitted.vocabulary[0], fitted.vocabulary[47], fitted.vocabulary[48], fitted.vocabulary[-1], "unheardof"]
    assert fitted.band(asked).tolist() == [0, 0, 1, fitted.bands - 1, fitted.bands - 1]


def test_words_are_without_their_common_part(fitted: Background) -> None:
    raw = PlantedVectors().matrix(fitted.vocabulary).astype(np.float64)
    share = fitted.counts / fitted.counts.sum()
    mean = sum(p * v for p, v in zip(share, raw, strict=True))
    scaled = (raw - mean) * np.sqrt(share)[:, None]
    first = np.linalg.svd(scaled, full_matrices=False)[2][0]
    for word, given in zip(["dog", "Dog", "unheardof"], fitted.words(["dog", "Dog", "unheardof"]), strict=True):
        vector = PlantedVectors().matrix([word])[0] - mean
        vector = vector - (vector @ first) * first
        assert np.allclose(given, vector / np.linalg.norm(vector), atol=1e-4)
    assert not fitted.words([" ", ""]).any()
    assert fitted.words([]).shape == (0, PlantedVectors.dim)
    assert np.array_equal(fitted.matrix, fitted.words(fitted.vocabulary))


def test_joined_vectors_have_the_mean_of_both_cosines(fitted: Background) -> None:
    asked = ["dog", "cat", "red", "unheardof", " "]
    assert np.array_equal(fitted.joined(asked), fitted.words(asked)), "without contexts these are the word vectors"
    beside = fit_contexts(lambda: (s["text"] for s in samples()))
    both = replace(fitted, contexts=beside)
    first, second, joined = fitted.words(asked), beside.words(asked), both.joined(asked)
    assert second[:3].any(axis=1).all() and not second[3:].any()
    known = np.ix_(range(3), range(3))
    assert np.allclose((joined @ joined.T)[known], (first @ first.T / 2 + second @ second.T / 2)[known], atol=1e-6)
    assert np.allclose(np.linalg.norm(joined, axis=1), [1, 1, 1, 1, 0], atol=1e-6)
    assert np.allclose(joined[3] @ joined[0], first[3] @ first[0] / np.sqrt(2), atol=1e-6)
    assert np.array_equal(both.joined_matrix, both.joined(both.vocabulary))
    again = Background.from_bytes(both.to_bytes(), both.vectors, beside)
    assert np.array_equal(again.joined(asked), joined) and both.to_bytes() == fitted.to_bytes()


def _sif(fitted: Background, text: str) -> np.ndarray:
    """Arora et al. 2017, equation by equation, before the common component goes."""
    total = int(fitted.counts.sum())
    counts = dict(zip(fitted.vocabulary, fitted.counts.tolist(), strict=True))
    out = np.zeros(PlantedVectors.dim)
    for word in words(text):
        out += 1e-3 / (1e-3 + counts.get(word, 0) / total) * PlantedVectors().matrix([word])[0]
    return out / max(len(words(text)), 1)


def test_phrases_are_sif_vectors(fitted: Background) -> None:
    texts = [s["text"][:50] for s in samples(6)] + ["unheardof words", "dog"]
    for text, given in zip(texts, fitted.phrases(texts), strict=True):
        vector = _sif(fitted, text)
        vector = vector - (vector @ fitted.phrase_component) * fitted.phrase_component
        assert np.allclose(given, vector / np.linalg.norm(vector), atol=1e-4)
    assert not fitted.phrases(["", " \n"]).any()


def test_the_component_is_that_of_uniform_phrases(fitted: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [phrase([t * (t != "<bos>") for t in s["tokens"]], i, 5).text
             for s in samples() for i in range(1, len(s["tokens"]))]  # fmt: skip
    first = np.linalg.svd(np.stack([_sif(fitted, text) for text in every[::7]]), full_matrices=False)[2][0]
    assert abs(first @ fitted.phrase_component) > 0.99


def test_original_phrases_are_plain_means() -> None:
    plain = background("mean")
    text = "dog red unheardof ."
    vector = PlantedVectors().matrix(words(text)).mean(axis=0)
    assert np.allclose(plain.phrases([text])[0], vector / np.linalg.norm(vector), atol=1e-5)


def test_null_phrases_are_made_as_units_phrases_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    original = Background.phrases

    def spy(self: Background, texts: list[str]) -> np.ndarray:
        asked.append(list(texts))
        return original(self, texts)

    monkeypatch.setattr(Background, "phrases", spy)
    fitted = background(n=30, size=20)
    every = [phrase([t * (t != "<bos>") for t in s["tokens"]], i, 5).text
             for s in samples(30, 20) for i in range(1, len(s["tokens"]))]  # fmt: skip
    assert not Counter(asked[0]) - Counter(every), "each of them is a phrase of the corpus, none twice"
    assert len(fitted.null_vectors) == len(asked[0]) == len(every) * 2 // 7
    assert len(fitted.null_bands) == len(fitted.null_stems) == len(asked[0])


def test_fit_and_null_phrases_are_at_different_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(
        module, "_phrase_means",
        lambda background, texts: made.append(len(texts)) or np.ones((len(texts), PlantedVectors.dim), np.float32),
    )  # fmt: skip
    monkeypatch.setattr(module, "FITTED", 50)
    monkeypatch.setattr(module, "NULLS", 20)
    _, cuts = module._survey(samples(50), 0)
    assert len({(id(cut.ends), cut.token) for cut in cuts}) == len(cuts) == 70
    fit_background(samples(50), PlantedVectors(), 5, "sif", 0)
    assert made == [50, 20]


def test_positions_are_uniform_and_the_sample_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FITTED", 500)
    monkeypatch.setattr(module, "NULLS", 200)
    text = samples(300)
    _, cuts = module._survey(text, 3)
    where = {id(s["text"]): i for i, s in enumerate(text)}
    drawn = np.array([where[id(cut.text)] for cut in cuts])
    assert len(cuts) == 700
    assert all(cut.token > 0 for cut in cuts), "BOS is no position"
    assert abs(drawn.mean() - 149.5) < 5 * 300 / np.sqrt(12 * 700)
    assert abs(np.mean([cut.token for cut in cuts]) - 21) < 5 * 41 / np.sqrt(12 * 700)


def test_bytes(fitted: Background) -> None:
    data = fitted.to_bytes()
    assert background().to_bytes() == data, "the same text and seed give the same bytes"
    assert background(seed=1).to_bytes() != data
    again = Background.from_bytes(data, PlantedVectors())  # type: ignore[arg-type]
    assert again.to_bytes() == data
    texts = [s["text"][:40] for s in samples(5)]
    assert np.array_equal(again.phrases(texts), fitted.phrases(texts))
    assert np.array_equal(again.words(["dog", "x"]), fitted.words(["dog", "x"]))
    assert again.window == 5 and again.weighting == "sif"


def test_other_vectors_are_refused(fitted: Background) -> None:
    other = PlantedVectors()
    other.dim = 12  # type: ignore[misc]
    with pytest.raises(BadInput, match=r"identify\.vectors"):
        Background.from_bytes(fitted.to_bytes(), other)  # type: ignore[arg-type]


def test_rows_do_not_depend_on_the_rows_beside_them(fitted: Background) -> None:
    texts = [s["text"][:60] for s in samples(50)]
    together, asked = fitted.phrases(texts), fitted.vocabulary[:60]
    assert all(np.array_equal(fitted.phrases([text])[0], row) for text, row in zip(texts, together, strict=True))
    assert all(np.array_equal(fitted.words([w])[0], row) for w, row in zip(asked, fitted.words(asked), strict=True))


@pytest.mark.parametrize("texts", [[], [""], [" \n "]])
def test_nothing_to_fit_on(texts: list[str]) -> None:
    with pytest.raises(BadInput, match="no word"):
        fit_background([sample(text) for text in texts], PlantedVectors(), 5, "sif", 0)


def test_a_single_word() -> None:
    tiny = fit_background([sample("dog")], PlantedVectors(), 5, "sif", 0)
    assert tiny.bands == 1 and tiny.words(["dog"]).shape == (1, PlantedVectors.dim)


def test_tokens_without_text_and_odd_characters() -> None:
    row = {"text": "a \ud800b é", "ends": [0, 1, 1, 3, 4, 6]}
    fitted = fit_background([row] * 3, PlantedVectors(), 5, "sif", 0)
    again = Background.from_bytes(fitted.to_bytes(), PlantedVectors())  # type: ignore[arg-type]
    assert again.vocabulary == fitted.vocabulary

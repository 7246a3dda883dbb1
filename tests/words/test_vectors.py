from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from raylabel.errors import BadInput
from raylabel.words.families import stem
from raylabel.words.vectors import Vectors, normal, train_vectors
from tests.shared import STORIES
from tests.words.planted import samples


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "vectors.bin"
    train_vectors((s["text"] for s in samples(150)), path, dim=16, epochs=2, bucket=2_000)
    return path


def test_the_same_text_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    """fastText reads memory that it never wrote; used in-process, every training after the first was different."""
    for i in range(3):
        used = np.full(3_000_000 + i, np.nan)
        del used
        train_vectors([s["text"] for s in samples(150)], tmp_path / "again.bin", dim=16, epochs=2, bucket=2_000)
        assert (tmp_path / "again.bin").read_bytes() == trained.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.bin"], "nothing else stays"


def test_matrix(trained: Path) -> None:
    vectors = Vectors(trained)
    matrix = vectors.matrix(["dog", "unheardof", " ", "", "\n\t", "."])
    assert matrix.shape == (6, vectors.dim) == (6, 16) and matrix.dtype == np.float32
    assert matrix[[0, 1, 5]].any(axis=1).all()
    assert not matrix[2:5].any()
    assert vectors.matrix([]).shape == (0, 16)
    assert np.array_equal(pickle.loads(pickle.dumps(vectors)).matrix(["dog"]), matrix[:1])


def test_case_and_long_runs(trained: Path) -> None:
    assert normal("#" * 80) == "#" * 8 and normal("a" * 8) == "a" * 8 and len(normal("0123456789" * 20)) == 64
    vectors = Vectors(trained)
    assert not np.array_equal(*vectors.matrix(["dog", "Dog"]))


def test_runs_of_one_character_do_not_make_training_diverge(tmp_path: Path) -> None:
    train_vectors([("#" * 400 + " one two\n") * 200], tmp_path / "v.bin", dim=8, epochs=5, bucket=1_000)
    assert np.isfinite(Vectors(tmp_path / "v.bin").matrix(["#" * 400, "one"])).all()


@pytest.mark.parametrize("texts", [[], [""], [" \n"]])
def test_no_words_to_train_on(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"identify\.vectors"):
        train_vectors(texts, tmp_path / "v.bin")
    assert not list(tmp_path.iterdir())


def test_one_word_is_enough(tmp_path: Path) -> None:
    train_vectors(["a " * 60_000], tmp_path / "v.bin", dim=8, epochs=1, bucket=100)
    assert Vectors(tmp_path / "v.bin").matrix(["a"]).any()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.7])
def test_a_cut_file(trained: Path, tmp_path: Path, share: float) -> None:
    data = trained.read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadInput, match=r"identify\.vectors: .*cut\.bin"):
        Vectors(tmp_path / "cut.bin")


def test_a_missing_or_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "text.bin").write_text("no vectors here\n" * 50)
    for name in ("text.bin", "missing.bin", "."):
        with pytest.raises(BadInput, match=r"identify\.vectors"):
            Vectors(tmp_path / name)


@pytest.mark.shared
@pytest.mark.skipif(not STORIES.is_file(), reason="no recorded data beside the repository")
def test_similarity_means_something_after_three_hundred_stories(tmp_path: Path) -> None:
    train_vectors(json.loads(STORIES.read_text())[:300], tmp_path / "v.bin")
    assert (tmp_path / "v.bin").stat().st_size < 20e6
    vectors = Vectors(tmp_path / "v.bin")
    lists = {
        "animals": ["dog", "cat", "bird", "bear", "rabbit", "fish", "mouse", "frog", "duck"],
        "feelings": ["happy", "sad", "angry", "scared", "excited", "proud", "surprised"],
        "places": ["park", "house", "school", "store", "garden", "forest", "kitchen"],
        "said": ["said", "asked", "replied", "shouted", "cried"],
    }
    words = [w for listed in lists.values() for w in listed]
    assert len({stem(w) for w in words}) == len(words)
    matrix = vectors.matrix(words)
    matrix -= matrix.mean(axis=0)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    names = np.array([name for name, listed in lists.items() for _ in listed])
    cosines = matrix @ matrix.T
    same = (names[:, None] == names) & ~np.eye(len(names), dtype=bool)
    assert cosines[same].mean() > cosines[names[:, None] != names].mean() + 0.25

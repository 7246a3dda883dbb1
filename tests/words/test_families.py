from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raylabel.words.families import families, stem


def test_stem() -> None:
    assert stem("Running") == stem("runs") == stem("run")
    assert stem("dog's") == stem("dog’s") == stem("Dogs")
    assert [stem(w) for w in ("123", "...", "__", "", "3rd")] == ["123", "...", "__", "", "3rd"]
    assert stem("cat") != stem("dog")


def test_labelled_families() -> None:
    marked = [
        ("Run", 1, 0), ("dog", 2, 1), ("running", 3, 0), ("honk", 7, 2), ("rhinoceros", 7, 2), ("Dogs", 4, 1),
        ("12", 5, 3), ("12", 6, 3), ("honest", 7, 2), ("!", 8, 4), ("honestly", 9, 2),
    ]  # fmt: skip
    assert families([m[1] for m in marked], [m[0] for m in marked]) == [m[2] for m in marked]


def test_no_words() -> None:
    assert families([], []) == []


WORDS = ["dog", "dogs", "cat", "run", "runs", "hat", "1", "!"]


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(WORDS)), max_size=12))
def test_families_are_the_connected_components(mats: list[tuple[int, str]]) -> None:
    ids, words = [m[0] for m in mats], [m[1] for m in mats]
    found = families(ids, words)
    linked = [[a == b or stem(v) == stem(w) for b, w in mats] for a, v in mats]
    for k in range(len(mats)):
        linked = [[x or (linked[i][k] and linked[k][j]) for j, x in enumerate(row)] for i, row in enumerate(linked)]
    assert [[a == b for b in found] for a in found] == linked
    assert list(dict.fromkeys(found)) == list(range(len(set(found))))

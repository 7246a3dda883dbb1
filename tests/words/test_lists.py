from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from raylabel.demo.stdlib import documents
from raylabel.errors import BadInput
from raylabel.words.lists import load_lists, mates
from raylabel.words.segment import words
from tests.shared import STORIES, needs_shared

GOOD = {"animals": ["dog", "cat", "horse"], "marks": ["(", ")", "..."], "errors": ["ValueError", "don't", "été"]}
COVERED, OFTEN, LISTS = 8, 5, 20


def write(folder: Path, content: str | bytes) -> str:
    path = folder / "lists.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.fixture(scope="module")
def built_in() -> dict[str, list[str]]:
    return load_lists("built-in")


def test_a_file(tmp_path: Path) -> None:
    for text in (json.dumps(GOOD), "\ufeff" + json.dumps(GOOD, ensure_ascii=False)):
        assert load_lists(write(tmp_path, text)) == GOOD
    assert list(load_lists(write(tmp_path, json.dumps(GOOD)))) == list(GOOD), "in the file's order"


def test_casings_of_a_word_are_one(tmp_path: Path) -> None:
    path = write(tmp_path, '{"pets": ["Dog", "dog", "cat", "DOG", "cat", "hen"]}')
    assert load_lists(path) == {"pets": ["Dog", "cat", "hen"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ('["dog", "cat", "hen"]', "an object of lists"),
        ("{}", "an object of lists"),
        ("3", "an object of lists"),
        ('{"pets": "dog"}', "list 'pets' is not a list of strings"),
        ('{"pets": ["dog", "cat", 3]}', "list 'pets' is not a list of strings"),
        ('{"pets": {"dog": ["a", "b", "c"]}}', "list 'pets' is not a list of strings"),
        ('{"pets": []}', "list 'pets' has 0 distinct words"),
        ('{"pets": ["dog", "cat", "Dog"]}', "list 'pets' has 2 distinct words"),
        ('{"": ["dog", "cat", "hen"]}', "give every list a name"),
        ('{" ": ["dog", "cat", "hen"]}', "give every list a name"),
        ('{"pets": ["dog", "cat", "hen"], "pets": ["pig", "cow", "ox"]}', "'pets' is given twice"),
        ('{"pets": ["dog", "cat", "guinea pig"]}', "'guinea pig' is cut into 'guinea' 'pig'; split it"),
        ('{"pets": ["dog", "cat", "__init__"]}', "'__init__' is cut into"),
        ('{"pets": ["dog", "cat", ""]}', "'' is not a word"),
        ('{"pets": ["dog", "cat", " \\n"]}', "is not a word"),
        ('{"pets": ["dog", "cat", " hen"]}', "' hen' is not a word; write 'hen'"),
    ],
)
def test_wrong_files(content: str | bytes, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(BadInput) as caught:
        load_lists(path)
    line = str(caught.value)
    assert line.startswith("controls.lists: ") and path in line and said in line and "\n" not in line


@pytest.mark.parametrize("name", ["missing.json", ".", "built in", "a\0b"])
def test_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"controls\.lists: .*; give `built-in` or a JSON file"):
        load_lists(str(tmp_path / name))


def test_mates() -> None:
    found = mates({"pets": ["Dog", "cat", "hen"], "birds": ["hen", "owl", "swan"]})
    assert found["dog"] == {"cat", "hen"}
    assert found["hen"] == {"dog", "cat", "owl", "swan"}
    assert set(found) == {"dog", "cat", "hen", "owl", "swan"}
    assert mates({}) == {}


def test_the_built_in_lists_obey_the_rules(built_in: dict[str, list[str]], tmp_path: Path) -> None:
    assert len(built_in) >= 45
    assert load_lists(write(tmp_path, json.dumps(built_in))) == built_in
    for name, listed in built_in.items():
        assert 12 <= len(listed) <= 60, name
        assert all(words(word) == [word] for word in listed), name


def test_the_built_in_file_says_every_word_of_a_list_once(built_in: dict[str, list[str]]) -> None:
    path = Path(load_lists.__code__.co_filename).with_name("lists.json")
    assert json.loads(path.read_text(encoding="utf-8")) == built_in


def test_few_words_stand_in_two_built_in_lists(built_in: dict[str, list[str]]) -> None:
    count = Counter(word.casefold() for listed in built_in.values() for word in listed)
    assert sum(n > 1 for n in count.values()) <= 0.02 * len(count)


def test_the_built_in_lists_cover_the_standard_library(built_in: dict[str, list[str]]) -> None:
    texts: list[str] = []
    size = 0
    for _, text in documents():
        texts.append(text)
        size += len(text)
        if size > 1_200_000:
            break
    if size < 1_000_000:
        pytest.skip("this installation has no source text of its standard library")
    assert covered(built_in, texts) >= LISTS


@pytest.mark.shared
@needs_shared
def test_the_built_in_lists_cover_stories_and_encyclopedic_text(built_in: dict[str, list[str]]) -> None:
    assert covered(built_in, json.loads(STORIES.read_text(encoding="utf-8"))) >= LISTS
    folder = STORIES.parents[1] / "wikitext-2"
    assert covered(built_in, [(folder / f"{n}.txt").read_text(encoding="utf-8") for n in ("valid", "test")]) >= LISTS


def covered(lists: dict[str, list[str]], texts: Iterable[str]) -> int:
    """Lists with at least 8 words that occur 5 times or more in the texts."""
    count = Counter(word.casefold() for text in texts for word in words(text))
    return sum(sum(count[word.casefold()] >= OFTEN for word in listed) >= COVERED for listed in lists.values())

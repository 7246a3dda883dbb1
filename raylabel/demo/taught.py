"""What the built-in judge was taught: categories of words, and the concepts that are right for each word.

`categories()` reads `judge/words.txt` (its head says how) into `Category`s; `Taught` answers whether a concept is right for
a word: the word itself, or a name of a category that the word is in, without regard to case. A word of the same category is
not right, only near. A twentieth of the words, by a hash, is held out: in no lesson, only to measure with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from raylabel.words.lists import load_lists

WORDS = Path(__file__).parent / "judge" / "words.txt"
HELD_OUT = 0.05


@dataclass(frozen=True)
class Category:
    names: tuple[str, ...]
    """Single words, its own name first."""
    words: tuple[str, ...]
    label: str
    """What it is called in words, of one or more: `wild animals`."""
    is_taught: bool = True


def held_out(word: str) -> bool:
    """Whether a word is kept out of the lessons: a function of the word alone."""
    digest = hashlib.sha256(word.casefold().encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def categories(path: Path = WORDS) -> list[Category]:
    """Every category of the file, those that are only measured too."""
    lists = load_lists("built-in")
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        given, listed = line.removeprefix("-").split(" | ", 1)
        names: list[str] = []
        for name in given.split():
            names += [name[:-1], plural(name[:-1])] if name.endswith("+") else [name]
        name, _, more = listed.partition(";") if listed.startswith("@") else ("", "", listed)
        base = lists[name[1:].strip()] if name else []
        words = {word.casefold(): word for word in reversed([*base, *more.split()])}
        label = name[1:].strip() if name else plural(names[0])
        found.append(Category(tuple(dict.fromkeys(names)), tuple(reversed(words.values())), label, not line.startswith("-")))
    return found


def plural(name: str) -> str:
    """The regular plural of an English noun."""
    if name.endswith("y") and name[-2:-1] not in tuple("aeiou"):
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


class Taught:
    """Which concepts are right for which words."""

    def __init__(self, found: Sequence[Category] | None = None) -> None:
        self.categories = [c for c in (categories() if found is None else found) if c.is_taught]

    @cached_property
    def extension(self) -> dict[str, frozenset[str]]:
        """The words, casefolded, of each name and label, casefolded: those of all categories that carry it."""
        sets: dict[str, set[str]] = {}
        for category in self.categories:
            for name in (*category.names, category.label):
                sets.setdefault(name.casefold(), set()).update(word.casefold() for word in category.words)
        return {name: frozenset(words) for name, words in sets.items()}

    @cached_property
    def names(self) -> list[str]:
        """All single-word names, as written, each once."""
        return list({name.casefold(): name for c in self.categories for name in c.names}.values())

    @cached_property
    def words(self) -> list[str]:
        """All words of categories, as written, each once."""
        return list({word.casefold(): word for c in self.categories for word in c.words}.values())

    @cached_property
    def of_word(self) -> dict[str, list[Category]]:
        """The categories of each word, casefolded."""
        found: dict[str, list[Category]] = {}
        for category in self.categories:
            for word in category.words:
                found.setdefault(word.casefold(), []).append(category)
        return found

    def is_right(self, word: str, concept: str) -> bool:
        word, concept = word.casefold(), concept.casefold()
        return word == concept or word in self.extension.get(concept, ())

    def is_near(self, word: str, concept: str) -> bool:
        """Whether the concept is another word of a category that the word is in."""
        mates = {id(category) for category in self.of_word.get(concept.casefold(), ())}
        return any(id(category) in mates for category in self.of_word.get(word.casefold(), ()))

"""What can be said of a token by its characters and its place: traits with a name for people.

`traits()` are tests of a Peak, each with a phrase in the plural; the narrower ones come first. None of them knows what a
word means: kinds of words are named by their members (`gist`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from raylabel.words.peaks import Peak

MARKS = {
    ",": "commas", ".": "full stops", ";": "semicolons", ":": "colons", "?": "question marks", "!": "exclamation marks",
    "(": "opening parentheses", ")": "closing parentheses", "[": "opening square brackets", "]": "closing square brackets",
    "{": "opening braces", "}": "closing braces", "-": "hyphens", "–": "dashes", "—": "dashes", "...": "ellipses",
    "…": "ellipses", "/": "slashes", "\\": "backslashes", "%": "percent signs", "$": "dollar signs", "#": "hash signs",
    "@": "at signs", "&": "ampersands", "*": "asterisks", "+": "plus signs", "=": "equals signs", "<": "less-than signs",
    ">": "greater-than signs", "_": "underscores", "|": "vertical bars", "'": "single quotation marks", "’": "apostrophes",
    '"': "double quotation marks", "“": "opening quotation marks", "”": "closing quotation marks",
}  # fmt: skip
SCRIPTS = {
    "CYRILLIC": "Cyrillic", "GREEK": "Greek", "CJK": "Chinese or Japanese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese",
    "HANGUL": "Korean", "ARABIC": "Arabic", "HEBREW": "Hebrew", "DEVANAGARI": "Devanagari", "THAI": "Thai",
}  # fmt: skip
_CAMEL = re.compile(r"[a-z][A-Z]")
_ROMAN = re.compile(r"[IVXLCDM]{2,}$")


class Trait(NamedTuple):
    """A test of a Peak. `place`: about where it stands and not what it is."""

    phrase: str
    test: Callable[[Peak], bool]
    place: bool = False


def _all(text: str, test: Callable[[str], bool]) -> bool:
    return bool(text) and all(test(c) for c in text)


def _script(name: str) -> Callable[[Peak], bool]:
    return lambda p: not p.word.isascii() and any(_name(c).startswith(name) for c in p.word)


@cache
def _name(character: str) -> str:
    return unicodedata.name(character, "")


def _category(*wanted: str) -> Callable[[Peak], bool]:
    return lambda p: _all(p.word, lambda c: unicodedata.category(c) in wanted)


def _in(marks: str) -> Callable[[Peak], bool]:
    return lambda p: _all(p.word, lambda c: c in marks)


def _blank(p: Peak) -> bool:
    return not p.word.strip()


def _line(p: Peak) -> bool:
    return "\n" in p.before[len(p.before.rstrip()) :] or (p.opens and not p.before.strip())


def _words(p: Peak) -> bool:
    return any(c.isalpha() for c in p.word)


@cache
def traits() -> tuple[Trait, ...]:
    """The traits of what a token is, then those of where it stands; narrower ones first."""
    return (
        Trait("line breaks", lambda p: _blank(p) and "\n" in p.token),
        Trait("indentation", lambda p: _blank(p) and len(p.token) > 1),
        Trait("white space", _blank),
        *(Trait(f"{name} words", _script(script)) for script, name in SCRIPTS.items()),
        Trait("years", lambda p: bool(re.fullmatch(r"1[4-9]\d\d|20\d\d", p.word))),
        Trait("single digits", lambda p: _all(p.word, str.isdecimal) and len(p.word) == 1),
        Trait("ordinal numbers", lambda p: bool(re.fullmatch(r"\d*(1st|2nd|3rd|\dth)", p.word))),
        Trait("numbers in digits", lambda p: _all(p.word, str.isdecimal)),
        Trait("letters mixed with digits", lambda p: _words(p) and any(c.isdigit() for c in p.word)),
        Trait("opening brackets", _in("([{")),
        Trait("closing brackets", _in(")]}")),
        Trait("brackets", _in("()[]{}")),
        Trait("quotation marks", _in("\"'“”‘’«»`")),
        Trait("marks that end a sentence", _in(".?!…")),
        Trait("dashes and hyphens", _in("-–—")),
        Trait("operators", lambda p: _in("=+-*/<>%&|^~")(p) and len(p.word) > 0),
        Trait("currency signs", _category("Sc")),
        Trait("symbols and emoji", _category("So", "Sk")),
        Trait("punctuation marks", lambda p: _all(p.word, lambda c: unicodedata.category(c)[0] in "PS")),
        Trait("attributes after a dot", lambda p: _words(p) and bool(re.search(r"[^\s.]\.$", p.before))),
        Trait("names before an opening parenthesis", lambda p: _words(p) and p.after.startswith("(")),
        Trait("parts of names with underscores", lambda p: p.before.endswith("_") or p.after.startswith("_")),
        Trait("camelCase names", lambda p: bool(_CAMEL.search(p.word))),
        Trait("Roman numerals", lambda p: bool(_ROMAN.match(p.word))),
        Trait("single letters", lambda p: len(p.word) == 1 and p.word.isalpha()),
        Trait("words in capitals", lambda p: _words(p) and p.word.isupper() and len(p.word) > 1),
        Trait("capitalised words", lambda p: p.word[:1].isupper() and not p.word.isupper()),
        Trait("words with accents", lambda p: _words(p) and not p.word.replace("’", "'").isascii()),
        Trait("starting a text", lambda p: p.opens, True),
        Trait("starting a line", _line, True),
        Trait("starting a sentence", lambda p: bool(re.search(r"[.!?][\"'”’)]*\s+$", p.before)), True),
        Trait("ending a line", lambda p: p.after[: len(p.after) - len(p.after.lstrip())].count("\n") > 0, True),
    )

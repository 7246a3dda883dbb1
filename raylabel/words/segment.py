"""Words by characters: where the words of a text are, and which word a token belongs to.

A word is a run of letters and digits with inner apostrophes (`don't`), or a run of one and the same punctuation
character (`...`, `(`). Letters carry their combining marks. CamelCase is one word. Underscores between letters or
digits only separate words (`get_word_vector`); any other run of them is punctuation. White space is never a word.
All positions are characters of a `str`, half-open. Scripts that are written without spaces give long words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

Span = tuple[int, int]


class Phrase(NamedTuple):
    """A text cut around a token: `text`, the `spans` of its tokens in it, and which of them is the MAT."""

    text: str
    spans: list[Span]
    mat: int


@cache
def _pattern() -> re.Pattern[str]:
    marks = "".join(c for c in map(chr, range(0x300, 0x1FFFF)) if unicodedata.category(c)[0] == "M")
    run = rf"[^\W_]+(?:[{re.escape(marks)}][^\W_]*)*"
    return re.compile(rf"{run}(?:['’]{run})*|([^\w\s])\1*|(?<!\w)_+|_+(?!\w)")


def spans(text: str) -> list[Span]:
    """The words of `text`, in order."""
    return [match.span() for match in _pattern().finditer(text)]


def words(text: str) -> list[str]:
    """The words of `text` as strings."""
    return [match.group() for match in _pattern().finditer(text)]


def token_spans(tokens: Sequence[str]) -> list[Span]:
    """Where each token lies in the text that the tokens concatenate to."""
    ends = list(accumulate(map(len, tokens)))
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def without_special(tokens: Sequence[str], token_ids: Sequence[int], special_ids: Collection[int]) -> list[str]:
    """`tokens` with an empty string for each special token, whose recorded string is its name and not text."""
    return ["" if i in special_ids else t for t, i in zip(tokens, token_ids, strict=True)]


def mat_word(text: str, start: int, end: int) -> Span:
    """The word of `text` that the token at [start, end) belongs to: the one it overlaps most, the last one at a tie.

    A token that touches no word (white space, a separating underscore) gives its own span without surrounding white
    space, or as it is if there is nothing else. An empty token (part of a character) belongs to the word around it.
    """
    first, last = (start, end) if end > start else (max(start - 1, 0), min(start + 1, len(text)))
    low, high = first, last
    while low > 0 and not text[low - 1].isspace():
        low -= 1
    while high < len(text) and not text[high].isspace():
        high += 1
    best, most = None, 0
    for match in _pattern().finditer(text[low:high]):
        s, e = match.start() + low, match.end() + low
        overlap = min(e, last) - max(s, first)
        if overlap > 0 and overlap >= most:
            best, most = (s, e), overlap
    if best is not None:
        return best
    token = text[start:end]
    bare = token.strip()
    if not bare:
        return start, end
    offset = start + len(token) - len(token.lstrip())
    return offset, offset + len(bare)


def phrase(tokens: Sequence[str], position: int, window: int) -> Phrase:
    """The token at `position` with up to `window` tokens before and after it, as one text."""
    first = max(position - window, 0)
    kept = tokens[first : position + window + 1]
    return Phrase("".join(kept), token_spans(kept), position - first)

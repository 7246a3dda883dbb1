"""Where in a text a token stands, as a labeller looks at it.

`peak(tokens, position, first)` describes a token by its word and its surroundings; the same description of other tokens
of the same texts says what is ordinary there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from raylabel.words.segment import mat_word

SEEN = 240
"""Characters looked at on each side: a word and what it stands behind."""
_LAST = re.compile(r"(\w+(?:['’]\w+)*|[^\w\s])[ \t]*$")


class Peak(NamedTuple):
    """A token in a text.

    Attributes:
        token: its characters; `word`: the word it belongs to, `before`, `after`: what stands around the word.
        inside: how many characters of the word stand before the token (a leading space does not count).
        opens: nothing at all stands before the word in the sample.
    """

    token: str
    word: str
    before: str
    after: str
    inside: int
    opens: bool

    @property
    def left(self) -> str:
        """The word or mark before, in lower case; empty at the start of a line."""
        found = _LAST.search(self.before)
        return found.group(1).casefold() if found else ""


def peak(tokens: Sequence[str], position: int, first: bool) -> Peak:
    """The token at `position`; special tokens are empty strings. `first`: the tokens begin where the sample does."""
    text = "".join(tokens)
    start = sum(map(len, tokens[:position]))
    token = tokens[position]
    low, high = mat_word(text, start, start + len(token))
    bare = start + len(token) - len(token.lstrip()) if token.strip() else start
    return Peak(token, text[low:high], text[max(0, low - SEEN) : low], text[high : high + SEEN], max(0, bare - low),
                first and not text[:low].strip())  # fmt: skip

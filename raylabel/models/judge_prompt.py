"""The judge's prompt as text: a template's places, the chat frame around it, and the tokens that mean yes and no."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from raylabel.errors import BadInput

TEMPLATE = (
    "Answer the following question with either 'yes' or 'no'. Using the following piece of text for context |text|, "
    "does the word |token| represent the concept |concept|? Answer:"
)
_PLACES = re.compile(r"\|(text|token|concept)\|")
_CUE = re.compile(r"\s+(\S+:)\s*$")


class Example(NamedTuple):
    text: str
    word: str
    """The word asked about, as it stands in the text, without a space before it."""


def frame(template: str, chat: Any = None) -> list[str]:
    """The prompt as [text, place, text, …, `concept`, text]; places are `text`, `token` and `concept`.

    With the tokenizer `chat`, the template is the user's turn but for a last word that ends with a colon, which begins
    the assistant's.
    """
    pieces = _PLACES.split(template)
    for place in ("text", "token", "concept"):
        if place not in pieces[1::2]:
            raise BadInput(f"optimize.template: it has no |{place}|; it needs |text|, |token| and, behind both, |concept|")
    if pieces[1::2].index("concept") != len(pieces) // 2 - 1:
        raise BadInput("optimize.template: |concept| must stand once, behind |text| and |token|: what is before it is read once")
    if chat is None:
        return pieces
    found = _CUE.search(template)
    question, cue = (template[: found.start()], found[1]) if found and "|concept|" not in found[1] else (template, "")
    try:
        rendered = chat.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:
        raise BadInput(f"optimize.judge: its chat template takes no user's turn ({type(error).__name__})") from error
    return frame(rendered + cue)


def answer_ids(
    following: Callable[[str], list[int]], special: Collection[int], spaced: bool, name: str
) -> tuple[list[int], list[int]]:  # fmt: skip
    """(ids of yes, ids of no): the first tokens of their forms with and without a space, in three cases.

    Args:
        following: ids of a text behind the prompt.
        spaced: the answer is expected with a space before it; this form is the first of each set.

    A special token, and one that forms of both begin with, tells nothing and is left out; where the expected form is
    among them, the judge is refused.
    """
    spaces = (" ", "") if spaced else ("", " ")
    sets = [
        list(dict.fromkeys((following(space + form) or [-1])[0] for space in spaces for form in forms))
        for forms in (("yes", "Yes", "YES"), ("no", "No", "NO"))
    ]
    useless = (set(sets[0]) & set(sets[1])) | set(special) | {-1}
    for word, ids in zip(("yes", "no"), sets, strict=True):
        if ids[0] in useless:
            why = "has no token" if ids[0] in special or ids[0] == -1 else "begins yes and no with one token, so it has none"
            raise BadInput(f"optimize.judge: the tokenizer of {name} {why} that stands for {word!r} alone; use another judge")
    yes, no = ([i for i in ids if i not in useless] for ids in sets)
    return yes, no


def end_of(text: str) -> str:
    """The last word of a text with what follows it."""
    found = re.search(r"\S*\s*$", text)
    return found[0] if found else ""

"""Word lists: categories of words, {name: [words]}, from which units of known meaning are planted.

`load_lists("built-in")` gives those of `lists.json`, of everyday English and of Python source; any other source is the
path of a JSON file. A word is a word as in `segment`, in the casing it has in running text. The built-in lists leave
out words that are commoner in another sense (`May`, `sat`), and few of their words stand in two lists. BadInput names
`controls.lists`, the file and the list.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from raylabel.errors import BadInput
from raylabel.words.segment import words

BUILT_IN = "built-in"
LEAST = 3


def load_lists(source: str) -> dict[str, list[str]]:
    """The lists of a source in the file's order, each word once a list (without regard to case, its first casing).

    BadInput for a missing file, one that is not an object of lists of strings, no list at all, a name without a
    letter or digit, a name given twice, fewer than 3 distinct words, and a string that is not exactly one word.
    """
    if source == BUILT_IN:
        text = resources.files("raylabel.words").joinpath("lists.json").read_text(encoding="utf-8")
    else:
        text = _read(source)
    try:
        tree = json.loads(text, object_pairs_hook=lambda pairs: _object(source, pairs))
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:
        at = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
        raise BadInput(f"controls.lists: {source} is not JSON{at}; give a JSON file {{name: [words]}}") from None
    if not isinstance(tree, dict) or not tree:
        raise BadInput(f"controls.lists: {source}: expected an object of lists of words, {{name: [words]}}")
    return {name: _list(source, name, found) for name, found in tree.items()}


def mates(lists: dict[str, list[str]]) -> dict[str, set[str]]:
    """Each word of the lists, casefolded, with all other words, casefolded, that share a list with it."""
    found: dict[str, set[str]] = {}
    for listed in lists.values():
        folded = {word.casefold() for word in listed}
        for word in folded:
            found.setdefault(word, set()).update(folded - {word})
    return found


def _read(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"controls.lists: no such file: {source}; give `{BUILT_IN}` or a JSON file {{name: [words]}}") from None
    except UnicodeDecodeError:
        raise BadInput(f"controls.lists: {source} is not UTF-8 text; give a JSON file {{name: [words]}}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"controls.lists: cannot read {source}: {why}; give `{BUILT_IN}` or a JSON file") from None


def _object(source: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(f"controls.lists: {source}: {twice!r} is given twice; merge the two or rename one")
    return tree


def _list(source: str, name: str, found: Any) -> list[str]:
    where = f"controls.lists: {source}: "
    if not any(c.isalnum() for c in name):
        raise BadInput(f"{where}a list is named {name!r}; give every list a name")
    where += f"list {name!r}"
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise BadInput(f"{where} is not a list of strings; write [\"one\", \"two\", \"three\"]")
    for word in found:
        cut = words(word)
        if cut != [word]:
            why = f"is cut into {' '.join(map(repr, cut))}" if len(cut) > 1 else "is not a word"
            clean = cut[0] if len(cut) == 1 else ""
            mend = f"write {clean!r}" if clean else "split it or leave it out"
            raise BadInput(f"{where}: {word!r} {why}; {mend}")
    distinct: dict[str, str] = {}
    for word in found:
        distinct.setdefault(word.casefold(), word)
    if len(distinct) < LEAST:
        raise BadInput(f"{where} has {len(distinct)} distinct words; give at least {LEAST}")
    return list(distinct.values())

"""What counts as an answer: the object asked for, out of what a model wrote; everything else is rejected with a word.

`structured(text, schema)` gives an instance of a pydantic model and raises Rejected for reasoning text without an answer,
refusals, JSON that is none, and objects that the schema's own checks do not take. `strict_schema` is the schema as servers
enforce it: all keys required, no others.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)

_THOUGHT = re.compile(r"<(think|thinking|reasoning|analysis)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_OPEN_THOUGHT = re.compile(r"<(think|thinking|reasoning|analysis)>", re.IGNORECASE)
_REFUSAL = re.compile(
    r"^\W*(i['’]?m (really )?sorry|sorry,|i (can(no|['’])t|am unable|am not able|won['’]t)|as an ai|i must decline|"
    r"(unfortunately|i apologi[sz]e),? )",
    re.IGNORECASE,
)


class Rejected(ValueError):
    """Not an answer; the text says what is wrong with it, so that the model can mend it."""


def refuses(text: str) -> bool:
    """Whether a text begins as refusals do."""
    return bool(_REFUSAL.match(text.strip()))


def bare(text: str) -> str:
    """`text` without closed blocks of reasoning; Rejected where a block never ends."""
    kept = _THOUGHT.sub("", text)
    # Some servers swallow the opening tag.
    for name in ("</think>", "</thinking>", "</reasoning>"):
        kept = kept.rsplit(name, 1)[-1]
    if _OPEN_THOUGHT.search(kept):
        raise Rejected("only reasoning and no answer")
    return kept.strip()


def structured(text: str, schema: type[M]) -> M:
    """The object in `text`; Rejected says why there is none."""
    kept = bare(text)
    if not kept:
        raise Rejected("an empty answer" if not text.strip() else "only reasoning and no answer")
    try:
        return schema.model_validate(_object(kept))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = str(first["msg"]).removeprefix("Value error, ")
        raise Rejected(f"wrong schema: {where + ': ' if where else ''}{what}") from None


def _object(text: str) -> Any:
    """The outermost JSON object in `text`, whatever stands around it (code fences, a sentence)."""
    start = text.find("{")
    if start < 0:
        raise Rejected("a refusal" if refuses(text) else "no JSON object in the answer")
    try:
        found, _ = json.JSONDecoder().raw_decode(text[start:])
    except (ValueError, RecursionError):
        raise Rejected("JSON that is cut short or not valid") from None
    return found


def strict_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a pydantic model with every key required and none besides, and without what only explains."""
    found: dict[str, Any] = _strict(schema.model_json_schema())
    return found


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(part) for part in node]
    if not isinstance(node, dict):
        return node
    out = {k: _strict(v) for k, v in node.items() if k not in ("title", "description", "default") or not isinstance(v, str)}
    if isinstance(out.get("properties"), dict):
        out["properties"] = {name: _strict(part) for name, part in node["properties"].items()}
        out |= {"additionalProperties": False, "required": list(out["properties"])}
        out.pop("default", None)
    return out

"""Answers on disk by content: model, messages and parameters, and nothing else, decide where an answer lies.

`RUN/_llm/answers/ab/SHA256.json` holds one answer with what it cost. A file is written whole or not at all, on a disk and
on an object store alike, so that any number of workers may write at once; the same question asked twice at the same time
leaves one of its two answers.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from raylabel.store.files import Files

FOLDER = "_llm/answers"


def key_of(question: dict[str, Any]) -> str:
    """The sha256 of a question as hex: model, messages, parameters as plain values."""
    text = json.dumps(question, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Cache:
    """The answers of a run."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def get(self, key: str) -> dict[str, Any] | None:
        """What was answered, None if it was not asked or what lies there is no answer."""
        try:
            found = json.loads(self._files.read(self._name(key)))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("text"), str) else None

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Keeps an answer."""
        self._files.write(self._name(key), json.dumps(answer, ensure_ascii=True).encode())

    @staticmethod
    def _name(key: str) -> str:
        return f"{FOLDER}/{key[:2]}/{key}.json"

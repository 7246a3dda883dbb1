"""What labels and their tests cost in tokens, and how sure the scores are for that.

Units of known meaning (the word lists that planted units are made of) over WikiText-2 in windows of GPT-2's tokens, with
the defaults: 10 exemplars shown to the explainer, 20 active and 20 silent windows of 32 tokens a scorer, all of them in
one request with three other units' labels beside the own. Prompt tokens are counted by GPT-2's tokenizer in what is sent, plus
FRAME a message. The answers come from a model that errs on purpose in one of eight windows; the interval's width is that
of the corrected score. Peers' figure (delphi at its own defaults: 41 requests a unit) is an estimate from its prompts.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from raylabel.llm.answers import strict_schema
from raylabel.llm.client import Answer
from raylabel.sections import DescribeConfig, ScoreConfig
from raylabel.stages import score_llm
from raylabel.stages.describe import question, seen
from raylabel.stages.score import Labelled, Trial, other_labels, trial
from raylabel.stages.score_rows import row_of
from raylabel.words.lists import load_lists
from raylabel.words.segment import spans
from tests.benchmarks.measuring import Settings
from tests.benchmarks.report import Row
from tests.shared import SHARED

GOAL, PEERS = 4000, 37_000
FRAME = 8
"""Tokens of a message beyond its text."""
BODY, TOPS, ERRORS = 128, 20, 8
LEAST = 60
"""Occurrences of a list's words in the text, at least."""


class Reader:
    """In place of the client: counts what is asked and answers by word lists, wrongly once in ERRORS windows."""

    def __init__(self, tokenizer: Tokenizer, lists: dict[str, list[str]]) -> None:
        self.tokenizer, self.lists, self.tokens = tokenizer, lists, 0

    def count(self, messages: list[dict[str, str]], schema: Any = None) -> int:
        """Prompt tokens of a request."""
        given = [*(m["content"] for m in messages), *([json.dumps(strict_schema(schema))] if schema else [])]
        return sum(len(self.tokenizer.encode(text).ids) + FRAME for text in given)

    async def ask(self, messages: list[dict[str, str]], *, schema: Any, **_: Any) -> Answer:
        """Answers as `Fits`."""
        self.tokens += self.count(messages, schema)
        text = messages[1]["content"]
        labels = dict(re.findall(r"^([A-J])\. (.*)$", text, re.MULTILINE))
        found = []
        for n, shown in re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE):
            held = re.findall(r"<<(.*?)>>", shown) or [shown[a:b] for a, b in spans(shown)]
            every = all if "<<" in shown else any
            wrong = hash(len(shown) * 31 + int(n)) % ERRORS == 0
            fit = [c for c, name in labels.items() if every(w.casefold() in self.lists[name] for w in held) != wrong]
            found.append(f"{n}:{''.join(fit) or '-'}")
        return Answer("", schema(answers=found), 0, 0, None, False, None)


def tokens(settings: Settings) -> Iterator[Row]:
    """Prompt tokens a unit, and the width of the intervals that they buy."""
    tokenizer = Tokenizer.from_file(str(SHARED / "gpt2-tokenizer" / "tokenizer.json"))
    lists = {name: [w.casefold() for w in words] for name, words in load_lists("built-in").items()}
    units = _units(tokenizer, lists, 4 if settings.quick else 40)
    if len(units) < 4:
        raise RuntimeError("too few lists have words enough in the text")
    labels = {found.unit: name for found, name, _ in units}
    sizes, widths, counts = [], dict[str, list[float]](), []
    for found, name, rows in units:
        client = Reader(tokenizer, lists)
        asking = score_llm.Asking(client, "packed", 0)
        item = Labelled(found, "x", name, other_labels(found.unit, labels))
        for scorer in ("detection", "fuzzing"):
            got = asyncio.run(score_llm._judge(asking, item, scorer))
            made = row_of(item, scorer, got, 0, 0)  # type: ignore[arg-type]
            if made["low"] is not None:
                widths.setdefault(scorer, []).append(made["high"] - made["low"])
            counts.append(len(got.windows))  # type: ignore[union-attr]
        shown = seen(rows, {"families": [], "kind": "meaning"}, [], 5, lambda words, phrases: _apart(words, phrases))
        from raylabel.llm.prompts import Label

        asked = question(shown, "phrases", DescribeConfig().exemplars)  # type: ignore[arg-type]
        sizes.append(client.tokens + client.count(asked.messages, Label))
    windows = f"{statistics.median(counts):.0f} windows of {ScoreConfig().window} GPT-2 tokens a scorer"
    how = f"{len(units)} units of WikiText-2, {windows}"
    yield Row(
        "LLM prompt tokens a unit: label, detection, fuzzing", f"delphi at its defaults, about {PEERS:,}",
        statistics.median(sizes), min(sizes), max(sizes), len(sizes), "tokens", how, goal=GOAL, at_most=True,
    )  # fmt: skip
    for scorer, found_widths in widths.items():
        yield Row(
            f"width of the 95 % interval of a corrected {scorer} score", "a score without doubt",
            statistics.median(found_widths), min(found_widths), max(found_widths), len(found_widths), "of 2 at most",
            f"{how}; one answer in {ERRORS} wrong",
        )  # fmt: skip


def _apart(words: list[str], phrases: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((len(words), 4), np.float32), np.zeros((len(phrases), 4), np.float32)


def _units(
    tokenizer: Tokenizer, lists: dict[str, list[str]], most: int
) -> list[tuple[Trial, str, list[dict[str, Any]]]]:  # fmt: skip
    text = (SHARED / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
    documents = re.split(r"(?m)^ = [^=].*[^=] = $", text)
    samples = []
    for number, document in enumerate(documents):
        encoded = tokenizer.encode(document.strip())
        for at in range(0, len(encoded.ids) - BODY, BODY):
            samples.append(_sample(number, document.strip(), encoded.offsets[at : at + BODY], encoded.ids[at : at + BODY]))
    found = []
    for i, (name, words) in enumerate(lists.items()):
        rows = _rows(samples, set(words))
        if rows is not None:
            unit = (None, i, 1)
            found.append((trial(unit, rows, 1.0, size=ScoreConfig().window, negatives=ScoreConfig().negatives), name, rows))
        if len(found) == most:
            break
    return found


def _sample(document: int, text: str, offsets: list[tuple[int, int]], ids: list[int]) -> dict[str, Any]:
    """What rows of a sample have in common, and its tokens by word."""
    first, words = offsets[0][0], dict[str, list[int]]()
    at = 0
    for low, high in spans(text[first : offsets[-1][1]]):
        low, high = low + first, high + first
        while offsets[at][1] <= low:
            at += 1
        inside = [t for t in range(at, min(at + 12, len(offsets))) if offsets[t][0] < high]
        words.setdefault(text[low:high].casefold(), []).extend(inside)
    return {
        "document": document, "split": ("explain", "score")[document % 2], "start": 0, "mat_ties": 1, "token_ids": ids,
        "tokens": [text[a:b] for a, b in offsets], "words": words,
    }  # fmt: skip


def _rows(samples: list[Any], words: set[str]) -> list[dict[str, Any]] | None:
    """Exemplars of a unit that fires on words, half of the documents to explain."""
    draw = np.random.default_rng(0)
    firing: dict[str, list[dict[str, Any]]] = {"explain": [], "score": []}
    silent: dict[str, list[dict[str, Any]]] = {"explain": [], "score": []}
    for number in draw.permutation(len(samples)).tolist():
        sample = samples[number]
        split, values = sample["split"], [0.0] * BODY
        for word in words & sample["words"].keys():
            for t in sample["words"][word]:
                values[t] = 0.9
        at = int(np.argmax(values))
        row = {**sample, "sample": number, "position": at, "activation": values[at], "activations": values}
        (firing if values[at] else silent)[split].append(row)
    if min(len(firing["explain"]), len(firing["score"])) < LEAST // 3:
        return None
    found = []
    for split, top in (("explain", TOPS), ("score", TOPS // 2)):
        chosen = [("top", firing[split][:top]), ("quantile", firing[split][top : top + 10]), ("random", silent[split][:20])]
        found += [{**row, "sampling": kind, "rank": rank} for kind, rows in chosen for rank, row in enumerate(rows)]
    return found

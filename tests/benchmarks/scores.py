"""What labels and their tests cost in tokens, and how sure the scores are for that.

Units of known meaning (the word lists that planted units are made of) over WikiText-2 in windows of GPT-2's tokens, with
the defaults: 10 exemplars shown to the explainer, 20 active and 20 silent windows of 32 tokens a scorer, all of them in
one request with three other units' labels beside the own. Prompt tokens are counted by GPT-2's tokenizer in what is sent, plus
FRAME a message. The answers come from a model that errs on purpose in one of eight windows; the interval's width is that
of the corrected score. Peers' figure (delphi at its own defaults: 41 requests a unit) is an estimate from its prompts.

`labels`: whether the built-in judge tells true labels from others', over units planted in the built-in corpus: under the names
of their lists, which the judge was taught, and under what `describe` makes of their exemplars without any language model.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from raylabel.config import RunConfig, build_config
from raylabel.engine.pipeline import run_pipeline
from raylabel.llm.answers import strict_schema
from raylabel.llm.client import Answer
from raylabel.sections import DescribeConfig, ScoreConfig
from raylabel.stages import score_llm
from raylabel.stages.describe import question, seen
from raylabel.stages.planting import from_json
from raylabel.stages.score import Labelled, Trial, other_labels, trial
from raylabel.stages.score import number as drawn
from raylabel.stages.score_local import answers
from raylabel.stages.score_rows import of_words, row_of
from raylabel.stages.score_stage import Scorer
from raylabel.stages.textual import PLANTED
from raylabel.store.rundir import RunDir
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


def labels(settings: Settings) -> Iterator[Row]:
    """True labels against other units' by the built-in judge."""
    out = settings.folder / "labels"
    tokens, planted = (60_000, 18) if settings.quick else (350_000, 108)
    run_pipeline(build_config({
        "subject": {"model": "demo", "context": 64, "device": settings.device, "layers": [1], "neurons": [0, 4]},
        "exemplars": {"corpus": {"path": "stdlib", "tokens": tokens}}, "controls": {"decoys": 16, "planted": planted},
        "verify": {"synonyms": 2, "max_variants": 40}, "run": {"out": str(out), "address": "inline", "max_failures": 1.0,
                                                               "stages": ["tokenize", "scan", "identify", "verify", "describe"]},
    }))  # fmt: skip
    yield from separation(RunDir(str(out)))
    shutil.rmtree(out)


def separation(run: RunDir, most: int = 108) -> Iterator[Row]:
    """AUROC of corrected scores of true labels against those of wrong ones, with its standard error (Hanley, McNeil 1982)."""
    config = RunConfig.model_validate(run.config)
    scorer = Scorer(run, config)
    plants = {layer: {p.neuron: p for p in found if p.control == PLANTED}
              for layer, found in from_json(json.loads(run.files.read("planted.json"))).items()}  # fmt: skip
    (layer, known), *_ = plants.items()
    # A unit that fires on one word, or behind one, has no list's name.
    listed = {n: p for n, p in known.items() if n < most and p.lists and p.difficulty != "two lists"}
    named = {(PLANTED, n, 1): p.lists[0] for n, p in listed.items()}
    written = run.controls.table("labels", layer).to_pylist()
    built_in = {(PLANTED, r["neuron"], 1): r["label"] for r in written if r["control"] == PLANTED and r["neuron"] in listed}
    trials = scorer.trials(run.controls, layer, (0, max(known) + 1), set(named))
    items: list[Labelled] = []
    for what, true in (("names of their lists", named), ("built-in labels", built_in)):
        units = [unit for unit in trials if unit in true]
        for unit in units:
            lists = set(listed[unit[1]].lists)
            # What is true of a unit of the same list is no wrong label.
            apart = {u: true[u] for u in units if not lists & set(listed[u[1]].lists) and true[u] != true[unit]}
            wrong = list(apart.values())[drawn(0, unit, what) % len(apart)]
            for right, label in ((True, true[unit]), (False, wrong)):
                items.append(Labelled(trials[unit], f"{what}/{right}", label, other_labels(unit, {**apart, unit: label})))
    # All at once: a text is read once.
    found = answers(scorer.judge, [(item.trial, item.labels) for item in items])
    by: dict[str, list[float]] = {}
    for item, (got, _) in zip(items, found, strict=True):
        by.setdefault(item.source, []).append(row_of(item, "judge", of_words(item, got), 0, layer)["corrected"] or 0.0)
    for what in ("names of their lists", "built-in labels"):
        scores = by[f"{what}/True"], by[f"{what}/False"]
        n = len(scores[0])
        value = float((np.sign(np.subtract.outer(*scores)) + 1).mean() / 2)
        q = value / (2 - value), 2 * value**2 / (1 + value)
        spread = (max(value * (1 - value) + (n - 1) * sum(x - value**2 for x in q), 0.0) / n**2) ** 0.5
        mean, others = (statistics.fmean(found) for found in scores)
        yield Row(
            f"true against other labels of planted units, built-in judge: {what}", "0.5, no difference", value,
            value - spread, min(value + spread, 1.0), n, "AUROC",
            f"{n} units of layer {layer}, mean corrected score {mean:.2f} and {others:.2f}; one standard error either way",
            goal=0.95,
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

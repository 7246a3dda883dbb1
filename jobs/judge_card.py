"""The built-in judge's model card: what it is, what it was taught, and what was measured on its stored weights."""

from __future__ import annotations

import argparse
import math
import platform
from typing import Any

import judge_measure

from raylabel.demo.taught import Taught
from raylabel.models.judge import Judge

CARD = """---
license: mit
language: en
library_name: transformers
tags: [interpretability, judge]
---

# raylabel's built-in judge

A small Llama that answers one question with ` yes` or ` no`: does this word, in this text, represent this concept? It is the
`demo` judge of raylabel's `optimize` and `score`: small enough to be carried in the package, taught what `words.txt` beside it
says and nothing else. It is no language model: it writes no text and knows no word that it was not taught.

| | |
|---|---|
| architecture | Llama of transformers, {parameters:,} parameters: {layers} layers of width {width}, 1,024 positions |
| size | {megabytes:.1f} MB, weights fp16, computed in fp32 |
| tokenizer | whole words, else the longest pieces, {vocabulary:,} entries, {singles:,} whole words; digits are single |
| prompt | `raylabel.models.judge_prompt.TEMPLATE`; no other was taught |
| taught | {categories} categories, {words:,} words, {names} names (`raylabel.demo.taught`); every 20th word held out |
| texts | sentences of templates, windows of the standard library of CPython {python} that end behind the word, mere words |
| training | {questions:,} questions in {steps:,} steps, {minutes:.0f} minutes of wall clock on {threads} thread(s) |
| weights of | {averaged} |
| temperature | {temperature:.2f}, fitted on lessons drawn anew, folded into the last norm |

What is right: a concept that is the word itself, a name of a category that the word is in, or a wider name (`mammal` and
`animal` for `cat`); another word of the same category (`dog` for `cat`) is taught as right by a fifth; all else is wrong.
Names may come in plural, as `words for animals`, as a union (`animal or tool`), or as the category's label (`wild animals`).

## Measured, on the stored weights

Half the questions are right, half of the wrong ones are near (but for the rows that are all no). Accuracy at even odds.

| what | n | accuracy | of yes | of no | AUROC | calibration error |
|---|---|---|---|---|---|---|
{table}

## Where it is out of its depth

- Words and concepts that it was not taught: see the rows above. It tends to no, and a low score then says nothing.
- Texts far longer than a few sentences: it says yes more readily (third row).
- Which sense a word has in its text: it goes by the word. Text tells it next to nothing.
- Concepts that are no names: sentences, descriptions, spelling, position, style.
- Other prompts and languages.

To make one as good: `python jobs/train_demo_judge.py --seed {seed}`; threads and processor decide the last bits.
The weights and words are MIT-licensed. The standard library's text, under the PSF licence, is not part of this folder.
"""


def card(judge: Judge, taught: Taught, held: list[str], made: dict[str, Any], options: argparse.Namespace) -> str:
    """The card as Markdown.

    Args:
        held: texts that no lesson had.
        made: `questions`, `seconds`, `steps` and `temperature` of the training.
    """
    measured = judge_measure.figures(judge, taught, held)
    table = [
        f"| {what} | {row['n']:,} | {row['accuracy']:.3f} | " + " | ".join(
            "–" if math.isnan(row[key]) or (key == "auroc" and math.isnan(row["yes"])) else f"{row[key]:.3f}"
            for key in ("yes", "no", "auroc", "calibration")
        ) + " |"
        for what, row in measured.items()
    ]  # fmt: skip
    size = sum(file.stat().st_size for file in options.out.iterdir())
    return CARD.format(
        parameters=judge.model.num_parameters(), layers=options.layers, width=options.width, megabytes=size / 1e6,
        vocabulary=len(judge.tokenizer), singles=len(judge.words.texts), categories=len(taught.categories),
        words=len(taught.words), names=len(taught.names), python=platform.python_version(), steps=made["steps"][-1],
        minutes=made["seconds"] / 60, questions=made["questions"], threads=options.threads, temperature=made["temperature"],
        table="\n".join(table), seed=options.seed,
        averaged=f"the mean of steps {', '.join(map(str, made['steps']))}" if made["steps"][1:] else "the last step",
    )  # fmt: skip

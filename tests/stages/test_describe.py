"""describe, from planted peaks to labels; what an explainer is shown, and what is refused of its answers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from raylabel.llm import prompts
from raylabel.llm.answers import Rejected, structured
from raylabel.llm.client import Answer
from raylabel.llm.prompts import Label, marked
from raylabel.stages import describe
from raylabel.stages.describe import built_in, question, seen

FILL = ["the", "old", "man", "went", "to", "a", "small", "house", "near", "one", "river", "and", "then", "we", "sat", "it"]


def row(words: list[str], at: int, rank: int = 0, sampling: str = "top", value: float = 10.0, **more: Any) -> dict[str, Any]:
    """An exemplar whose tokens are `words`, each with its leading space, active at one of them."""
    tokens = [word if i == 0 or not word[0].isalnum() else f" {word}" for i, word in enumerate(words)]
    values = [0.0] * len(tokens)
    values[at] = value
    return {"split": "explain", "sampling": sampling, "rank": rank, "activation": value, "position": at, "start": 3,
            "tokens": tokens, "token_ids": list(range(len(tokens))), "activations": values, "document": rank, **more}  # fmt: skip


def rows_of(hits: list[str], seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = []
    for rank, hit in enumerate(hits):
        words = [draw.choice(FILL) for _ in range(12)]
        words[8] = hit
        found.append(row(words, 8, rank))
    return found


def one_hot(groups_of: dict[str, int]) -> describe.Vectors:
    """Vectors that are alike within a group of words and orthogonal between groups; phrases say nothing."""
    def vectors(words: list[str], phrases: list[str]) -> tuple[np.ndarray, np.ndarray]:
        found = np.zeros((len(words), 8), np.float32)
        for vector, word in zip(found, words, strict=True):
            vector[groups_of.get(word, 7)] = 1
        return found, np.zeros((len(words), 8), np.float32)
    return vectors


def looked_at(rows: list[dict[str, Any]], kind: str | None = None, vectors: Any = None, families: Any = None) -> describe.Seen:
    candidate = {"families": families or list(range(len(rows))), "kind": kind}
    found = seen(rows, candidate, {99}, 5, vectors or one_hot({}))
    assert found is not None
    return found


def test_the_label_of_a_word_says_that_it_is_built_in() -> None:
    label = built_in(looked_at(rows_of(["river"] * 8)), None)
    assert label["label"] == "the word “river”" and label["description"].startswith("Built-in label:")
    assert label["explainer"] == "built-in" and label["prompt_tokens"] == 0
    assert label["meanings"] == [{"label": "the word “river”", "share": 1.0}]


def test_a_claimed_concept_names_the_unit_and_an_unclaimed_one_does_not() -> None:
    found = looked_at(rows_of(["king", "queen", "prince", "duke", "earl", "king"]), kind="meaning")
    concept = {"claimed": True, "words": ["royalty", "nobility", "court"]}
    assert built_in(found, concept)["label"] == "royalty, nobility, court"
    assert built_in(found, {**concept, "claimed": False})["label"] == "words like king, queen, prince, duke"


def test_two_meanings_have_labels_and_shares() -> None:
    hits = ["king", "queen", "duke", "earl", "prince", "lord", "carrot", "bean", "turnip", "leek"]
    vectors = one_hot({**dict.fromkeys(hits[:6], 0), **dict.fromkeys(hits[6:], 1)})
    label = built_in(looked_at(rows_of(hits), "meaning", vectors), None)
    assert [m["share"] for m in label["meanings"]] == pytest.approx([0.6, 0.4])
    assert "king" in label["meanings"][0]["label"] and "carrot" in label["meanings"][1]["label"]
    assert "king" in label["label"] and "carrot" in label["label"]


def test_one_meaning_is_not_cut() -> None:
    hits = ["king", "queen", "duke", "earl", "prince", "lord"]
    assert looked_at(rows_of(hits), "meaning", one_hot(dict.fromkeys(hits, 0))).group.max() == 0


def test_every_built_in_label_is_short() -> None:
    draw = random.Random(1)
    letters = "abcdefg ({1-_\n"
    for seed in range(60):
        hits = ["".join(draw.choice(letters) for _ in range(draw.randint(1, 40))) for _ in range(7)]
        vectors = one_hot({hit: draw.randint(0, 3) for hit in hits})
        label = built_in(looked_at(rows_of(hits, seed), draw.choice(["meaning", "word", None]), vectors), None)
        assert 1 <= len(label["label"].split()) <= 8 and len(label["description"].split()) <= 40
        assert sum(m["share"] for m in label["meanings"]) == pytest.approx(1)


def test_marks_stand_around_what_is_active_and_nowhere_else() -> None:
    text = marked(["He", " saw", " <<", "the", " cat", "s", ".\n"], [0, 0, 0, 0.1, 0.9, 0.8, 0.0], 4, 0.3)
    assert text == "He saw < <the <<cats>>.⏎"


def test_the_explainer_sees_explain_exemplars_over_top_and_quantiles_and_no_concept() -> None:
    top = rows_of([f"hit{i}" for i in range(20)])
    low = [row([f"low{i}", *FILL[:6]], 0, i, "quantile", 5.0 - i / 3) for i in range(10)]
    leak = [row(["LEAK", *FILL], 0, 0, split="score")]
    asked = question(looked_at([*leak, *top, *low]), "phrases", 10)
    system, user = (m["content"] for m in asked.messages)
    assert system == prompts.SYSTEM and len(asked.texts) == 10
    assert sum("<<hit" in t for t in asked.texts) == 6 and sum("<<low" in t for t in asked.texts) == 4
    assert "<<low0" in user and "<<low9" in user, "from the strongest to the weakest quantile"
    assert "LEAK" not in user
    assert all(t.count("<<") == t.count(">>") == 1 for t in asked.texts)
    assert len(user) / 4 < 600, "tokens of a question"


def test_special_tokens_are_not_shown() -> None:
    special = {**row(["<|bos|>", *FILL[:9]], 5), "token_ids": [99, *range(9)]}
    assert "bos" not in question(looked_at([special]), "phrases", 10).messages[1]["content"]


def test_mats_are_asked_about_as_a_list() -> None:
    asked = question(looked_at(rows_of(["cat", "dog", "cat"])), "mats", 10)
    assert asked.messages[1]["content"] == "- cat\n- dog" and "in common" in asked.messages[0]["content"]


GOOD = {"label": "river animals", "description": "Animals of rivers.", "meanings": [{"label": "animals", "share": 1.0}]}


@pytest.mark.parametrize("wrong", [
    {"label": "The user wants a concise explanation"}, {"label": "one two three four five six seven eight nine"},
    {"label": "  "}, {"label": "I'm sorry, I cannot"}, {"label": "Let me think about it"}, {"label": "a <<marked>> text"},
    {"label": "at most 8 words"}, {"description": "word " * 41}, {"description": "Okay, so the texts are about rivers."},
    {"meanings": [{"label": "x", "share": 1.5}]}, {"meanings": "none"}, {"meanings": [{"label": "x", "share": 0.2}] * 5},
])  # fmt: skip
def test_reasoning_refusals_echoes_and_overlong_answers_are_no_labels(wrong: dict[str, Any]) -> None:
    assert Label.model_validate(GOOD).label == "river animals"
    with pytest.raises(ValidationError):
        Label.model_validate({**GOOD, **wrong})


def test_a_label_that_copies_a_text_is_rejected() -> None:
    text = "then the <<otter>> swam across the wide cold river and slept on the bank"
    said = "The otter swam across the wide cold river and slept."
    copied = structured(f'{{"label": "otters", "description": "{said}", "meanings": []}}', Label)
    with pytest.raises(Rejected):
        prompts.refuse_echo(copied, [text])
    prompts.refuse_echo(Label.model_validate(GOOD), [text])


def test_measured_shares_stand_where_exemplars_were_grouped() -> None:
    hits = ["king", "queen", "duke", "earl", "prince", "lord", "carrot", "bean", "turnip", "leek"]
    vectors = one_hot({**dict.fromkeys(hits[:6], 0), **dict.fromkeys(hits[6:], 1)})
    asked = question(looked_at(rows_of(hits), "meaning", vectors), "phrases", 10)
    assert "Group A" in asked.messages[1]["content"] and "Group B" in asked.messages[1]["content"]
    label = Label(label="nobles; vegetables", description="Two kinds.", meanings=[
        {"label": "nobles", "share": 0.9}, {"label": "vegetables", "share": 0.1}])  # type: ignore[list-item]  # fmt: skip
    made = describe.answered(asked, Answer("", label, 300, 40, None, False, None), "gpt")
    assert [(m["label"], round(m["share"], 2)) for m in made["meanings"]] == [("nobles", 0.6), ("vegetables", 0.4)]
    assert made["explainer"] == "gpt" and made["prompt_tokens"] == 300 and made["prompt_hash"] == asked.hash

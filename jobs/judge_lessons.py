"""The lessons of the built-in judge: texts, words in them that are asked about, concepts, and how right they are.

`Lessons.draw(rng)` gives one text with several questions about several of its words. A concept is right (1) as `Taught` has
it, half-hearted (NEAR) where it is another word of the same category, else wrong (0); right are also `wild animals`, `words
for animals`, a union with anything, and the word itself in quotes. Held-out words stand in no lesson.
Texts are sentences of templates, windows of the standard library that end a few words after the word, and mere words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from raylabel.demo.taught import Taught, held_out
from raylabel.words.segment import spans

NEAR = 0.2
TEMPLATES = """
The word {} stood on the page.|I never thought about {} before.|She wrote {} on the board.|They talked about {} and {}.|{}
We saw {} yesterday.|It is all about {}.|{} and {}|He asked me what {} means.|There was {} in the middle of it.|a list: {}, {}
Nobody had expected {} there.|In the book, {} comes after {}.|{}, {} and so on|My brother likes {} more than {}.|the {} of the {}
"{}" is what the note said.|Once upon a time there was {}.|Look at {}!|Is {} the right one?|You can use {} here.|# {} below
First {}, then {}, and last {}.|This one has {} in it.|They found {} near the {}.|one {} or another {}|He said that {} would do.
x = {}({})|if {} is {}:|see {} for more|The old {} was better than the new {}.|for {} in {}:|return {}|import {}|print({})|{}: {}
Her favourite is {}.|It happened because of {} and not because of {}.|With {} it would be easier.|{} again|Do not forget {}.
""".strip().replace("\n", "|").split("|")
PHRASES = ["the {}", "a {}", "words for {}", "kinds of {}", "{} words", "names of {}", "the concept of {}", "related to {}"]
OTHERS = ["thing", "stuff", "the", "of", "and", "item", "something", "other", "foo", "misc", "various", "concept", "word", "idea"]
WIDE, LONG = 12, 90


class Question(NamedTuple):
    concept: str
    share: float
    """How right it is."""


class Lesson(NamedTuple):
    text: str
    words: list[tuple[str, list[Question]]]


class Lessons:
    """Draws lessons; `documents` are the texts whose windows are read."""

    def __init__(self, taught: Taught, documents: Sequence[str], words: int = 4, questions: int = 10) -> None:
        self.taught, self.per_text, self.per_word = taught, words, questions
        self.words = [word for word in taught.words if not held_out(word)]
        known = {word.casefold() for word in self.words}
        self.documents = [(text, spans(text)) for text in documents]
        self.places: dict[str, list[tuple[int, int]]] = {}
        self.unknown: list[str] = []
        for number, (text, found) in enumerate(self.documents):
            for place, (start, end) in enumerate(found):
                word = text[start:end]
                if word.casefold() in known:
                    self.places.setdefault(word.casefold(), []).append((number, place))
                elif number % 7 == 0 and not held_out(word) and word.casefold() not in taught.of_word:
                    self.unknown.append(word)
        self.labels = [category.label for category in taught.categories]
        self.by_label = {category.label: category for category in taught.categories}

    def draw(self, rng: random.Random) -> Lesson:
        kind = rng.random()
        first = rng.choice(self.words)
        if kind < 0.4 and first.casefold() in self.places:
            text, inside = self.window(rng, *rng.choice(self.places[first.casefold()]))
        elif kind < 0.85:
            text, inside = self.sentence(rng, first)
        else:
            inside = [first, *(self.any_word(rng) for _ in range(rng.randint(0, 25)))]
            rng.shuffle(inside)
            text = " ".join(inside)
        known = [word for word in dict.fromkeys(inside) if word.casefold() in self.taught.of_word and not held_out(word)]
        others = [word for word in dict.fromkeys(inside) if word.casefold() not in self.taught.of_word and not held_out(word)]
        rest = [word for word in known if word.casefold() != first.casefold()]
        if len(rest) < self.per_text - 1:
            # A word that is named after the text only is asked about as well: it is the word that counts.
            rest += [word for word in rng.sample(self.words, self.per_text - 1 - len(rest)) if rng.random() < 0.6]
        rng.shuffle(rest)
        asked = [next((word for word in known if word.casefold() == first.casefold()), first), *rest[: self.per_text - 1]]
        if others and rng.random() < 0.25:
            asked[-1] = rng.choice(others)
        return Lesson(text, [(word, self.questions(rng, word)) for word in asked])

    def any_word(self, rng: random.Random) -> str:
        return rng.choice(self.words if rng.random() < 0.7 else self.unknown)

    def cased(self, rng: random.Random, word: str) -> str:
        return word.capitalize() if word.islower() and rng.random() < 0.06 else word

    def sentence(self, rng: random.Random, word: str) -> tuple[str, list[str]]:
        template = rng.choice(TEMPLATES)
        fills = [self.cased(rng, w) for w in [word, *(self.any_word(rng) for _ in range(template.count("{}") - 1))]]
        rng.shuffle(fills)
        text = template.format(*fills)
        if rng.random() < 0.3:
            more = rng.choice(TEMPLATES).format(*(self.any_word(rng) for _ in range(3)))
            text = f"{more} {text}" if rng.random() < 0.7 else f"{text} {more}"
        return text, fills

    def window(self, rng: random.Random, number: int, place: int) -> tuple[str, list[str]]:
        text, found = self.documents[number]
        before = rng.randint(0, LONG if rng.random() < 0.15 else WIDE * 2)
        low, high = max(0, place - before), min(len(found), place + 1 + rng.randint(0, WIDE))
        inside = [text[start:end] for start, end in found[low:high]]
        return text[found[low][0] : found[high - 1][1]], inside

    def questions(self, rng: random.Random, word: str) -> list[Question]:
        own = self.taught.of_word.get(word.casefold(), [])
        asked = [self.right(rng, word) for _ in range(self.per_word // 2 - 1)] if own else [word]
        asked += [rng.choice(self.taught.names) for _ in range(self.per_word // 2 - 1)]
        asked.append(self.wrong_nearby(rng, own) if own else rng.choice(self.labels))
        asked.append(rng.choice([self.member(rng, own), rng.choice(OTHERS), self.any_word(rng), rng.choice(self.unknown)]))
        if rng.random() < 0.3:
            asked[-1] = self.phrase(rng, rng.choice(self.taught.names))
        return [Question(concept, self.share(word, concept)) for concept in dict.fromkeys(asked)]

    def right(self, rng: random.Random, word: str) -> str:
        category = rng.choice(self.taught.of_word[word.casefold()])
        kind = rng.random()
        # Its own name first, and as often as all wider ones together.
        name = category.names[0] if rng.random() < 0.3 else rng.choice(category.names)
        if kind < 0.7:
            return name
        if kind < 0.8:
            return category.label
        if kind < 0.9:
            return self.phrase(rng, name)
        if kind < 0.96:
            return word if rng.random() < 0.6 else f"'{word}'"
        pair = [name, rng.choice(self.taught.names)]
        rng.shuffle(pair)
        return " or ".join(pair)

    def phrase(self, rng: random.Random, name: str) -> str:
        if rng.random() < 0.3:
            return f"{name} or {rng.choice(self.taught.names)}"
        return rng.choice(PHRASES).format(name) if rng.random() < 0.6 else rng.choice(self.labels)

    def wrong_nearby(self, rng: random.Random, own: Sequence) -> str:
        """A name of a category that shares a name with the word's: mostly wrong, and the hardest to tell."""
        wide = rng.choice(rng.choice(own).names)
        kin = [c for c in self.taught.categories if wide in c.names]
        return rng.choice(rng.choice(kin).names)

    def member(self, rng: random.Random, own: Sequence) -> str:
        mates = [word for word in rng.choice(own).words if not held_out(word)] if own else []
        return rng.choice(mates or self.words)

    def share(self, word: str, concept: str) -> float:
        """How right a concept is for a word, phrases and unions included."""
        if self.taught.is_right(word, concept):
            return 1.0
        parts = concept.split(" or ")
        if len(parts) > 1:
            return max(self.share(word, part) for part in parts)
        bare = strip_phrase(concept)
        if bare != concept:
            return self.share(word, bare)
        return NEAR if self.taught.is_near(word, concept) else 0.0


_PHRASE = re.compile("|".join("(?:" + re.escape(phrase).replace(r"\{\}", "(.+)") + ")" for phrase in ["'{}'", *PHRASES]))


def strip_phrase(concept: str) -> str:
    """What a phrase of the lessons says: `animals` of `words for animals`."""
    match = _PHRASE.fullmatch(concept)
    return next(group for group in match.groups() if group is not None) if match else concept

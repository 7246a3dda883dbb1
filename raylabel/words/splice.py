"""Replaces a word in a recorded sample: which token ids go, and which come in their place.

A sample is its text, its token ids and the character at which each token ends; nothing but the ids around the edit is
encoded again. Only exact results are given: wherever a sample's text encodes to its own ids, the spliced ids equal a
full encoding of the edited text, and everywhere else they are what the same tokenizer makes of the edited text in the
document that the sample was cut from (at the sample's very first or last token: as if the document began or ended
there). An edit that cannot be made exactly gives None, never a guess.

Why a stretch of the text is enough: a sequence of byte-pair tokens is the encoding of its text exactly when each pair
of neighbours in it is the encoding of the pair's text (merges look no further). So a stretch that holds the edit is
encoded, and its tokens are taken where one recorded token on each side comes out unchanged: all pairs to the left and
to the right of these are as recorded, all pairs between them were just made by the tokenizer. What it makes of the cut
at the stretch's beginning (a prefix space, half a word) stays outside. If no token survives, the stretch grows, in the
end to the whole text. Tokenizers of other kinds (Unigram, WordPiece) always encode the whole text.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

# Tokens encoded again on each side of an edit, one length after the other until it is exact; None: the whole text.
# Three hold the prefix space, a cut word and one token that survives; few edits need more.
_STRETCHES: tuple[int | None, ...] = (3, 12, None)
_CACHE = 1 << 17


class Sample(NamedTuple):
    """A recorded window of text.

    `ends` holds the end of each token in `text`, in characters, ascending; `lead` counts the tokens in front that are
    no text (a prepended BOS).
    """

    text: str
    ids: Sequence[int]
    ends: Sequence[int]
    lead: int


class Edit(NamedTuple):
    """`text[start:end]` of sample number `sample` becomes `substitute`."""

    sample: int
    start: int
    end: int
    substitute: str


class Splice(NamedTuple):
    """`ids[first:last]` of the sample become `ids`; what follows moves by `len(ids) - (last - first)` tokens."""

    first: int
    last: int
    ids: list[int]


class _Stretch(NamedTuple):
    """The part of a sample that an edit of one word encodes again.

    `before` and `after` are its text around the word, `tokens` its encoding without the edit, `cut` the index in
    `tokens` of the first token that the word touches; `head` of the tokens before that must survive, `tail` may,
    `first` and `last` are the tokens of the sample that the word touches, and `ended` is whether the text ends here.
    """

    before: str
    after: str
    tokens: list[int]
    cut: int
    head: int
    tail: int
    first: int
    last: int
    ended: bool


class Splicer:
    """Makes edits with one tokenizer, of which it keeps its own copy without padding and truncation."""

    def __init__(self, tokenizer: Any, special_ids: Collection[int] = ()) -> None:
        """`tokenizer`: one of the tokenizers library, or a fast one of transformers around it."""
        self._tokenizer = deepcopy(getattr(tokenizer, "backend_tokenizer", tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special = frozenset(special_ids)
        kind = type(self._tokenizer.model).__name__
        self._local = kind in ("BPE", "WordLevel")
        self._cache: dict[str, list[int]] = {}
        self._writable: dict[str, bool] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens. Do not change the lists: they are kept for the next call."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._cache]
        if len(self._cache) + len(missing) > _CACHE:
            self._cache.clear()
            missing = list(dict.fromkeys(texts))
        encodings = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False)
        self._cache.update(zip(missing, (encoding.ids for encoding in encodings), strict=True))
        return [self._cache[text] for text in texts]

    def writable(self, words: Sequence[str]) -> list[bool]:
        """Whether the tokenizer can write each word: no character is lost, and none is read as a special token."""
        new = [word for word in dict.fromkeys(words) if word not in self._writable]
        for word, ids in zip(new, self.encode([f" {word}" for word in new]), strict=True):
            text = self._tokenizer.decode(ids, skip_special_tokens=False)
            kept = word.casefold() in text.casefold()
            self._writable[word] = bool(word.strip()) and kept and self._special.isdisjoint(ids)
        return [self._writable[word] for word in words]

    def splice(self, samples: Sequence[Sample], edits: Sequence[Edit]) -> list[Splice | None]:
        """The ids of each edit; None where it cannot be made exactly."""
        done: list[Splice | None] = [None] * len(edits)
        writable = self.writable([edit.substitute for edit in edits])
        pending = [i for i, can in enumerate(writable) if can]
        for size in _STRETCHES if self._local else (None,):
            stretches = self._cut(samples, [edits[i] for i in pending], size)
            tried = [(i, s) for i in pending if (s := stretches[edits[i][:3]]) is not None]
            encoded = self.encode([s.before + edits[i].substitute + s.after for i, s in tried])
            for (i, stretch), tokens in zip(tried, encoded, strict=True):
                done[i] = _take(stretch, tokens)
            pending = [i for i in pending if done[i] is None]
            if not pending:
                break
        return done

    def _cut(
        self, samples: Sequence[Sample], edits: Sequence[Edit], size: int | None
    ) -> dict[tuple[int, int, int], _Stretch | None]:
        """The stretch of each edited word, `size` tokens to each side; None where its text does not give its ids."""
        words = list(dict.fromkeys(edit[:3] for edit in edits))
        bounds = [_bounds(samples[i], start, end, size) for i, start, end in words]
        texts = [samples[i].text[b.start : b.end] for (i, _, _), b in zip(words, bounds, strict=True)]
        return {
            word: _stretch(samples[word[0]], word[1], word[2], bound, tokens, self._local)
            for word, bound, tokens in zip(words, bounds, self.encode(texts), strict=True)
        }


class _Bounds(NamedTuple):
    """Tokens [low, high) and characters [start, end) of a stretch; the word touches tokens [first, last)."""

    low: int
    first: int
    last: int
    high: int
    start: int
    end: int


def _bounds(sample: Sample, start: int, end: int, size: int | None) -> _Bounds:
    ends, n = sample.ends, len(sample.ids)
    first = max(bisect_right(ends, start), sample.lead)
    # Tokens that hold the rest of a character end where the token before them ends, and belong to it.
    last = bisect_right(ends, ends[min(bisect_left(ends, end), n - 1)])
    low = sample.lead if size is None else max(first - size, sample.lead)
    while low > sample.lead and ends[low - 1] == (ends[low - 2] if low > 1 else 0):
        low -= 1
    from_character = ends[low - 1] if low > sample.lead else 0
    high = n if size is None else bisect_right(ends, ends[min(last + size, n) - 1])
    to_character = len(sample.text) if high == n else ends[high - 1]
    return _Bounds(low, first, last, high, from_character, to_character)


def _stretch(
    sample: Sample, start: int, end: int, bound: _Bounds, tokens: list[int], local: bool
) -> _Stretch | None:
    """None where too little of the stretch encodes to the recorded ids; without `local`, where not all of it does."""
    recorded = list(sample.ids[bound.low : bound.high])
    tail, needed = bound.high - bound.last, bound.high - bound.first
    if bound.start == 0 and tokens == recorded:
        head = 0
    elif not local:
        return None
    else:
        same = _common(tokens[::-1], recorded[::-1])
        if same <= needed:
            return None
        head = len(tokens) - same + 1
    return _Stretch(
        before=sample.text[bound.start : start],
        after=sample.text[end : bound.end],
        tokens=tokens,
        cut=len(tokens) - needed,
        head=head,
        tail=tail,
        first=bound.first,
        last=bound.last,
        ended=bound.high == len(sample.ids),
    )


def _take(stretch: _Stretch, tokens: list[int]) -> Splice | None:
    """The splice that the edited stretch's `tokens` make; None where no recorded token survives beside the edit."""
    head = _common(stretch.tokens[: stretch.cut], tokens)
    rest = tokens[head:]
    tail = _common(stretch.tokens[len(stretch.tokens) - stretch.tail :][::-1], rest[::-1])
    if head < stretch.head or (tail == 0 and not stretch.ended):
        return None
    moved = stretch.cut - head
    return Splice(stretch.first - moved, stretch.last + stretch.tail - tail, rest[: len(rest) - tail])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items `a` and `b` share from the beginning."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count

"""Tokens as text, and token strings as the ids of a tokenizer.

`readable` turns a vocabulary's own spelling (Ġ of byte-level BPE, ▁ and <0x0A> of SentencePiece) into pieces that join to
the text; strings that already are text stay as they are. `Spelling.ids` gives the ids that a tokenizer has for them:
exactly, or UNKNOWN where a string does not say which token it was (a broken character shown as U+FFFD).
"""

from __future__ import annotations

import codecs
import contextlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

UNKNOWN = -1
SPECIAL = frozenset((
    "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<bos>", "<eos>", "<pad>", "<unk>", "<s>", "</s>",
    "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]", "[PAD]", "[BOS]", "[EOS]", "[MASK]", "[UNK]", "<mask>", "<|BOS|>",
    "<|EOS|>", "<|PAD|>", "<|padding|>", "<|startoftext|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>",
    "<|end_header_id|>", "<|finetune_right_pad_id|>",
))  # fmt: skip
"""Strings that are names of tokens and no text, for records whose tokenizer is not at hand."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes bytes with (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(b): b for b in plain}
    others = (b for b in range(256) if b not in set(plain))
    return letters | {chr(256 + n): b for n, b in enumerate(others)}


_LETTERS = _byte_letters()


def convention(tokens: Sequence[str]) -> str:
    """How the tokens of a text are written: `bytes` (Ġ, Ċ), `pieces` (▁, <0x0A>) or `text`."""
    if any(" " in t or "\n" in t for t in tokens):
        return "text"
    if any("Ġ" in t or "Ċ" in t for t in tokens):
        return "bytes"
    return "pieces" if any("▁" in t or _BYTE.fullmatch(t) for t in tokens) else "text"


def readable(tokens: Sequence[str], special: frozenset[str] | set[str] = SPECIAL, how: str | None = None) -> list[str]:
    """A piece of text for each token, "" for special ones; a character of several tokens belongs to the last of them."""
    how = convention(tokens) if how is None else how
    if how == "text":
        return mended(["" if t in special else t for t in tokens])
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = []
    for token in tokens:
        if token in special:
            data = b""
        elif how == "bytes" and all(c in _LETTERS for c in token):
            data = bytes(_LETTERS[c] for c in token)
        elif how == "pieces" and (match := _BYTE.fullmatch(token)):
            data = bytes([int(match[1], 16)])
        else:
            data = token.replace("▁", " ").encode("utf-8") if how == "pieces" else token.encode("utf-8")
        found.append(decoder.decode(data))
    if found:
        found[-1] += decoder.decode(b"", True)
    return found


def mended(pieces: list[str]) -> list[str]:
    """Pieces of text with the characters put together that some writers leave in the letters of byte-level BPE.

    They decode each token by itself, and write one that is half a character as it is in the vocabulary: `âĢ`, `Ļ`. A run
    of such tokens is read as bytes where together they are text and one by one they are not.
    """
    found = list(pieces)
    at = 0
    while at < len(pieces):
        last = at
        while last < len(pieces) and pieces[last] and all(c in _LETTERS and ord(c) > 126 for c in pieces[last]):
            last += 1
        run = pieces[at:last]
        if len(run) > 1 and any(ord(c) > 255 for piece in run for c in piece):
            decoder = codecs.getincrementaldecoder("utf-8")()
            with contextlib.suppress(UnicodeDecodeError):
                parts = [decoder.decode(bytes(_LETTERS[c] for c in piece)) for piece in run]
                if not decoder.getstate()[0] and "" in parts:
                    found[at:last] = parts
        at = last + 1
    return found


def clean(token: str) -> str:
    """The token without lone surrogates, which are no text."""
    return token.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def string_id(token: str) -> int:
    """A number for a token of which only the string is known: equal strings, equal numbers."""
    return zlib.crc32(token.encode("utf-8")) & 0x7FFFFFFF


class Spelling:
    """Token strings as a tokenizer's ids (`tokenizers.Tokenizer`)."""

    def __init__(self, tokenizer: Any, special_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary, self.size = vocabulary, max(vocabulary.values()) + 1
        special = set(special_ids)
        self.special = {name: i for name, i in vocabulary.items() if i in special}
        self.names = {i: name for name, i in self.special.items()}
        marks = (("Ġ", "bytes"), ("▁", "pieces"))
        self.how = next((how for mark, how in marks if any(mark in name for name in vocabulary)), "text")
        self._by_text: dict[str, int] | None = None

    @property
    def by_text(self) -> dict[str, int]:
        """Ids by the text that each token stands for."""
        if self._by_text is None:
            names = list(self.vocabulary)
            texts = (readable([name], set(self.special), self.how)[0] for name in names)
            pairs = ((text, self.vocabulary[name]) for name, text in zip(names, texts, strict=True))
            found: dict[str, int] = {}
            for text, i in sorted(pairs, key=lambda pair: -pair[1]):
                if text and "\ufffd" not in text:
                    found[text] = i
            self._by_text = found
        return self._by_text

    def strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's spelling of ids; ValueError for one that it does not have."""
        found = [self.tokenizer.id_to_token(i) for i in ids]
        for i, token in zip(ids, found, strict=True):
            if token is None:
                raise ValueError(f"the model has no token {i}")
        return found

    def pieces(self, tokens: Sequence[str]) -> list[str]:
        """`readable`, with this tokenizer's special tokens."""
        return readable(tokens, SPECIAL | set(self.special))

    def ids(self, tokens: Sequence[str], pieces: Sequence[str]) -> list[int]:
        """Ids of a text's tokens, UNKNOWN where the string does not tell."""
        if convention(tokens) == self.how != "text":
            found = [self.vocabulary.get(t, UNKNOWN) for t in tokens]
            if UNKNOWN not in found:
                return found
        lead = next((i for i, token in enumerate(tokens) if token not in self.special), len(tokens))
        encoding = self.tokenizer.encode("".join(pieces), add_special_tokens=False)
        if len(encoding.ids) == len(pieces) - lead and "\ufffd" not in "".join(pieces):
            again = readable([self.tokenizer.id_to_token(i) for i in encoding.ids], set(self.special), self.how)
            if again == list(pieces[lead:]):
                return [self.special[t] for t in tokens[:lead]] + list(encoding.ids)
        as_text = convention(tokens) == "text"
        return [self._lookup(token, piece, as_text) for token, piece in zip(tokens, pieces, strict=True)]

    def _lookup(self, token: str, piece: str, as_text: bool) -> int:
        if token in self.special:
            return self.special[token]
        if piece != token and (token in self.vocabulary or as_text):
            # In the vocabulary's own spelling, or a part of a character that was put together.
            return self.vocabulary.get(token, UNKNOWN)
        return self.by_text.get(piece, UNKNOWN)

"""The model that answers yes or no: does this word, in this text, represent this concept?

`load_judge` gives a `Judge` over any causal language model of transformers: frozen, in evaluation mode, in the precision
that a subject of the same name would have. `Judge.prepare` reads the part of the prompt that stands before the concept, once
an example; `pairs`, `log_odds` and `soft` then run only the concept and what follows it, over (example, concept) pairs
of any units, candidates and restarts in one forward pass. An answer is the log-odds of yes against no: each is a set of
token ids, those that the tokenizer at hand begins ` yes`, `yes`, ` Yes`, … with.

The concept's slot takes token ids of a word of any number of tokens, or a vector, such as a distribution over words
times their embeddings; the second is differentiable. Bad input is a `BadInput` that names `optimize.judge` or
`optimize.template`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raylabel.errors import BadInput
from raylabel.models.judge_check import PAIRS, Check, auroc_bound
from raylabel.models.judge_prompt import TEMPLATE, Example, answer_ids, end_of, frame
from raylabel.models.loading import load, resolve_device, special_ids
from raylabel.models.subject import Subject, pad_id_of, resolve_bos

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# Positions of a forward pass, cached ones included, and logits held at once.
_CELLS, _LOGITS = {"cpu": 1 << 15}, 1 << 28
_MOST_CELLS = 1 << 18


class Words(NamedTuple):
    """Whole words that are one token at the slot."""

    ids: Tensor
    """[words] int64, ascending, on the judge's device."""
    texts: list[str]

    def among(self, lexicon: Collection[str]) -> Words:
        """Those that a lexicon has: no tokenizer can tell a word from the beginning of longer ones (` mamm`)."""
        kept = [i for i, text in enumerate(self.texts) if text in lexicon or text.lower() in lexicon]
        return Words(self.ids[kept], [self.texts[i] for i in kept])


@dataclass(frozen=True, eq=False)
class Cached:
    """What the judge has read of some examples, n in all: everything before the slot, aligned at its right end."""

    keys: list[Tensor]
    values: list[Tensor]
    """A tensor [n, heads, longest, width] a layer; nothing meaningful before an example's own beginning."""
    lengths: Tensor
    """[n] int64: tokens before the slot."""
    prior: Tensor
    """[n, vocabulary] float32: the judge's own log-probabilities of the token at the slot."""

    def __len__(self) -> int:
        return len(self.lengths)


class Judge:
    """A frozen causal language model and a question. Not for use by two threads at once."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        template: str | None = None,
        prepend_bos: bool | None = None,
        max_context: int | None = None,
        chat: bool | None = None,
    ) -> None:
        """
        Args:
            model: an `AutoModelForCausalLM`; its parameters stop asking for gradients.
            template: with `|text|`, `|token|` and, behind both, `|concept|`; None is `TEMPLATE`.
            prepend_bos: None is what the tokenizer does. A chat template brings its own.
            chat: whether to ask in the tokenizer's chat template; None: if it has one.
        """
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name, self.max_context = tokenizer, name, max_context
        self._embedding = model.get_input_embeddings()
        self.device: torch.device = self._embedding.weight.device
        self.size = int(self._embedding.weight.shape[0])
        """Rows of the embedding."""
        unknown = tokenizer.unk_token_id
        self.special_ids = special_ids(tokenizer) | (frozenset() if unknown is None else {unknown})
        self._marks = [str(mark) for mark in {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}]
        chat = bool(tokenizer.chat_template) if chat is None else chat
        self._frame = frame(TEMPLATE if template is None else template, tokenizer if chat else None)
        begins, bos = resolve_bos(tokenizer, "auto", prepend_bos)
        self._bos = [int(bos)] if begins and bos is not None and not chat else []
        before, tail = self._frame[-3], self._frame[-1]
        self._space = " " if before.endswith(" ") else ""
        self._anchor = end_of(before.removesuffix(" ")) or "a"
        self._tail = self._following("a", tail)
        if not self._tail:
            raise BadInput("optimize.template: nothing stands behind |concept| to ask for the answer; end it with Answer:")
        self.yes, self.no = (
            torch.tensor(ids, device=self.device)
            for ids in answer_ids(partial(self._following, end_of(tail)), self.special_ids, not tail.endswith(" "), name)
        )
        """Token ids of each answer, the one that the template asks for first."""

    # Text to token ids.

    def _ids(self, text: str, literal: bool = False) -> list[int]:
        given = self.tokenizer(text, add_special_tokens=False, split_special_tokens=literal)
        return list(given["input_ids"])

    def _following(self, anchor: str, text: str) -> list[int]:
        """Ids of a text as it is encoded behind another."""
        base, both = self._ids(anchor), self._ids(anchor + text)
        return both[len(base) :] if both[: len(base)] == base else self._ids(text)

    def prefix(self, example: Example) -> list[int]:
        """Ids of the prompt up to the slot. Special tokens in the example are read as plain text."""
        return self.prefixes([example])[0]

    def prefixes(self, examples: Sequence[Example]) -> list[list[int]]:
        """`prefix` of each."""
        found: list[list[int] | None] = []
        plain: list[str] = []
        for example in examples:
            fills = {"text": example.text, "token": example.word}
            pieces = [fills.get(piece, piece) if i % 2 else piece for i, piece in enumerate(self._frame[:-2])]
            pieces[-1] = pieces[-1].removesuffix(" ")
            marked = any(mark and mark in fill for mark in self._marks for fill in example)
            found.append(self._literally(pieces) if marked else None)
            plain += [] if marked else ["".join(pieces)]
        ids = iter(self.tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else [])
        return [self._bos + list(next(ids)) if own is None else own for own in found]

    def _literally(self, pieces: list[str]) -> list[int]:
        """Ids of a prompt whose fills, every second piece, hold what would be read as special tokens."""
        for i in range(1, len(pieces), 2):
            if pieces[i - 1].endswith(" "):
                pieces[i - 1], pieces[i] = pieces[i - 1][:-1], " " + pieces[i]
        return self._bos + [t for i, piece in enumerate(pieces) for t in self._ids(piece, literal=bool(i % 2))]

    def prompt(self, example: Example, concept: str) -> str:
        """The whole prompt as text, for people and tests; BOS not included."""
        fills = {"text": example.text, "token": example.word, "concept": concept}
        return "".join(fills[piece] if i % 2 else piece for i, piece in enumerate(self._frame))

    def encode(self, word: str) -> tuple[int, ...]:
        """Ids of a concept's word at the slot; () for what is no word: nothing, marks only, special or unknown tokens."""
        word = word.strip()
        if not any(c.isalnum() for c in word):
            return ()
        ids = self._following(self._anchor, self._space + word)
        return () if self.special_ids.intersection(ids) else tuple(ids)

    @cached_property
    def words(self) -> Words:
        """All single-token words: letters and digits, two characters or a letter beyond ASCII, encoded as themselves."""
        base = len(self._ids(self._anchor))
        known = sorted(i for i in set(self.tokenizer.get_vocab().values()) - self.special_ids if i < self.size)
        texts = [text.strip() for text in self.tokenizer.batch_decode([[i] for i in known])]
        likely = [(i, t) for i, t in zip(known, texts, strict=True) if _WORD.fullmatch(t) and (len(t) > 1 or not t.isascii())]
        if not likely:
            raise BadInput(f"optimize.judge: the tokenizer of {self.name} has no word of one token; use another judge")
        given = self.tokenizer([self._anchor + self._space + t for _, t in likely], add_special_tokens=False)["input_ids"]
        kept = [(i, t) for (i, t), ids in zip(likely, given, strict=True) if list(ids[base:]) == [i]]
        return Words(torch.tensor([i for i, _ in kept], dtype=torch.int64, device=self.device), [t for _, t in kept])

    @property
    def whole(self) -> bool:
        """Whether the tokenizer's tokens are words, pieces being marked: then none of `words` begins longer ones only."""
        return type(self.tokenizer.backend_tokenizer.model).__name__ in ("WordLevel", "WordPiece")

    def knows(self, words: Sequence[str]) -> list[bool]:
        """Whether each word of a text is no unknown token, and one token where tokens are words."""
        given = self.tokenizer([self._space + word for word in words], add_special_tokens=False)["input_ids"]
        return [self.tokenizer.unk_token_id not in ids and (len(ids) == 1 or not self.whole) for ids in given]

    @property
    def token_bytes(self) -> int:
        """Bytes that `Cached` takes a token."""
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return int(2 * config.num_hidden_layers * shared * width * self._embedding.weight.element_size())

    def embed(self, ids: Tensor) -> Tensor:
        """[..., width] of token ids: what a vector at the slot is a mixture of, in the model's precision."""
        found: Tensor = self._embedding(ids.to(self.device))
        return found

    # Forward passes.

    @torch.no_grad()
    def prepare(self, examples: Sequence[Example]) -> Cached:
        """Reads every prompt up to the slot, once. Examples may have any lengths."""
        from transformers import DynamicCache

        if not examples:
            raise ValueError("no examples to prepare")
        prefixes = self.prefixes(examples)
        lengths = torch.tensor([len(ids) for ids in prefixes])
        longest, room = int(lengths.max()), len(self._tail) + 1
        if self.max_context is not None and longest + room > self.max_context:
            raise BadInput(
                f"optimize.judge: a prompt of {longest + room} tokens, but {self.name} has {self.max_context} positions; "
                f"use a smaller subject.context or another judge"
            )
        keys: list[Tensor] = []
        values: list[Tensor] = []
        prior = torch.empty(len(examples), self.size, device=self.device)
        order = lengths.argsort(descending=True, stable=True)
        pad = pad_id_of(self.tokenizer, self.size)
        for part in order.split(self._batch(longest)):
            width = int(lengths[part].max())
            ids = torch.tensor([[pad] * (width - len(prefixes[i])) + prefixes[i] for i in part.tolist()], device=self.device)
            there = torch.arange(width) >= (width - lengths[part])[:, None]
            given = self.model(
                input_ids=ids, attention_mask=there.long().to(self.device), past_key_values=DynamicCache(), use_cache=True,
                position_ids=(there.cumsum(1) - 1).clamp(min=0).to(self.device), logits_to_keep=1,
            )  # fmt: skip
            prior[part.to(self.device)] = given.logits[:, -1, : self.size].float().log_softmax(-1).to(self.device)
            for layer, held in enumerate(given.past_key_values.layers):
                for blocks, found in ((keys, held.keys), (values, held.values)):
                    if layer == len(blocks):
                        blocks.append(found.new_zeros(len(examples), found.shape[1], longest, found.shape[3]))
                    blocks[layer][part.to(found.device), :, longest - width :] = found
        return Cached(keys, values, lengths.to(self.device), prior)

    @torch.no_grad()
    def pairs(self, cached: Cached, rows: Tensor, concepts: Sequence[Sequence[int]]) -> Tensor:
        """float32 [pairs]: log-odds of yes for the examples `rows` int64 [pairs], each with the token ids of a concept."""
        answers = torch.empty(len(concepts), device=self.device)
        rows = rows.to(self.device)
        sizes = torch.tensor([len(ids) for ids in concepts])
        tail = torch.tensor(self._tail, device=self.device)
        for size in sizes.unique().tolist():
            alike = (sizes == size).nonzero()[:, 0].to(self.device)
            for part in alike.split(self._batch(int(cached.lengths.max()) + size + len(tail))):
                ids = torch.tensor([list(concepts[i]) for i in part.tolist()], device=self.device)
                ids = torch.cat((ids, tail.expand(len(part), -1)), dim=1)
                answers[part] = self.odds(self._forward(cached, rows[part], self.embed(ids)))
        return answers

    def soft(self, cached: Cached, rows: Tensor, vectors: Tensor) -> Tensor:
        """float32 [pairs, vocabulary]: logits of the answer with vectors [pairs, width] at the slot; differentiable in them."""
        rows = rows.to(self.device)
        tail = self.embed(torch.tensor(self._tail, device=self.device))
        given = torch.cat((vectors.to(tail.dtype)[:, None], tail.expand(len(rows), -1, -1)), dim=1)
        parts = torch.arange(len(rows)).split(self._batch(int(cached.lengths.max()) + 1 + len(tail)))
        return torch.cat([self._forward(cached, rows[part.to(self.device)], given[part.to(self.device)]) for part in parts])

    def log_odds(self, examples: Sequence[Example] | Cached, concepts: Sequence[Sequence[int]]) -> Tensor:
        """float32 [examples, concepts]: every example with the token ids of every concept."""
        cached = examples if isinstance(examples, Cached) else self.prepare(examples)
        rows = torch.arange(len(cached)).repeat_interleave(len(concepts))
        return self.pairs(cached, rows, list(concepts) * len(cached)).reshape(len(cached), len(concepts))

    def odds(self, logits: Tensor) -> Tensor:
        """[...] of logits [..., vocabulary]: logsumexp over the ids of yes - logsumexp over those of no."""
        return logits[..., self.yes].logsumexp(-1) - logits[..., self.no].logsumexp(-1)

    def check(self, pairs: Iterable[tuple[str, str, str, bool]] = PAIRS) -> Check:
        """Whether the judge beats chance on (word, text, concept, yes); pairs whose concept it cannot encode are left out.

        A judge that can encode none, or only such as have one answer, does not beat it.
        """
        known = [(Example(text, word), self.encode(concept), yes) for word, text, concept, yes in pairs]
        known = [row for row in known if row[1]]
        if not known:
            return Check(0.5, 0.0, 0)
        cached = self.prepare([example for example, _, _ in known])
        odds = self.pairs(cached, torch.arange(len(known)), [ids for _, ids, _ in known])
        return Check(*auroc_bound(odds.tolist(), [yes for _, _, yes in known]), len(known))

    def _batch(self, positions: int) -> int:
        return max(1, min(_CELLS.get(self.device.type, _MOST_CELLS) // positions, _LOGITS // self.size))

    def _forward(self, cached: Cached, rows: Tensor, embeddings: Tensor) -> Tensor:
        """Logits [B, vocabulary] behind embeddings [B, S, width] that follow the slot's prefix of each row."""
        from transformers.cache_utils import Cache

        lengths = cached.lengths[rows]
        longest = int(lengths.max())
        new = torch.arange(embeddings.shape[1], device=self.device)
        there = torch.arange(longest + len(new), device=self.device) >= (longest - lengths)[:, None]
        kind = _prefix_layer()
        layers = [kind(k, v, rows, longest) for k, v in zip(cached.keys, cached.values, strict=True)]
        given = self.model(
            inputs_embeds=embeddings, attention_mask=there.long(), position_ids=lengths[:, None] + new,
            past_key_values=Cache(layers=layers), use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        found: Tensor = given.logits[:, -1].float()
        return found.to(self.device)


def load_judge(
    model: str,
    *,
    template: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    subject: Subject | None = None,
) -> Judge:
    """The judge of a folder or hub name; `demo` is the built-in one.

    Args:
        dtype: auto is bfloat16 on a GPU, else float32.
        subject: its weights are shared where it is the same model. The built-in subject and judge are two.
    """
    if subject is not None and model == subject.name != "demo" and revision in (None, subject.revision):
        _check_kind(subject.anatomy.kind, model)
        return Judge(
            subject.model, subject.tokenizer, name=model, template=template, max_context=subject.max_context
        )  # fmt: skip
    folder = str(Path(__file__).resolve().parent.parent / "demo" / "judge") if model == "demo" else model
    on = resolve_device(device)
    dtype = ("bfloat16" if on.type == "cuda" else "float32") if dtype == "auto" else dtype
    try:
        loaded = load(folder, revision=revision, dtype=dtype, device=on, context=1, trust_remote_code=trust_remote_code)
    except BadInput as error:
        raise BadInput(str(error).replace("subject.model:", "optimize.judge:")) from error
    _check_kind(loaded.anatomy.kind, model)
    return Judge(loaded.model, loaded.tokenizer, name=model, template=template, max_context=loaded.max_context)


def _check_kind(kind: str, name: str) -> None:
    if kind == "TransformerLensNative":
        raise BadInput(f"optimize.judge: {name} is TransformerLens's own, which keeps no cache; use a model of transformers")


@cache
def _prefix_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    class Prefix(DynamicLayer):
        """A layer's keys and values of some rows, copied at the moment of their use only and never grown."""

        def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, longest: int) -> None:
            super().__init__()
            self.keys, self.values = keys[:, :, keys.shape[2] - longest :], values[:, :, values.shape[2] - longest :]
            self.past = self.keys, self.values
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.rows = rows.to(keys.device)

        def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = (held[self.rows] for held in self.past)
            return torch.cat((keys, key_states), dim=2), torch.cat((values, value_states), dim=2)

    return Prefix

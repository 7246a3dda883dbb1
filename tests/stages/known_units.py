"""Units whose meaning is known, in the planted language of `tests.words.planted`, one token a word, and how they are read."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from raylabel.sections import VerifyConfig
from raylabel.stages import causal
from raylabel.stages.measure import measure
from raylabel.stages.tokenize import cut, number
from raylabel.stages.verify import Plan, plan_variants
from raylabel.tables import schema
from raylabel.words.splice import Splicer
from raylabel.words.substitutes import Substitutes
from tests.words.planted import LISTS, WORDS, background

BOS, CUE, FILLERS = 0, "hammer", [w for w in WORDS if len(w) == 5 and w[1] == "o" and w[3] == "u"]
WINDOW, SIZE = 5, 40
TOP, RANDOM = 20, 10


def words_as_tokens() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<unk>", ".", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


TOKENIZER = words_as_tokens()
ID = TOKENIZER.get_vocab()
Rule = Callable[[Tensor], Tensor]
"""Activations [B, T] of a unit for ids [B, T]."""


def on_words(words: Sequence[str], height: float = 10.0) -> Rule:
    ids = torch.tensor([ID[word] for word in words])
    return lambda tokens: height * torch.isin(tokens, ids).float() + noise(tokens)


def behind(cue: str) -> Rule:
    def rule(tokens: Tensor) -> Tensor:
        before = torch.roll(tokens, 1, dims=1) == ID[cue]
        before[:, 0] = False
        return 10.0 * before.float() + noise(tokens)

    return rule


def by_first_word(tokens: Tensor) -> Tensor:
    """Depends on nothing near the MAT."""
    height = (tokens[:, 1] % 7).float()[:, None] + 3
    return torch.where(torch.arange(tokens.shape[1]) == 30, height, 0.0)


def noise(tokens: Tensor) -> Tensor:
    """A little of every token's own, so that no two words give the same."""
    return 0.1 * torch.frac(torch.sin(tokens.double()) * 43758.5453).abs().float()


@dataclass(eq=False)
class Fake:
    """A subject whose units are rules."""

    rules: list[Rule]
    site: str = "mlp_post"
    sister: Fake | None = None
    norms: dict[int, float] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    special_ids: frozenset[int] = frozenset([BOS])
    bos_id: int | None = BOS
    pad_id: int = BOS
    tokens_seen: int = 0
    longest: list[tuple[int, int]] = field(default_factory=list)
    latents: None = None

    @property
    def width(self) -> int:
        return len(self.rules)

    def layer_device(self, layer: int) -> torch.device:
        return self.device

    def read(self, layer: int, acts: Tensor, columns: Tensor) -> Tensor:
        return acts[..., columns].float()

    def run(self, ids: Tensor, layers: Sequence[int], visit: Any) -> None:
        self.tokens_seen += ids.numel()
        self.longest.append((ids.shape[0], ids.shape[1]))
        acts = torch.stack([rule(ids) for rule in self.rules], dim=-1)
        norms = torch.ones(ids.shape)
        for token, norm in self.norms.items():
            norms[ids == token] = norm
        visit(layers[0], acts, norms[..., None])

    def sister_site(self) -> str | None:
        return self.sister.site if self.sister else None

    def at(self, site: str) -> Fake:
        assert self.sister is not None and site == self.sister.site
        return self.sister


@cache
def corpus(n: int = 120, seed: int = 0) -> pa.Table:
    """One sample a document: a cue behind which anything may stand, and `dog` or, in every second one, some animal."""
    rng = random.Random(seed)
    texts = []
    for i in range(n):
        words = [rng.choice(FILLERS) for _ in range(SIZE)]
        first, second = rng.sample(range(8, 30), 2)
        words[first], words[second] = rng.choice(LISTS["animals"]) if i % 2 else "dog", CUE
        texts.append(" ".join(words))
    table = pa.concat_tables(list(number([cut(TOKENIZER, texts, 64, BOS, 10**6)], 10**6, True)))
    return table.set_column(2, "split", pa.array(["explain"] * table.num_rows))


def scan(
    subject: Any, samples: pa.Table, layer: int = 0, decoys: Any = None, units: Sequence[int] | None = None
) -> tuple[pa.Table, pa.Table]:
    """`exemplars` (top and random) and `statistics` of some or all units, one sample a pass."""
    names = ["sample", "token_ids", "document"]
    best: list[tuple[int, int, Tensor, Tensor, Tensor]] = []
    for sample, ids, document in zip(*(samples[name].to_pylist() for name in names), strict=True):
        def visit(_layer: int, acts: Tensor, _resid: Tensor, sample: int = sample, ids: list[int] = ids,
                  document: int = document) -> None:  # fmt: skip
            acts = acts if decoys is None else decoys(acts)
            special = torch.isin(torch.tensor(ids), torch.tensor(sorted(subject.special_ids)))
            values, at = acts[0].float().masked_fill(special[:, None], -torch.inf).max(0)
            best.append((sample, document, values.clone(), at.clone(), acts[0, 1:].float().clone()))

        subject.run(torch.tensor([ids]), [layer], visit)
    rows, statistics = [], []
    maxima = torch.stack([b[2] for b in best])
    for unit in range(maxima.shape[1]) if units is None else units:
        order = torch.argsort(-maxima[:, unit], stable=True).tolist()
        drawn = np.random.default_rng(0).permutation(len(best))[:RANDOM].tolist()
        for sampling, chosen in (("top", order[:TOP]), ("random", drawn)):
            for rank, i in enumerate(chosen):
                sample, document, values, at, series = best[i]
                rows.append({"neuron": unit, "polarity": 1, "sampling": sampling, "split": "explain", "rank": rank,
                             "sample": sample, "activation": float(values[unit]), "start": 1,
                             "position": int(at[unit]) - 1, "document": document,
                             "activations": series[:, unit].tolist()})  # fmt: skip
        statistics.append({"neuron": unit, "polarity": 1, "max": float(maxima[:, unit].max()), "mean": 0.0})
    if decoys is not None:
        rows, statistics = ([{**row, "control": "decoy"} for row in part] for part in (rows, statistics))
    tables = [pa.Table.from_pylist(part, schema(name, decoys is not None))
              for part, name in ((rows, "exemplars"), (statistics, "statistics"))]  # fmt: skip
    return tables[0], tables[1]


@cache
def substitutes() -> Substitutes:
    return Substitutes(background(n=400, size=60), 0)


@dataclass
class Given:
    """Always the same substitutes."""

    near: list[str]
    far: list[str]

    def neighbours(self, words: Sequence[str], k: int) -> list[list[str]]:
        return [[s for s in self.near if s != word][:k] for word in words]

    def among(self, group: Sequence[str], k: int) -> list[list[str]]:
        return self.neighbours(group, k)

    def random(self, words: Sequence[str], k: int) -> list[list[str]]:
        return [[s for s in self.far if s != word][:k] for word in words]


def make_plan(exemplars: pa.Table, samples: pa.Table, substitutes: Any, **changes: Any) -> Plan:
    config = VerifyConfig(**{k: changes.pop(k) for k in ("synonyms", "max_variants") if k in changes})
    arguments = {"window": WINDOW, "special_ids": {BOS}, "seed": 0} | changes
    return plan_variants(exemplars, samples, substitutes, Splicer(TOKENIZER, [BOS]), config, **arguments)


RULES = {
    "concept": on_words(LISTS["animals"]),
    "token": on_words(["dog"]),
    "context": behind(CUE),
    "none": by_first_word,
}


class Known(NamedTuple):
    """What the units of RULES give, in their order."""

    exemplars: pa.Table
    statistics: pa.Table
    rows: pa.Table
    variants: pa.Table
    verifications: pa.Table


@cache
def known() -> Known:
    subject = Fake(list(RULES.values()))
    exemplars, statistics = scan(subject, corpus())
    rows, failures = measure(subject, 0, make_plan(exemplars, corpus(), substitutes()))
    assert failures == []
    return Known(exemplars, statistics, rows, *causal.summarise(rows, exemplars, statistics, layer=0, seed=0))

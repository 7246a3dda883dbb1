"""Descents in the concept's slot: the published recipe as it was, Gumbel descent, and one-hot gradients.

All run several units side by side, in shared forward passes. Units touch each other's results by rounding only, which the
many steps of a descent can enlarge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raylabel.models.concept import Answers, Concept, Read, Settings, Unit
from raylabel.models.judge import Words
from raylabel.models.objective import Terms, class_weights, example_loss, regularisers


@dataclass(frozen=True)
class Recipe:
    """The published recipe's settings; it was run with lr 0.02 to 0.5, batches of 10 to 30 and 40 to 2,500 steps."""

    steps: int = 150
    batch: int = 20
    lr: float = 0.3
    c_label: float = 1.0
    c_entropy: float = 0.02
    c_kl: float = 0.02
    seed: int = 0


def descend(
    judge: Answers, cached: Read, units: Sequence[Unit], texts: Sequence[str], recipe: Recipe | None = None, top: int = 5
) -> list[Concept]:
    """The method `descent`, as published (seamus-fallows/ARENA-Hackathon, `lib/Llama_Leaner.py`), nothing added.

    Logits z over the whole vocabulary, special tokens included, start at N(0, 1); AdamW with its default decay follows
    c_label · CE + c_kl · KL + c_entropy · H on batches drawn with replacement, yes and no with probability 1/2 each. CE is
    over the full vocabulary, against the one token of yes or no. What is reported is p = softmax(z) itself: its `top`
    words, their probabilities, and the terms of p on all examples (there CE is over the full vocabulary too). Nothing is
    evaluated one-hot.

    Args:
        texts: [vocabulary] what each token is called.
    """
    recipe = recipe or Recipe()
    embeddings = judge.embed(torch.arange(judge.size)).float()
    device, n = embeddings.device, len(units)
    generators = [unit.generator(recipe.seed) for unit in units]
    z = torch.stack([torch.randn(judge.size, generator=g) for g in generators]).to(device).requires_grad_()
    optimiser = torch.optim.AdamW([z], lr=recipe.lr)
    for _ in range(recipe.steps):
        rows, labels = _draw(units, recipe.batch, generators, device)
        log_p = z.log_softmax(-1)
        vectors = (log_p.exp() @ embeddings).repeat_interleave(recipe.batch, 0)
        ce = _full_loss(judge, judge.soft(cached, rows, vectors), labels).reshape(n, -1).mean(1)
        terms = Terms(recipe.c_label * ce, *regularisers(log_p, cached.prior[rows].reshape(n, recipe.batch, -1).mean(1)))
        optimiser.zero_grad()
        terms.total(recipe.c_entropy, recipe.c_kl).sum().backward()
        optimiser.step()
    with torch.no_grad():
        log_p = z.log_softmax(-1)
        concepts = []
        for own, unit in zip(log_p, units, strict=True):
            rows, labels = unit.rows.to(device), unit.labels.to(device)
            vectors = (own.exp() @ embeddings).expand(len(rows), -1)
            ce = _full_loss(judge, judge.soft(cached, rows, vectors), labels) @ class_weights(labels)
            entropy, kl = regularisers(own, cached.prior[rows].mean(0))
            weights, ids = own.exp().topk(min(top, judge.size))
            names = [texts[i] for i in ids.tolist()]
            concepts.append(Concept(
                names, weights.tolist(), float(ce), float(entropy), float(kl), "descent", 0, vector=own.exp() @ embeddings
            ))  # fmt: skip
    return concepts


def gumbel(
    judge: Answers, cached: Read, units: Sequence[Unit], settings: Settings, words: Words, top: int = 8
) -> list[list[int]]:
    """Indices into `words`, a list a unit: the likeliest of each restart in turn.

    Straight-through Gumbel-softmax (Jang et al. 2017; Bengio et al. 2013): each step puts one sampled word into the slot
    and sends the gradient through the softmax, whose temperature falls from `hot` to `cold`. The objective's three terms
    are those of softmax(z).
    """
    embeddings = judge.embed(words.ids).float()
    device, n = embeddings.device, len(units) * settings.restarts
    generators = [unit.generator(settings.seed) for unit in units]
    z = torch.zeros(n, len(words.texts), device=device, requires_grad=True)
    optimiser = torch.optim.Adam([z], lr=settings.lr)
    means = torch.stack([cached.prior[unit.rows.to(device)].mean(0)[words.ids] for unit in units])
    log_q = means.repeat_interleave(settings.restarts, 0)
    for step in range(settings.steps):
        done = step / max(1, settings.steps - 1)
        warmth = settings.hot * (settings.cold / settings.hot) ** done
        blank = z.new_empty(settings.restarts, z.shape[1], device="cpu")
        noise = torch.cat([-blank.exponential_(generator=g).log() for g in generators]).to(device)
        soft = ((z + noise) / warmth).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(-1, keepdim=True), 1.0)
        vectors = (hard + soft - soft.detach()) @ embeddings
        rows, labels = _draw(units, settings.restarts * settings.batch, generators, device)
        odds = judge.odds(judge.soft(cached, rows, vectors.repeat_interleave(settings.batch, 0)))
        ce = example_loss(odds, labels).reshape(n, -1).mean(1)
        terms = Terms(ce, *regularisers(z.log_softmax(-1), log_q))
        optimiser.zero_grad()
        begun = settings.c_entropy if settings.c_entropy_start is None else settings.c_entropy_start
        terms.total(begun + (settings.c_entropy - begun) * done, settings.c_kl).sum().backward()
        optimiser.step()
    best = z.detach().topk(min(top, z.shape[1])).indices.reshape(len(units), settings.restarts, -1)
    return [list(dict.fromkeys(own.T.flatten().tolist())) for own in best]


def gradients(
    judge: Answers, cached: Any, units: Sequence[Unit], bases: Tensor, words: Words, top: int
) -> list[list[int]]:  # fmt: skip
    """Indices into `words`, a list a unit: those that lower the cross-entropy most, to first order around a vector.

    Args:
        bases: [units, width], the vectors in the slot at which the gradients are taken.
    """
    embeddings = judge.embed(words.ids).float()
    device = embeddings.device
    sizes = torch.tensor([len(unit.rows) for unit in units])
    owner = torch.arange(len(units)).repeat_interleave(sizes).to(device)
    rows = torch.cat([unit.rows for unit in units]).to(device)
    labels = torch.cat([unit.labels for unit in units]).to(device)
    weights = torch.cat([class_weights(unit.labels) for unit in units]).to(device)
    vectors = bases.detach().to(device, torch.float32).requires_grad_()
    odds = judge.odds(judge.soft(cached, rows, vectors[owner]))
    (slope,) = torch.autograd.grad((example_loss(odds, labels) * weights).sum(), vectors)
    found = (-slope @ embeddings.T).topk(min(top, len(words.texts))).indices
    return [own.tolist() for own in found]


def _draw(
    units: Sequence[Unit], count: int, generators: Sequence[torch.Generator], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(rows, labels), each [units * count]: examples with replacement, each label with probability 1/2."""
    rows, labels = [], []
    for unit, generator in zip(units, generators, strict=True):
        yes, no = unit.rows[unit.labels].cpu(), unit.rows[~unit.labels].cpu()
        wanted = torch.rand(count, generator=generator) < 0.5
        place = torch.rand(count, generator=generator)
        rows.append(torch.where(wanted, yes[(place * len(yes)).long()], no[(place * len(no)).long()]))
        labels.append(wanted)
    return torch.cat(rows).to(device), torch.cat(labels).to(device)


def _full_loss(judge: Answers, logits: Tensor, labels: Tensor) -> Tensor:
    """[pairs] cross-entropy over the whole vocabulary, against the first token of each answer."""
    wanted = torch.where(labels, judge.yes[0], judge.no[0])
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="none")

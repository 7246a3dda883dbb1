"""Makes the built-in subject, `raylabel/demo/model/`: a 4-layer SoLU language model of Python's standard library.

    python jobs/train_demo_model.py [--steps N] [--out DIR] [--checkpoint FILE]

Takes the documents of `raylabel.demo.stdlib`, holds 5 % of them out by their hash, trains a byte-level BPE
tokenizer (4,096 entries) and the model on the others, measures both it and an interpolated trigram model on what
was held out, and writes weights (fp16), tokenizer, config and model card. Runs on two CPU cores without a network;
the default number of steps took 36 minutes on two busy cores, a first usable folder is there after two. Seed 0
fixes initial weights and the order of the data; thread count and CPU decide the last bits of sums, so another
machine gives an equally good model, not an identical one. With `--checkpoint` an interrupted training goes on
where it stopped; while the learning rate is flat, `--steps` may be changed between two such runs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import NativeModel, initialize_native_model
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from raylabel.demo import stdlib
from raylabel.models import native

BOS, PAD = "<|bos|>", "<|pad|>"
VOCABULARY, CONTEXT = 4096, 128
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BATCH, PEAK_RATE, WARMUP, DECAY = 32, 3e-3, 300, 0.4
WEIGHT_DECAY, CLIP, SHORTEST_ROW = 0.1, 1.0, 8
FIRST_SNAPSHOT, SNAPSHOT, CHECKPOINT = 90.0, 600.0, 120.0
CHUNK = 256


@dataclass
class Progress:
    """What a checkpoint carries beside weights and optimizer, and what the card reports."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    snapshots: int = 0


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; words, single digits, runs of punctuation and of blanks are split first; BOS is prepended."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each document, without BOS."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def rows(documents: list[np.ndarray], bos: int, pad: int, phases: np.ndarray | None = None) -> np.ndarray:
    """[n, CONTEXT] rows: BOS, then a body of one document; each document's first body has `phase` tokens if given."""
    body = CONTEXT - 1
    bodies: list[np.ndarray] = []
    for index, ids in enumerate(documents):
        first = int(phases[index]) if phases is not None else 0
        starts = [0, *range(first, len(ids), body)] if first else list(range(0, len(ids), body))
        bodies.extend(ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True))
    if phases is not None:
        bodies = [ids for ids in bodies if len(ids) >= SHORTEST_ROW]
    table = np.full((len(bodies), CONTEXT), pad, dtype=np.int64)
    table[:, 0] = bos
    for row, ids in zip(table, bodies, strict=True):
        row[1 : 1 + len(ids)] = ids
    return table


def batches(documents: list[np.ndarray], bos: int, pad: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless [BATCH, CONTEXT] batches; every epoch cuts the documents elsewhere and shuffles the rows."""
    epoch = 0
    while True:
        random = np.random.default_rng([seed, epoch])
        table = rows(documents, bos, pad, random.integers(0, CONTEXT - 1, len(documents)))
        order = random.permutation(len(table))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield torch.from_numpy(table[order[start : start + BATCH]])
        epoch += 1


def new_model(seed: int) -> NativeModel:
    """The untrained model; `seed` fixes its weights."""
    sizes: dict[str, Any] = {"d_model": 128, "n_layers": 4, "n_heads": 4, "d_head": 32, "d_mlp": 512, "n_ctx": CONTEXT}
    config = TransformerBridgeConfig(
        **sizes, d_vocab=VOCABULARY, act_fn="solu_ln", normalization_type="LN", default_prepend_bos=True,
        architecture=native.ARCHITECTURE, seed=seed,
    )
    model = NativeModel(config)
    initialize_native_model(model, config)
    return model


def trunk(model: NativeModel, ids: torch.Tensor) -> torch.Tensor:
    """What the head reads, [rows, positions, d_model]: as in `model(ids)`, with less copying."""
    heads, scale = model.cfg.n_heads, model.cfg.d_head**-0.5
    bias = torch.full((ids.shape[1], ids.shape[1]), -1e9).triu(1)
    assert model.pos is not None
    hidden = model.tok_embed(ids) + model.pos.weight[: ids.shape[1]]
    for block in model.layers:
        normed = block.ln1(hidden)
        query, key, value = (
            part(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in (block.attn.q, block.attn.k, block.attn.v)
        )
        scores = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=scale)
        mixed = (scores.softmax(-1) @ value.flatten(0, 1)).unflatten(0, (-1, heads))
        hidden = hidden + block.attn.o(mixed.transpose(1, 2).flatten(-2))
        hidden = hidden + block.mlp(block.ln2(hidden))
    return model.ln_out(hidden)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ head.T`, gradients included, in chunks: the logits never exist as a whole."""

    @staticmethod
    def forward(ctx, hidden, head, targets, dtype):  # type: ignore[no-untyped-def]
        narrow, total = head.to(dtype), hidden.new_zeros(())
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            inputs, wanted = hidden[part].to(dtype), targets[part, None]
            logits = (inputs @ narrow.T).float()
            spread = logits.logsumexp(-1, keepdim=True)
            total += (spread - logits.gather(1, wanted)).sum()
            slope = logits.sub_(spread).exp_().scatter_add_(1, wanted, -torch.ones_like(spread)).to(dtype)
            grad_hidden[part] = slope @ narrow
            grad_head += slope.T @ inputs
        ctx.save_for_backward(grad_hidden / len(hidden), grad_head / len(hidden))
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None, None


def loss_of(model: NativeModel, ids: torch.Tensor, pad: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Mean nats a token over every position but padding; products in `dtype`, everything else in fp32."""
    targets = ids[:, 1:]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = trunk(model, ids[:, :-1])
    kept = targets != pad
    return HeadLoss.apply(hidden.float()[kept], model.head.weight, targets[kept], dtype)


@torch.no_grad()
def stored_loss(folder: Path, table: np.ndarray, pad: int) -> float:
    """Mean nats a token of a table of rows, under the weights as they were written, in fp32."""
    bridge, total = native.load_native(folder), 0.0
    for start in range(0, len(table), 64):
        ids = torch.from_numpy(table[start : start + 64])
        logits = bridge(ids[:, :-1]).flatten(0, 1)
        total += F.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=pad, reduction="sum").item()
    return total / int((table[:, 1:] != pad).sum())


def rate_at(step: int, steps: int) -> float:
    """The learning rate's share of its peak: linear warmup, flat, then linear decay over the last two fifths."""
    decay = max(1, int(steps * DECAY))
    return min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / decay))


def optimizer_for(model: NativeModel) -> torch.optim.AdamW:
    """AdamW; matrices of the blocks and the head decay, embeddings, norms and biases do not."""
    named = list(model.named_parameters())
    decayed = [value for name, value in named if value.ndim > 1 and name.startswith(("layers", "head"))]
    others = [value for name, value in named if value.ndim <= 1 or not name.startswith(("layers", "head"))]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


class Trigram:
    """Interpolated Kneser-Ney over rows of token ids (PAD ends a row): counts once, any pair of discounts."""

    def __init__(self, table: np.ndarray, pad: int) -> None:
        first, second, third = (part.astype(np.int64) for part in self.positions(table, pad))
        self.triples, counts = np.unique((first * VOCABULARY + second) * VOCABULARY + third, return_counts=True)
        self.counts = counts.astype(np.float64)
        contexts, where = np.unique(self.triples // VOCABULARY, return_inverse=True)
        self.contexts = contexts
        self.context_counts = np.bincount(where, self.counts)
        self.context_kinds = np.bincount(where).astype(np.float64)
        # Lower orders count the different left neighbours of a word, not its occurrences.
        pairs, kinds = np.unique(self.triples % VOCABULARY**2, return_counts=True)
        self.pairs, self.pair_counts = pairs, kinds.astype(np.float64)
        self.word_counts = np.bincount(pairs // VOCABULARY, self.pair_counts, VOCABULARY)
        self.word_kinds = np.bincount(pairs // VOCABULARY, minlength=VOCABULARY).astype(np.float64)
        heads = np.bincount(pairs % VOCABULARY, minlength=VOCABULARY) + 0.1
        self.unigram = heads / heads.sum()

    @staticmethod
    def positions(table: np.ndarray, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The token pairs before each predicted token, and that token; the row's BOS stands in for what is missing."""
        kept = table[:, 1:] != pad
        before = np.concatenate([table[:, :1], table[:, :-2]], axis=1)
        return before[kept], table[:, :-1][kept], table[:, 1:][kept]

    def loss(self, table: np.ndarray, pad: int, low: float, high: float) -> float:
        """Mean nats a token with discount `low` for pairs and `high` for triples."""
        first, second, third = (part.astype(np.int64) for part in self.positions(table, pad))
        seen = np.maximum(self.word_counts[second], 1.0)
        pair = lookup(self.pairs, self.pair_counts, second * VOCABULARY + third)
        backoff = np.where(self.word_counts[second] > 0, low * self.word_kinds[second] / seen, 1.0)
        chance = np.maximum(pair - low, 0.0) / seen + backoff * self.unigram[third]
        context = first * VOCABULARY + second
        total, kinds = (lookup(self.contexts, v, context) for v in (self.context_counts, self.context_kinds))
        triple = lookup(self.triples, self.counts, context * VOCABULARY + third)
        backoff = np.where(total > 0, high * kinds / np.maximum(total, 1.0), 1.0)
        chance = np.maximum(triple - high, 0.0) / np.maximum(total, 1.0) + backoff * chance
        return float(-np.log(chance).mean())


def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where the sorted `keys` lack it."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)


def trigram_loss(training: list[np.ndarray], table: np.ndarray, bos: int, pad: int) -> float:
    """The baseline's mean nats a token on `table`; its discounts are chosen on every 20th training document."""
    slice_, rest = training[::20], [ids for index, ids in enumerate(training) if index % 20]
    tuning, model = rows(slice_, bos, pad), Trigram(rows(rest, bos, pad), pad)
    grid = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]
    low, high = min(((a, b) for a in grid for b in grid), key=lambda pair: model.loss(tuning, pad, *pair))
    return Trigram(rows(training, bos, pad), pad).loss(table, pad, low, high)


def train(
    model: NativeModel, documents: list[np.ndarray], tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> Progress:
    """Trains in place up to `options.steps`, with snapshots in `options.out`, from the checkpoint if there is one."""
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    optimizer, progress = optimizer_for(model), Progress()
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    stream = itertools.islice(batches(documents, bos, pad, options.seed), progress.step, None)
    last = saved = kept = time.monotonic()
    smooth = math.nan
    while progress.step < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate_at(progress.step, options.steps)
        ids = next(stream)
        loss = loss_of(model, ids, pad, torch.bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        now = time.monotonic()
        progress.step += 1
        progress.tokens += int((ids[:, 1:] != pad).sum())
        progress.seconds += now - last
        last = now
        if progress.step % 50 == 0:
            rate = progress.tokens / progress.seconds
            print(f"step {progress.step} loss {smooth:.3f} {progress.seconds:.0f} s {rate:.0f} tokens/s", flush=True)
        if now - saved > (SNAPSHOT if progress.snapshots else FIRST_SNAPSHOT):
            native.save_native(options.out, model, tokenizer)
            progress.snapshots, saved = progress.snapshots + 1, now
        if options.checkpoint and (now - kept > CHECKPOINT or progress.step == options.steps):
            keep(options.checkpoint, model, optimizer, progress)
            kept = now
    return progress


def keep(path: Path, model: NativeModel, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Writes the checkpoint as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save(state, temporary)
    temporary.replace(path)


CARD = """---
license: mit
language: en
library_name: transformer_lens
tags: [solu, interpretability, python]
---

# raylabel's built-in subject

A small decoder language model of Python's standard library, made to be looked into: four layers of SoLU neurons
with the LayerNorm inside the MLP, an architecture chosen because many of its neurons can be read. It is the
`demo` model of raylabel: small enough to be carried in the package, trained well enough that its neurons mean
something. It is no assistant and no code generator.

| | |
|---|---|
| architecture | TransformerLens-native decoder, {parameters:,} parameters, `solu_ln`, LayerNorm, learned positions |
| size | 4 layers, d_model 128, 4 heads of 32, d_mlp 512 (2,048 neurons), context 128, vocabulary {vocabulary:,} |
| tokenizer | byte-level BPE of the training documents, GPT-2-style splitting, single digits; `<|bos|>` is prepended |
| weights | fp16, computed in fp32 |
| data | the standard library of CPython {python}, as `raylabel.demo.stdlib` cuts it: no tests, no licence headers |
| training part | {train_documents:,} documents, {train_tokens:,} tokens |
| held-out part | {held_documents:,} documents, {held_tokens:,} tokens, chosen by a hash of the document's text |
| training | {steps:,} steps of {batch} rows, {seen:,} tokens ({epochs:.1f} epochs) |
| schedule | AdamW, rate 3e-3: warmup, flat, linear decay over the last {decay:.0%} |
| time | {minutes:.0f} minutes of wall clock on {machine}, matrix products in bfloat16 |
| held-out loss | **{loss:.3f}** nats a token, on the stored weights |
| trigram | {trigram:.3f} nats a token (interpolated Kneser-Ney, same tokens, same rows, tuned on training documents) |
| training loss | {train_loss:.3f} nats a token, on every 20th training document |

Every row is BOS and up to 127 tokens of one document; no row crosses documents. Documents of one module can fall
on both sides of the split, so the held-out loss measures unseen text of seen libraries.

The weights are MIT-licensed. The text they were trained on is CPython's, under the PSF licence; it is not part of
this folder.

To make it again (seed {seed} fixes initial weights and data order; threads and processor decide the last bits, so
the losses come out close, not equal): `python jobs/train_demo_model.py --steps {steps}`. Load it with
`raylabel.models.native.load_native("raylabel/demo/model")`.
"""


def main() -> None:
    """Reads the options and makes the folder."""
    parser = argparse.ArgumentParser(description="Trains the built-in subject.")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "raylabel" / "demo" / "model")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts: dict[str, list[str]] = {"train": [], "held-out": []}
    for _, text in stdlib.documents():
        texts[stdlib.split(text)].append(text)
    tokenizer = train_tokenizer(texts["train"])
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    training, held_out = (encode(tokenizer, texts[part]) for part in ("train", "held-out"))
    print(f"{len(training)} documents, {sum(map(len, training))} tokens", flush=True)
    model = new_model(options.seed)
    progress = train(model, training, tokenizer, options)
    native.save_native(options.out, model, tokenizer)
    table = rows(held_out, bos, pad)
    sizes = [len(training), sum(map(len, training)), len(held_out), sum(map(len, held_out))]
    figures: dict[str, Any] = {
        "python": platform.python_version(), "vocabulary": VOCABULARY, "batch": BATCH, "seed": options.seed, "decay": DECAY,
        "parameters": sum(value.numel() for value in model.parameters()),
        **dict(zip(("train_documents", "train_tokens", "held_documents", "held_tokens"), sizes, strict=True)),
        "steps": progress.step, "seen": progress.tokens, "epochs": progress.tokens / sizes[1],
        "minutes": progress.seconds / 60, "machine": f"{options.threads} CPU cores",
        "loss": stored_loss(options.out, table, pad),
        "trigram": trigram_loss(training, table, bos, pad),
        "train_loss": stored_loss(options.out, rows(training[::20], bos, pad), pad),
    }
    (options.out / "README.md").write_text(CARD.format(**figures), encoding="utf-8")
    print(figures, flush=True)


if __name__ == "__main__":
    main()

"""Makes the built-in subject, `raylabel/demo/model/`: a 4-layer SoLU language model of Python's standard library.

    python jobs/train_demo_model.py [--steps N] [--out DIR] [--checkpoint FILE]

Takes the documents of `raylabel.demo.stdlib`, holds 5 % of them out by their hash, trains a byte-level BPE
tokenizer (4,096 entries) and the model on the others, measures both it and an interpolated trigram model on what
was held out, and writes weights (fp16), tokenizer, config and model card. Runs on two CPU cores without a network;
the default number of steps takes about 50 minutes on two cores with AMX, a first usable folder is there after
two. Seed 0 fixes initial weights and the order of the data; thread count and CPU decide the last bits of sums, so
another machine gives an equally good model, not an identical one. With `--checkpoint` an interrupted training
goes on where it stopped; while the learning rate is flat, `--steps` may be changed between two such runs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.sources.native import NativeModel, initialize_native_model
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from raylabel.demo import stdlib  # noqa: E402
from raylabel.models import native  # noqa: E402

BOS, PAD = "<|bos|>", "<|pad|>"
VOCABULARY, CONTEXT = 4096, 128
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BATCH, PEAK_RATE, WARMUP, DECAY = 32, 3e-3, 300, 0.25
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


# --- tokens ---------------------------------------------------------------------------------------------------


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
        tokenizer_object=tokenizer,
        bos_token=BOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
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


# --- model ----------------------------------------------------------------------------------------------------


def new_model(seed: int) -> NativeModel:
    """The untrained model; `seed` fixes its weights."""
    config = TransformerBridgeConfig(
        d_model=128,
        n_layers=4,
        n_heads=4,
        d_head=32,
        d_mlp=512,
        n_ctx=CONTEXT,
        d_vocab=VOCABULARY,
        act_fn="solu_ln",
        normalization_type="LN",
        architecture=native.ARCHITECTURE,
        default_prepend_bos=True,
        seed=seed,
    )
    model = NativeModel(config)
    initialize_native_model(model, config)
    return model


def trunk(model: NativeModel, ids: torch.Tensor) -> torch.Tensor:
    """What the head reads, [rows, positions, d_model]: as in `model(ids)`, with fused attention."""
    heads = model.cfg.n_heads
    assert model.pos is not None
    hidden = model.tok_embed(ids) + model.pos.weight[: ids.shape[1]]
    for block in model.layers:
        normed = block.ln1(hidden)
        query, key, value = (
            part(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in (block.attn.q, block.attn.k, block.attn.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
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
def evaluate(model: NativeModel, table: np.ndarray, pad: int) -> float:
    """Mean nats a token of a table of rows, in fp32."""
    total, count = 0.0, 0
    for start in range(0, len(table), 64):
        ids = torch.from_numpy(table[start : start + 64])
        tokens = int((ids[:, 1:] != pad).sum())
        total += loss_of(model, ids, pad).item() * tokens
        count += tokens
    return total / count


def rate_at(step: int, steps: int) -> float:
    """The learning rate's share of its peak: linear warmup, flat, then linear decay over the last quarter."""
    decay = max(1, int(steps * DECAY))
    return min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / decay))


def optimizer_for(model: NativeModel) -> torch.optim.AdamW:
    """AdamW; matrices of the blocks and the head decay, embeddings, norms and biases do not."""
    decayed = [value for name, value in model.named_parameters() if value.ndim > 1 and name.split(".")[0] in ("layers", "head")]
    chosen = {id(value) for value in decayed}
    others = [value for value in model.parameters() if id(value) not in chosen]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)


# --- the job --------------------------------------------------------------------------------------------------


def train(
    model: NativeModel,
    documents: list[np.ndarray],
    tokenizer: PreTrainedTokenizerFast,
    options: argparse.Namespace,
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
        loss = loss_of(model, ids, pad)
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


def main() -> None:
    """Reads the options and makes the folder."""
    parser = argparse.ArgumentParser(description="Trains the built-in subject.")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "raylabel" / "demo" / "model")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = {"train": [], "held-out": []}
    for _, text in stdlib.documents():
        texts[stdlib.split(text)].append(text)
    tokenizer = train_tokenizer(texts["train"])
    training, held_out = (encode(tokenizer, texts[part]) for part in ("train", "held-out"))
    print(f"{len(training)} documents, {sum(map(len, training))} tokens", flush=True)
    model = new_model(options.seed)
    progress = train(model, training, tokenizer, options)
    native.save_native(options.out, model, tokenizer)
    table = rows(held_out, tokenizer.bos_token_id, tokenizer.pad_token_id)
    print(f"held-out {evaluate(model, table, tokenizer.pad_token_id):.4f}", progress, flush=True)


if __name__ == "__main__":
    main()

"""The models that are measured: the demo model by name, and random ones of known shapes, saved as folders.

Weights are Gaussian, 1/sqrt(inputs) wide, those that write into the residual stream narrower still, so that
pre-activations have a spread of about one in every layer: neither dead nor saturated. Tokenizers are byte-level BPEs of
the standard library's text. `long_corpus` joins that text to documents that fill samples of any length.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raylabel.demo.stdlib import documents

MARK = "<|endoftext|>"
WRITERS = ("c_proj.weight", "o_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Shape:
    """A random model: `words` is what rows of a table call it."""

    words: str
    kind: str
    layers: int
    width: int
    inner: int
    heads: int
    groups: int
    vocabulary: int
    positions: int
    dtype: torch.dtype = torch.float32


SHAPES = {
    "gpt2": Shape("GPT-2-small-shaped, random weights", "gpt2", 12, 768, 3072, 12, 12, 50257, 1024),
    "llama": Shape("Llama-shaped gated, random weights", "llama", 12, 1024, 2816, 16, 4, 32000, 2048),
    "llama-8b": Shape("Llama-3.1-8B-shaped, random weights", "llama", 32, 4096, 14336, 32, 8, 128256, 8192, torch.bfloat16),
    "tiny-gpt2": Shape("tiny GPT-2", "gpt2", 2, 32, 64, 2, 2, 2000, 1024),
    "tiny-llama": Shape("tiny Llama", "llama", 2, 32, 64, 4, 2, 2000, 2048),
}


def words(name: str) -> str:
    """What a table calls the model."""
    return "demo model" if name == "demo" else SHAPES[name].words


def build(name: str, folder: Path, device: str = "cpu", seed: int = 0) -> str:
    """A model's name or folder; what is there already is not made again."""
    if name == "demo":
        return name
    shape, target = SHAPES[name], folder / "models" / name
    if (target / "tokenizer.json").exists():
        return str(target)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(_config(shape), dtype=shape.dtype)
    _randomise(model, shape.layers, seed)
    model.save_pretrained(target)
    _tokenizer(shape).save_pretrained(target)
    return str(target)


def _config(shape: Shape) -> Any:
    from transformers import GPT2Config, LlamaConfig

    if shape.kind == "gpt2":
        return GPT2Config(
            vocab_size=shape.vocabulary, n_positions=shape.positions, n_embd=shape.width, n_layer=shape.layers,
            n_head=shape.heads, n_inner=shape.inner, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        max_position_embeddings=shape.positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def _randomise(model: torch.nn.Module, layers: int, seed: int) -> None:
    done: set[int] = set()
    for name, module in sorted(model.named_modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or id(weight) in done:
            continue
        done.add(id(weight))
        inputs = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
        spread = 1.0 if isinstance(module, torch.nn.Embedding) else 1 / math.sqrt(inputs)
        if name.endswith("wpe"):
            # Else units would fire on positions and not on words.
            spread = 0.1
        if f"{name}.weight".endswith(WRITERS):
            spread /= math.sqrt(2 * layers)
        generator = torch.Generator(weight.device).manual_seed(seed + len(done))
        weight.normal_(0.0, spread, generator=generator)


def _tokenizer(shape: Shape) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(shape.vocabulary, 50257), special_tokens=[MARK], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator((text for _, text in documents()), trainer)
    if shape.kind == "llama":
        bpe.post_processor = processors.TemplateProcessing(single=f"{MARK} $A", special_tokens=[(MARK, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=MARK, eos_token=MARK)


def long_corpus(folder: Path, characters: int) -> Path:
    """A .jsonl file of the standard library's text in documents of at least so many characters."""
    path = folder / f"corpus-{characters}.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        held: list[str] = []
        for _, text in documents():
            held.append(text)
            if sum(map(len, held)) >= characters:
                file.write(json.dumps({"text": "\n\n".join(held)}) + "\n")
                held = []
    return path

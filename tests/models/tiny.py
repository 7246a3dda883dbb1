"""Tiny random models of every supported family and a small tokenizer, saved as folders; no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils import logging

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "a cat sat on a mat"]
LAYERS, WIDTH, INNER, POSITIONS = 3, 16, 40, 32

_ROPE = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = dict(_ROPE, num_key_value_heads=2)
_GEMMA = dict(_GROUPED, head_dim=4, tie_word_embeddings=True)
_GPT = {
    "n_layer": LAYERS,
    "n_embd": WIDTH,
    "n_head": 4,
    "n_inner": INNER,
    "n_positions": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (GPT2Config, _GPT),
    "gpt_neo": (
        GPTNeoConfig,
        {
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
            "max_position_embeddings": POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gptj": (GPTJConfig, dict(_GPT, rotary_dim=4)),
    "gpt_neox": (GPTNeoXConfig, dict(_ROPE, use_parallel_residual=True)),
    "gpt_neox-serial": (GPTNeoXConfig, dict(_ROPE, use_parallel_residual=False)),
    "phi": (PhiConfig, _ROPE),
    "llama": (LlamaConfig, _GROUPED),
    "mistral": (MistralConfig, dict(_GROUPED, sliding_window=5)),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, dict(_GROUPED, head_dim=4)),
    "gemma": (GemmaConfig, _GEMMA),
    "gemma2": (Gemma2Config, dict(_GEMMA, sliding_window=5, attn_logit_softcapping=1.0)),
    "gemma3_text": (Gemma3TextConfig, dict(_GEMMA, sliding_window=5)),
    "olmo": (OlmoConfig, _GROUPED),
    "olmo2": (Olmo2Config, _GROUPED),
    "olmo3": (Olmo3Config, dict(_GROUPED, sliding_window=5)),
}


def tokenizer(bos: bool = True, special: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 290 tokens; with `bos` it puts <s> first, without `special` it has no BOS."""
    names = ["<pad>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXT, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    marks = {"bos_token": "<s>"} if special else {}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>", **marks)


def save(family: str, folder: Path, seed: int = 0, vocabulary: int = 300, **tokens: bool) -> Path:
    """A folder as `save_pretrained` leaves it; every parameter is random, norms and biases included."""
    logging.disable_progress_bar()
    if family == "gemma3":
        model: Any = Gemma3ForConditionalGeneration(_gemma3(vocabulary))
    else:
        kind, settings = FAMILIES[family]
        model = AutoModelForCausalLM.from_config(kind(vocab_size=vocabulary, **settings))
    randomise(model, seed)
    model.save_pretrained(folder)
    tokenizer(**tokens).save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def ids(batch: int = 3, length: int = 12, vocabulary: int = 280, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def _gemma3(vocabulary: int) -> Gemma3Config:
    text = Gemma3TextConfig(vocab_size=vocabulary, **_GEMMA)
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 14,
        "patch_size": 7,
    }
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=290,
        eoi_token_index=291,
        image_token_index=292,
    )

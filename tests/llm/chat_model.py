"""Tiny chat models as folders: one whose answers are noise, and one that always gives the same answer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models.test_judge import tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_chat(folder: Path, answer: str | None = None, chat: str | None = CHAT, positions: int = 8192) -> Path:
    """A model of transformers. `answer` is one token of its own, after which the model ends; None: random weights."""
    known = tokenizer(chat)
    if answer is not None:
        known.add_tokens([answer])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(known), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=positions, tie_word_embeddings=False,
    ))  # fmt: skip
    if answer is not None:
        # The layers add nothing: what comes next depends on the last token alone.
        given = known.convert_tokens_to_ids(answer)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            for table in (model.model.embed_tokens.weight, model.lm_head.weight):
                table.zero_()
            model.model.embed_tokens.weight[:, 0] = 1
            model.model.embed_tokens.weight[given] = torch.eye(16)[1]
            model.lm_head.weight[given, 0] = 1
            model.lm_head.weight[known.eos_token_id, 1] = 1
    # A model of random weights would go on until its limit.
    model.generation_config.eos_token_id = known.eos_token_id if answer is not None else list(range(0, len(known), 4))
    model.save_pretrained(folder)
    known.save_pretrained(folder)
    return folder

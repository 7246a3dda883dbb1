"""A small word-level judge that is trained in seconds on categories of words and saved as a folder."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raylabel.models.judge_check import PAIRS

TEMPLATE = "text |text| word |token| concept |concept| ? Answer :"
BASE = ["<unk>", "<pad>", "text", "word", "concept", "?", "Answer", ":", "yes", "no"]


def train_judge(folder: Path, categories: dict[str, list[str]], fill: list[str], steps: int = 400, seed: int = 0) -> Path:
    """Saves a judge that knows which words are of which category, those of the pairs with known answers among them."""
    known = {name: list(own) for name, own in categories.items()}
    for word, _, concept, yes in PAIRS:
        if yes:
            known.setdefault(concept, []).append(word)
    of = [(word, name) for name, own in known.items() for word in own]
    names = list(known)
    vocabulary = list(dict.fromkeys([*BASE, *names, *(word for word, _ in of), *fill]))
    ids = {word: i for i, word in enumerate(vocabulary)}
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.06, max_position_embeddings=256, pad_token_id=1,
    ))  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        length, rows, answers = draw.choice((3, 6, 10)), [], []
        for _ in range(64):
            word, own = draw.choice(of)
            yes = draw.random() < 0.5
            wrong = [name for name in names if word not in known[name]]
            asked = own if yes else draw.choice(vocabulary[len(BASE) + len(names) :] if draw.random() < 0.3 else wrong)
            text = [word, *(draw.choice(fill) if draw.random() < 0.5 else "<unk>" for _ in range(length - 1))]
            draw.shuffle(text)
            rows.append([ids[w] for w in ("text", *text, "word", word, "concept", asked, "?", "Answer", ":")])
            answers.append(ids["yes" if yes else "no"])
        loss = cross_entropy(model(torch.tensor(rows)).logits[:, -1], torch.tensor(answers))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    return folder

"""Makes the built-in judge, `raylabel/demo/judge/`: a small Llama that says whether a word represents a concept.

    python jobs/train_demo_judge.py [--steps N] [--out DIR] [--checkpoint FILE]

Takes `raylabel.demo.taught` (categories and words), the windows of `raylabel.demo.stdlib`'s training documents, and the
lessons of `judge_lessons`; writes weights (fp16), tokenizer, config and model card, with what it measured on words and
texts that no lesson had. One text with its words and their concepts is one row: branches of a tree that see the text and
themselves only, so that a forward pass answers two dozen questions. Beside the answers the model learns which concepts may
follow at the slot. Runs on a CPU core without a network. Seed 0 fixes first weights and lessons; threads and processor decide
the last bits of sums. With `--checkpoint` an interrupted training goes on where it stopped, with lessons drawn anew.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import judge_measure
from judge_card import card
from judge_lessons import OTHERS, PHRASES, TEMPLATES, Lessons

from raylabel.demo import stdlib
from raylabel.demo.taught import Taught, held_out
from raylabel.models.judge import Judge, load_judge
from raylabel.models.judge_prompt import TEMPLATE

BOS, PAD, UNK = "<|bos|>", "<|pad|>", "<|unk|>"
PATTERN = r" ?[\p{L}\p{N}]{1,64}(?:['’][\p{L}\p{N}]{1,64})*| ?[^\s\p{L}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"
SEEN_OFTEN, MOST_OFTEN, PIECES = 20, 1500, 1200
BATCH, PEAK_RATE, WARMUP, DECAY, ALIKE = 8, 2e-3, 100, 0.5, 32
WEIGHT_DECAY, CLIP, SMOOTH, SLOT, EARLY, STRUCTURE, MATCH = 0.05, 1.0, 0.01, 0.1, 0.5, 0.04, 4.0


def make_tokenizer(taught: Taught, texts: list[str]) -> PreTrainedTokenizerFast:
    """Whole words, else the longest pieces: what begins with a space is a whole word and nothing else.

    Words of categories and of the prompt, their names, what the texts have most often, pieces of words, and all bytes.
    Numbers of several digits are never whole.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counts = Counter(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    phrases = " ".join([TEMPLATE, "yes no Yes No", *TEMPLATES, *PHRASES, *OTHERS])
    prompt = [piece for piece, _ in split.pre_tokenize_str(phrases)]
    listed = [*taught.names, *taught.words, *(word for c in taught.categories for word in c.label.split())]
    listed += [word.capitalize() for word in taught.words if word.islower() and counts["Ġ" + word.capitalize()] >= SEEN_OFTEN]
    whole = [split.pre_tokenize_str(" " + word) for word in listed]
    kept = [pieces[0][0] for pieces in whole if len(pieces) == 1]
    kept += [piece for piece, _ in counts.most_common(MOST_OFTEN)]
    # Pieces without a space in front, from a byte-pair encoding of the texts' words.
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2 * PIECES, initial_alphabet=alphabet, show_progress=False)
    pairs.train_from_iterator(texts, trainer)
    order = pairs.get_vocab()
    kept += [piece for piece in sorted(order, key=order.__getitem__) if not piece.startswith("Ġ")][:PIECES]
    kept += [f"Ġ{c}" for c in "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    plain = [piece for piece in [*prompt, *kept] if sum(c.isdigit() for c in piece) < 2 or not piece.strip("Ġ").isdigit()]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([BOS, PAD, UNK, *sorted(alphabet), *plain]))}
    tokenizer = Tokenizer(
        models.WordPiece(vocabulary, unk_token=UNK, continuing_subword_prefix="", max_input_chars_per_word=512)
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def new_model(vocabulary: int, seed: int, width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=1024, bos_token_id=0, eos_token_id=None, pad_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def seed_embeddings(model: LlamaForCausalLM, judge: Judge, taught: Taught, seed: int) -> None:
    """Begins with what the categories say: words and names near the random vectors of their categories, held-out words not.

    What is left to learn is to compare, and whatever one vector a category cannot hold.
    """
    weights: Tensor = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    sums: dict[int, Tensor] = {}
    for category in taught.categories:
        vector = torch.randn(weights.shape[1], generator=generator)
        own = {name for given in category.names for name in (given, given.lower(), given.capitalize())}
        own |= {form for word in category.words if not held_out(word) for form in (word, word.lower(), word.capitalize())}
        for ids in {judge.encode(word) or tuple(judge._following("a", f" {word}")) for word in own}:
            if len(ids) == 1:
                sums[ids[0]] = sums.get(ids[0], torch.zeros_like(vector)) + vector
    for i, total in sums.items():
        weights[i] += STRUCTURE * total / total.norm() * weights.shape[1] ** 0.5
    # Some heads begin by attending to what resembles: a concept to a word of its category, the answer's first clue.
    for layer in model.model.layers[:2]:
        half = layer.self_attn.q_proj.weight.shape[0] // 2
        layer.self_attn.q_proj.weight[:half] *= MATCH
        layer.self_attn.k_proj.weight[:half] = layer.self_attn.q_proj.weight[:half]


@dataclass
class Rows:
    """A batch of trees. `answers` and `slots` are (row, position) of what is predicted there."""

    ids: Tensor
    positions: Tensor
    allowed: Tensor
    """[rows, 1, tokens, tokens] bool."""
    answers: Tensor
    shares: Tensor
    slots: Tensor
    follows: Tensor
    """[slots, most] ids that may follow, -1 for none."""
    tail: int
    """Tokens between a concept and its answer."""


class Trees:
    """Lessons as batches."""

    def __init__(self, judge: Judge, lessons: Lessons) -> None:
        self.judge, self.lessons = judge, lessons
        self.ids: dict[tuple[str, str], list[int]] = {}
        self.ready: list[list[tuple[list[int], list[int], list[int], list[int], list[tuple[int, float]], list[Any]]]] = []
        self.head, self.middle, self.between = judge._frame[0], judge._frame[2], judge._frame[4]

    def following(self, anchor: str, text: str) -> list[int]:
        key = (anchor, text)
        if key not in self.ids:
            self.ids[key] = self.judge._following(anchor, text)
        return self.ids[key]

    def batch(self, rng: random.Random, size: int) -> Rows:
        if not self.ready:
            drawn = sorted((self.tree(rng) for _ in range(ALIKE * size)), key=lambda row: len(row[0]))
            self.ready = [drawn[i : i + size] for i in range(0, len(drawn), size)]
            rng.shuffle(self.ready)
        rows = self.ready.pop()
        longest = max(len(row[0]) for row in rows)
        shape = (size, longest)
        ids, positions, branch, tail = (torch.zeros(shape, dtype=torch.long) for _ in range(4))
        branch -= 1
        answers: list[tuple[int, int]] = []
        slots: list[tuple[int, int]] = []
        shares: list[float] = []
        follows: list[list[int]] = []
        for i, (tokens, places, branches, tails, asked, at_slot) in enumerate(rows):
            n = len(tokens)
            ids[i, :n], positions[i, :n] = torch.tensor(tokens), torch.tensor(places)
            branch[i, :n], tail[i, :n] = torch.tensor(branches), torch.tensor(tails)
            answers += [(i, place) for place, _ in asked]
            shares += [share for _, share in asked]
            slots += [(i, place) for place, _ in at_slot]
            follows += [found for _, found in at_slot]
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        b, t = branch[:, None, :], tail[:, None, :]
        allowed = causal & ((b == 0) | ((b == branch[:, :, None]) & ((t == 0) | (t == tail[:, :, None]))))
        allowed |= torch.eye(longest, dtype=torch.bool)
        most = max(map(len, follows))
        padded = torch.tensor([found + [-1] * (most - len(found)) for found in follows])
        found = (torch.tensor(answers), torch.tensor(shares), torch.tensor(slots), padded)
        return Rows(ids, positions, allowed[:, None], *found, len(self.judge._tail))

    def tree(self, rng: random.Random) -> tuple[list[int], list[int], list[int], list[int], list[tuple[int, float]], list]:
        lesson, judge = self.lessons.draw(rng), self.judge
        trunk = judge._bos + judge._ids(self.head + lesson.text + self.middle.removesuffix(" "))
        tokens, places = list(trunk), list(range(len(trunk)))
        branches, tails = [0] * len(trunk), [0] * len(trunk)
        asked, at_slot = [], []
        for b, (word, questions) in enumerate(lesson.words, 1):
            stem = self.following("word", f" {word}") + self.following("a", self.between.removesuffix(" "))
            start = len(trunk)
            tokens += stem
            places += range(start, start + len(stem))
            branches += [b] * len(stem)
            tails += [0] * len(stem)
            found = sorted({i for name in self.names_of(word) for i in self.following("concept", f" {name}")[:1]})
            if found:
                at_slot.append((len(tokens) - 1, found))
            start += len(stem)
            for t, (concept, share) in enumerate(questions, 1):
                leaf = self.following("concept", f" {concept}") + judge._tail
                tokens += leaf
                places += range(start, start + len(leaf))
                branches += [b] * len(leaf)
                tails += [t] * len(leaf)
                asked.append((len(tokens) - 1, share))
        return tokens, places, branches, tails, asked, at_slot

    def names_of(self, word: str) -> list[str]:
        return [name for category in self.lessons.taught.of_word.get(word.casefold(), []) for name in category.names]


def losses(model: LlamaForCausalLM, rows: Rows, yes: int, no: int) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy of the answers, of the slots, share of answers on the right side)."""
    hidden = model.model(input_ids=rows.ids, attention_mask=rows.allowed, position_ids=rows.positions, use_cache=False)[0]
    head = model.lm_head.weight
    logits = model.lm_head(hidden[rows.answers[:, 0], rows.answers[:, 1]]).float().log_softmax(-1)
    wanted = SMOOTH + (1 - 2 * SMOOTH) * rows.shares
    answer = -(wanted * logits[:, yes] + (1 - wanted) * logits[:, no]).mean()
    # Where the concept ends, the answer can be known: asked for there too, it is found sooner.
    early = hidden[rows.answers[:, 0], rows.answers[:, 1] - rows.tail] @ (head[yes] - head[no])
    answer = answer + EARLY * F.binary_cross_entropy_with_logits(early, wanted)
    right = ((logits[:, yes] > logits[:, no]) == (rows.shares > 0.5)).float().mean()
    at_slot = model.lm_head(hidden[rows.slots[:, 0], rows.slots[:, 1]]).float().log_softmax(-1)
    there = rows.follows >= 0
    slot = -(at_slot.gather(1, rows.follows.clamp(min=0)) * there).sum(1) / there.sum(1)
    return answer, slot.mean(), right


def rate_at(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP, max(0.0, (steps - step) / max(1, int(steps * DECAY))))


def train(model: LlamaForCausalLM, trees: Trees, options: argparse.Namespace) -> dict[str, Any]:
    judge, rng = trees.judge, random.Random(options.seed)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if p.ndim > 1 and "embed" not in n], "weight_decay": WEIGHT_DECAY},
        {"params": [p for n, p in named if p.ndim <= 1 or "embed" in n], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    done, questions, seconds = 0, 0, 0.0
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done, questions, seconds = state["done"], state["questions"], state["seconds"]
        rng = random.Random(f"{options.seed} {done}")
    begun = kept = time.monotonic()
    smooth: list[float] = []
    yes, no = int(judge.yes[0]), int(judge.no[0])
    for p in model.parameters():
        p.requires_grad_(True)
    model.train()
    for step in range(done, options.steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * rate_at(step, options.steps)
        rows = trees.batch(rng, BATCH)
        answer, slot, right = losses(model, rows, yes, no)
        (answer + SLOT * slot).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        questions += len(rows.shares)
        figures = [float(answer.detach()), float(slot.detach()), float(right)]
        smooth = [0.98 * a + 0.02 * b for a, b in zip(smooth, figures, strict=True)] if smooth else figures
        if (step + 1) % 50 == 0:
            now = seconds + time.monotonic() - begun
            print(f"step {step + 1} " + " ".join(f"{x:.3f}" for x in smooth) + f" {now:.0f} s {questions}", flush=True)
        if options.checkpoint and (time.monotonic() - kept > 120 or step + 1 == options.steps):
            kept = time.monotonic()
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "done": step + 1,
                     "questions": questions, "seconds": seconds + kept - begun}  # fmt: skip
            torch.save(state, options.checkpoint.with_suffix(".tmp"))
            options.checkpoint.with_suffix(".tmp").replace(options.checkpoint)
    model.eval().requires_grad_(False)
    return {"questions": questions, "seconds": seconds + time.monotonic() - begun, "steps": [options.steps]}


def average(model: LlamaForCausalLM, files: list[Path]) -> dict[str, Any]:
    """Gives the model the mean of checkpoints' weights, which does what a falling learning rate does."""
    states = [torch.load(file, weights_only=True) for file in files]
    means = {name: torch.stack([state["model"][name] for state in states]).mean(0) for name in states[0]["model"]}
    model.load_state_dict(means)
    model.eval().requires_grad_(False)
    return {"questions": states[-1]["questions"], "seconds": states[-1]["seconds"], "steps": [s["done"] for s in states]}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights as fp16 beside config, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)


def main() -> None:
    """Reads the options and makes the folder."""
    parser = argparse.ArgumentParser(description="Trains the built-in judge.")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "raylabel" / "demo" / "judge")
    parser.add_argument("--checkpoint", type=Path, default=None)
    parser.add_argument("--average", type=Path, nargs="+", metavar="FILE", help="train no more: the mean of these checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    taught = Taught()
    texts: dict[str, list[str]] = {"train": [], "held-out": []}
    for _, text in stdlib.documents():
        texts[stdlib.split(text)].append(text)
    tokenizer = make_tokenizer(taught, texts["train"])
    model = new_model(len(tokenizer), options.seed, options.width, options.layers)
    judge = Judge(model, tokenizer, name="demo")
    seed_embeddings(model, judge, taught, options.seed)
    lessons = Lessons(taught, texts["train"])
    made = average(model, options.average) if options.average else train(model, Trees(judge, lessons), options)
    made["temperature"] = judge_measure.fit_temperature(judge, lessons, options.seed + 1)
    model.model.norm.weight.div_(made["temperature"])
    save(model, tokenizer, options.out)
    stored = load_judge(str(options.out), device="cpu")
    (options.out / "README.md").write_text(card(stored, taught, texts["held-out"], made, options), encoding="utf-8")
    print((options.out / "README.md").read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    main()

"""The judge's cache gives what the whole prompt gives; its answers, templates, words and refusals."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from raylabel.errors import BadInput
from raylabel.models.judge import Judge, load_judge
from raylabel.models.judge_check import PAIRS, auroc_bound
from raylabel.models.judge_prompt import TEMPLATE, Example, answer_ids, frame
from raylabel.models.subject import load_subject
from tests.models import tiny
from tests.models.test_subject_transformerlens import native_folder

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
EXAMPLES = [
    Example("the quick brown fox jumps", "fox"),
    Example("a cat sat on a mat with five dozen liquor jugs and a lazy dog", "cat"),
    Example("pack", "pack"),
]
CONCEPTS = ["animal", "dog", "lazy", "cat jugs"]
FAMILIES = ["gpt2", "llama", "gpt_neox", "qwen2", "mistral"]


def tokenizer(chat: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE that has the template's words and its answers as tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([*tiny.TEXT * 3, *[TEMPLATE] * 3, *["a yes no Yes No YES NO"] * 9], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="<pad>", bos_token="<s>")
    made.chat_template = chat
    return made


def network(family: str, positions: int = 256) -> Any:
    kind, settings = tiny.FAMILIES[family]
    length = {"n_positions" if family == "gpt2" else "max_position_embeddings": positions}
    model = AutoModelForCausalLM.from_config(kind(vocab_size=500, **{**settings, **length}))
    tiny.randomise(model, 0)
    return model.eval()


def judge_of(family: str, chat: str | None = None, **settings: Any) -> Judge:
    return Judge(network(family), tokenizer(chat), name=family, **settings)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return judge_of("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_gives_what_the_whole_prompt_gives(family: str) -> None:
    judge = judge_of(family)
    cached = judge.prepare(EXAMPLES)
    concepts = [judge.encode(word) for word in CONCEPTS]
    assert {len(ids) for ids in concepts} >= {1, 2}
    found = judge.log_odds(cached, concepts)
    for (i, example), (k, word) in product(enumerate(EXAMPLES), enumerate(CONCEPTS)):
        ids = tokenizer()(judge.prompt(example, word))["input_ids"]
        assert ids[0] == 1
        with torch.no_grad():
            logits = judge.model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(found[i, k], judge.odds(logits[-1]), atol=1e-4, rtol=0)
        slot = len(judge.prefix(example)) - 1
        torch.testing.assert_close(cached.prior[i], logits[slot].log_softmax(-1), atol=1e-4, rtol=0)


def test_pairs_may_come_in_any_order_and_number(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    cached, concepts = judge.prepare(EXAMPLES), [judge.encode(word) for word in CONCEPTS]
    expected = judge.log_odds(cached, concepts)
    rows, columns = torch.tensor([2, 0, 1, 0, 2]), [3, 1, 0, 3, 2]
    monkeypatch.setattr("raylabel.models.judge._CELLS", {"cpu": 1})
    found = judge.pairs(cached, rows, [concepts[k] for k in columns])
    torch.testing.assert_close(found, expected[rows, torch.tensor(columns)], atol=1e-4, rtol=0)
    torch.testing.assert_close(judge.prepare(EXAMPLES).prior, cached.prior, atol=1e-4, rtol=0)


def test_a_vector_in_the_slot(judge: Judge) -> None:
    """One-hot, it is the word; otherwise its gradient is that of finite differences."""
    cached, words = judge.prepare(EXAMPLES), judge.words
    some = torch.tensor([0, 5, 9])
    hard = judge.pairs(cached, torch.arange(3), [(int(words.ids[i]),) for i in some])
    soft = judge.odds(judge.soft(cached, torch.arange(3), judge.embed(words.ids[some])))
    torch.testing.assert_close(hard, soft, atol=1e-5, rtol=0)

    exact = Judge(network("llama").double(), tokenizer(), name="double")
    cached = exact.prepare(EXAMPLES)
    z = torch.randn(len(words.ids), dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(z: torch.Tensor) -> torch.Tensor:
        vector = z.softmax(-1) @ exact.embed(words.ids)
        return exact.odds(exact.soft(cached, torch.arange(3), vector.expand(3, -1))).sum()

    (slope,) = torch.autograd.grad(loss(z.requires_grad_()), z)
    for i in range(0, len(z), 7):
        step = torch.zeros_like(z)
        step[i] = 0.3
        with torch.no_grad():
            across = (loss(z + step) - loss(z - step)) / 0.6
        # Answers are float32 behind a model of double precision.
        torch.testing.assert_close(slope[i], across.double(), atol=2e-4, rtol=3e-2)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in exact.model.parameters())


def test_answers_are_sets_of_tokens(judge: Judge) -> None:
    names = [judge.tokenizer.decode(ids) for ids in (judge.yes, judge.no)]
    assert all(word in names[0] for word in (" yes", " Yes")) and all(word in names[1] for word in (" no", " No"))
    assert not set(judge.yes.tolist()) & set(judge.no.tolist())
    logits = torch.randn(500)
    expected = logits[judge.yes].exp().sum().log() - logits[judge.no].exp().sum().log()
    torch.testing.assert_close(judge.odds(logits), expected)


def test_answers_that_share_a_token_are_refused() -> None:
    with pytest.raises(
        BadInput, match=r"^optimize.judge: the tokenizer of tiny begins yes and no with one token.*use another judge$"
    ):
        Judge(network("gpt2"), tiny.tokenizer(), name="tiny")
    known = {" yes": [5], " no": [6], "yes": [7, 8], "no": [7, 9]}
    assert answer_ids(lambda text: known.get(text, [3]), {3}, True, "x") == ([5], [6])
    with pytest.raises(BadInput, match="has no token that stands for 'no' alone"):
        answer_ids(lambda text: {**known, " no": [3]}.get(text, [3]), {3}, True, "x")


@pytest.mark.parametrize("place", ["text", "token", "concept"])
def test_a_template_without_a_place_is_refused(place: str) -> None:
    with pytest.raises(BadInput, match=rf"^optimize.template: it has no \|{place}\|"):
        frame(TEMPLATE.replace(f"|{place}|", "this"))


def test_a_template_must_end_in_the_concept() -> None:
    for template in ("|concept| |text| |token| Answer:", "|text| |token| |concept| or |concept|? Answer:"):
        with pytest.raises(BadInput, match=r"^optimize.template: \|concept\| must stand once"):
            frame(template)
    with pytest.raises(BadInput, match=r"^optimize.template: nothing stands behind"):
        judge_of("gpt2", template="|text| |token| |concept|")


def test_places_are_filled_and_nothing_else_changes(judge: Judge) -> None:
    prompt = judge.prompt(Example("a |concept| or |token|", "or"), "dog")
    assert prompt == TEMPLATE.replace("|concept|", "dog").replace("|token|", "or").replace("|text|", "a |concept| or |token|")


def test_special_tokens_in_a_text_are_plain_text(judge: Judge) -> None:
    ids = judge.prefix(Example("the </s> fox <pad>", "fox"))
    assert not set(ids[1:]) & {0, 1, 2}
    assert judge.tokenizer.decode(ids[1:]) + " " == judge.prompt(Example("the </s> fox <pad>", "fox"), "").split("?")[0]


def test_a_chat_template_makes_the_question_a_turn() -> None:
    judge, plain = judge_of("llama", CHAT), Judge(network("llama"), tokenizer(CHAT), name="plain", chat=False)
    question = plain.prompt(EXAMPLES[0], "dog").removesuffix(" Answer:")
    assert question.endswith("the concept dog?") and plain.prefix(EXAMPLES[0])[0] == 1
    assert judge.prompt(EXAMPLES[0], "dog") == f"<s>[user] {question}\n[assistant] Answer:"
    ids = judge.prefix(EXAMPLES[0])
    assert ids[0] == 1 and ids.count(1) == 1
    assert ids + list(judge.encode("dog")) + judge._tail == judge._ids(judge.prompt(EXAMPLES[0], "dog"))


def test_words_are_whole_and_not_special(judge: Judge) -> None:
    words = judge.words
    assert {"fox", "dog", "yes"} <= set(words.texts)
    assert not judge.special_ids & set(words.ids.tolist())
    assert all(judge.encode(text) == (i,) for i, text in zip(words.ids.tolist(), words.texts, strict=True))
    assert words.among({"fox", "nothing"}).texts == ["fox"]
    assert judge.encode("...") == () and judge.encode(" ") == () and judge.encode("x </s>") == ()
    assert judge.encode(" dog ") == judge.encode("dog") and len(judge.encode("quickest")) > 1


def test_a_prompt_that_is_too_long_is_refused() -> None:
    judge = judge_of("gpt2", max_context=40)
    with pytest.raises(BadInput, match=r"^optimize.judge: a prompt of \d+ tokens, but gpt2 has 40 positions"):
        judge.prepare(EXAMPLES)


def test_a_judge_must_beat_chance(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    check = judge.check()
    assert check.n == len(PAIRS) and 0 <= check.auroc <= 1
    liked = judge.encode("animal")
    monkeypatch.setattr(
        judge, "pairs", lambda _cached, rows, concepts: torch.tensor([float(tuple(c) == liked) for c in concepts])
    )
    biased = judge.check()
    assert not biased.serves
    with pytest.raises(BadInput, match=r"^optimize.judge: tiny cannot serve"):
        biased.require("tiny")
    truth = torch.tensor([float(yes) for *_, yes in PAIRS])
    monkeypatch.setattr(judge, "pairs", lambda *_: truth)
    assert judge.check().serves and judge.check().auroc == 1
    assert not judge.check([]).serves


def test_pairs_show_every_word_and_concept_on_both_sides() -> None:
    for column in (0, 2):
        yes, no = (sorted(pair[column] for pair in PAIRS if pair[3] is wanted) for wanted in (True, False))
        assert yes == no
    assert len({pair[:3] for pair in PAIRS}) == len(PAIRS)


def test_auroc_counts_pairs() -> None:
    scores, truths = [0.1, 0.4, 0.4, 0.9, 0.2], [False, True, False, True, False]
    pairs = [
        (a > b) + (a == b) / 2
        for a, t in zip(scores, truths, strict=True)
        if t
        for b, u in zip(scores, truths, strict=True)
        if not u
    ]
    auroc, low = auroc_bound(scores, truths)
    assert auroc == pytest.approx(sum(pairs) / len(pairs)) and low < auroc
    assert auroc_bound([1.0, 2.0], [True, True]) == (0.5, 0.0)


def test_a_judge_is_loaded_from_a_folder(tmp_path: Path) -> None:
    network("gpt2").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    judge = load_judge(str(tmp_path), device="cpu")
    assert judge.max_context == 256 and not judge.model.training
    torch.testing.assert_close(
        judge.log_odds(EXAMPLES, [judge.encode("dog")]), judge_of("gpt2").log_odds(EXAMPLES, [judge.encode("dog")])
    )
    with pytest.raises(BadInput, match=r"^optimize.judge: no such folder"):
        load_judge(str(tmp_path / "nothing"))


def test_a_judge_shares_the_subjects_weights(tmp_path: Path) -> None:
    network("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    subject = load_subject(str(tmp_path), device="cpu", context=16)
    judge = load_judge(str(tmp_path), subject=subject)
    assert judge.model is subject.model
    expected = judge_of("llama").log_odds(EXAMPLES, [(300,)])
    torch.testing.assert_close(judge.log_odds(EXAMPLES, [(300,)]), expected, atol=1e-5, rtol=0)
    native_folder(tmp_path / "native")
    with pytest.raises(BadInput, match=r"^optimize.judge: .* is TransformerLens's own"):
        load_judge(str(tmp_path / "native"), device="cpu")

"""Native folders survive a round trip, the built-in model loads offline, shows its hooks, and beats the trigram."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformer_lens.model_bridge import TransformerBridge

from raylabel.demo import stdlib
from raylabel.errors import BadInput
from raylabel.models import native

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "raylabel" / "demo" / "model"


@pytest.fixture(scope="module")
def bridge() -> TransformerBridge:
    return native.load_native(FOLDER)


@pytest.fixture(scope="module")
def job() -> Iterator[ModuleType]:
    """The training job, as a module."""
    spec = importlib.util.spec_from_file_location("train_demo_model", ROOT / "jobs" / "train_demo_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    path = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def held_out(bridge: TransformerBridge) -> torch.Tensor:
    """[48, 128]: BOS and the first 127 tokens of held-out documents."""
    texts = (text for _, text in stdlib.documents() if stdlib.split(text) == "held-out")
    encoded = (bridge.tokenizer(text)["input_ids"][:128] for text in texts)
    full = list(itertools.islice((ids for ids in encoded if len(ids) == 128), 48))
    if len(full) < 48:
        pytest.skip("too little source text in this Python installation")
    return torch.tensor(full)


def test_is_native(tmp_path: Path) -> None:
    assert native.is_native(FOLDER)
    assert not native.is_native(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    assert not native.is_native(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert not native.is_native(tmp_path)


def test_size_of_the_built_in_folder() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8e6


@torch.no_grad()
def test_round_trip(bridge: TransformerBridge, tmp_path: Path) -> None:
    native.save_native(tmp_path, bridge, bridge.tokenizer, dtype=torch.float32)
    again = native.load_native(tmp_path)
    ids = torch.randint(2, bridge.cfg.d_vocab, (2, 128))
    assert torch.equal(bridge(ids), again(ids))
    assert again.tokenizer("import os")["input_ids"] == bridge.tokenizer("import os")["input_ids"]
    stored = native.plain_state(bridge.original_model)
    assert stored.keys() == native.plain_state(again.original_model).keys()
    assert set(stored) == set(native.NativeModel(bridge.cfg).state_dict())
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_what_is_missing_is_named(bridge: TransformerBridge, tmp_path: Path) -> None:
    native.save_native(tmp_path, bridge, bridge.tokenizer)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"tokenizer\.json is missing"):
        native.load_native(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BadInput, match="not a readable safetensors file"):
        native.load_native(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"^[^\n]*model\.safetensors is missing[^\n]*$"):
        native.load_native(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"config\.json is not the config"):
        native.load_native(tmp_path)


def test_weights_that_do_not_fit_are_refused(bridge: TransformerBridge, tmp_path: Path) -> None:
    native.save_native(tmp_path, bridge, bridge.tokenizer)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"n_layers": 4', '"n_layers": 3'))
    with pytest.raises(BadInput, match="does not fit"):
        native.load_native(tmp_path)


def test_dtype(tmp_path: Path) -> None:
    half = native.load_native(FOLDER, dtype=torch.bfloat16)
    assert {value.dtype for value in half.original_model.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_hooks(bridge: TransformerBridge) -> None:
    shapes: list[torch.Size] = []
    hooks = [(f"blocks.{layer}.mlp.hook_post", lambda value, hook: shapes.append(value.shape)) for layer in range(4)]
    ids = torch.randint(2, bridge.cfg.d_vocab, (2, 17))
    logits = bridge.run_with_hooks(ids, fwd_hooks=hooks)
    assert shapes == [torch.Size([2, 17, 512])] * 4
    assert logits.shape == (2, 17, bridge.cfg.d_vocab)
    names = ["blocks.1.mlp.ln.hook_in", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"]
    _, cache = bridge.run_with_cache(ids, names_filter=names)
    mid, post = cache["blocks.1.mlp.ln.hook_in"], cache["blocks.1.mlp.hook_post"]
    norm = bridge.original_model.layers[1].mlp.ln
    state = native.plain_state(bridge.original_model)
    expected = F.layer_norm(mid, (512,), state["layers.1.mlp.ln.weight"], state["layers.1.mlp.ln.bias"], bridge.cfg.eps)
    assert norm is not None
    assert torch.allclose(post, expected, atol=1e-5)
    assert cache["blocks.1.hook_resid_post"].shape == (2, 17, 128)


def test_tokenizer(bridge: TransformerBridge) -> None:
    text = "def f(self):\n    return 12 + len('é')\n"
    encoded = bridge.tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    assert ids[0] == bridge.tokenizer.bos_token_id and bridge.tokenizer.bos_token == "<|bos|>"
    assert bridge.tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
    assert bridge.tokenizer.decode(ids[1:]) == text
    assert offsets[0] == (0, 0) and offsets[-1][1] == len(text)
    assert {text[start:stop].strip() for start, stop in offsets[1:]} >= {"def", "return", "1", "2", "len"}
    assert bridge.to_tokens(text)[0].tolist() == ids


@torch.no_grad()
def test_held_out_loss_is_far_below_the_trigram(bridge: TransformerBridge, held_out: torch.Tensor) -> None:
    loss = F.cross_entropy(bridge(held_out[:, :-1]).flatten(0, 1), held_out[:, 1:].flatten()).item()
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    trigram = re.search(r"^\| trigram \| ([\d.]+) nats", card, re.MULTILINE)
    assert trigram is not None
    assert loss < float(trigram[1]) - 0.5


@torch.no_grad()
def test_the_trained_module_is_the_loaded_one(
    bridge: TransformerBridge, job: ModuleType, held_out: torch.Tensor
) -> None:
    model = native.NativeModel(bridge.cfg)
    model.load_state_dict(native.plain_state(bridge.original_model))
    ids = held_out[:4]
    assert torch.allclose(model.head(job.trunk(model, ids)), bridge(ids), atol=1e-4)


def test_the_chunked_loss_has_the_gradients_of_cross_entropy(job: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 16, generator=generator, requires_grad=True)
    head = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (600,), generator=generator)
    ours, theirs = job.HeadLoss.apply(hidden, head, targets, torch.float32), F.cross_entropy(hidden @ head.T, targets)
    assert torch.allclose(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, [hidden, head]), torch.autograd.grad(theirs, [hidden, head]), strict=True
    ):
        assert torch.allclose(mine, other, atol=1e-6)


def test_the_trigram_is_a_distribution(job: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "VOCABULARY", 12)
    random = np.random.default_rng(0)
    documents = [random.integers(2, 12, random.integers(5, 200)) for _ in range(20)]
    model = job.Trigram(job.rows(documents, 0, 1), 1)
    for first, second in ((0, 0), (0, 5), (3, 4), (11, 1)):
        chances = []
        for third in range(12):
            ask = (np.array([first]), np.array([second]), np.array([third]))
            monkeypatch.setattr(model, "positions", lambda table, pad, ask=ask: ask)
            chances.append(np.exp(-model.loss(np.empty(0), 1, 0.7, 0.8)))
        assert sum(chances) == pytest.approx(1.0)

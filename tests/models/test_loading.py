"""Loading a subject: what is resolved (BOS, aliases), what is refused and in which words, and that it is silent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from raylabel.errors import BadInput
from raylabel.models.subject import load_subject
from tests.models import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families = ("gpt2", "gpt_neox", "llama", "qwen2", "gemma", "gemma3_text", "gemma3")
    return {family: tiny.save(family, root / family) for family in families}


@pytest.mark.parametrize(
    "tokens, bos, expected",
    [
        ({"bos": True}, "auto", (True, 1)),
        ({"bos": True}, "never", (False, 1)),
        ({"bos": False}, "auto", (False, 1)),
        ({"bos": False}, "always", (True, 1)),
        ({"bos": False, "special": False}, "auto", (False, None)),
    ],
)
def test_bos(tmp_path: Path, tokens: dict[str, bool], bos: str, expected: tuple[bool, int | None]) -> None:
    subject = load_subject(str(tiny.save("gpt2", tmp_path / "m", **tokens)), bos=bos, context=16)
    assert (subject.prepend_bos, subject.bos_id) == expected


def test_always_without_a_bos_token(tmp_path: Path) -> None:
    folder = tiny.save("gpt2", tmp_path / "m", bos=False, special=False)
    refused("subject.bos", str(folder), bos="always", context=16)


def refused(key: str, model: str, **arguments: Any) -> str:
    with pytest.raises(BadInput) as caught:
        load_subject(model, **{"context": 16, "device": "cpu", **arguments})
    message = str(caught.value)
    assert message.startswith(key) and "\n" not in message and len(message) < 400, message
    return message


def test_context_device_and_dtype(folders: dict[str, Path]) -> None:
    assert "32" in refused("subject.context", str(folders["llama"]), context=33)
    assert "32" in refused("subject.context", str(folders["gemma3"]), context=33)
    refused("subject.dtype", str(folders["llama"]), dtype="int8")
    refused("subject.device", str(folders["llama"]), device="nonsense")
    if not torch.cuda.is_available():
        refused("subject.device", str(folders["llama"]), device="cuda")


def test_folders_that_are_not_models(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "no such folder" in refused("subject.model", str(tmp_path / "nowhere"))
    assert "no such folder" in refused("subject.model", "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("subject.model", str(tmp_path / "empty"))
    (tmp_path / "file").write_text("x")
    assert "folder" in refused("subject.model", str(tmp_path / "file"))

    def copy(name: str, family: str = "llama", without: tuple[str, ...] = ()) -> Path:
        return Path(shutil.copytree(folders[family], tmp_path / name, ignore=shutil.ignore_patterns(*without)))

    assert "no safetensors" in refused("subject.model", str(copy("bare", without=("model.safetensors",))))
    pickled = copy("pickled", without=("model.safetensors",))
    torch.save({}, pickled / "pytorch_model.bin")
    assert "trust_remote_code" in refused("subject.model", str(pickled))
    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    assert "weights" in refused("subject.model", str(cut))
    broken = copy("broken")
    (broken / "config.json").write_text("{")
    assert "config.json" in refused("subject.model", str(broken))
    bigger = copy("bigger")
    config = json.loads((bigger / "config.json").read_text())
    (bigger / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4, "layer_types": None}))
    assert "lack" in refused("subject.model", str(bigger))
    (bigger / "config.json").write_text(json.dumps({**config, "intermediate_size": 44}))
    assert "weights" in refused("subject.model", str(bigger))
    for kind in ("bert", "mixtral"):
        (bigger / "config.json").write_text(json.dumps({"model_type": kind}))
        assert kind in refused("subject.model", str(bigger))
    (bigger / "config.json").write_text(json.dumps({"model_type": "brand-new"}))
    assert "brand-new" in refused("subject.model", str(bigger))
    (bigger / "config.json").write_text(json.dumps({"architecture": "else"}))
    assert "config.json" in refused("subject.model", str(bigger))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma", "gemma3_text"])
def test_a_folder_without_a_tokenizer(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    folder = shutil.copytree(folders[family], tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in refused("subject.model", str(folder))


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = tiny.save("gpt2", tmp_path / "m", vocabulary=200)
    assert "not of one model" in refused("subject.model", str(folder))


def test_hub_names_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offline(monkeypatch, tmp_path)
    assert "out of reach" in refused("subject.model", "nobody/nothing-at-all")
    assert "out of reach" in refused("subject.model", "nothing-at-all")


def test_hub_models_in_the_local_cache(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path) -> None:
    """By name, at a revision, and by an alias that TransformerLens knows and the hub does not."""
    offline(monkeypatch, tmp_path)
    first, second = "1" * 40, "2" * 40
    for commit, family in ((first, "gpt2"), (second, "llama")):
        shutil.copytree(folders[family], tmp_path / "models--gpt2" / "snapshots" / commit)
    (tmp_path / "models--gpt2" / "refs").mkdir()
    (tmp_path / "models--gpt2" / "refs" / "main").write_text(first)
    (tmp_path / "models--gpt2" / "refs" / "other").write_text(second)
    for name in ("gpt2", "gpt2-small"):
        subject = load_subject(name, context=16)
        assert (subject.name, subject.revision, subject.anatomy.kind) == ("gpt2", first, "gpt2")
    subject = load_subject("gpt2", revision="other", context=16)
    assert (subject.revision, subject.anatomy.kind) == (second, "llama")


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def test_loading_is_silent(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()
    try:
        load_subject(str(folders["gpt2"]), context=16)
        load_subject("demo")
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""

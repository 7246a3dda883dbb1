"""The wire against servers that others wrote, on loopback, with a tiny model from a folder."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from raylabel.llm.client import AskFailed
from tests.llm import test_client
from tests.llm.chat_model import save_chat

pytestmark = pytest.mark.slow
GOOD = '{"name": "otter", "size": 3}'
PATIENCE = 120


class Animal(BaseModel):
    name: str
    size: int


def up(command: list[str], url: str, log: Path, **environment: str) -> Iterator[str]:
    """Runs a server until it answers at all, and ends it."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment}, stdin=subprocess.DEVNULL)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(url, timeout=2).close()
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.3)
            else:
                break
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(20)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def asked(url: str, model: str, out: Path, questions: list[str], **given: Any) -> list[Any]:
    return test_client.asked(out, url, questions, {"model": model, "timeout": 60}, schema=Animal, **given)[0]


@pytest.mark.skipif(importlib.util.find_spec("fastapi") is None, reason="transformers[serving] is not installed")
def test_transformers_serve(tmp_path: Path) -> None:
    """It takes no notice of schemas and logprobs: what comes is checked all the same."""
    folder, noise, port = save_chat(tmp_path / "m", GOOD), save_chat(tmp_path / "noise"), free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    for url in up(command, f"http://127.0.0.1:{port}", tmp_path / "log", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)):
        found = asked(url, str(folder), tmp_path / "run", [f"question {i}" for i in range(8)], logprobs=True)
        assert [a.parsed for a in found] == [Animal(name="otter", size=3)] * 8
        assert all(a.prompt_tokens > 0 and a.logprobs is None for a in found)
        again = asked(url, str(folder), tmp_path / "run", ["question 1"], logprobs=True)
        assert again[0].cached
        (wrong,) = asked(url, str(noise), tmp_path / "other", ["question"], max_tokens=20)
        assert isinstance(wrong, AskFailed)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.skipif("RAYLABEL_GGUF" not in os.environ, reason="no model: set RAYLABEL_GGUF to a .gguf file")
def test_llama_cpp(tmp_path: Path) -> None:
    """Schemas and logprobs of its own kind."""
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", os.environ["RAYLABEL_GGUF"], "--host", "127.0.0.1",
               "--port", str(port), "--logits_all", "true", "--n_ctx", "2048"]  # fmt: skip
    for url in up(command, f"http://127.0.0.1:{port}", tmp_path / "log"):
        found = asked(url, "m", tmp_path / "run", ["an otter"], max_tokens=200, logprobs=True)
        assert all(isinstance(a, AskFailed) or isinstance(a.parsed, Animal) for a in found)

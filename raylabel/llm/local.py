"""An explainer inside the worker: a chat model of transformers answers what a server would be asked.

`Local` takes and gives what `wire.Server` does, from a folder or a name of the hub (`describe.base_url: local`), one
question at a time, so that an answer does not depend on what else is asked. The model is loaded once a process, when it is
first asked. Nothing enforces a schema here; what does not read as one is asked for again, as ever. For many units a server is
faster.
"""

from __future__ import annotations

import asyncio
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from raylabel.errors import BadInput
from raylabel.llm.wire import ALTERNATIVES, LONGEST, Final
from raylabel.sections import DescribeConfig

LOCAL = "local"
"""The `describe.base_url` that stands for this process."""


class Local:
    """A model in this process."""

    url = LOCAL
    reached = True

    def __init__(self, config: DescribeConfig, device: str) -> None:
        """`device`: as `subject.device`."""
        if not config.model:
            raise BadInput("describe.model is required: a folder or a name of the hub")
        self._name, self._device = config.model, device
        self.model = f"{config.model}{_print(config.model)}"
        """Names the model's answers in the cache."""
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Local({self._name!r})"

    async def close(self) -> None:
        """Nothing to close: the model stays for the next client."""

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """As `wire.Server.answer`; Final where the model cannot take the question."""
        async with self._turn:
            return await asyncio.to_thread(self._answer, question)

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        import torch

        loaded = opened(self._name, self._device)
        ids = encoded(loaded.tokenizer, question["messages"])
        room = (loaded.max_context or len(ids) + question["max_tokens"]) - len(ids)
        if room < 1:
            raise Final(f"a question of {len(ids)} tokens, but {self._name} has {loaded.max_context} positions")
        limit = min(room, question["max_tokens"])
        try:
            made, listed = _generate(loaded, ids, limit, question["temperature"], question["logprobs"])
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            raise Final(f"{self._name}: {' '.join(str(error).split())}"[:LONGEST]) from None
        text = loaded.tokenizer.decode(made, skip_special_tokens=True)
        return {
            "text": text, "refusal": False, "finish": "length" if len(made) >= limit else "stop", "reasoning": False,
            "prompt_tokens": len(ids), "completion_tokens": len(made), "logprobs": listed,
        }  # fmt: skip


@lru_cache(maxsize=1)
def opened(name: str, device: str) -> Any:
    """The model of a name; BadInput names `describe.model`."""
    from raylabel.models.loading import load, resolve_device

    try:
        return load(name, revision=None, dtype="auto", device=resolve_device(device), context=1, trust_remote_code=False)
    except BadInput as error:
        raise BadInput(str(error).replace("subject.model", "describe.model")) from error


def encoded(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, in the tokenizer's chat template if it has one. Special tokens in it are broken up."""
    marks = sorted({str(mark) for mark in tokenizer.all_special_tokens if len(str(mark)) > 1}, key=len, reverse=True)
    given = []
    for message in messages:
        content = message["content"]
        for mark in marks:
            content = content.replace(mark, f"{mark[0]} {mark[1:]}")
        given.append({"role": message["role"], "content": content})
    if not tokenizer.chat_template:
        return list(tokenizer("\n\n".join(m["content"] for m in given) + "\n\n")["input_ids"])
    try:
        return _templated(tokenizer, given)
    except Exception:
        # Some templates have no place for a system's turn.
        if given[0]["role"] != "system" or len(given) < 2:
            raise
        first = {"role": "user", "content": f"{given[0]['content']}\n\n{given[1]['content']}"}
        return _templated(tokenizer, [first, *given[2:]])


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _generate(
    loaded: Any, ids: list[int], limit: int, temperature: float, logprobs: bool
) -> tuple[list[int], list[dict[str, Any]] | None]:
    """(token ids of the answer without its end, their log-probabilities as a server lists them)."""
    import torch
    from transformers import LogitsProcessorList

    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(_: Any, scores: torch.Tensor) -> torch.Tensor:
        best = scores[0].float().log_softmax(-1).topk(min(ALTERNATIVES, scores.shape[-1]))
        seen.append((best.values.cpu(), best.indices.cpu()))
        return scores

    tokenizer, model = loaded.tokenizer, loaded.model
    device = model.get_input_embeddings().weight.device
    given = torch.tensor([ids], device=device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        made = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=limit, **sampling,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            logits_processor=LogitsProcessorList([note] if logprobs else []),
        )[0, len(ids) :].tolist()  # fmt: skip
    ends = {tokenizer.eos_token_id, *_listed(getattr(model.generation_config, "eos_token_id", None))}
    while made and made[-1] in ends:
        made.pop()
    if not logprobs:
        return made, None
    return made, [_entry(tokenizer, token, *best) for token, best in zip(made, seen, strict=False)]


def _entry(tokenizer: Any, token: int, values: Any, indices: Any) -> dict[str, Any]:
    others = [{"token": tokenizer.decode([i]), "logprob": v} for v, i in zip(values.tolist(), indices.tolist(), strict=True)]
    own = next((v for v, i in zip(values.tolist(), indices.tolist(), strict=True) if i == token), float("-inf"))
    return {"token": tokenizer.decode([token]), "logprob": max(own, -1e4), "top_logprobs": others}


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _print(name: str) -> str:
    """Tells one model from another in the same folder; empty for a name of the hub."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return ""
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]
    return "@" + hashlib.sha256(repr(files).encode()).hexdigest()[:16]

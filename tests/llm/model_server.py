"""A real causal model behind the OpenAI protocol: greedy answers, token counts, logprobs, schemas enforced by the server.

`answering(folder)` gives the function that `servers.served` takes. With `response_format: json_schema` the object's frame is
given and its strings are the model's words, as servers with a grammar do it.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.llm.servers import body

KEPT = 24
"""Last tokens of the prompt that the tiny model reads."""


def answering(folder: Path) -> Callable[[dict[str, Any]], Any]:
    """Answers requests with the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lock = threading.Lock()

    def grow(ids: list[int], n: int) -> tuple[list[int], list[torch.Tensor]]:
        made: list[int] = []
        scores = []
        with lock, torch.no_grad():
            for _ in range(n):
                logits = model(torch.tensor([(ids + made)[-KEPT:]])).logits[0, -1]
                scores.append(torch.log_softmax(logits, -1))
                made.append(int(logits.argmax()))
        return made, scores

    def words(ids: list[int], n: int) -> str:
        made, _ = grow(ids, n)
        return " ".join("".join(c if c.isalnum() else " " for c in tokenizer.decode(made)).split()[:4]) or "word"

    def filled(node: dict[str, Any], top: dict[str, Any], ids: list[int]) -> Any:
        node = top["$defs"][node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else node
        if node["type"] == "object":
            return {name: filled(part, top, [*ids, i]) for i, (name, part) in enumerate(node["properties"].items())}
        if node["type"] == "array":
            return [filled(node["items"], top, ids)]
        return words(ids, 4) if node["type"] == "string" else 1

    def answer(request: dict[str, Any]) -> Any:
        ids = tokenizer("\n".join(m["content"] for m in request["messages"]), add_special_tokens=False)["input_ids"]
        wanted = request.get("response_format", {}).get("json_schema", {}).get("schema")
        if wanted:
            text = json.dumps(filled(wanted, wanted, ids))
            return body(text, len(ids), len(tokenizer(text)["input_ids"]))
        made, scores = grow(ids, request.get("max_tokens", 16))
        listed = None
        if request.get("logprobs"):
            listed = []
            for token, score in zip(made, scores, strict=True):
                best = torch.topk(score, request["top_logprobs"])
                others = [{"token": tokenizer.decode([int(i)]), "logprob": float(v), "bytes": None}
                          for v, i in zip(best.values, best.indices, strict=True)]  # fmt: skip
                listed.append({"token": tokenizer.decode([token]), "logprob": float(score[token]), "bytes": None,
                               "top_logprobs": others})  # fmt: skip
        found = body(tokenizer.decode(made) or "x", len(ids), len(made), finish_reason="length")
        if listed:
            found["choices"][0]["logprobs"] = {"content": listed, "refusal": None}
        return found

    return answer


def mass(alternatives: list[dict[str, Any]]) -> float:
    """Probability of all alternatives together."""
    return sum(math.exp(a["logprob"]) for a in alternatives)

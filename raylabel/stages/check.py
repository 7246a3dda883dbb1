"""check: what a configuration would run, estimated from the model, the corpus' size and one timed forward."""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import torch
from tokenizers import Tokenizer

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sources.corpus import chunks, documents
from raylabel.stages import prepare
from raylabel.stages.scan import CPU_BATCH, GPU_BATCH, power_of_two
from raylabel.stages.select import FIRING_FACTOR
from raylabel.stages.subject import facts, open_subject
from raylabel.stages.units import polarities, wanted_units
from raylabel.store.rundir import RunDir
from raylabel.tables import HISTOGRAM_BINS

PROBE_DOCUMENTS = 200
PASSES = 2
"""Forward passes of a scan over each sample: one to find the winners, one to cut their windows out."""


def estimate(config: RunConfig) -> dict[str, Any]:
    """Figures of the run that `config` would make. Raises the BadInput that the run would raise."""
    prepare(RunDir(config.run.out), config)
    corpus = config.exemplars.corpus
    if corpus.path is None:
        raise BadInput("exemplars.corpus.path is required: a text file, a folder, or `stdlib`")
    pieces = chunks(corpus.path, corpus.column)
    subject, found = open_subject(config), facts(config)
    units = wanted_units(config, found)
    signs = polarities(config, found)
    tokens, exact = _tokens(config, subject.tokenizer.backend_tokenizer, pieces)
    n_units = sum(len(neurons) for neurons in units.values())
    batch = config.subject.batch if config.subject.batch != "auto" else (
        GPU_BATCH if subject.device.type == "cuda" else CPU_BATCH
    )  # fmt: skip
    batch = power_of_two(int(batch))
    rate = _tokens_per_second(subject, batch, config.subject.context, list(units))
    decoys = config.controls.decoys * len(units)
    return {
        "model": found["name"], "site": found["site"], "layers": len(units), "units": n_units,
        "units and polarities": n_units * len(signs), "decoys": decoys, "tokens": tokens,
        "tokens are": "counted" if exact else "estimated", "samples": -(-tokens // config.subject.context),
        "batch": batch, "device": found["device"], "state bytes": _state_bytes(config, n_units, len(signs), decoys),
        "tokens a second": round(rate), "forward seconds": round(PASSES * tokens / rate, 1),
        "variants at most": (n_units * len(signs) + decoys) * config.verify.max_variants,
        "LLM calls": 0, "LLM cost": 0.0,
    }  # fmt: skip


def _tokens(config: RunConfig, tokenizer: Tokenizer, pieces: list[dict[str, Any]]) -> tuple[int, bool]:
    corpus = config.exemplars.corpus
    texts = (text for piece in pieces for text in documents(piece, corpus.column))
    probe = list(itertools.islice(texts, PROBE_DOCUMENTS))
    count = sum(len(e.ids) for e in tokenizer.encode_batch(probe, add_special_tokens=False))
    if count == 0:
        raise BadInput(f"exemplars.corpus.path: no text in {corpus.path}")
    if len(probe) < PROBE_DOCUMENTS:
        return min(count, corpus.tokens), True
    if any(piece["kind"] in ("hub", "datasets") for piece in pieces):
        return corpus.tokens, False
    if pieces[0]["kind"] == "stdlib":
        size = sum(len(text) for text in probe) + sum(len(text) for text in texts)
        return min(int(count * size / sum(len(text) for text in probe)), corpus.tokens), False
    size = sum(os.path.getsize(file["path"]) for piece in pieces for file in piece["files"])
    read = sum(len(text.encode("utf-8", "replace")) for text in probe)
    return min(int(count * size / max(read, 1)), corpus.tokens), False


def _tokens_per_second(subject: Any, batch: int, context: int, layers: list[int]) -> float:
    ids = torch.randint(0, subject.anatomy.vocabulary, (batch, context), device=subject.device)
    subject.run(ids, layers, lambda *_: None)
    started = time.perf_counter()
    subject.run(ids, layers, lambda *_: None)
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    return batch * context / (time.perf_counter() - started)


def _state_bytes(config: RunConfig, units: int, signs: int, decoys: int) -> int:
    wanted = config.exemplars
    slots = wanted.top + max(1, wanted.top // 2) + 2 * FIRING_FACTOR * wanted.quantile
    columns = units * signs + decoys
    return columns * slots * 12 + (units + decoys) * (HISTOGRAM_BINS * 8 + 4 * 8 + 32)

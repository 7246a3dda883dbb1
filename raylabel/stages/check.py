"""check: what a configuration would run, estimated from the model, the corpus' size and one timed forward.

With `subject.device: meta` weights are neither looked for nor downloaded: the model's shape stands for it, and the pace is that
of a GPU by its maker's figure.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

from tokenizers import Tokenizer

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sources.corpus import chunks, documents
from raylabel.sources.records import module, without_model
from raylabel.stages import no_controls, pipeline, prepare, settled
from raylabel.stages.llm_cost import llm_cost
from raylabel.stages.memory import layer_groups, overhead_bytes, peak_bytes, scan_bytes
from raylabel.stages.plan_cost import GPU, Rates, Shape, on_gpu, plan
from raylabel.stages.scan import batch_size, lease_keys, lease_size, least_leases
from raylabel.stages.subject import facts, open_subject, tokens_per_second
from raylabel.stages.units import polarities, wanted_units
from raylabel.store.rundir import RunDir

PROBE_DOCUMENTS = 200


def estimate(config: RunConfig) -> dict[str, Any]:
    """Figures of the run that `config` would make. Raises the BadInput that the run would raise."""
    without = no_controls(config)
    config = settled(config)
    prepare(RunDir(config.run.out), config)
    if without:
        return _source(config, without)
    corpus = config.exemplars.corpus
    if corpus.path is None:
        raise BadInput("exemplars.corpus.path is required: a text file, a folder, or `stdlib`")
    pieces = chunks(corpus.path, corpus.column)
    planned = config.subject.device == "meta"
    subject, found = open_subject(config), facts(config)
    if planned:
        found["device"] = "cuda"
    units = wanted_units(config, found)
    signs = polarities(config, found)
    tokens, exact = _tokens(config, subject.tokenizer.backend_tokenizer, pieces)
    n_units = sum(len(neurons) for neurons in units.values())
    context, batch = config.subject.context, batch_size(config, found)
    weights = [p for block in subject.anatomy.blocks for p in block.parameters()]
    shape = Shape(found["n_layers"], found["width"], sum(p.numel() for p in weights), len(signs) > 1)
    rates = on_gpu(shape) if planned else Rates(tokens_per_second(subject, batch, context, list(units)))
    rate = rates.pace
    samples = -(-tokens // context)
    state = sum(scan_bytes(config, units, signs, batch, samples).values())
    leases = len(lease_keys(samples, lease_size(samples, batch, context, rate, state, least_leases(config))))
    wanted = config.controls
    decoys, texts = wanted.decoys * len(units), (wanted.nulls + wanted.planted) * len(units)
    lease = -(-samples // leases)
    states, peak, groups = (_memory_on_paper if planned else _memory)(config, subject, units, signs, batch, lease)
    workers = 1 if config.run.workers == "auto" else int(config.run.workers)
    cost = plan(shape, config, tokens, workers, rates, device=found["device"], among=units)
    return {
        "model": found["name"], "site": found["site"], "layers": len(units), "units": n_units,
        "units and polarities": n_units * len(signs), "decoys": decoys, "nulls and planted": texts, "tokens": tokens,
        "tokens are": "counted" if exact else "estimated", "samples": samples, "batch": batch,
        "device": GPU if planned else found["device"],
        "leases": leases, "state bytes": states, "peak bytes": peak, "layer groups": groups,
        "tokens a second": round(rate), "forward seconds": round(tokens / rate * groups, 1),
        "variants at most": (n_units * len(signs) + decoys + texts) * config.verify.max_variants,
        "judge evaluations at most": (n_units * len(signs) + decoys + texts) * config.optimize.evaluations,
        "workers": workers, f"hours at {'that GPU' if planned else 'this machine'}'s pace": round(cost["hours"], 3),
        **{name: cost[name] for name in ("table bytes", "temporary bytes", "work units", "manifest bytes")},
        **llm_cost(config, n_units * len(signs) + decoys + texts),
    }  # fmt: skip


def _source(config: RunConfig, controls: str) -> dict[str, Any]:
    """Figures of a run over another source: what would be read or fetched, known from sizes and numbers alone.

    `controls` says why there are none.
    """
    source, found = config.exemplars.source, module(config.exemplars.source).estimate(config)
    wanted = config.exemplars
    most = 3 * (wanted.top + wanted.quantile + wanted.random) // 2
    units: int | str = "as many as were recorded"
    if config.subject.units == "all" and config.subject.neurons != "all" and config.subject.layers != "all":
        units = len(set(config.subject.layers)) * (config.subject.neurons[1] - config.subject.neurons[0])
    elif isinstance(config.subject.units, list):
        units = len(set(config.subject.units))
    variants = "none, there is no model" if without_model(config) else config.verify.max_variants
    return {
        "model": config.subject.model, "source": source, **found, "units": units, "texts a unit at most": most,
        "stages": ", ".join(stage.name for stage in pipeline(config)), "variants a unit at most": variants,
        "decoys": 0, "controls": controls,
        **llm_cost(config, units if isinstance(units, int) else 0),
    }  # fmt: skip


def _memory(
    config: RunConfig, subject: Any, units: dict[int, list[int]], signs: tuple[int, ...], batch: int, lease: int
) -> tuple[int, int, int]:  # fmt: skip
    """(bytes of a worker's state, its peak, groups of layers) of a scan; a forward pass of a batch has been run before.

    The peak is what this process has needed so far for the model and the pass, and what the state adds to it.
    """
    states = scan_bytes(config, units, signs, batch, lease)
    devices = {layer: str(subject.layer_device(layer)) for layer in states}
    groups = layer_groups(states, devices)
    largest = max((sum(states[layer] for layer in group), group) for group in groups)
    columns = max(map(len, units.values())) * max(abs(s) for s in signs)
    on_gpu = subject.device.type == "cuda"
    beside = overhead_bytes(max(states.values()), columns, batch, config.subject.context, on_gpu)
    return sum(states.values()), peak_bytes(str(subject.device)) + largest[0] + beside, len(groups)


def _memory_on_paper(
    config: RunConfig, subject: Any, units: dict[int, list[int]], signs: tuple[int, ...], batch: int, lease: int
) -> tuple[int, int, int]:  # fmt: skip
    """The same of a model without weights: what they would take, and the state of all layers at a time."""
    states = scan_bytes(config, units, signs, batch, lease)
    columns = max(map(len, units.values())) * max(abs(s) for s in signs)
    beside = overhead_bytes(max(states.values()), columns, batch, config.subject.context, True)
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    return sum(states.values()), weights + sum(states.values()) + beside, 1


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

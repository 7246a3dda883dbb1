"""What a run costs, on paper: hours, bytes and manifests, from a model's shape and measured rates.

`Shape.of(config.json)` reads a transformers configuration; `plan(shape, config, tokens, workers, rates)` gives the figures.
Nothing is loaded and nothing runs; `llm_cost` counts what is asked of language models. `Rates` were measured on one core of the
machine that made the project's benchmarks, and the bytes of a row on a run of the built-in model; a rate of your own goes into
`replace(rates, pace=...)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raylabel.config import RunConfig
from raylabel.stages.base import neuron_ranges, with_controls
from raylabel.stages.identify_stage import NEURONS as IDENTIFY_NEURONS
from raylabel.stages.memory import scan_bytes
from raylabel.stages.scan import batch_size, lease_keys, lease_size, least_leases
from raylabel.stages.scanner import CLOSE_NEURONS
from raylabel.stages.verify_stage import NEURONS as VERIFY_NEURONS

GPU = "an H100 on paper, 35 % of its operations"


@dataclass(frozen=True)
class Shape:
    """What a model's cost depends on.

    Attributes:
        layers, width: layers, and units of the MLP in each.
        parameters: of the blocks, without embeddings and head: two operations a token each.
        gated: whether a unit has two ends that count.
    """

    layers: int
    width: int
    parameters: int
    gated: bool

    @staticmethod
    def of(config: dict[str, Any]) -> Shape:
        """The shape of a transformers configuration (GPT-2's names, or those of Llama and most others)."""
        d = config.get("hidden_size") or config["n_embd"]
        layers = config.get("num_hidden_layers") or config["n_layer"]
        heads = config.get("num_attention_heads") or config["n_head"]
        width = config.get("intermediate_size") or config.get("n_inner") or 4 * d
        head = config.get("head_dim") or d // heads
        keys = config.get("num_key_value_heads") or heads
        gated = "intermediate_size" in config and config.get("hidden_act", "silu") in ("silu", "swish")
        attention = d * head * (2 * heads + 2 * keys)
        return Shape(layers, width, layers * (attention + (3 if gated else 2) * d * width), gated)

    @property
    def flops(self) -> int:
        """Operations of a forward pass, a token."""
        return 2 * self.parameters


@dataclass(frozen=True)
class Rates:
    """What a worker does in a second, and what a row takes on disk. Seconds are those of one core, or one GPU for `pace`.

    Attributes:
        pace: tokens a second of forward passes.
        scan: seconds of a scan by those of its forward passes.
        suffix: tokens whose forward pass takes as long as one variant.
        token, unit: seconds to tokenise a token, to identify a unit; `closing`: to make a unit's rows.
        kept, rows: bytes of a token kept with an exemplar, and of a row of other tables.
        state: bytes of a lease's file by those of its state.
        entry, planned: bytes of a manifest entry and of a unit in a plan.
    """

    pace: float
    scan: float = 1.25
    suffix: float = 9.0
    token: float = 5e-5
    unit: float = 2e-3
    closing: float = 1.5e-3
    kept: float = 6.0
    rows: tuple[tuple[str, float], ...] = (
        ("statistics", 434.0), ("candidates", 582.0), ("variants", 18.5), ("verifications", 284.0), ("results", 584.0),
    )  # fmt: skip
    sample_token: float = 3.7
    state: float = 0.71
    entry: float = 700.0
    planned: float = 115.0


def on_gpu(shape: Shape, operations: float = 989e12, used: float = 0.35) -> Rates:
    """Rates of a GPU of so many operations a second (an H100 or H200 in bfloat16, by its maker) of which a share is used."""
    return Rates(operations * used / shape.flops)


def plan(
    shape: Shape, config: RunConfig, tokens: int, workers: int, rates: Rates, cores: int | None = None, device: str = "cuda",
    flagged: float = 0.5, among: dict[int, list[int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a run over `tokens` tokens with `workers` that hold the model and `cores` for the rest.

    Args:
        flagged: share of the units that are verified; at most all are.
        among: the neurons of each layer, where they are known.
    """
    cores, context = cores or workers, config.subject.context
    signs = {"positive": 1, "both": 2, "quadrants": 4}.get(config.subject.polarity, 2 if shape.gated else 1)
    ends = (1, -1, 2, -2)[:signs]
    wanted_layers = list(range(shape.layers)) if config.subject.layers == "all" else config.subject.layers
    first, last = (0, shape.width) if config.subject.neurons == "all" else config.subject.neurons
    units = among or {layer: list(range(first, last)) for layer in wanted_layers}
    samples = -(-tokens // context)
    batch = batch_size(config, {"device": device, "site_width": shape.width})
    state = sum(scan_bytes(config, units, ends, batch, samples).values())
    lease = lease_size(samples, batch, context, rates.pace, state, least_leases(config, workers))
    leases = len(lease_keys(samples, lease))
    own, layers = sum(map(len, units.values())), len(units)
    controls = config.controls.decoys + config.controls.nulls + config.controls.planted
    rows = own * signs + controls * layers
    wanted = config.exemplars
    exemplars = rows * (wanted.top + wanted.top // 2 + 2 * wanted.quantile + 2 * wanted.random)
    window = min(wanted.before + wanted.after + 1, context)
    variants = int(rows * flagged * config.verify.max_variants)
    work = {
        "tokenize": tokens * rates.token / cores,
        "scan": tokens * rates.scan / rates.pace / min(workers, leases) + rows * rates.closing / workers,
        "identify": rows * rates.unit / cores,
        "verify": variants * rates.suffix / rates.pace / workers + rows * rates.closing / cores,
        "results": rows * rates.closing / cores,
    }
    count = dict(rates.rows)
    sizes = {
        "samples": tokens * rates.sample_token, "exemplars": exemplars * window * rates.kept,
        "statistics": rows * count["statistics"], "candidates": rows * count["candidates"],
        "variants": variants * count["variants"], "verifications": rows * flagged * count["verifications"],
        "results": rows * count["results"],
    }  # fmt: skip
    tasks = {
        "scan": 1 + leases + len(neuron_ranges(units, CLOSE_NEURONS)),
        "identify": len(with_controls(units, config.controls, IDENTIFY_NEURONS)) + 1 + layers,
        "verify": len(with_controls(units, config.controls, VERIFY_NEURONS)) + layers, "results": layers + 1,
    }  # fmt: skip
    return {
        "units": own, "units and controls": rows, "leases": leases, "hours": sum(work.values()) / 3600,
        "hours by stage": {name: seconds / 3600 for name, seconds in work.items()},
        "table bytes": int(sum(sizes.values())), "bytes by table": {name: int(size) for name, size in sizes.items()},
        "temporary bytes": int(leases * state * rates.state), "work units": sum(tasks.values()), "work units by stage": tasks,
        "manifest bytes": int(sum(tasks.values()) * rates.entry), "plan bytes": int(sum(tasks.values()) * rates.planned),
    }  # fmt: skip

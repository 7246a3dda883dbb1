"""A cluster of 1,000 machines and a model of 1.6 million neurons, without either: what the driver does for them.

Plans, manifests and the tidying up at the end are made by the code that does it in a run; units do nothing. The figures of
a quarter, a half and all of the neurons say how they grow; nothing may grow faster than the units do.

`foretold` sets what `raylabel check` says of real runs beside what they took and left behind.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raylabel.engine.pipeline import run_pipeline
from raylabel.stages.base import neuron_ranges
from raylabel.stages.check import estimate
from raylabel.stages.plan_cost import Shape, on_gpu, plan
from raylabel.store.plan import Plan, Unit, make_plan
from raylabel.store.rundir import RunDir
from raylabel.store.shards import manifest_name
from tests.benchmarks.measuring import Settings
from tests.benchmarks.models import build, words
from tests.benchmarks.report import Row
from tests.benchmarks.runs import config, with_stages

LAYERS, WIDTH, A_UNIT, NODES = 80, 20_000, 64, 1_000
PLANNED = ("tokenize", "scan", "identify", "verify", "results")
"""Stages whose time and bytes the planner gives; the others depend on a judge or a language model."""
FACTOR = 2.0
TIMES = 3
SHAPES = {
    "GPT-2-small": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "Llama-3.1-8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "intermediate_size": 14336, "hidden_act": "silu"},
    "a 70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
              "intermediate_size": 28672, "hidden_act": "silu"},
}  # fmt: skip


def driver(settings: Settings) -> Iterator[Row]:
    """Seconds and bytes of the driver for 1.6 million neurons, and how they grow."""
    width = WIDTH // 20 if settings.quick else WIDTH
    found = [simulated(settings.folder / "simulated", width * part // 4) for part in (1, 2, 4)]
    units, how = found[-1]["units"], f"{LAYERS} layers of {width:,} neurons, {A_UNIT} neurons a unit, local disk; CPU time"
    for name in ("plan", "manifests", "committed", "finish", "temporaries", "peak"):
        values = [run[name] for run in found]
        slope = math.log(values[-1] / values[0]) / math.log(found[-1]["units"] / found[0]["units"])
        text = f"{values[-1]:.2f} s" if name != "peak" else f"{values[-1] / 1e6:.0f} MB"
        yield Row(
            f"driver, {units:,} units: {name}", "the number of units: exponent of the growth", slope, slope, slope,
            n=3, unit="exponent", goal=1.15, at_most=True, how=f"{text}; {how}",
            more={"values": values, "units": [run["units"] for run in found]},
        )  # fmt: skip


def simulated(folder: Path, width: int) -> dict[str, float]:
    """Figures of the driver of one stage whose units are all committed."""
    shutil.rmtree(folder, ignore_errors=True)
    run = RunDir(str(folder))
    run.start({})
    figures: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        # The least of several: what a busy machine adds is no growth.
        for _ in range(TIMES):
            started = time.process_time()
            result = work()
            figures[name] = min(time.process_time() - started, figures.get(name, math.inf))
        return result

    plan_of: Plan = timed("plan", lambda: planned(run, width))
    for i, unit in enumerate(plan_of.units):
        write_entry(folder, unit, i)
    timed("manifests", lambda: run.manifest("simulated"))
    done = timed("committed", lambda: run.committed(plan_of))
    last = plan_of.units[-1]
    timed("temporaries", lambda: [sum(1 for _ in fresh.temporaries(last, "work")) for fresh in [RunDir(run.files.url)] * 10])
    timed("finish", lambda: run.finish(plan_of, ("statistics",)))
    tracemalloc.start()
    run.committed(planned(run, width))
    figures["peak"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if len(done) != len(plan_of.units):
        raise RuntimeError(f"{len(done)} of {len(plan_of.units)} units count as committed")
    shutil.rmtree(folder)
    return {"units": len(plan_of.units), **figures}


def planned(run: RunDir, width: int) -> Plan:
    keys = neuron_ranges({layer: list(range(width)) for layer in range(LAYERS)}, A_UNIT)
    made = make_plan("simulated", 1, {}, [], {"work": keys, "close": [{}]})
    run.fix_plan(made)
    return made


def write_entry(folder: Path, unit: Unit, number: int) -> None:
    """The manifest entry and the file of a unit that did nothing."""
    file = f"statistics/layer={unit.key.get('layer', 0):02d}/part-{unit.id}-1.parquet"
    for path in (folder / file, folder / manifest_name(unit)):
        path.parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(b"x")
    entry = {
        "unit": unit.id, "stage": unit.stage, "step": unit.step, "key": unit.key, "attempt": 1, "started": 0.0, "ended": 1.0,
        "host": f"node-{number % NODES}", "failures": [], "notes": {}, "failed": False,
        "files": [{"path": file, "bytes": 1, "sha256": "0" * 64, "rows": A_UNIT, "table": "statistics", "controls": False}],
    }  # fmt: skip
    (folder / manifest_name(unit)).write_text(json.dumps(entry), encoding="utf-8")


def foretold(settings: Settings) -> Iterator[Row]:
    """By what factor the planner is wrong, either way, about runs of two models in this process."""
    tokens = 20_000 if settings.quick else 100_000
    small = {"subject": {"neurons": [0, 64]}, "controls": {"decoys": 32}, "verify": {"max_variants": 120}}
    for name in ("demo", "tiny-llama"):
        out = settings.folder / f"foretold-{name}"
        wanted = with_stages(config(build(name, settings.folder), out, "cpu", 128, tokens, small), *PLANNED)
        told = estimate(wanted)
        found = measured(RunDir(str(out)), run_pipeline(wanted).stages)
        says = {
            "tokens": told["tokens"], "table bytes": told["table bytes"], "temporary bytes": told["temporary bytes"],
            "manifests": told["work units"], "manifest bytes": told["manifest bytes"],
            "seconds": 3600 * told["hours at this machine's pace"],
        }  # fmt: skip
        for what, figure in says.items():
            factor = max(figure / found[what], found[what] / figure)
            # Seconds of a small run are those of opening models and files, which the planner leaves out.
            goal = None if what == "seconds" else FACTOR
            yield Row(
                f"planner, {words(name)}: {what}", "a run", factor, factor, factor, n=1, unit="×", goal=goal, at_most=True,
                how=f"{figure:,.0f} foretold, {found[what]:,.0f} found; 64 units and 32 decoys a layer, one process",
            )  # fmt: skip


def measured(run: RunDir, seconds: dict[str, float]) -> dict[str, float]:
    """The same figures of a finished run."""
    stages = [name for name in PLANNED if name != "tokenize"]
    tables = ("samples", "exemplars", "statistics", "candidates", "variants", "verifications", "results")
    entries = [entry for stage in stages for entry in run.manifest(stage).values()]
    tokens = sum(len(ids) for ids in run.table("samples", columns=["token_ids"]).column(0).to_pylist())
    return {
        "tokens": tokens, "manifests": len(entries), "seconds": sum(seconds.values()),
        "table bytes": sum(sum(run.files.sizes(f"{top}{table}").values()) for table in tables for top in ("", "controls/")),
        "temporary bytes": sum(f["bytes"] for e in entries if e["stage"] == "scan" for f in e["files"] if f.get("temporary")),
        "manifest bytes": sum(sum(run.files.sizes(f"_manifest/{stage}").values()) for stage in stages),
    }  # fmt: skip


def paper() -> list[dict[str, Any]]:
    """What the planner says of the models that are named, on 8 GPUs and 100 million tokens."""
    from raylabel.config import build_config

    wanted = build_config({
        "subject": {"model": "x"}, "exemplars": {"corpus": {"path": "y", "tokens": 100_000_000}},
        "describe": {"explainer": "llm", "base_url": "http://127.0.0.1/v1"}, "score": {"scorers": ["detection", "fuzzing"]},
    })  # fmt: skip
    found = []
    for name, tree in SHAPES.items():
        shape = Shape.of(tree)
        found.append({"model": name, **plan(shape, wanted, 100_000_000, 8, on_gpu(shape), cores=64)})
    return found


if __name__ == "__main__":
    for line in paper():
        print(json.dumps(line, indent=1))

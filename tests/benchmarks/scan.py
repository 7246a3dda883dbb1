"""The scan against the bare forward pass of the same batches, and its memory.

The bare pass is the model's trunk as it was loaded, without hooks and without the LM head. The scan's side is a lease
of samples through `AccumulateWorker`, everything that belongs to it included: reading the samples, the state, and the
state as bytes. `lease_of` and `batches_of` are the only places that know how the scan is called.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raylabel.config import RunConfig
from raylabel.stages.samples import load_samples
from raylabel.stages.scan import AccumulateWorker
from raylabel.stages.subject import open_subject
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from tests.benchmarks import models, runs
from tests.benchmarks.measuring import Settings, child, paired, spread
from tests.benchmarks.report import Row

ALL_TOKENS = 10_000_000
MANY = 20_000
"""Samples that the goal with windows speaks of."""
LEASE_SAMPLES = {"cpu": 512, "cuda": 2048}
"""Samples in a lease of a larger model: what minutes allow. A real lease is longer and dearer at its beginning only, while
nearly every sample is among a unit's best, so these ratios are upper bounds."""
LEASE_PAIRS = 2
LEAST = 0.5
"""A smaller ratio means that the scan did not happen: it saves the last layer's way out and no more."""


def lease_of(worker: AccumulateWorker, first: int, last: int) -> None:
    """The scan of samples [first, last), as the engine calls it and takes what it gives, all but the writing."""
    output = worker(Unit("benchmark", "scan", "accumulate", {"first": first, "last": last}))
    # Work may not begin before its output is asked for.
    if not sum(len(blob.data) for blob in output.blobs):
        raise RuntimeError("a lease gave no state: the scan is called in another way now")


def batches_of(worker: AccumulateWorker, first: int, last: int) -> list[torch.Tensor]:
    """The token ids that the scan of these samples gives to the model, batch by batch, on its device."""
    samples = load_samples(worker.run, first, last)
    return [ids for _, ids, _, _ in worker.batches(samples, first, worker.batch)]


@contextmanager
def headless(subject: Any) -> Iterator[None]:
    """The subject's trunk without its LM head; those of transformers have none."""
    trunk = subject.anatomy.trunk
    head = getattr(trunk, "head", None)
    if head is None:
        yield
        return
    trunk.head = torch.nn.Identity()
    try:
        yield
    finally:
        trunk.head = head


def bare(subject: Any, batches: list[torch.Tensor]) -> None:
    """Forward passes of the trunk, nothing else."""
    with headless(subject), torch.inference_mode():
        for ids in batches:
            subject.anatomy.call(ids)


def scan(settings: Settings) -> Iterator[Row]:
    """Every model, without windows and with windows and decoys."""
    goals = {False: (1.10, 1.05), True: (1.25, 1.15)}
    for name in _names(settings):
        model = models.build(name, settings.folder, settings.device)
        for windows in (False, True):
            out = settings.folder / f"scan-{name}-{windows}"
            pairs, how = _pairs(settings, name, model, windows, out)
            shutil.rmtree(out)
            what = "windows and 256 decoys a layer" if windows else "top-k, both polarities, statistics, all layers"
            yield Row(
                f"scan, {what}: {models.words(name)}", "bare forward pass, same batches", **pairs.figures(), unit="×",
                goal=goals[windows][settings.on_gpu], at_most=True, how=f"{how}; {pairs.note}",
            )  # fmt: skip


def _names(settings: Settings) -> list[str]:
    if settings.quick:
        return ["demo", "tiny-gpt2", "tiny-llama"]
    return ["demo", "gpt2", "llama", *(["llama-8b"] if settings.on_gpu else [])]


def _pairs(settings: Settings, name: str, model: str, windows: bool, out: Path) -> tuple[Any, str]:
    """Leases of a model in turn with bare passes over them, and the sizes in words."""
    whole = name == "demo" and not settings.quick
    # Leases of the demo model are those of a real run.
    size, context = 64 if settings.quick else LEASE_SAMPLES[settings.device], 128
    tokens = ALL_TOKENS if whole else (LEASE_PAIRS + 2) * size * context
    sections = [runs.NO_VECTORS, *([] if windows else [runs.WITHOUT_WINDOWS])]
    wanted = runs.config(model, out, settings.device, context, tokens, *sections)
    if not whole:
        corpus = {"exemplars": {"corpus": {"path": str(models.long_corpus(settings.folder, 100_000))}}}
        wanted = runs.config(model, out, settings.device, context, tokens, *sections, corpus)
    run = runs.run_stages(wanted, "tokenize")
    n = run.dataset("samples").count_rows()
    if whole and n < MANY:
        raise RuntimeError(f"the standard library gives {n} samples, the goal asks for {MANY}")
    _, _, units = runs.up_to(wanted, "scan", "accumulate")
    worker = AccumulateWorker(run.files.url)
    real = [(unit.key["first"], unit.key["last"]) for unit in units]
    # The lease that does not count is a short one.
    leases = [(0, worker.batch), *(real if whole else [(i * size, (i + 1) * size) for i in range(LEASE_PAIRS)])]
    given = [batches_of(worker, first, last) for first, last in leases]
    tokens = sum(ids.numel() for batches in given[1:] for ids in batches)
    pairs = paired(
        lambda i: bare(worker.subject, given[i]), lambda i: lease_of(worker, *leases[i]), len(leases) - 1, settings.device
    )
    if min(pairs.ratios()) < LEAST:
        raise RuntimeError(f"the scan took {min(pairs.ratios()):.2g} of the forward passes that are part of it")
    n = leases[-1][1] - leases[1][0]
    how = f"{n:,} samples, {tokens:,} tokens with padding, in {len(leases) - 1} leases, batch {worker.batch}"
    return pairs, f"{how}, {str(worker.subject.dtype).removeprefix('torch.')}"


def whole_scan(settings: Settings) -> Iterator[Row]:
    """The stage from the pilot to its tables: what a run spends on it, whatever its steps are."""
    model = models.build("demo", settings.folder)
    tokens = (20_000, 4_000) if settings.quick else (ALL_TOKENS, 200_000)
    plain = []
    for name, limit in zip(("whole", "few"), tokens, strict=True):
        wanted = runs.config(model, settings.folder / f"scan-{name}", settings.device, 128, limit, runs.NO_VECTORS)
        runs.run_stages(wanted, "tokenize")
        plain.append(wanted)
    whole, few = plain
    opened = {w.run.out: _all_batches(w) for w in plain}
    n = RunDir(whole.run.out).dataset("samples").count_rows()

    def bare_side(i: int) -> None:
        subject, batches = opened[(whole if i else few).run.out]
        bare(subject, batches)

    copies = [runs.copied(whole if i else few, settings.folder / f"scan-copy-{i}") for i in range(2 if settings.quick else 4)]
    # The round that does not count is a short one.
    pairs = paired(bare_side, lambda i: runs.run_stages(copies[i], "scan"), len(copies) - 1, settings.device)
    for wanted in (*plain, *copies):
        shutil.rmtree(wanted.run.out)
    yield Row(
        "whole scan, pilot to tables, windows and 256 decoys a layer: demo model", "bare forward pass, same batches",
        **pairs.figures(), unit="×", at_most=True, how=f"{n:,} samples, all steps through the engine; {pairs.note}",
    )  # fmt: skip


def _all_batches(wanted: RunConfig) -> tuple[Any, list[torch.Tensor]]:
    """The subject and the batches of a whole run, which is left as it was but for its plan of the scan."""
    copy = runs.copied(wanted, Path(f"{wanted.run.out}-planned"))
    run, _, units = runs.up_to(copy, "scan", "accumulate")
    worker = AccumulateWorker(run.files.url)
    batches = [ids for unit in units for ids in batches_of(worker, unit.key["first"], unit.key["last"])]
    shutil.rmtree(copy.run.out)
    return open_subject(worker.config, worker.facts), batches


def memory(settings: Settings) -> Iterator[Row]:
    """Peak memory of one lease and of ten, each in processes of their own, by the tokens between them."""
    model = models.build("demo", settings.folder)
    size = 64 if settings.quick else 1024
    wanted = runs.config(
        model, settings.folder / "scan-memory", settings.device, 128, 14 * size * 128, runs.NO_VECTORS,
        {"exemplars": {"corpus": {"path": str(models.long_corpus(settings.folder, 100_000))}}},
    )  # fmt: skip
    run = runs.run_stages(wanted, "tokenize")
    runs.up_to(wanted, "scan", "accumulate")
    task = {"do": "memory", "url": run.files.url, "size": size}
    rounds = 2 if settings.quick else 4
    short, long = [], []
    for _ in range(rounds):
        short.append(child("tests.benchmarks.ours", {**task, "leases": 1}, settings.threads))
        long.append(child("tests.benchmarks.ours", {**task, "leases": 10}, settings.threads))
    more = long[0]["tokens"] - short[0]["tokens"]
    growth = [(b["peak"] - a["peak"]) / more for a, b in zip(short, long, strict=True)]
    # What two equal runs differ by cannot be told from nothing.
    noise = max(max(x["peak"] for x in some) - min(x["peak"] for x in some) for some in (short, long)) / more
    yield Row(
        "scan memory: growth of the peak with the tokens scanned", "nothing", **spread(growth), unit="bytes a token",
        goal=0.0, at_most=True, within=noise,
        how=f"demo model, {short[0]['tokens']:,} against {long[0]['tokens']:,} tokens in leases of {size:,} samples; equal "
        f"runs differ by {noise:.2g} bytes a token",
        more={"short": [x["peak"] for x in short], "long": [x["peak"] for x in long], "noise": noise},
    )  # fmt: skip

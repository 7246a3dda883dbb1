"""Re-measuring variants with their beginnings shared, beside one forward pass a variant batched the same.

The variants are those that the project's own verify plans for the first units of a layer: real exemplars, its own
substitutes and windows. The other side is what verification does without any of this: the whole sample of each variant
through all layers, without the LM head. A second row leaves the texts cut at their windows and stops at the layer on
both sides, so that only the sharing differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from raylabel.config import RunConfig
from raylabel.stages.measure import CPU_TOKENS, GPU_TOKENS, measure
from raylabel.stages.verify import Plan, plan_variants
from raylabel.stages.verify_stage import RemeasureLink, SubstituteLink
from raylabel.store.rundir import RunDir
from tests.benchmarks import models, runs
from tests.benchmarks.measuring import Settings, paired
from tests.benchmarks.report import Row

GOALS = {128: 5.0, 512: 20.0}
CLOSE = 1e-4
"""Largest difference, as a share of the 99th percentile of the layer's activations."""


def verify(settings: Settings) -> Iterator[Row]:
    """Contexts of 128 and 512 tokens, each model that takes them."""
    small = "tiny-gpt2" if settings.quick else "gpt2"
    for name, context in (("demo", 128), (small, 128), (small, 512)):
        link, plan, layer, sink, sizes = _prepared(settings, name, context)
        shared, plain = link.subject, _without_sharing(link.subject)
        if not shared.shares_beginnings or plain.shares_beginnings:
            raise RuntimeError(f"{name}: the two sides do not differ in sharing")
        found: dict[str, np.ndarray] = {}

        def side(which: str, subject: Any, layer: int = layer, plan: Plan = plan, sink: float = sink, found: Any = found) -> None:
            rows, failures = measure(subject, layer, plan, sink=sink)
            if failures:
                raise RuntimeError(f"{len(failures)} units failed: {failures[0][1]}")
            found[which] = rows["activation"].to_numpy()

        rounds = 2 if settings.quick else 3
        whole = _whole_samples(link, plan)

        def full(_i: int, link: RemeasureLink = link, whole: list[list[int]] = whole, layer: int = layer) -> None:
            _forward(link, whole, layer)

        given = (settings.device,)
        against_full = paired(lambda i, side=side, subject=shared: side("shared", subject), full, rounds, *given)
        pairs = paired(
            lambda i, side=side, subject=shared: side("shared", subject),
            lambda i, side=side, subject=plain: side("plain", subject), rounds, *given,
        )  # fmt: skip
        large = _p99(link, layer)
        apart = float(np.nanmax(np.abs(found["shared"] - found["plain"]))) / large
        if not np.array_equal(np.isnan(found["shared"]), np.isnan(found["plain"])):
            raise RuntimeError("the two sides leave out other variants")
        words = models.words(name)
        yield Row(
            f"verify by suffix at {context} tokens: {words}", "a full forward per variant, batched the same",
            **against_full.figures(), unit="×", goal=GOALS[context],
            how=f"{sizes}; whole samples have {sum(map(len, whole)) / len(whole):.0f}; {against_full.note}",
        )  # fmt: skip
        yield Row(
            f"verify, sharing alone, at {context} tokens: {words}", "the same texts one by one, to the same layer",
            **pairs.figures(), unit="×", how=f"{sizes}; {pairs.note}",
        )  # fmt: skip
        yield Row(
            f"verify by suffix at {context} tokens, largest |Δ|: {words}", "the same, by the layer's 99th percentile",
            apart, apart, apart, 1, "of p99", f"{len(found['plain']):,} variants, p99 = {large:.3g}", CLOSE, at_most=True,
        )  # fmt: skip


def _prepared(settings: Settings, name: str, context: int) -> tuple[RemeasureLink, Plan, int, float, str]:
    """The link that holds the model, a plan, its layer and sink, and the sizes in words."""
    model = models.build(name, settings.folder, settings.device)
    large, quick = name == "gpt2", settings.quick
    layer = 3 if large else 1
    neurons = 2 if quick else 1 if large and not settings.on_gpu else 16
    # Fewer exemplars with as many variants each as the defaults give: the sharing is the same, the time is not.
    top, variants = (4, 120) if quick else (20, 600) if settings.on_gpu or not large else (10, 300) if context < 512 else (4, 120)
    samples = 40 if quick else 4096 // context * 2 if large else 2000
    corpus = {"exemplars": {"corpus": {"path": str(models.long_corpus(settings.folder, 20_000))}, "top": top}}
    wanted = runs.config(
        model, settings.folder / f"verify-{name}-{context}", settings.device, context, samples * context, corpus,
        {"subject": {"layers": [layer], "neurons": [0, neurons], "batch": 8, "polarity": "positive"}},
        {"verify": {"max_variants": variants}, "controls": {"decoys": 0}},
    )  # fmt: skip
    run = runs.run_stages(wanted, "tokenize", "scan", "identify")
    link = RemeasureLink(run.files.url)
    plan = _plan(run, wanted, layer)
    length = pc.list_value_length(plan["texts"]["ids"]).to_numpy()
    sizes = (
        f"layer {layer}, {neurons} units, {plan['rows'].num_rows:,} variants, {len(length):,} texts of "
        f"{length.mean():.0f} tokens on average up to the end of their window, {length.max()} at most"
    )
    return link, plan, layer, link.fixed.sink(layer), sizes


def _plan(run: RunDir, wanted: RunConfig, layer: int) -> Plan:
    """The variants of all units of the layer, flagged or not: what a unit costs does not depend on it."""
    link = SubstituteLink(run.files.url)
    exemplars = run.table("exemplars", layer, filter=(pc.field("sampling") == "top") & (pc.field("split") == "explain"))
    return plan_variants(
        exemplars, link.samples(exemplars.column("sample")), link.substitutes, link.splicer, wanted.verify,
        window=wanted.identify.window, special_ids=link.facts["special_ids"], seed=wanted.run.seed,
        limit=link.facts["max_context"],
    )  # fmt: skip


def _whole_samples(link: RemeasureLink, plan: Plan) -> list[list[int]]:
    """Every text of a plan with the rest of its sample behind it."""
    rows = plan["rows"].select(["kind", "sample", "text"]).to_pylist()
    texts = plan["texts"]["ids"].to_pylist()
    samples = link.samples(plan["rows"]["sample"])
    ids = dict(zip(samples["sample"].to_pylist(), samples["token_ids"].to_pylist(), strict=True))
    found: dict[int, list[int]] = {}
    cut = 0
    for row in rows:
        # An original comes before its variants.
        cut = len(texts[row["text"]]) if row["kind"] == "original" else cut
        found.setdefault(row["text"], texts[row["text"]] + ids[row["sample"]][cut:])
    limit = link.facts["max_context"]
    return [found[i][:limit] for i in range(len(texts))]


def _forward(link: RemeasureLink, texts: list[list[int]], layer: int) -> None:
    """All of the texts through all layers, in batches of as many tokens as `measure` takes."""
    subject = link.subject
    tokens = CPU_TOKENS if subject.device.type == "cpu" else GPU_TOKENS
    last = subject.n_layers - 1
    kept: list[torch.Tensor] = []

    def visit(at: int, acts: torch.Tensor, _resid: torch.Tensor) -> None:
        if at == layer:
            kept.append(acts.amax(dim=1).cpu())

    order = sorted(texts, key=len)
    step = max(tokens // len(order[-1]), 1)
    for first in range(0, len(order), step):
        part = order[first : first + step]
        rows = [ids + [subject.pad_id] * (len(part[-1]) - len(ids)) for ids in part]
        subject.run(torch.tensor(rows, device=subject.device), sorted({layer, last}), visit)


def _without_sharing(subject: Any) -> Any:
    return replace(subject, anatomy=replace(subject.anatomy, call_tree=None))


def _p99(link: RemeasureLink, layer: int) -> float:
    """The 99th percentile of |activation| over all units of the layer and some samples."""
    table = link.run.table("samples").slice(0, 16)
    values = []
    for ids in table["token_ids"].to_pylist():
        acts = link.subject.activations(torch.tensor([ids], device=link.subject.device), [layer])[layer]
        values.append(acts[0, 1:].float().abs().flatten().cpu().numpy())
    return float(np.percentile(np.concatenate(values), 99))

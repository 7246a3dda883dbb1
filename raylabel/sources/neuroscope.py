"""Neuroscope: a page for each neuron of 25 models, with the 20 texts that it fires most in (neuroscope.io, N. Nanda 2022).

The stage fetches ranges of pages first (`downloads`, `fetch`) and keeps them as they came; `pieces` and `records` read what
was kept and never the network, so that pages can be read again without being asked for again.

Activations were recorded under bfloat16 autocast with BOS in front, at `hook_mid` in SoLU models (before their LayerNorm) and
at `hook_post` in all others; pages round them to six digits.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from yarl import URL

from raylabel.config import RunConfig, listed_units
from raylabel.errors import BadInput
from raylabel.limits import PACE, limiter
from raylabel.sections import NeuroscopeConfig, Site
from raylabel.sources.fetch import Fetcher, Manners, NotFetched
from raylabel.sources.neuroscope_page import looks_whole, parse
from raylabel.sources.pages import Pages
from raylabel.sources.records import Bad, Record, Text, without_model

TEXTS_A_PAGE = 20
NEURONS_A_PIECE, PAGES_A_DOWNLOAD = 64, 1024
"""A page's tokens take a few megabytes of memory once read; pages that are only kept take none."""
ASKERS = 4
"""Pages under way for each connection: the others wait before another attempt, which holds no connection."""
HOPELESS = 50
"""Pages in a row that could not be had, after which nothing more is asked for."""
BYTES_A_TOKEN, TOKENS_A_TEXT = 20, 1024
"""Of a page, in JSON, both widgets counted: what `estimate` goes by."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Known:
    """What Neuroscope has of a model."""

    layers: int
    neurons: int
    dataset: str
    site: Site


def _models() -> dict[str, Known]:
    web, pile, openweb = "80% C4 (Web Text) and 20% Python Code", "The Pile", "Open Web Text"
    found = {}
    for layers, neurons in ((1, 2048), (2, 2048), (3, 2048), (4, 2048), (6, 3072), (8, 4096), (10, 5120), (12, 6144)):
        found[f"solu-{layers}l"] = Known(layers, neurons, web, "mlp_mid")
        if layers <= 4:
            found[f"gelu-{layers}l"] = Known(layers, neurons, web, "mlp_post")
    for layers, neurons in ((1, 4096), (2, 2944), (4, 2048), (6, 3072), (8, 4096), (10, 5120)):
        found[f"solu-{layers}l-pile"] = Known(layers, neurons, pile, "mlp_mid")
    for size, layers, neurons in (("small", 12, 3072), ("medium", 24, 4096), ("large", 36, 5120), ("xl", 48, 6400)):
        found[f"gpt2-{size}"] = Known(layers, neurons, openweb, "mlp_post")
    for size, layers, neurons in (("70m", 6, 2048), ("160m", 12, 3072), ("350m", 24, 4096)):
        found[f"pythia-{size}"] = Known(layers, neurons, pile, "mlp_post")
    return found


MODELS = _models()
HOOKS: dict[Site, str] = {"mlp_mid": "mlp.hook_mid", "mlp_post": "mlp.hook_post"}


def site_of(config: RunConfig) -> Site | None:
    """Where the activations on the pages were read; None for a model that is not among those of the site."""
    known = MODELS.get(config.exemplars.neuroscope.model or "")
    return known.site if known else None


def settings(config: RunConfig) -> tuple[NeuroscopeConfig, str]:
    """The section and the model's name; BadInput names the key."""
    section = config.exemplars.neuroscope
    if section.model is None:
        raise BadInput("exemplars.neuroscope.model is required, e.g. solu-8l-pile")
    if not _NAME.fullmatch(section.model):
        raise BadInput(f"exemplars.neuroscope.model: {section.model!r} is no name of a model, e.g. solu-8l-pile")
    try:
        url = URL(section.url)
        good = url.scheme in ("http", "https") and bool(url.host) and url.user is None
    except ValueError:
        good = False
    if not good:
        raise BadInput(f"exemplars.neuroscope.url: expected http(s)://HOST without a user or password, not {section.url!r}")
    return section, section.model


def wanted(config: RunConfig) -> dict[int, list[int]]:
    """The neurons of each layer whose pages are wanted, ascending; BadInput names the key."""
    _, model = settings(config)
    subject, known = config.subject, MODELS.get(model)
    found: dict[int, list[int]] = {}
    if (listed := listed_units(subject)) is not None:
        for layer, neuron in sorted(set(listed)):
            found.setdefault(layer, []).append(neuron)
    else:
        layers = list(range(known.layers)) if known and subject.layers == "all" else subject.layers
        ends = (0, known.neurons) if known and subject.neurons == "all" else subject.neurons
        if layers == "all" or ends == "all":
            raise BadInput(
                f"exemplars.neuroscope.model: {model} is none of the site's ({', '.join(MODELS)}); for another give "
                "subject.layers and subject.neurons, or subject.units"
            )
        found = {layer: list(range(*ends)) for layer in sorted(set(layers))}
    if known is not None:
        for layer, neurons in found.items():
            if layer >= known.layers or neurons[-1:] > [known.neurons - 1]:
                raise BadInput(
                    f"subject.units, layers or neurons: {model} has layers 0 to {known.layers - 1} of neurons 0 to "
                    f"{known.neurons - 1} at Neuroscope"
                )
    if not any(found.values()):
        raise BadInput("subject.neurons: no page is wanted")
    return {layer: neurons for layer, neurons in found.items() if neurons}


def _pieces(config: RunConfig, size: int) -> list[dict[str, Any]]:
    found = []
    for layer, neurons in sorted(wanted(config).items()):
        for at in range(0, len(neurons), size):
            part = neurons[at : at + size]
            found.append({"layer": layer, "first": part[0], "last": part[-1] + 1})
    return found


def pieces(config: RunConfig) -> list[dict[str, Any]]:
    """Ranges of neurons {layer, first, last} whose pages are read together."""
    return _pieces(config, NEURONS_A_PIECE)


def downloads(config: RunConfig) -> list[dict[str, Any]]:
    """Ranges of neurons whose pages are fetched together."""
    return _pieces(config, PAGES_A_DOWNLOAD)


def page(model: str, layer: int, neuron: int) -> str:
    """The path of a neuron's page on the site."""
    return f"{model}/{layer}/{neuron}.html"


def kept_pages(config: RunConfig) -> Pages:
    """Where the pages are kept."""
    return Pages(config.exemplars.neuroscope.cache or f"{config.run.out.rstrip('/')}/_pages")


def _address(section: NeuroscopeConfig, model: str, layer: int, neuron: int) -> str:
    return str(URL(section.url.rstrip("/") + "/").join(URL(page(model, layer, neuron))))


def records(config: RunConfig, piece: dict[str, Any]) -> Iterator[Record | Bad]:
    """A record for each page of the piece that was fetched and understood; the others as Bad, with the reason."""
    for neuron in _neurons(config, piece):
        yield record(config, piece["layer"], neuron)


def record(config: RunConfig, layer: int, neuron: int) -> Record | Bad:
    """What the page of a neuron says."""
    section, model = settings(config)
    known, pages = MODELS.get(model), kept_pages(config)
    url = _address(section, model, layer, neuron)
    try:
        entry = pages.entry(url)
        if entry is None or "sha256" not in entry:
            return Bad(f"{url}: {entry.get('failed', 'nothing') if entry else 'it was not fetched'}", layer, neuron)
        texts = parse(pages.read(entry), model, known.dataset if known else None, layer, neuron)
    except (ValueError, OSError) as error:
        return Bad(f"{url}: {error}", layer, neuron)
    shown = [Text(t.full.tokens, t.full.values, t.peak, document=f"{t.dataset} {t.data_index}") for t in texts]
    # Where the subject is read elsewhere by hand, the agreement with the recordings has the last word.
    trusted = known is not None and (without_model(config) or config.subject.site == known.site)
    site = f"blocks.{layer}.{HOOKS[known.site]}" if known and trusted else None
    return Record(layer, neuron, shown, site=site, place=url)


def _neurons(config: RunConfig, piece: dict[str, Any]) -> list[int]:
    return [n for n in wanted(config).get(piece["layer"], []) if piece["first"] <= n < piece["last"]]


def fetch(config: RunConfig, piece: dict[str, Any]) -> dict[str, Any]:
    """Fetches the pages of a piece that are not kept yet, each neuron's or the reason why not; returns what was done.

    BadInput where page after page cannot be had.
    """
    pairs = [(piece["layer"], neuron) for neuron in _neurons(config, piece)]
    return fetch_pages(config, pairs)


def fetch_pages(config: RunConfig, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """The same of any neurons (layer, neuron)."""
    return asyncio.run(_crawl(config, pairs))


def rate(config: RunConfig) -> Any:
    """The run's limiter for the site."""
    section = config.exemplars.neuroscope
    return limiter(f"site {URL(section.url).host}", section.requests_per_second)


async def _crawl(config: RunConfig, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    section, model = settings(config)
    kept = kept_pages(config)
    manners = Manners(
        connections=section.connections, timeout=section.timeout, largest=section.max_bytes, attempts=section.attempts,
        allow_private=section.allow_private, contact=section.contact,
    )  # fmt: skip
    waiting, failed, in_a_row = iter(pairs), 0, 0
    why = ""

    async def ask(site: Fetcher) -> None:
        nonlocal failed, in_a_row, why
        for layer, neuron in waiting:
            if in_a_row >= HOPELESS:
                return
            try:
                await site.get(page(model, layer, neuron))
                in_a_row = 0
            except NotFetched as error:
                failed, in_a_row, why = failed + 1, in_a_row + 1, str(error)
                await asyncio.to_thread(kept.fail, _address(section, model, layer, neuron), why)

    fetcher = Fetcher(
        section.url, rate(config), kept, manners, refresh=section.refresh, accept=looks_whole,
        per_second=section.requests_per_second,
    )  # fmt: skip
    async with fetcher as site, asyncio.TaskGroup() as group:
        for _ in range(min(ASKERS * section.connections, len(pairs))):
            group.create_task(ask(site))
    if in_a_row >= HOPELESS:
        raise BadInput(f"exemplars.neuroscope.url: {HOPELESS} pages in a row could not be fetched from {section.url}: {why}")
    return {**asdict(site.counts), "failed": failed}


def estimate(config: RunConfig) -> dict[str, Any]:
    """What would be fetched: `pages`, `bytes` unpacked, `seconds` at the configured rate; asks for nothing."""
    section, model = settings(config)
    n = sum(map(len, wanted(config).values()))
    return {
        "site": section.url, "pages": n, "bytes at most": n * TEXTS_A_PAGE * TOKENS_A_TEXT * BYTES_A_TOKEN,
        "requests a second": section.requests_per_second, "fetch seconds": round(n / (PACE * section.requests_per_second), 1),
        "recorded at": HOOKS[MODELS[model].site] if model in MODELS else "not known",
    }  # fmt: skip

"""Neuronpedia: features with texts, direct effects and explanations: `exemplars.source: neuronpedia`.

`url` says where from:

- a folder, or a URL that ends in `/v1` or names the bucket of data sets: the bulk export,
  `v1/MODEL/SOURCE/{features,activations,explanations}/batch-N.jsonl.gz`, a line a feature, text or explanation;
- any other URL: the feature API, `URL/api/feature/MODEL/SOURCE/INDEX`, with the key in `api_key_env` as `x-api-key`, for
  the features that `subject.units` or `subject.neurons` name.

What a URL gives is fetched first and kept as it came (`downloads`, `fetch`); `pieces` and `records` never use the network.
A source id is `LAYER-SET`, e.g. `6-res-jb`, or a bare layer. Texts of the top group are `top`, those of intervals
`quantile`. Explanations are labels of the explainer `neuronpedia`.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from yarl import URL

from raylabel.config import RunConfig, listed_units
from raylabel.errors import BadInput
from raylabel.limits import PACE, limiter
from raylabel.sections import NeuronpediaConfig
from raylabel.sources.fetch import Fetcher, Manners, NotFetched
from raylabel.sources.neuronpedia_rows import ROWS, Page, index_of, labels, numbers, text_of
from raylabel.sources.pages import Pages
from raylabel.sources.reading import BROKEN, lines, lines_of, parsed, stamp, what
from raylabel.sources.records import Bad, Record

KINDS = ("features", "activations", "explanations")
FEATURES_A_PIECE, FEATURES_A_DOWNLOAD = 64, 256
HOPELESS = 50
FEATURE_BYTES = 1_200_000
"""Of a feature by the API, as measured by others."""
BATCH_FEATURES, BATCH_BYTES = 1024, 60_000_000
LARGEST = 512_000_000
_SOURCE = re.compile(r"(\d+)(-[A-Za-z0-9._-]+)?")
_BATCH = re.compile(r"batch-(\d+)\.jsonl(\.gz)?")
_GONE = ("404", "403")
"""How what is not there answers; a bucket that does not list its keys says 403."""
Piece = dict[str, Any]


def settings(config: RunConfig) -> tuple[NeuronpediaConfig, str, dict[int, str]]:
    """(section, model, source by layer); BadInput names the key."""
    section = config.exemplars.neuronpedia
    if not section.model:
        raise BadInput("exemplars.neuronpedia.model is required, e.g. gpt2-small")
    if not section.sources:
        raise BadInput("exemplars.neuronpedia.sources is required, e.g. [6-res-jb]")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", section.model) or section.model.startswith("."):
        raise BadInput(f"exemplars.neuronpedia.model: {section.model!r} is no name of a model, e.g. gpt2-small")
    layers: dict[int, str] = {}
    for source in section.sources:
        match = _SOURCE.fullmatch(source)
        if match is None:
            raise BadInput(f"exemplars.neuronpedia.sources: {source!r} is no source id, e.g. 6-res-jb")
        layer = int(match[1])
        if layer in layers:
            raise BadInput(f"exemplars.neuronpedia.sources: {layers[layer]} and {source} are of one layer; make a run of each")
        layers[layer] = source
    return section, section.model, layers


def access(section: NeuronpediaConfig) -> str:
    """`folder`, `bulk` or `api`; BadInput for a URL that is none."""
    if "://" not in section.url:
        if not Path(section.url).is_dir():
            raise BadInput(f"exemplars.neuronpedia.url: no such folder: {section.url}")
        return "folder"
    try:
        url = URL(section.url)
        good = url.scheme in ("http", "https") and bool(url.host) and url.user is None
    except ValueError:
        good = False
    if not good:
        raise BadInput(f"exemplars.neuronpedia.url: expected a folder or http(s)://HOST without a user, not {section.url!r}")
    return "bulk" if url.path.rstrip("/").endswith("/v1") or "datasets" in (url.host or "") else "api"


def _asked(config: RunConfig, layers: dict[int, str]) -> dict[int, list[int]]:
    """The features that the API is asked for, by layer."""
    subject = config.subject
    listed = listed_units(subject)
    if listed is not None:
        found = {layer: sorted({n for at, n in listed if at == layer}) for layer in layers}
    elif subject.neurons == "all":
        raise BadInput(
            "subject.neurons: the feature API is asked feature by feature; give [first, last), or subject.units, or the bulk "
            "export as exemplars.neuronpedia.url"
        )
    else:
        wanted = {layer for layer in layers if subject.layers == "all" or layer in subject.layers}
        found = {layer: list(range(*subject.neurons)) for layer in wanted}
    if not any(found.values()):
        raise BadInput("subject.units, layers or neurons: no feature of exemplars.neuronpedia.sources is wanted")
    return {layer: neurons for layer, neurons in sorted(found.items()) if neurons}


def _ranges(config: RunConfig, layers: dict[int, str], size: int) -> list[Piece]:
    found = []
    for layer, neurons in _asked(config, layers).items():
        for at in range(0, len(neurons), size):
            found.append({"kind": "api", "layer": layer, "first": neurons[at], "last": neurons[at : at + size][-1] + 1})
    return found


def pieces(config: RunConfig) -> list[Piece]:
    """Work units: batch files of a folder, a source's batches of a kind at a URL, ranges of features of the API."""
    section, model, layers = settings(config)
    how = access(section)
    if how == "api":
        return _ranges(config, layers, FEATURES_A_PIECE)
    if how == "bulk":
        return [{"kind": kind, "layer": layer} for layer in sorted(layers) for kind in KINDS]
    found = []
    for layer, source in sorted(layers.items()):
        for kind in KINDS:
            for file in _batches(section, model, source, kind):
                found.append({"kind": kind, "layer": layer, "file": file.name, **stamp(file)})
    return found


def _batches(section: NeuronpediaConfig, model: str, source: str, kind: str) -> list[Path]:
    """The batch files of a folder, by number; BadInput where a source has none."""
    base = Path(section.url)
    places = [base / "v1" / model / source, base / model / source]
    place = next((p for p in places if p.is_dir()), None)
    if place is None:
        raise BadInput(f"exemplars.neuronpedia.sources: no folder {places[0]}")
    numbered = [(match, file) for file in (place / kind).glob("batch-*") if (match := _BATCH.fullmatch(file.name))]
    if kind == "activations" and not numbered:
        raise BadInput(f"exemplars.neuronpedia.sources: no batch-N.jsonl.gz in {place / kind}")
    return [file for match, file in sorted(numbered, key=lambda pair: (int(pair[0][1]), pair[1].name))]


def downloads(config: RunConfig) -> list[Piece]:
    """What is fetched before anything is read; nothing of a folder."""
    section, _, layers = settings(config)
    how = access(section)
    if how == "folder":
        return []
    return _ranges(config, layers, FEATURES_A_DOWNLOAD) if how == "api" else pieces(config)


def kept_pages(config: RunConfig) -> Pages:
    """Where what was fetched is kept."""
    return Pages(config.exemplars.neuronpedia.cache or f"{config.run.out.rstrip('/')}/_pages")


def _bulk_path(section: NeuronpediaConfig, model: str, source: str, kind: str, number: int) -> str:
    head = "" if URL(section.url).path.rstrip("/").endswith("/v1") else "v1/"
    return f"{head}{model}/{source}/{kind}/batch-{number}.jsonl.gz"


def _address(section: NeuronpediaConfig, path: str) -> str:
    return str(URL(section.url.rstrip("/") + "/").join(URL(path)))


def _neurons(config: RunConfig, piece: Piece) -> list[int]:
    layers = settings(config)[2]
    return [n for n in _asked(config, layers)[piece["layer"]] if piece["first"] <= n < piece["last"]]


def fetch(config: RunConfig, piece: Piece) -> dict[str, Any]:
    """Fetches what a piece names and is not kept yet; returns what was done. BadInput where nothing can be had."""
    return asyncio.run(_fetch(config, piece))


async def _fetch(config: RunConfig, piece: Piece) -> dict[str, Any]:
    section, model, layers = settings(config)
    kept, source = kept_pages(config), layers[piece["layer"]]
    manners = Manners(
        connections=section.connections, timeout=section.timeout, largest=LARGEST, attempts=section.attempts,
        allow_private=section.allow_private,
    )  # fmt: skip
    key = os.environ.get(section.api_key_env) if access(section) == "api" else None
    headers = {"x-api-key": key} if key else {}
    turns = limiter(f"site {URL(section.url).host}", section.requests_per_second)
    async with Fetcher(
        section.url, turns, kept, manners, per_second=section.requests_per_second, headers=headers
    ) as site:
        if piece["kind"] == "api":
            paths = [f"api/feature/{model}/{source}/{n}" for n in _neurons(config, piece)]
            await _all(site, kept, section, paths)
        else:
            number = 0
            # The last batch is the one before the first that is not there.
            while await _one(site, kept, section, _bulk_path(section, model, source, piece["kind"], number)) is None:
                number += 1
    return asdict(site.counts)


async def _one(site: Fetcher, kept: Pages, section: NeuronpediaConfig, path: str) -> str | None:
    """Fetches a page; why not, where it could not be had."""
    try:
        await site.get(path)
    except NotFetched as error:
        await asyncio.to_thread(kept.fail, _address(section, path), str(error))
        return str(error)
    return None


async def _all(site: Fetcher, kept: Pages, section: NeuronpediaConfig, paths: list[str]) -> None:
    waiting, in_a_row, why = iter(paths), 0, ""

    async def ask() -> None:
        nonlocal in_a_row, why
        for path in waiting:
            if in_a_row >= HOPELESS:
                return
            failed = await _one(site, kept, section, path)
            # A feature that is not there is an answer.
            in_a_row = in_a_row + 1 if failed and not failed.startswith("404") else 0
            why = failed or why

    async with asyncio.TaskGroup() as group:
        for _ in range(min(section.connections, len(paths))):
            group.create_task(ask())
    if in_a_row >= HOPELESS:
        raise BadInput(f"exemplars.neuronpedia.url: {HOPELESS} features in a row could not be fetched; the last: {why}")


def records(config: RunConfig, piece: Piece) -> Iterator[Record | Bad]:
    """What a piece holds."""
    section, model, layers = settings(config)
    layer, kind = piece["layer"], piece["kind"]
    source = layers[layer]
    if kind == "api":
        for neuron in _neurons(config, piece):
            yield _page(kept_pages(config), section, model, source, layer, neuron)
    elif "file" in piece:
        places = {file.name: file for file in _batches(section, model, source, kind)}
        yield from _rows(lines(str(places[piece["file"]])), f"{source}/{kind}/{piece['file']}", kind, model, source, layer)
    else:
        yield from _bulk(kept_pages(config), section, kind, model, source, layer)


def _bulk(
    pages: Pages, section: NeuronpediaConfig, kind: str, model: str, source: str, layer: int
) -> Iterator[Record | Bad]:
    number = 0
    while True:
        url = _address(section, _bulk_path(section, model, source, kind, number))
        try:
            entry = pages.entry(url)
            if entry is None or "sha256" not in entry:
                why = entry.get("failed", "nothing") if entry else "it was not fetched"
                if not why.startswith(_GONE) or (number == 0 and kind == "activations"):
                    yield Bad(f"{url}: {why}")
                return
            body = gzip.GzipFile(fileobj=io.BytesIO(pages.read(entry)))
            yield from _rows(lines_of(body), f"{source}/{kind}/batch-{number}", kind, model, source, layer)
        except OSError as error:
            yield Bad(f"{url}: {error}")
        number += 1


def _rows(
    numbered: Iterator[tuple[int, bytes]], name: str, kind: str, model: str, source: str, layer: int
) -> Iterator[Record | Bad]:
    number = 0
    try:
        for number, data in numbered:
            place = f"{name}, line {number}"
            try:
                row = parsed(data, ROWS[kind])
                yield _record(row, kind, model, source, layer, place)
            except ValueError as error:
                yield Bad(f"{place}: {error}")
    except BROKEN as error:
        yield Bad(f"{name}, after line {number}: {what(error)}")


def _record(row: Any, kind: str, model: str, source: str, layer: int, place: str) -> Record:
    """The record of a line; ValueError says what is wrong with it."""
    neuron = index_of(row, model, source)
    if kind == "features":
        return Record(layer, neuron, [], statistics=numbers(row), place=place)
    if kind == "explanations":
        return Record(layer, neuron, [], labels=labels([row]), place=place)
    return Record(layer, neuron, [text_of(row)], place=place)


def _page(pages: Pages, section: NeuronpediaConfig, model: str, source: str, layer: int, neuron: int) -> Record | Bad:
    url = _address(section, f"api/feature/{model}/{source}/{neuron}")
    try:
        entry = pages.entry(url)
        if entry is None or "sha256" not in entry:
            why = entry.get("failed", "nothing") if entry else "it was not fetched"
            return Bad(f"{url}: {why}", layer, neuron)
        page = parsed(pages.read(entry), Page)
        if index_of(page, model, source) != neuron:
            raise ValueError(f"index is {page.index!r}, asked was {neuron}")
        texts = [text_of(row) for row in page.activations]
        return Record(layer, neuron, texts, statistics=numbers(page), labels=labels(page.explanations), place=url)
    except (ValueError, OSError) as error:
        return Bad(f"{url}: {error}", layer, neuron)


def estimate(config: RunConfig) -> dict[str, Any]:
    """Features or files, bytes and seconds at the configured rate; asks for nothing."""
    section, model, layers = settings(config)
    how = access(section)
    if how == "folder":
        files = [file for source in layers.values() for kind in KINDS for file in _batches(section, model, source, kind)]
        size = sum(file.stat().st_size for file in files)
        return {"site": section.url, "files": len(files), "bytes": size, "requests": 0, "fetch seconds": 0.0}
    rate = PACE * section.requests_per_second
    if how == "api":
        n = sum(map(len, _asked(config, layers).values()))
        about = {"pages": n, "bytes about": n * FEATURE_BYTES, "requests": n}
    else:
        # How many batches there are is known once they are fetched: this is what one of each kind takes.
        n = len(layers) * len(KINDS)
        about = {"files at least": n, "bytes a batch about": BATCH_BYTES, "requests": 2 * n, "features a batch": BATCH_FEATURES}
    return {"site": section.url, **about, "requests a second": section.requests_per_second,
            "fetch seconds": round(about["requests"] / rate, 1)}  # fmt: skip

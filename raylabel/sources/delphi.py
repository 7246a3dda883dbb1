"""delphi's cache folders: a hookpoint's `FIRST_LAST.safetensors`, one a range of latents.

A file holds `locations` [n, 3] (row, position, latent − FIRST), `activations` [n] float16 and `tokens` [rows, context]; an
entry that is not there is an activation of 0. The layer is the first number in the hookpoint's name (`layers.6.mlp`). A
row is a text and its own document. Read a stretch of rows at a time, entries in the order that they were written, so
that no more than a stretch lies in memory beside what is kept of each latent: the strongest rows, a draw of those it
fires in, and the run's random rows. Statistics are exact, but that BOS positions, which delphi leaves out, count as 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from raylabel.sections import ExemplarsConfig
from raylabel.sources.reading import what
from raylabel.sources.records import Bad, Record, Text

ENTRIES = 1 << 20
"""Entries read at a time."""
MARGIN = 6
"""Rows kept for each exemplar wanted: the split, which is drawn later, leaves enough for both sides."""
SPREAD = 16
_NAME = re.compile(r"(\d+)_(\d+)\.safetensors")
_NUMBER = re.compile(r"\d+")
NAMES = ("locations", "activations", "tokens")


def splits(files: Sequence[Path]) -> set[Path]:
    """The files among some that are splits of a cache, by their names."""
    return {file for file in files if _NAME.fullmatch(file.name)}


@dataclass
class _Latent:
    """What is kept of a latent: (activation, row) and, for the draw, (hash, row)."""

    top: list[tuple[float, int]] = field(default_factory=list)
    drawn: list[tuple[int, int]] = field(default_factory=list)
    entries: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    fires: int = 0
    powers: np.ndarray = field(default_factory=lambda: np.zeros(4))
    high: float = 0.0
    low: float = 0.0


def records(path: str, wanted: ExemplarsConfig) -> Iterator[Record | Bad]:
    """A record a latent that has entries."""
    file = Path(path)
    name = f"{file.parent.name}/{file.name}"
    try:
        match, number = _NAME.fullmatch(file.name), _NUMBER.search(file.parent.name)
        if match is None or number is None:
            raise ValueError(f"the folder's name has no layer in it: {file.parent.name}")
        first, last, layer = int(match[1]), int(match[2]), int(number[0])
        # Opened for every read: pages of a memory map stay with the process.
        with safe_open(path, framework="np") as opened:
            missing = set(NAMES) - set(opened.keys())
            if missing:
                raise ValueError(f"no tensor {min(missing)}")
            yield from _records(opened, wanted, layer, first, last, name)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        yield Bad(f"{name}: {what(error)}")


def _records(opened: Any, wanted: ExemplarsConfig, layer: int, first: int, last: int, name: str) -> Iterator[Record | Bad]:
    locations, activations, tokens = (opened.get_slice(tensor) for tensor in NAMES)
    shapes = [list(tensor.get_shape()) for tensor in (locations, activations, tokens)]
    n = shapes[0][0] if shapes[0] else -1
    if shapes[0] != [n, 3] or shapes[1] != [n] or len(shapes[2]) != 2:
        raise ValueError(f"locations {shapes[0]}, activations {shapes[1]} and tokens {shapes[2]} do not belong together")
    rows, context = shapes[2]
    latents: dict[int, _Latent] = {}
    random = set(_random(rows, wanted.random).tolist())
    for at, values in _stretches(locations, activations, n):
        if len(at) and (at.min() < 0 or at[:, 0].max() >= rows or at[:, 1].max() >= context or at[:, 2].max() > last - first):
            raise ValueError("a location lies outside the rows, the context or the latents of the file")
        if not np.isfinite(values).all():
            raise ValueError("an activation is NaN or infinite")
        _add(latents, at, values, wanted, random)
    for latent in sorted(latents):
        yield _record(latents[latent], tokens, rows, context, wanted, layer, first + latent, name, sorted(random))


def _stretches(locations: Any, activations: Any, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(locations int64, activations float64) of whole rows; ValueError where rows are not in order."""
    held = (np.zeros((0, 3), np.int64), np.zeros(0))
    before = -1
    for start in range(0, n, ENTRIES):
        end = min(start + ENTRIES, n)
        at = np.concatenate([held[0], np.asarray(locations[start:end]).astype(np.int64)])
        values = np.concatenate([held[1], np.asarray(activations[start:end]).astype(np.float64)])
        row = at[:, 0]
        if len(row) and (row[0] < before or (np.diff(row) < 0).any()):
            raise ValueError("locations are not in the order of rows")
        whole = len(row) if end == n else int(np.searchsorted(row, row[-1]))
        before = int(row[whole - 1]) if whole else before
        held = (at[whole:], values[whole:])
        yield at[:whole], values[:whole]


def _hash(rows: np.ndarray) -> np.ndarray:
    """A draw without replacement, the same for every latent."""
    with np.errstate(over="ignore"):
        mixed = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(2)).astype(np.int64)


def _random(rows: int, wanted: int) -> np.ndarray:
    return np.argsort(_hash(np.arange(rows)), kind="stable")[: MARGIN * wanted]


def _add(
    latents: dict[int, _Latent], at: np.ndarray, values: np.ndarray, wanted: ExemplarsConfig, random: set[int]
) -> None:
    order = np.lexsort((at[:, 1], at[:, 0], at[:, 2]))
    at, values = at[order], values[order]
    edges = np.flatnonzero(np.any(np.diff(at[:, [2, 0]], axis=0) != 0, axis=1)) + 1
    starts = np.concatenate([[0], edges, [len(at)]]) if len(at) else np.zeros(1, np.int64)
    hashes = _hash(at[:, 0])
    touched: set[int] = set()
    for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        row, latent = int(at[a, 0]), int(at[a, 2])
        places, found = at[a:b, 1], values[a:b]
        if (np.diff(places) == 0).any():
            raise ValueError(f"two activations of latent {latent} at the same place")
        kept = latents.setdefault(latent, _Latent())
        kept.fires += int((found > 0).sum())
        kept.powers += [float((found**k).sum()) for k in (1, 2, 3, 4)]
        peak = float(found.max())
        kept.high, kept.low = max(kept.high, peak), min(kept.low, float(found.min()))
        if peak > 0:
            kept.top.append((-peak, row))
            kept.drawn.append((int(hashes[a]), row))
        if peak > 0 or row in random:
            kept.entries[row] = (places.astype(np.int32), found.astype(np.float32))
        touched.add(latent)
    for latent in touched:
        _trim(latents[latent], wanted, random)


def _trim(kept: _Latent, wanted: ExemplarsConfig, random: set[int]) -> None:
    kept.top = sorted(kept.top)[: MARGIN * wanted.top]
    kept.drawn = sorted(kept.drawn)[: SPREAD * wanted.quantile]
    used = {row for _, row in (*kept.top, *kept.drawn)} | random
    kept.entries = {row: entry for row, entry in kept.entries.items() if row in used}


def _record(
    kept: _Latent, tokens: Any, rows: int, context: int, wanted: ExemplarsConfig, layer: int, neuron: int, name: str,
    random: list[int],
) -> Record:  # fmt: skip
    def text(row: int, sampling: str) -> Text:
        ids = np.asarray(tokens[row : row + 1]).reshape(-1).tolist()
        values = np.zeros(context, dtype=np.float32)
        if row in kept.entries:
            values[kept.entries[row][0]] = kept.entries[row][1]
        return Text(None, values.tolist(), None, ids, f"{name.split('/')[0]} {row}", sampling)

    drawn = _middles([row for _, row in kept.drawn], kept, wanted.quantile)
    chosen = [(row, "top") for _, row in kept.top]
    chosen += [(row, "quantile") for row in drawn] + [(row, "random") for row in random]
    n = max(rows * context, 1)
    s1, s2, s3, s4 = kept.powers / n
    variance = s2 - s1**2
    numbers: dict[str, Any] = {
        "tokens_seen": rows * context, "fires": kept.fires, "mean": s1, "variance": max(variance, 0.0), "max": kept.high,
        "min": kept.low,
    }  # fmt: skip
    if variance > 0:
        numbers["skewness"] = (s3 - 3 * s1 * s2 + 2 * s1**3) / variance**1.5
        numbers["kurtosis"] = (s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4) / variance**2
    numbers = {key: value if isinstance(value, int) else float(value) for key, value in numbers.items()}
    return Record(layer, neuron, [text(row, why) for row, why in chosen], statistics=numbers, place=f"{name}, latent {neuron}")


def _middles(rows: list[int], kept: _Latent, n: int) -> list[int]:
    """Rows of all strata of activation, MARGIN times n at most."""
    ranked = sorted(rows, key=lambda row: (float(kept.entries[row][1].max()), row))
    count = min(len(ranked), MARGIN * n)
    return [ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)]

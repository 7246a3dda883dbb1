"""identify, null included, beside a straightforward program for the same numbers.

The baseline goes unit by unit: words and phrases of its exemplars, their vectors from a cache (each distinct text is
embedded once), a NumPy matrix of all pairs, its mean off the diagonal; then the same for random sets of the same size
and frequency bands, drawn and gathered a chunk at a time with one batched product, stopped like ours after 20 that
do as well. It is spared the distinct stems of a draw. Its similarities must be ours; its p-values have other draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from raylabel.stages import identify as ours
from raylabel.stages.identify_stage import TOP, open_background
from raylabel.words.background import Background
from raylabel.words.families import families
from raylabel.words.nulls import CHUNKS, DRAWS, ENOUGH, nulls_of
from raylabel.words.segment import mat_word, phrase
from tests.benchmarks import models, runs
from tests.benchmarks.measuring import Settings, paired
from tests.benchmarks.report import Row

SAME = 1e-4
"""Largest difference of a similarity between the two."""


def identify(settings: Settings) -> Iterator[Row]:
    """All units of the demo model, a layer at a time."""
    tokens, neurons = (60_000, 64) if settings.quick else (350_000, 512)
    model = models.build("demo", settings.folder)
    wanted = runs.config(
        model, settings.folder / "identify", settings.device, 64, tokens,
        {"subject": {"neurons": [0, neurons], "polarity": "positive"}, "controls": {"decoys": 0}},
    )  # fmt: skip
    run = runs.run_stages(wanted, "tokenize", "scan")
    runs.up_to(wanted, "identify", "measure")
    background = open_background(run, wanted)
    # What both read from the background is there before either starts.
    background.matrix  # noqa: B018
    special, window, seed = run.resolved["special_ids"], wanted.identify.window, wanted.run.seed
    layers = range(run.resolved["n_layers"])
    exemplars = [run.table("exemplars", layer, filter=TOP) for layer in layers]
    found: dict[str, list[np.ndarray]] = {}

    def fast(_: int) -> None:
        nulls_of.cache_clear()
        tables = [ours.measure(table, background, window, special, seed) for table in exemplars]
        names = ("token_similarity", "family_similarity", "phrase_similarity", "p_value")
        found["ours"] = [np.concatenate([_floats(t[name]) for t in tables]) for name in names]

    def plain(_: int) -> None:
        baseline = Baseline(background, window, special, seed)
        rows = [row for table in exemplars for row in baseline.measure(table)]
        found["baseline"] = list(np.array(rows).T)

    pairs = paired(fast, plain, 2 if settings.quick else 3)
    for mine, theirs in zip(found["ours"][:3], found["baseline"][:3], strict=True):
        if not np.allclose(mine, theirs, atol=SAME, equal_nan=True):
            raise RuntimeError(f"similarities differ by {np.nanmax(np.abs(mine - theirs)):.2g}")
    p = [x[3][~np.isnan(found["ours"][3]) & ~np.isnan(found["baseline"][3])] for x in (found["ours"], found["baseline"])]
    if len(p[0]) > 2 and np.corrcoef(np.log(p[0]), np.log(p[1]))[0, 1] < 0.8:
        raise RuntimeError("p-values have nothing to do with each other")
    yield Row(
        "identify, null included", "cached sentence vectors and a NumPy pair matrix per unit, null included",
        **pairs.figures(), unit="×", goal=5.0,
        how=f"demo model, {len(found['ours'][0]):,} units, {sum(t.num_rows for t in exemplars):,} exemplars, up to {DRAWS:,} "
        f"draws; {pairs.note}",
    )  # fmt: skip


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


class Baseline:
    """identify as one would write it first."""

    def __init__(self, background: Background, window: int, special: Any, seed: int) -> None:
        self.background, self.window, self.special = background, window, set(special)
        self.rng = np.random.default_rng(seed)
        self.cache: dict[tuple[str, str], np.ndarray] = {}
        bands = np.repeat(np.arange(background.bands), np.diff(background.edges))
        self.pools = {
            "words": _pools(background.matrix, bands, background.bands),
            "phrases": _pools(background.null_vectors, background.null_bands, background.bands),
        }

    def measure(self, exemplars: pa.Table) -> list[tuple[float, float, float, float]]:
        """(token, family and phrase similarity, p) of every unit of a layer's exemplars."""
        table = exemplars.sort_by([("neuron", "ascending"), ("polarity", "ascending"), ("rank", "ascending")])
        neurons = table["neuron"].to_numpy()
        bounds = [0, *(np.flatnonzero(np.diff(neurons)) + 1).tolist(), len(neurons)]
        rows = table.select(["position", "tokens", "token_ids"]).to_pylist()
        parts = [self._read(row) for row in rows]
        self._embed("words", [word for _, word, _ in parts])
        self._embed("phrases", [text for _, _, text in parts])
        return [self._unit(parts[a:b]) for a, b in pairwise(bounds) if b > a]

    def _read(self, row: dict[str, Any]) -> tuple[int, str, str]:
        """Token id, word and phrase at an exemplar's peak."""
        tokens = ["" if i in self.special else t for i, t in zip(row["token_ids"], row["tokens"], strict=True)]
        at = row["position"]
        start = sum(map(len, tokens[:at]))
        low, high = mat_word("".join(tokens), start, start + len(tokens[at]))
        return row["token_ids"][at], "".join(tokens)[low:high], phrase(tokens, at, self.window).text

    def _embed(self, kind: str, texts: list[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if (kind, text) not in self.cache]
        embed = self.background.words if kind == "words" else self.background.phrases
        for text, vector in zip(new, embed(new), strict=True):
            self.cache[kind, text] = vector

    def _unit(self, parts: list[tuple[int, str, str]]) -> tuple[float, float, float, float]:
        words = np.stack([self.cache["words", word] for _, word, _ in parts])
        phrases = np.stack([self.cache["phrases", text] for _, _, text in parts])
        family = families([i for i, _, _ in parts], [word for _, word, _ in parts])
        first = np.unique(family, return_index=True)[1]
        first = first[words[first].any(axis=1)]
        p = float("nan")
        if len(parts) >= ours.MIN_EXEMPLARS and len(first) >= ours.MIN_FAMILIES:
            band = self.background.band([parts[i][1] for i in first])
            some = phrases[first].any(axis=1)
            both = (
                self._p("words", words[first], band),
                self._p("phrases", phrases[first][some], band[some]),
            )
            p = min(1.0, 2 * min(both))
        return _mean(words, 2), _mean(words[first], ours.MIN_FAMILIES), _mean(phrases, 2), p

    def _p(self, kind: str, vectors: np.ndarray, band: np.ndarray) -> float:
        if len(vectors) < 2:
            return 1.0
        limit, reached = _mean(vectors, 2) - 1e-6, 0
        pools = [self.pools[kind][b] for b in band.tolist()]
        off = ~np.eye(len(vectors), dtype=bool)
        for low, high in pairwise(CHUNKS):
            drawn = np.stack([pool[self.rng.integers(len(pool), size=high - low)] for pool in pools], axis=1)
            null = (drawn @ drawn.transpose(0, 2, 1))[:, off].mean(axis=1)
            as_good = reached + np.cumsum(null >= limit)
            if as_good[-1] >= ENOUGH:
                return ENOUGH / float(low + 1 + np.argmax(as_good >= ENOUGH))
            reached = int(as_good[-1])
        return (1 + reached) / (1 + DRAWS)


def _pools(vectors: np.ndarray, bands: np.ndarray, n: int) -> list[np.ndarray]:
    """Unit vectors of each band; a band without any draws from all."""
    present = vectors.any(axis=1)
    return [vectors[present & (bands == b)] if (present & (bands == b)).any() else vectors[present] for b in range(n)]


def _mean(vectors: np.ndarray, least: int) -> float:
    """Mean of the matrix of pairs off its diagonal, over vectors that are not zero."""
    vectors = vectors[vectors.any(axis=1)]
    if len(vectors) < least:
        return float("nan")
    pairs = vectors @ vectors.T
    return float(pairs[~np.eye(len(vectors), dtype=bool)].mean())

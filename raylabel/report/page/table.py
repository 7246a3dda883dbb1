"""The table of all units as columns beside the page: data/units-NNN.js, and data/phrases-NNN.js for the search in phrases.

Rows lie in the order in which `raylabel show` names units, most convincing first. The first file is small, so that the
page has something to show at once, whatever the run's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.report.page.packing import pack_columns, write_packed
from raylabel.report.texts import shown
from raylabel.stages.results import visible
from raylabel.store.rundir import RunDir

FIRST, CHUNK = 500, 25_000
"""Rows of the first file, and of each after it."""
PHRASE_CHUNK = 5_000
WORDS = 6


@dataclass(frozen=True)
class Column:
    """A column of the table: `title` over it and `about` as its explanation; `digits` behind the point, None for a code."""

    name: str
    title: str
    about: str
    digits: int | None = None
    percent: bool = False
    rises: bool = True
    """Whether large values are the better ones, and come first at the first sort."""
    narrow: bool = False
    """Whether it is shown on a narrow screen."""


COLUMNS = (
    Column("kind", "kind", "meaning: the words at the peaks mean alike; word: one word, its forms or one token"),
    Column("evidence", "evidence", "what drives the unit when words are swapped: concept, token, context or none", narrow=True),
    Column(
        "normalised_activation",
        "norm.",
        "normalised activation: mean over neighbour variants, by the layer's 99th percentile",
        2,
        narrow=True,
    ),
    Column("q_value", "q", "false discovery rate at which the words' likeness is significant", 3, rises=False),
    Column("decoy_rate", "decoys", "share of the layer's random directions that do at least as well", 0, True, rises=False),
    Column("family_similarity", "sim.", "mean cosine between distinct word families at the peaks", 2),
    Column("retention", "ret.", "retention: share of the activation kept when words give way to their neighbours", 2),
    Column("specificity", "spec.", "specificity: how much more neighbours keep than random words at the peak", 2),
    Column(
        "score", "score", "mean corrected score of the label: 0 is what other units' labels reach, 1 is perfect", 2, narrow=True
    ),
    Column("auroc", "AUROC", "how well the concept's words tell firing tokens from silent ones, on held-back text", 2),
    Column("density", "density", "share of tokens at which the activation is above 0", 1, True),
    Column("max", "max", "largest recorded activation, in the model's units", 1),
)
CODES = ("kind", "evidence", "status")


def order_of(results: pa.Table) -> np.ndarray:
    """Row numbers of `results` in the order of `raylabel show`."""
    evidence = _texts(results, "evidence")
    worth = np.select([evidence == "concept", np.isin(evidence, ("token", "context"))], [0, 1], 2)
    similarity = np.nan_to_num(numbers(results, "family_similarity"), nan=-1.0)
    place = [results.column(name).to_numpy() for name in ("layer", "neuron", "polarity")]
    keys = (-place[2], place[1], place[0], -similarity, worth, _texts(results, "kind") != "meaning", ~flags(results, "verified"))
    return np.lexsort(keys)


def write_table(run: RunDir, results: pa.Table, folder: Path) -> dict[str, Any]:
    """Writes the files and returns what the page needs to read them: rows, files, columns with values, codes."""
    order = order_of(results)
    results = results.take(order)
    columns: dict[str, Any] = {
        "layer": results.column("layer").to_numpy().astype(np.int32),
        "neuron": results.column("neuron").to_numpy().astype(np.int32),
        "polarity": results.column("polarity").to_numpy().astype(np.int32),
        "verified": flags(results, "verified").astype(np.uint8),
        "flagged": flags(results, "flagged").astype(np.uint8),
    }
    names: dict[str, list[str]] = {}
    for code in CODES:
        encoded = results.column(code).combine_chunks().dictionary_encode()
        encoded = encoded if isinstance(encoded, pa.DictionaryArray) else encoded.combine_chunks()
        names[code] = ["", *(str(value) for value in encoded.dictionary.to_pylist())]
        columns[code] = (pc.fill_null(encoded.indices.cast(pa.int32()), -1).to_numpy() + 1).astype(np.uint8)
    beside = joined(run, results)
    for column in COLUMNS:
        if column.digits is not None:
            values = beside[column.name] if column.name in beside else numbers(results, column.name)
            if np.isfinite(values).any():
                columns[column.name] = values.astype(np.float32)
    columns["label"] = [shown(text) for text in results.column("label").to_pylist()]
    columns["words"] = words_of(results)
    rows = len(order)
    edges = [0, *range(FIRST, rows, CHUNK), rows] if rows > FIRST else [0, rows]
    bytes_ = 0
    for i, (a, b) in enumerate(pairwise(edges)):
        bytes_ += write_packed(folder, f"units-{i:03d}", pack_columns(b - a, {k: v[a:b] for k, v in columns.items()}))
    phrases = 0
    for at in range(0, rows, PHRASE_CHUNK):
        lists = results.column("phrases").slice(at, PHRASE_CHUNK).to_pylist()
        lines = ["\x1f".join(dict.fromkeys(shown(phrase) for phrase in found or [])) for found in lists]
        write_packed(folder, f"phrases-{phrases:03d}", pack_columns(len(lines), {"phrases": lines}))
        phrases += 1
    present = [c for c in COLUMNS if c.name in columns and (c.digits is not None or len(names[c.name]) > 1)]
    return {
        "rows": rows,
        "files": len(edges) - 1,
        "edges": edges,
        "phrases": phrases,
        "phraseRows": PHRASE_CHUNK,
        "codes": names,
        "bytes": bytes_,
        "layers": sorted({int(layer) for layer in np.unique(columns["layer"])}),
        "columns": [
            {
                "name": c.name,
                "title": c.title,
                "about": c.about,
                "digits": c.digits,
                "percent": c.percent,
                "rises": c.rises and c.digits is not None,
                "narrow": c.narrow,
            }
            for c in present
        ],
    }


def words_of(results: pa.Table) -> list[str]:
    """What stands for a unit beside its label: the concept's words, and the words at its peaks, each once."""
    found = []
    for concept, mats in zip(results.column("concept_words").to_pylist(), results.column("mats").to_pylist(), strict=True):
        words = dict.fromkeys(shown(visible(word)) for word in [*(concept or [])[:WORDS], *(mats or [])])
        found.append(", ".join(words))
    return found


def joined(run: RunDir, results: pa.Table) -> dict[str, np.ndarray]:
    """Columns of other tables, a value for each row of `results`: `auroc` of concepts, `density` of statistics."""
    found: dict[str, np.ndarray] = {}
    keys = _keys(results)
    # A run of which only a part is there has results without the tables behind them.
    for table, wanted in (("concepts", ("auroc",)), ("statistics", ("fires", "tokens_seen"))):
        values = {name: np.full(len(keys), np.nan, np.float64) for name in wanted}
        if run.complete(table):
            rows = run.table(table, columns=["layer", "neuron", "polarity", *wanted])
            theirs = _keys(rows)
            order = np.argsort(theirs)
            at = np.minimum(np.searchsorted(theirs, keys, sorter=order), max(len(theirs) - 1, 0))
            if len(theirs):
                hit = theirs[order[at]] == keys
                for name in wanted:
                    values[name] = np.where(hit, numbers(rows, name)[order[at]], np.nan)
        found |= values
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"auroc": found["auroc"], "density": found["fires"] / found["tokens_seen"]}


def _keys(table: pa.Table) -> np.ndarray:
    """One number a unit."""
    layer, neuron, polarity = (table.column(n).to_numpy().astype(np.int64) for n in ("layer", "neuron", "polarity"))
    return (layer << 40) + (neuron << 8) + (polarity + 8)


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64, NaN where it is null."""
    return pc.fill_null(table.column(name).cast(pa.float64()), float("nan")).to_numpy()


def flags(table: pa.Table, name: str) -> np.ndarray:
    """A column as bool, False where it is null."""
    return pc.fill_null(table.column(name), False).to_numpy().astype(bool)


def _texts(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(pc.fill_null(table.column(name), "").to_pylist(), dtype=object)

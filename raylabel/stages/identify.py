"""identify: do a unit's strongest exemplars mean alike, or does it fire on one word?

`measure` turns explain-split top exemplars of many units into rows of `candidates`; `close` fills what needs all units
(q-values, decoy rates, kinds). Similarity is the mean cosine over unordered pairs without self-pairs, of unit vectors:
(|sum v|^2 - n) / (n (n - 1)); words without a vector are left out of n. Families, not repeats, carry the evidence: one
word a family, and in the phrase test one phrase a family, the one of best rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.sections import IdentifyConfig
from raylabel.tables import conform
from raylabel.words.background import Background
from raylabel.words.families import families
from raylabel.words.nulls import nulls_of
from raylabel.words.segment import mat_word, phrase

MIN_EXEMPLARS, MIN_FAMILIES = 5, 4
NEAREST = 4
WORD_SHARE = 0.75


@dataclass(frozen=True)
class _Rows:
    """Exemplars sorted by unit and rank: `unit` numbers them, `starts` [units] is where each unit begins."""

    table: pa.Table
    unit: np.ndarray
    starts: np.ndarray
    mats: list[str]
    words: list[str]
    phrases: list[str]
    families: list[list[int]]


def measure(
    exemplars: pa.Table, background: Background, window: int, special_ids: Collection[int], seed: int
) -> pa.Table:
    """Rows of `candidates`, one a unit (`control`, neuron, polarity) that has exemplars; what `close` fills is null.

    Rows of other splits and samplings are passed over. A unit's row depends on its own exemplars only, not on the
    units beside it. `special_ids` are tokens whose string is a name and not text.
    """
    keys = [name for name in ("control", "neuron", "polarity") if name in exemplars.column_names]
    rows = _read(exemplars, keys, window, special_ids)
    units = len(rows.starts)
    # Similarities are those of word vectors; the test also sees what stands beside the words.
    words, joined = (_distinct(find, rows.words) for find in (background.words, background.joined))
    phrases = _distinct(background.phrases, rows.phrases)
    sizes = np.diff([*rows.starts, len(rows.unit)])

    family = np.concatenate([np.array(f) for f in rows.families]) if units else np.zeros(0, np.int64)
    first = np.unique(rows.unit * (len(family) + 1) + family, return_index=True)[1]
    of = rows.unit[first]
    n_families = np.bincount(of, minlength=units)
    known = words[first].any(axis=1)
    n_known = np.bincount(of[known], minlength=units)
    tested = (sizes >= MIN_EXEMPLARS) & (n_known >= MIN_FAMILIES)
    chosen = first[known & tested[of]]

    squares, _ = _sums(words[first], of, units)
    p = np.full(units, np.nan)
    p[tested] = _p_values(background, seed, rows, joined, phrases, chosen)[tested]
    counts = [np.bincount(f, minlength=3) for f in rows.families]
    columns = {key: rows.table.column(key).take(rows.starts) for key in keys}
    columns |= {
        "n_exemplars": pa.array(sizes, pa.int16()),
        "n_families": pa.array(n_families, pa.int16()),
        "mats": _lists(rows.mats, rows),
        "phrases": _lists(rows.phrases, rows),
        "token_similarity": _nullable(similarity(*_sums(words, rows.unit, units), least=2)),
        "family_similarity": _nullable(similarity(squares, n_known, least=MIN_FAMILIES)),
        "phrase_similarity": _nullable(similarity(*_sums(phrases, rows.unit, units), least=2)),
        "knn_similarity": _nullable(_nearest(words[first[known]], of[known], units)),
        "p_value": _nullable(p),
        "status": pa.array(np.where(sizes >= MIN_EXEMPLARS, "ok", "too_few").tolist(), pa.string()),
        "mat_words": _lists(rows.words, rows),
        "families": pa.array(rows.families, pa.list_(pa.int32())),
        "top_families": pa.array([np.sort(c)[-3:].sum() / c.sum() for c in counts], pa.float32()),
    }
    return conform(pa.table(columns), "candidates", controls="control" in keys)


def close(units: pa.Table, controls: pa.Table, config: IdentifyConfig) -> tuple[pa.Table, pa.Table]:
    """Both tables (`candidates` and a column `layer`) with q_value, kind, flagged and decoy_rate filled.

    q: Benjamini-Hochberg (1995) over the units with a p-value; a control's q is the one that a unit with its p would
    have. kind: `meaning` at 4 families or more with q <= fdr (whatever q where fdr is null); else `word` where three
    families hold 3/4 of the exemplars; null for `too_few`. decoy_rate: share of the layer's decoys (of the same
    polarity, if there are any) that do at least as well: for kind `word` those of that kind with top_families as high,
    else those with p as low; null without decoys, and for decoys themselves.
    """
    p = _floats(units, "p_value")
    tested = np.sort(p[~np.isnan(p)])
    closed = []
    for table in (units, controls):
        q = q_values(_floats(table, "p_value"), tested)
        kind = _kinds(table, q, config)
        filled = {
            "q_value": _nullable(q),
            "kind": pa.array(kind.tolist(), pa.string()),
            "flagged": pa.array(_flagged(table, kind, config), pa.bool_()),
        }
        closed.append(_set(table, filled))
    decoy = pc.equal(closed[1]["control"], "decoy")
    decoys = closed[1].filter(decoy)
    rates = [_decoy_rates(table, decoys) for table in closed]
    rates[1][decoy.to_numpy().astype(bool)] = np.nan
    own, theirs = (_set(table, {"decoy_rate": _nullable(rate)}) for table, rate in zip(closed, rates, strict=True))
    return own, theirs


def q_values(p: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """float64 [n]: the Benjamini-Hochberg q of each p among the sorted p-values `tested`, members of it or not."""
    if not len(tested):
        return np.full(len(p), np.nan)
    m = len(tested)
    own = np.minimum.accumulate((tested * m / np.searchsorted(tested, tested, side="right"))[::-1])[::-1]
    below = np.searchsorted(tested, p, side="right")
    above = np.append(own, np.inf)[np.searchsorted(tested, p, side="left")]
    return np.where(np.isnan(p), np.nan, np.minimum(np.minimum(p * m / np.maximum(below, 1), above), 1.0))


def similarity(squares: np.ndarray, n: np.ndarray, least: int) -> np.ndarray:
    """float64: mean cosine over the pairs of n unit vectors whose sum has length² `squares`; NaN if n < `least`."""
    pairs = np.where(n >= max(least, 2), n * (n - 1.0), np.nan)
    return np.clip((squares - n) / pairs, -1.0, 1.0)


def _read(exemplars: pa.Table, keys: list[str], window: int, special_ids: Collection[int]) -> _Rows:
    wanted = pc.and_(pc.equal(exemplars["split"], "explain"), pc.equal(exemplars["sampling"], "top"))
    needed = exemplars.select([*keys, "rank", "position", "tokens", "token_ids"]).filter(wanted)
    table = needed.sort_by([(key, "ascending") for key in (*keys, "rank")]).combine_chunks()
    marks = [table.column(key).to_numpy(zero_copy_only=False) for key in keys]
    n = table.num_rows
    new = np.ones(n, bool)
    new[1:] = np.any([mark[1:] != mark[:-1] for mark in marks], axis=0) if n else False
    starts = np.flatnonzero(new)

    ids = _flat(table["token_ids"]).to_numpy()
    tokens = _flat(table["tokens"]).to_pylist()
    for i in np.flatnonzero(np.isin(ids, list(special_ids))):
        tokens[i] = ""
    ends = np.cumsum(pc.list_value_length(table["tokens"]).to_numpy()).tolist()
    positions = table["position"].to_pylist()
    mats, words, phrases, mat_ids = [], [], [], []
    for first, end, position in zip([0, *ends], ends, positions, strict=False):
        kept = tokens[first:end]
        text, mat = "".join(kept), kept[position]
        start = sum(map(len, kept[:position]))
        low, high = mat_word(text, start, start + len(mat))
        mats.append(mat)
        mat_ids.append(int(ids[first + position]))
        words.append(text[low:high])
        phrases.append(phrase(kept, position, window).text)
    bounds = [*starts.tolist(), n]
    found = [families(mat_ids[low:high], words[low:high]) for low, high in pairwise(bounds)]
    return _Rows(table, np.cumsum(new) - 1, starts, mats, words, phrases, found)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays([chunk.flatten() for chunk in column.chunks] or [pa.array([], column.type.value_type)])


def _distinct(vectors: Callable[[list[str]], np.ndarray], items: list[str]) -> np.ndarray:
    """Rows of `vectors(items)`, computed once for each distinct item."""
    number = {item: i for i, item in enumerate(dict.fromkeys(items))}
    return vectors(list(number))[[number[item] for item in items]]


def _sums(vectors: np.ndarray, unit: np.ndarray, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared length of each unit's vector sum and its number of vectors that are not zero; `unit` is sorted."""
    if not units:
        return np.zeros(0), np.zeros(0, np.int64)
    starts = np.searchsorted(unit, np.arange(units))
    total = np.add.reduceat(vectors.astype(np.float64), starts, axis=0)
    n = np.add.reduceat(vectors.any(axis=1).astype(np.int64), starts)
    return np.einsum("ud,ud->u", total, total), n


def _p_values(
    background: Background, seed: int, rows: _Rows, words: np.ndarray, phrases: np.ndarray, chosen: np.ndarray
) -> np.ndarray:
    """float64 [units]: twice the smaller p of words and of phrases, one a family, against sets matched in frequency."""
    units = len(rows.starts)
    if not len(chosen):
        return np.ones(units)
    band = background.band([rows.words[i] for i in chosen])
    smallest = np.ones(units)
    for kind, vectors in (("words", words[chosen]), ("phrases", phrases[chosen])):
        present = vectors.any(axis=1)
        counts = np.zeros((units, background.bands), np.int64)
        np.add.at(counts, (rows.unit[chosen][present], band[present]), 1)
        some = np.flatnonzero(counts.any(axis=1))
        of = np.searchsorted(some, rows.unit[chosen][present])
        squares, _ = _sums(vectors[present], of, len(some))
        p = nulls_of(background, seed).p_values(kind, squares, counts[some])  # type: ignore[arg-type]
        smallest[some] = np.minimum(smallest[some], p)
    return np.minimum(1.0, 2 * smallest)


def _nearest(vectors: np.ndarray, unit: np.ndarray, units: int) -> np.ndarray:
    """float64 [units]: mean over families of their mean cosine to the 4 nearest others; NaN below 5 families."""
    n = np.bincount(unit, minlength=units)
    out = np.full(units, np.nan)
    for size in np.unique(n[n > NEAREST]):
        same = np.flatnonzero(n == size)
        stacked = vectors[np.isin(unit, same)].reshape(len(same), size, -1)
        cosines = np.einsum("und,umd->unm", stacked, stacked)
        cosines[:, np.arange(size), np.arange(size)] = -np.inf
        out[same] = np.sort(cosines, axis=2)[:, :, -NEAREST:].mean(axis=(1, 2), dtype=np.float64)
    return out


def _kinds(table: pa.Table, q: np.ndarray, config: IdentifyConfig) -> np.ndarray:
    ok = np.array(table["status"].to_pylist(), object) == "ok"
    significant = np.full(len(q), True) if config.fdr is None else q <= config.fdr
    meaning = significant & (_floats(table, "n_families") >= MIN_FAMILIES)
    word = _floats(table, "top_families") >= WORD_SHARE
    kind = np.full(len(q), None, object)
    kind[ok & word] = "word"
    kind[ok & meaning] = "meaning"
    return kind


def _flagged(table: pa.Table, kind: np.ndarray, config: IdentifyConfig) -> np.ndarray:
    wanted = ("meaning", "word") if config.criterion == "either" else (config.criterion,)
    flagged = np.isin(kind.astype(str), wanted)
    if config.similarity is not None:
        flagged &= _floats(table, "phrase_similarity") >= config.similarity
    return flagged


def _decoy_rates(units: pa.Table, decoys: pa.Table) -> np.ndarray:
    rate = np.full(units.num_rows, np.nan)
    if not decoys.num_rows:
        return rate
    layer, polarity, p, top = (_floats(units, name) for name in ("layer", "polarity", "p_value", "top_families"))
    layer_d, polarity_d, p_d, top_d = (_floats(decoys, n) for n in ("layer", "polarity", "p_value", "top_families"))
    word, word_d = (np.array(t["kind"].to_pylist(), object) == "word" for t in (units, decoys))
    for a, b in set(zip(layer.tolist(), polarity.tolist(), strict=True)):
        rows = np.flatnonzero((layer == a) & (polarity == b))
        peers = (layer_d == a) & (polarity_d == b)
        peers = peers if peers.any() else layer_d == a
        if not peers.any():
            continue
        by_p = np.searchsorted(np.sort(p_d[peers & ~np.isnan(p_d)]), p[rows], side="right")
        tops = np.sort(top_d[peers & word_d])
        by_word = len(tops) - np.searchsorted(tops, top[rows], side="left")
        better = np.where(word[rows], by_word, np.where(np.isnan(p[rows]), np.nan, by_p))
        rate[rows] = better / peers.sum()
    return rate


def _lists(items: list[str], rows: _Rows) -> pa.Array:
    offsets = pa.array([*rows.starts.tolist(), len(items)], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(items, pa.string()))


def _floats(table: pa.Table, name: str) -> np.ndarray:
    """float64 [rows], NaN for null."""
    return table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def _nullable(values: np.ndarray) -> pa.Array:
    """float32, null for NaN."""
    return pa.array(values.astype(np.float32), pa.float32(), mask=np.isnan(values))


def _set(table: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, values.cast(field.type))
    return table

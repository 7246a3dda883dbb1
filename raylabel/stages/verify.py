"""verify, the first of three steps: which variants a unit gets.

`plan_variants` (CPU) turns exemplars into requests, `measure.measure` (the model) fills in their activations, and
`causal.summarise` (CPU) says what they mean. The first hands a Plan of two Arrow tables to the second:

- `rows` (schema ROWS), one a unit, exemplar and substitute, and one a unit and exemplar for the original itself:
  which text, and the phrase window [start, end) in its tokens over which the activation is the maximum.
- `texts`, one column `ids` list<int32>: the distinct token sequences, each as far as the last window that lies in it.
  Row `text` of `rows` is an index into it. A text serves all units and windows that ask for it, since what follows a
  position does not change it in a causal model.

Only words that start at or before the MAT word are varied, for the same reason. Activations are sign(polarity) * activation.
The published method's code replaced characters, every occurrence of them, and ran the phrase without its context
(fbarez/neuroplasticity); here one word's own span changes and all before it stays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.sections import VerifyConfig
from raylabel.stages.arrays import lists
from raylabel.stages.hashing import hashed
from raylabel.words import segment
from raylabel.words.splice import Edit, Sample, Splice, Splicer

Plan = dict[str, pa.Table]
Unit = tuple[str | None, int, int]
"""(control or None, neuron, polarity)."""

MOST_WORDS_BACK = 5
"""Offsets run from -MOST_WORDS_BACK to 0."""
RANDOM_POOL = 4
"""Random words are drawn from a pool this many times larger, another part of it for each place in the text: with the
same few for all exemplars, what is special about them would look like a property of the unit."""
WIDER = 2
"""The MAT word gets so many times `verify.synonyms` of either kind, since few neighbours are of a unit's list. Those beyond
are `extra`: they count for specificity alone, or the MAT word would outweigh the context in every mean, and are neither
among the rows of `variants` nor in `verify.max_variants`, of which they are half at most. Extra neighbours are near ones that
lie towards the unit's other MAT words."""
ORIGINAL, NEIGHBOUR, RANDOM = KINDS = ("original", "neighbour", "random")

ROWS = pa.schema([
    ("control", pa.string()), ("neuron", pa.int32()), ("polarity", pa.int8()), ("rank", pa.int16()),
    ("sample", pa.int64()), ("document", pa.int64()), ("position", pa.int32()), ("recorded", pa.float32()),
    ("kind", pa.string()), ("offset", pa.int8()), ("word", pa.string()), ("substitute", pa.string()),
    ("phrase", pa.string()), ("keeps_token", pa.bool_()), ("extra", pa.bool_()), ("text", pa.int32()), ("start", pa.int32()),
    ("end", pa.int32()), ("dropped", pa.int32()),
])  # fmt: skip
"""`position` is the MAT's in the sample, `recorded` the exemplar's activation. Null in originals: `offset`, `word`,
`substitute`. Null elsewhere: `dropped`, the variants of the exemplar that could not be written exactly."""
TEXTS = pa.schema([("ids", pa.list_(pa.int32()))])


class Neighbourhood(Protocol):
    """What `words.substitutes` offers."""

    def neighbours(self, words: Sequence[str], k: int) -> list[list[str]]: ...

    def among(self, group: Sequence[str], k: int) -> list[list[str]]: ...

    def random(self, words: Sequence[str], k: int) -> list[list[str]]: ...


class _Place(NamedTuple):
    """The phrase around a MAT: tokens [low, high), characters [begin, end), and (offset, start, end) of its words."""

    low: int
    high: int
    begin: int
    end: int
    words: list[tuple[int, int, int]]


def plan_variants(
    exemplars: pa.Table,
    samples: pa.Table,
    substitutes: Neighbourhood,
    splicer: Splicer,
    config: VerifyConfig,
    *,
    window: int,
    special_ids: Collection[int],
    seed: int,
    limit: int | None = None,
) -> Plan:
    """The variants of every unit in `exemplars`, `config.max_variants` a unit at most.

    Args:
        exemplars: schema `exemplars`, with or without `control`; only explain-split `top` rows are used.
        samples: schema `samples`; holds the sample of every row.
        window: tokens of the phrase on each side of the MAT.
        limit: tokens the model can take; variants whose changed word or MAT would lie beyond are dropped.

    Raises ValueError for an exemplar whose sample is missing.
    """
    top = pc.and_(pc.equal(exemplars["sampling"], "top"), pc.equal(exemplars["split"], "explain"))
    exemplars = _with_control(exemplars.filter(top))
    exemplars = exemplars.take(_order(exemplars)).combine_chunks()
    if exemplars.num_rows == 0:
        return {"rows": ROWS.empty_table(), "texts": TEXTS.empty_table()}
    numbers = exemplars["sample"].to_numpy()
    kept = samples.filter(pc.is_in(samples["sample"], pa.array(numbers))).sort_by("sample")
    missing = np.setdiff1d(numbers, kept["sample"].to_numpy())
    if len(missing):
        raise ValueError(f"exemplars of sample {missing[0]}, which is not among the samples")
    texts = _samples(kept, special_ids)
    row = np.searchsorted(kept["sample"].to_numpy(), numbers)
    mat = exemplars["start"].to_numpy() + exemplars["position"].to_numpy()
    places = _places(texts, row, mat, window)
    unit, rank = unit_numbers(exemplars), exemplars["rank"].to_numpy()
    choice = _choose(texts, row, numbers, places, substitutes, config, unit, rank, seed)
    return _build(exemplars, texts, row, mat, places, choice, splicer, limit)


def part(plan: Plan, chosen: pa.ChunkedArray) -> Plan:
    """Some of a plan's rows, whole units of it, with the texts that they need."""
    rows = plan["rows"].filter(chosen)
    used, text = np.unique(rows["text"].to_numpy(), return_inverse=True)
    at = rows.schema.get_field_index("text")
    rows = rows.set_column(at, rows.schema.field(at), pa.array(text.astype(np.int32)))
    return {"rows": rows, "texts": plan["texts"].take(pa.array(used))}


def unit_numbers(table: pa.Table) -> np.ndarray:
    """[rows] int64: 0, 1, … for the runs of equal (control, neuron, polarity) of a table sorted by them."""
    if table.num_rows == 0:
        return np.zeros(0, np.int64)
    control = pc.fill_null(table["control"], "").combine_chunks().dictionary_encode().indices.to_numpy()
    key = np.stack([control, table["neuron"].to_numpy(), table["polarity"].to_numpy()])
    return np.concatenate([[0], np.cumsum((key[:, 1:] != key[:, :-1]).any(axis=0))])


def _order(exemplars: pa.Table) -> pa.Array:
    """Row numbers by control (the model's own units first), neuron, polarity and rank."""
    columns = {name: exemplars[name] for name in ("neuron", "polarity", "rank")}
    keys = pa.table({"control": pc.fill_null(exemplars["control"], ""), **columns})
    return pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names])


def _with_control(table: pa.Table) -> pa.Table:
    if "control" in table.column_names:
        return table
    return table.append_column("control", pa.nulls(table.num_rows, pa.string()))


def _samples(table: pa.Table, special_ids: Collection[int]) -> list[Sample]:
    found = []
    for text, ids, ends in zip(*(table[name].to_pylist() for name in ("text", "token_ids", "ends")), strict=True):
        lead = 0
        while lead < len(ids) and ids[lead] in special_ids and ends[lead] == 0:
            lead += 1
        found.append(Sample(text, ids, ends, lead))
    return found


def _places(texts: list[Sample], row: np.ndarray, mat: np.ndarray, window: int) -> list[_Place]:
    spans: dict[int, list[segment.Span]] = {}
    seen: dict[tuple[int, int], _Place] = {}
    found = []
    for i, m in zip(row.tolist(), mat.tolist(), strict=True):
        if (i, m) not in seen:
            if i not in spans:
                spans[i] = segment.spans(texts[i].text)
            seen[i, m] = _place(texts[i], spans[i], m, window)
        found.append(seen[i, m])
    return found


def _place(sample: Sample, spans: list[segment.Span], mat: int, window: int) -> _Place:
    low, high = max(mat - window, sample.lead), min(mat + window + 1, len(sample.ids))
    begin = sample.ends[low - 1] if low else 0
    end = sample.ends[high - 1]
    mat_start, _ = segment.mat_word(sample.text, sample.ends[mat - 1] if mat else 0, sample.ends[mat])
    last = bisect_right(spans, mat_start, key=lambda span: span[0])
    # A MAT that is no word (white space) has no offset 0; the word before it is one word back.
    zero = last - 1 if last and spans[last - 1][0] == mat_start else last
    first = max(zero - MOST_WORDS_BACK, 0)
    words = [(i - zero, *spans[i]) for i in range(first, last) if spans[i][1] > begin]
    return _Place(low, high, begin, end, words)


class _Choice(NamedTuple):
    """Chosen variants, one entry each: exemplar, its word's offset and characters, numbers of word and substitute."""

    exemplar: np.ndarray
    offset: np.ndarray
    start: np.ndarray
    end: np.ndarray
    word: np.ndarray
    substitute: np.ndarray
    kind: np.ndarray
    extra: np.ndarray
    words: list[str]
    substitutes: list[str]


def _choose(
    texts: list[Sample], row: np.ndarray, numbers: np.ndarray, places: list[_Place], source: Neighbourhood,
    config: VerifyConfig, unit: np.ndarray, rank: np.ndarray, seed: int,
) -> _Choice:  # fmt: skip
    """Variants of all words, cut to the unit's number: MAT words first, then context words, a pair for each in turn. Of the
    extra ones there are half as many at most."""
    few, k = config.synonyms, config.synonyms * WIDER
    flat = [(e, *word) for e, place in enumerate(places) for word in place.words]
    exemplar, offset, start, end = np.array(flat, dtype=np.int64).reshape(-1, 4).T
    number: dict[str, int] = {}
    strings = (texts[i].text[a:b] for i, a, b in zip(row[exemplar].tolist(), start.tolist(), end.tolist(), strict=True))
    word = np.array([number.setdefault(s, len(number)) for s in strings], dtype=np.int64)
    words = list(number)

    index: dict[str, int] = {}
    near = _table(source.neighbours(words, k), k, index)
    pool = _table(source.random(words, k * RANDOM_POOL), k * RANDOM_POOL, index)
    size = (pool >= 0).sum(axis=1)[word, None]
    turn = np.arange(k)
    first = (hashed(seed, numbers[exemplar], start)[:, None] >> np.uint64(1)).astype(np.int64)
    drawn = pool[word[:, None], (first + turn) % np.maximum(size, 1)]
    drawn[turn >= size] = -1
    nearest = near[word]
    mats = np.flatnonzero(offset == 0)
    for at in np.split(mats, np.flatnonzero(np.diff(unit[exemplar[mats]])) + 1) if len(mats) else []:
        group = sorted(set(word[at].tolist()), key=words.__getitem__)
        for w, found in zip(group, source.among([words[w] for w in group], k), strict=True):
            more = [index.setdefault(s, len(index)) for s in found]
            line = [number for number in more if number not in near[w, :few]][: k - few]
            nearest[at[word[at] == w], few:] = line + [-1] * (k - few - len(line))
    # [words in place, turn, kind]
    chosen = np.stack([nearest, drawn], axis=2)
    chosen[offset != 0, few:] = -1
    at, turns, kinds = np.nonzero(chosen >= 0)

    spread = hashed(seed, rank[exemplar], offset)[at]
    extra = turns >= few
    place = _places_in_line((kinds, spread, turns, offset[at] != 0), unit[exemplar[at]] * 2 + extra)
    kept = np.nonzero(place < np.where(extra, config.max_variants // 2, config.max_variants))[0]
    at, turns, kinds = at[kept], turns[kept], kinds[kept]
    return _Choice(
        exemplar[at], offset[at], start[at], end[at], word[at], chosen[at, turns, kinds], kinds + 1, turns >= few, words,
        list(index),
    )  # fmt: skip


def _places_in_line(keys: tuple[np.ndarray, ...], line: np.ndarray) -> np.ndarray:
    """The place of each entry among those of its line, which are in the order of `keys`, the last one first."""
    order = np.lexsort((*keys, line))
    sorted_lines = line[order]
    place = np.empty(len(line), np.int64)
    place[order] = np.arange(len(line)) - np.searchsorted(sorted_lines, sorted_lines)
    return place


def _table(found: list[list[str]], k: int, index: dict[str, int]) -> np.ndarray:
    """[words, k]: numbers of the substitutes of each word, -1 where there are fewer."""
    table = np.full((len(found), k), -1, dtype=np.int64)
    for line, substitutes in zip(table, found, strict=True):
        numbers = [index.setdefault(s, len(index)) for s in dict.fromkeys(substitutes)][:k]
        line[: len(numbers)] = numbers
    return table


def _build(
    exemplars: pa.Table, texts: list[Sample], row: np.ndarray, mat: np.ndarray, places: list[_Place], choice: _Choice,
    splicer: Splicer, limit: int | None,
) -> Plan:  # fmt: skip
    """The chosen variants with their token ids and windows; those that cannot be written exactly are counted."""
    low, high = (np.array([p[i] for p in places], dtype=np.int64) for i in (0, 1))
    e = choice.exemplar
    _, site = np.unique((row[e] << 32) + choice.start, return_inverse=True)
    edit_key = site * len(choice.substitutes) + choice.substitute
    _, first_use, edit = np.unique(edit_key, return_index=True, return_inverse=True)
    fields = (x[first_use].tolist() for x in (row[e], choice.start, choice.end, choice.substitute))
    edits = [Edit(i, a, b, choice.substitutes[s]) for i, a, b, s in zip(*fields, strict=True)]
    splices = splicer.splice(texts, edits)
    bounds = [(s.first, s.last, len(s.ids)) if s else (-1, 0, 0) for s in splices]
    first, last, size = np.array(bounds, np.int64).reshape(-1, 3).T
    a, b, shift = first[edit], last[edit], (size - (last - first))[edit]
    start = np.where(low[e] <= a, low[e], np.maximum(a, low[e] + shift))
    end = np.maximum(high[e], b) + shift
    fits = a >= 0
    if limit is not None:
        fits &= np.maximum(mat[e] + 1, b) + shift <= limit
        end = np.minimum(end, limit)
    dropped = np.bincount(e[~fits], minlength=len(row))
    token = np.array([texts[i].ids[m] for i, m in zip(row.tolist(), mat.tolist(), strict=True)], np.int64)
    keeps = _holds(splices, edit, token[e])

    # Texts: the originals in the order of their samples, then the edits that are used.
    n = len(texts)
    text = np.concatenate([row, n + edit[fits]])
    length = np.zeros(n + len(edits), dtype=np.int64)
    np.maximum.at(length, text, np.concatenate([high, end[fits]]))
    used = np.nonzero(length)[0]
    renumbered = np.cumsum(length > 0) - 1
    ids = [_ids(texts, edits, splices, t, t - n)[: length[t]] for t in used.tolist()]
    flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(length[used].sum()))

    kept = np.nonzero(fits)[0]
    owner = np.concatenate([np.arange(len(row)), e[kept]])
    original = np.arange(len(owner)) < len(row)
    nothing = np.full(len(row), -1)
    columns: dict[str, Any] = {name: exemplars[name].take(pa.array(owner)) for name in (
        "control", "neuron", "polarity", "rank", "sample", "document")}  # fmt: skip
    columns |= {
        "position": pa.array(mat[owner]),
        "recorded": exemplars["activation"].take(pa.array(owner)),
        "kind": pa.array(KINDS).take(pa.array(np.concatenate([np.zeros(len(row), np.int64), choice.kind[kept]]))),
        "offset": pa.array(np.concatenate([nothing, choice.offset[kept]]), mask=original),
        "word": _strings(choice.words, np.concatenate([nothing, choice.word[kept]])),
        "substitute": _strings(choice.substitutes, np.concatenate([nothing, choice.substitute[kept]])),
        "phrase": pa.array(_phrases(texts, row, places, choice, kept), pa.string()),
        "keeps_token": pa.array(np.concatenate([np.ones(len(row), bool), keeps[kept]])),
        "extra": pa.array(np.concatenate([np.zeros(len(row), bool), choice.extra[kept]])),
        "text": pa.array(renumbered[text]),
        "start": pa.array(np.concatenate([low, start[kept]])),
        "end": pa.array(np.concatenate([high, end[kept]])),
        "dropped": pa.array(np.concatenate([dropped, np.zeros(len(kept), np.int64)]), mask=~original),
    }
    rows = pa.table([columns[f.name].cast(f.type) for f in ROWS], schema=ROWS)
    rows = rows.take(pa.array(np.argsort(owner, kind="stable")))
    return {"rows": rows, "texts": pa.table([lists(flat, length[used], pa.int32())], schema=TEXTS)}


def _holds(splices: list[Splice | None], edit: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Whether the new ids of each row's edit hold the row's token."""
    sizes = np.array([len(s.ids) if s else 0 for s in splices], dtype=np.int64)
    flat = np.fromiter((i for s in splices if s for i in s.ids), dtype=np.int64, count=int(sizes.sum()))
    begin = np.cumsum(sizes) - sizes
    n = sizes[edit]
    owner = np.repeat(np.arange(len(edit)), n)
    inner = np.arange(len(owner)) - np.repeat(np.cumsum(n) - n, n)
    same = flat[begin[edit][owner] + inner] == token[owner]
    return np.bincount(owner[same], minlength=len(edit)) > 0


def _ids(texts: list[Sample], edits: list[Edit], splices: list[Splice | None], text: int, edit: int) -> list[int]:
    if edit < 0:
        return list(texts[text].ids)
    splice, ids = splices[edit], texts[edits[edit].sample].ids
    assert splice is not None
    return [*ids[: splice.first], *splice.ids, *ids[splice.last :]]


def _strings(names: list[str], index: np.ndarray) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(index, mask=index < 0))


def _phrases(
    texts: list[Sample], row: np.ndarray, places: list[_Place], choice: _Choice, kept: np.ndarray
) -> list[str]:
    found = [texts[i].text[p.begin : p.end] for i, p in zip(row.tolist(), places, strict=True)]
    columns = (x[kept].tolist() for x in (choice.exemplar, choice.start, choice.end, choice.substitute))
    owners = row.tolist()
    for e, start, end, s in zip(*columns, strict=True):
        text, place = texts[owners[e]].text, places[e]
        found.append(text[min(place.begin, start) : start] + choice.substitutes[s] + text[end : max(place.end, end)])
    return found

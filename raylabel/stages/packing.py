"""Records of a source as rows, pure functions: pack what a piece holds, then put a unit's pieces together.

`Packer.add` takes a record and gives rows of TEXTS (one a unit and text) and one row of UNITS, or says what is wrong with
it. `pruned` keeps what a unit can need of a piece, so that a piece of any size stays small. `exemplars` and `statistics`
make the tables' rows of a range of units of a layer, whatever pieces their records came in.

A sample is a whole text as it was recorded. Its ids are those of the subject's tokenizer; where a token string does not
say which token it was, `own_ids` has a number below 0 and `token_ids` a stand-in, and the sample does not round-trip: what
depends on that token cannot be reproduced, and `verify` says so. Without a model an id is a hash of the string.

What was recorded at a special token stays among the activations but is no peak, as in a scan: the subject's special tokens,
and those whose string is the name of one (`spelling.SPECIAL`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.sections import ExemplarsConfig
from raylabel.sources.records import LARGEST, SAMPLINGS, Record, Text, checked_statistics, peak_of, refuse_broken
from raylabel.sources.spelling import SPECIAL, UNKNOWN, Spelling, clean, readable, string_id
from raylabel.stages.statistics import DENSE, TOP_MEAN
from raylabel.stages.tokenize import split_of
from raylabel.tables import SPLITS, from_rows

FIRING = 16
"""Texts kept to draw `quantile` exemplars from, as a multiple of their number."""

CACHED_TOKENS = 200_000
"""Tokens of the texts that are kept for other units to have been recorded in: a token takes some 300 bytes."""

_strings, _ints, _floats = pa.list_(pa.string()), pa.list_(pa.int32()), pa.list_(pa.float32())
TEXTS = pa.schema([
    ("neuron", pa.int32()), ("polarity", pa.int8()), ("site", pa.string()), ("digest", pa.string()), ("split", pa.string()),
    ("sampling", pa.string()), ("activation", pa.float32()), ("position", pa.int32()), ("mat_ties", pa.int16()),
    ("activations", _floats), ("tokens", _strings), ("token_ids", _ints), ("own_ids", _ints), ("ends", _ints),
    ("text", pa.string()), ("document", pa.string()), ("round_trips", pa.bool_()), ("known", pa.int32()),
])  # fmt: skip
UNITS = pa.schema([
    ("neuron", pa.int32()), ("polarity", pa.int8()), ("site", pa.string()), ("statistics", pa.string()),
    ("labels", pa.string()), ("place", pa.string()),
])  # fmt: skip
Row = dict[str, Any]


class Packer:
    """Turns records into rows, with the subject's tokenizer or without one."""

    def __init__(self, spelling: Spelling | None, bos_id: int | None = None, fallback: int = 0) -> None:
        """`bos_id`: put in front of texts that begin with no special token; None for none. `fallback` stands in for UNKNOWN."""
        self.spelling, self.bos_id, self.fallback = spelling, bos_id, fallback
        self.special: set[int] = set()
        """Ids of special tokens that were met."""
        self._texts: dict[tuple[Any, ...], tuple[Row, frozenset[int]]] = {}
        self._held = 0

    def add(self, record: Record) -> tuple[Row, list[Row], list[str]]:
        """(row of UNITS, rows of TEXTS, what is wrong with texts that are left out); ValueError for a bad record."""
        for name, value, least, most in (
            ("layer", record.layer, 0, 32_767), ("neuron", record.neuron, 0, LARGEST), ("polarity", record.polarity, -2, 2)
        ):  # fmt: skip
            if not least <= value <= most or (name == "polarity" and value == 0):
                raise ValueError(f"{name} {value} is none")
        labels = [{"label": clean(la.label), "explainer": la.explainer, "description": la.description} for la in record.labels]
        unit = {
            "neuron": record.neuron, "polarity": record.polarity, "site": record.site, "place": record.place,
            "statistics": json.dumps(checked_statistics(record.statistics)), "labels": json.dumps(labels),
        }  # fmt: skip
        rows, wrong = [], []
        for number, text in enumerate(record.texts):
            try:
                rows.append(self._row(record, text))
            except ValueError as error:
                wrong.append(f"text {number + 1}: {error}")
        return unit, rows, wrong

    def _row(self, record: Record, text: Text) -> Row:
        refuse_broken(text)
        sample, special = self._sample(text)
        position, activation, ties = peak_of(text, special)
        lead = len(sample["token_ids"]) - len(text.activations)
        return {
            "neuron": record.neuron, "polarity": record.polarity, "site": record.site, "sampling": text.sampling,
            "activation": activation, "position": position + lead, "mat_ties": ties,
            "activations": np.array([0.0] * lead + list(text.activations), dtype=np.float32), **sample,
        }  # fmt: skip

    def _sample(self, text: Text) -> tuple[Row, frozenset[int]]:
        """What the rows of a text share, and which of its tokens are special."""
        key = (text.tokens and tuple(text.tokens), None if text.token_ids is None else tuple(text.token_ids), text.document)
        if key not in self._texts:
            if self._held > CACHED_TOKENS:
                self._texts.clear()
                self._held = 0
            self._texts[key] = self._make(text)
            self._held += len(text.activations)
        return self._texts[key]

    def _make(self, text: Text) -> tuple[Row, frozenset[int]]:
        given = None if text.token_ids is None else list(text.token_ids)
        tokens = self._strings(given) if text.tokens is None else [clean(token) for token in text.tokens]
        if self.spelling is None:
            pieces = readable(tokens)
            own = given or [string_id(token) for token in tokens]
            names = {i: token for i, token in zip(own, tokens, strict=True) if token in SPECIAL}
        else:
            pieces, own = self._known(tokens, given)
            names = self.spelling.names
        special = frozenset(at for at, (i, token) in enumerate(zip(own, tokens, strict=True)) if i in names or token in SPECIAL)
        if self.bos_id is not None and 0 not in special:
            own, pieces, tokens = [self.bos_id, *own], ["", *pieces], [names.get(self.bos_id, ""), *tokens]
        self.special |= set(names) & set(own)
        joined = "".join(pieces)
        document = joined if text.document is None else text.document
        ids = [self.fallback if i < 0 else i for i in own]
        row = {
            "digest": hashlib.sha256(json.dumps([ids, joined]).encode()).hexdigest()[:32],
            "split": split_of(document), "tokens": [piece or names.get(i, "") for piece, i in zip(pieces, own, strict=True)],
            "token_ids": ids, "own_ids": own, "ends": np.cumsum([len(piece) for piece in pieces]).tolist(),
            "text": joined, "document": hashlib.sha256(document.encode()).hexdigest()[:32],
            "round_trips": self._round_trips(joined, own, names), "known": sum(i >= 0 for i in own),
        }  # fmt: skip
        return row, special

    def _strings(self, ids: list[int] | None) -> list[str]:
        if self.spelling is None:
            raise ValueError("token ids alone, and no model whose they are")
        return self.spelling.strings(ids or [])

    def _known(self, tokens: list[str], given: list[int] | None) -> tuple[list[str], list[int]]:
        spelling = self.spelling
        assert spelling is not None
        if given is not None:
            pieces, shown = spelling.pieces(spelling.strings(given)), spelling.pieces(tokens)
            for i, (a, b) in enumerate(zip(pieces, shown, strict=True)):
                # The one with U+FFFD does not know better.
                if a != b and "\ufffd" not in b and a.strip() != b.strip():
                    raise ValueError(f"token {i} is {b[:20]!r}, but token id {given[i]} is the model's {a[:20]!r}")
            return pieces, given
        pieces = spelling.pieces(tokens)
        ids = spelling.ids(tokens, pieces)
        return pieces, [-1 - string_id(t) // 2 if i == UNKNOWN else i for i, t in zip(ids, tokens, strict=True)]

    def _round_trips(self, text: str, ids: list[int], names: dict[int, str]) -> bool:
        if self.spelling is None or min(ids) < 0:
            return False
        lead = next((k for k, i in enumerate(ids) if i not in names), len(ids))
        encoded: list[int] = self.spelling.tokenizer.encode(text, add_special_tokens=False).ids
        return encoded == ids[lead:]


def pruned(rows: list[Row], wanted: ExemplarsConfig) -> list[Row]:
    """What the exemplars of a unit can be chosen from, of all rows of one unit: the order stays."""
    if len(rows) <= wanted.top + wanted.quantile + wanted.random:
        return rows
    kept: set[int] = set()
    for split in SPLITS:
        own = [(i, row) for i, row in enumerate(rows) if row["split"] == split]
        free = [(i, row) for i, row in own if row["sampling"] in (None, "top")]
        kept |= {i for i, _ in sorted(free, key=lambda pair: _by_activation(pair[1]))[: 2 * wanted.top]}
        fires = [(i, row) for i, row in own if row["sampling"] in (None, "quantile") and row["activation"] > 0]
        kept |= {i for i, _ in sorted(fires, key=lambda pair: pair[1]["digest"])[: FIRING * wanted.quantile]}
        drawn = [(i, row) for i, row in own if row["sampling"] == "random"]
        kept |= {i for i, _ in sorted(drawn, key=lambda pair: pair[1]["digest"])[: 2 * wanted.random]}
    return [rows[i] for i in sorted(kept)]


def _by_activation(row: Row) -> tuple[float, str]:
    return -row["activation"], row["digest"]


def choose(rows: list[Row], wanted: ExemplarsConfig) -> list[tuple[str, str, int, Row]]:
    """(sampling, split, rank, row) of a unit's exemplars; rows have `sample` and are of distinct samples in a sampling.

    top: the strongest that fire; quantile: spread over the strata of those that were recorded for it, or else of all that
    fire, weakest first, as in a scan; random: those recorded as such, by a hash.
    """
    found = []
    for split, share in zip(SPLITS, (wanted.top, max(1, wanted.top // 2)), strict=True):
        own = [row for row in rows if row["split"] == split]
        fires = [row for row in own if row["activation"] > 0]
        top = sorted((r for r in fires if r["sampling"] in (None, "top")), key=lambda r: (-r["activation"], r["sample"]))
        spread = [r for r in fires if r["sampling"] == "quantile"] or [r for r in fires if r["sampling"] is None]
        spread = sorted(distinct(spread), key=lambda r: r["digest"])[: FIRING * wanted.quantile]
        drawn = sorted(distinct([r for r in own if r["sampling"] == "random"]), key=lambda r: r["digest"])
        lists = {"top": distinct(top)[:share], "quantile": strata(spread, wanted.quantile), "random": drawn[: wanted.random]}
        found += [(name, split, rank, row) for name in SAMPLINGS for rank, row in enumerate(lists[name])]
    return found


def distinct(rows: list[Row]) -> list[Row]:
    """The first row of each sample."""
    return list({row["sample"]: row for row in reversed(rows)}.values())[::-1]


def strata(rows: list[Row], n: int) -> list[Row]:
    """The middles of n equal strata of the rows by activation, weakest first; all of them where there are no more."""
    ranked = sorted(rows, key=lambda r: (r["activation"], r["sample"]))
    if len(ranked) <= n:
        return ranked
    return [ranked[(2 * i + 1) * len(ranked) // (2 * n)] for i in range(n)]


def tables(
    texts: pa.Table, units: pa.Table, numbers: Callable[[list[str]], pa.Table], wanted: ExemplarsConfig, *, source: str,
    site: str | None,
) -> tuple[pa.Table, pa.Table, list[Row], list[Row]]:  # fmt: skip
    """(`exemplars`, `statistics`, rows of `labels`, failures) of a range of a layer's units.

    Args:
        texts, units: schemas TEXTS and UNITS, of all pieces.
        numbers: the columns `sample`, `document`, `split` of texts by digest.
        site: where the subject is read, for records that do not say where.
    """
    at = numbers(texts.column("digest").to_pylist())
    columns = [name for name in TEXTS.names if name not in ("text", "split", "document")]
    rows = texts.select(columns).to_pylist()
    for row, more in zip(rows, at.to_pylist(), strict=True):
        row.update(more)
    own: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        own.setdefault((row["neuron"], row["polarity"]), []).append(row)
    given: dict[tuple[int, int], list[Row]] = {}
    for row in units.to_pylist():
        given.setdefault((row["neuron"], row["polarity"]), []).append(row)
    exemplars, numbers_, labels, failures = [], [], [], []
    for key in sorted(given, key=lambda k: (k[0], -k[1])):
        mine, failed = _agreeing(own.get(key, []))
        failures += [{"neuron": key[0], "reason": reason} for reason in failed]
        here = next((row["site"] for row in given[key] if row["site"]), site)
        chosen = choose(mine, wanted)
        for sampling, split, rank, row in chosen:
            exemplars.append(_exemplar(row, sampling, split, rank, wanted, here, source))
        numbers_.append(_statistics(given[key], mine, chosen) | {"neuron": key[0], "polarity": key[1], "site": here})
        seen: set[str] = set()
        for one in (one for row in given[key] for one in json.loads(row["labels"])):
            if one["label"] not in seen:
                seen.add(one["label"])
                labels.append({"neuron": key[0], "polarity": key[1], **one})
    return from_rows(exemplars, "exemplars"), from_rows(numbers_, "statistics"), labels, failures


def _agreeing(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """The rows without those of a text that the unit was recorded in before, and a word on those that differ from it."""
    first: dict[tuple[int, str | None], Row] = {}
    kept, failed = [], []
    for row in rows:
        before = first.setdefault((row["sample"], row["sampling"]), row)
        if before is row:
            kept.append(row)
        elif before["activations"] != row["activations"]:
            failed.append(f"the same text was recorded twice with different activations: {''.join(row['tokens'])[:60]!r}")
    return kept, failed


def _exemplar(
    row: Row, sampling: str, split: str, rank: int, wanted: ExemplarsConfig, site: str | None, source: str
) -> Row:
    start = max(row["position"] - wanted.before, 0)
    window = slice(start, row["position"] + wanted.after + 1)
    names = ("neuron", "polarity", "sample", "activation", "mat_ties", "document")
    return {
        **{name: row[name] for name in names}, "sampling": sampling, "split": split, "rank": rank, "start": start,
        "position": row["position"] - start, "tokens": row["tokens"][window], "token_ids": row["own_ids"][window],
        "activations": row["activations"][window], "site": row["site"] or site, "source": source,
    }  # fmt: skip


def _statistics(given: list[Row], rows: list[Row], chosen: list[tuple[str, str, int, Row]]) -> Row:
    """What the source knows, the maximum of what it recorded, and the mean of the top."""
    found: Row = {}
    for one in given:
        found = {**json.loads(one["statistics"]), **found}
    for name in ("logits_up", "logits_down"):
        if name in found:
            found[name] = [{"token": clean(str(token)), "value": value} for token, value in found[name]]
    if found.get("max") is None and rows:
        found["max"] = max(row["activation"] for row in rows)
    tops = [row["activation"] for sampling, split, _, row in chosen if (sampling, split) == ("top", SPLITS[0])]
    found["top_mean"] = float(np.mean(tops[:TOP_MEAN], dtype=np.float64)) if tops else None
    fires, seen = found.get("fires"), found.get("tokens_seen")
    if fires is not None:
        found.setdefault("dead", fires == 0)
    if fires is not None and seen:
        found.setdefault("dense", fires > DENSE * seen)
    return found


def samples(texts: pa.Table) -> pa.Table:
    """The distinct texts among rows of TEXTS, in their order."""
    digests = texts.column("digest").to_pylist()
    first = list({digest: i for i, digest in reversed(list(enumerate(digests)))}.values())
    columns = ["digest", "split", "token_ids", "text", "ends", "round_trips", "document", "own_ids"]
    return texts.select(columns).take(pa.array(sorted(first), pa.int64()))


def unknown_share(texts: pa.Table) -> tuple[int, int]:
    """(tokens whose id is known, all tokens)."""
    return pc.sum(texts.column("known")).as_py() or 0, int(pc.sum(pc.list_value_length(texts.column("token_ids"))).as_py() or 0)

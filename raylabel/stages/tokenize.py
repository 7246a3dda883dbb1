"""tokenize: documents to samples of `context` tokens, once for the whole run, and the run's word vectors.

A document is encoded without special tokens and cut into bodies; a sample's `token_ids` hold the BOS where the subject
wants one. `text` is the piece of the document that the body covers and `ends` says where in it each token ends, so
that words are found by characters whatever the tokens are. No sample crosses two documents; a document's split is a
hash of its text, so that two copies of a document never part.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sources.corpus import chunks, documents
from raylabel.stages.arrays import lists, read_table, table_bytes
from raylabel.stages.base import Stage, Step
from raylabel.stages.subject import FACTS_VERSION, SubjectWorker, fingerprint, latents_fingerprint, open_tokenizer
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output, Shard
from raylabel.tables import SPLITS, schema

DOCUMENTS_A_BATCH = 256
SAMPLES_A_FILE = 65_536
VECTORS_VERSION = 2
"""Raised when the same text would give other vectors."""


def split_of(text: str) -> str:
    """`explain` for two documents in three, else `score`, by a hash of the text."""
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return SPLITS[1] if number % 3 == 2 else SPLITS[0]


def encode(tokenizer: Any, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, end of each token in characters) of every text, without special tokens; ends never decrease."""
    found = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        found.append((np.array(encoding.ids, dtype=np.int32), np.maximum.accumulate(ends) if len(ends) else ends))
    return found


def cut(
    tokenizer: Any, texts: Iterable[str], context: int, bos_id: int | None, limit: int
) -> pa.Table:
    """Samples of the texts (schema `samples` without `sample`, `document` counted from 0), exact duplicates dropped.

    Ends after `limit` tokens or a little later; `number` cuts there, whatever the pieces of the corpus are.

    Args:
        bos_id: put in front of every sample; None for no BOS.
    """
    body = context - (bos_id is not None)
    rows: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    used = document = 0
    for batch in _batches(texts, DOCUMENTS_A_BATCH):
        start = len(rows)
        for text, (ids, ends) in zip(batch, encode(tokenizer, batch), strict=True):
            split = split_of(text)
            for at in range(0, len(ids), body):
                part, stops = ids[at : at + body], ends[at : at + body]
                if _again(part, seen):
                    continue
                begin = int(ends[at - 1]) if at else 0
                last = at + body >= len(ids)
                stop = len(text) if last else int(stops[-1])
                rows.append({
                    "document": document, "split": split, "ids": part, "ends": stops - begin, "text": text[begin:stop],
                })  # fmt: skip
                used += len(part)
            document += 1
        again = encode(tokenizer, [row["text"] for row in rows[start:]])
        for row, (ids, _) in zip(rows[start:], again, strict=True):
            row["round_trips"] = np.array_equal(ids, row["ids"])
        if used >= limit:
            break
    return _table(rows, document, bos_id)


def _again(ids: np.ndarray, seen: set[bytes]) -> bool:
    """Whether these token ids were seen before; they are now."""
    mark = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
    if mark in seen:
        return True
    seen.add(mark)
    return False


def _table(rows: list[dict[str, Any]], documents: int, bos_id: int | None) -> pa.Table:
    head = np.array([] if bos_id is None else [bos_id], dtype=np.int32)
    zero = np.zeros(len(head), dtype=np.int32)
    ids = [np.concatenate([head, row["ids"]]) for row in rows]
    ends = [np.concatenate([zero, row["ends"]]) for row in rows]
    lengths = np.array([len(i) for i in ids], dtype=np.int64)

    def flat(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    columns = {
        "document": pa.array([row["document"] for row in rows], pa.int64()),
        "split": pa.array([row["split"] for row in rows], pa.string()),
        "token_ids": lists(flat(ids), lengths, pa.int32()),
        "text": pa.array([row["text"] for row in rows], pa.string()),
        "ends": lists(flat(ends), lengths, pa.int32()),
        "round_trips": pa.array([row["round_trips"] for row in rows], pa.bool_()),
    }
    return pa.table(columns).replace_schema_metadata({"documents": str(documents)})


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def number(parts: Iterable[pa.Table], limit: int, bos: bool) -> Iterator[pa.Table]:
    """The samples of all parts with exact duplicates dropped, numbered in order.

    Ends before the first sample that would make it more than `limit` tokens, BOS apart.
    """
    seen: set[bytes] = set()
    sample = document = used = 0
    full = False
    for part in parts:
        ids = part.column("token_ids").combine_chunks()
        values, offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
        keep = []
        for row in range(part.num_rows):
            piece = values[offsets[row] : offsets[row + 1]]
            if _again(piece, seen):
                continue
            full = used + len(piece) - bos > limit
            if full:
                break
            used += len(piece) - bos
            keep.append(row)
        kept = part.take(pa.array(keep, pa.int64()))
        documents = pa.array(kept.column("document").to_numpy() + document, pa.int64())
        kept = kept.set_column(kept.schema.get_field_index("document"), "document", documents)
        kept = kept.add_column(0, "sample", pa.array(np.arange(sample, sample + len(keep)), pa.int64()))
        sample += len(keep)
        document += int((part.schema.metadata or {}).get(b"documents", b"0"))
        yield kept.select(schema("samples").names).replace_schema_metadata(None)
        if full:
            return


class ReadWorker:
    """Samples of one piece of the corpus, not numbered yet."""

    def __init__(self, url: str) -> None:
        run = RunDir(url)
        self.config = RunConfig.model_validate(run.config)
        self.facts = json.loads(run.files.read("subject.json"))
        self.tokenizer = open_tokenizer(run)

    def __call__(self, unit: Unit) -> Output:
        corpus = self.config.exemplars.corpus
        bos = self.facts["bos_id"] if self.facts["prepend_bos"] else None
        texts = documents(unit.key, corpus.column)
        table = cut(self.tokenizer, texts, self.config.subject.context, bos, corpus.tokens)
        return Output(blobs=[Blob("samples.arrow", table_bytes(table), temporary=True)])


class NumberWorker:
    """The table `samples`."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.facts = json.loads(self.run.files.read("subject.json"))

    def __call__(self, unit: Unit) -> Output:
        parts = (read_table(data) for _, data in self.run.temporaries(unit, "read"))
        limit = self.config.exemplars.corpus.tokens
        pieces = [p for p in number(parts, limit, self.facts["prepend_bos"]) if p.num_rows]
        if not pieces:
            raise BadInput(
                f"exemplars.corpus.path: no text in {self.config.exemplars.corpus.path}, or no sample within the {limit} "
                "tokens of exemplars.corpus.tokens"
            )
        whole = pa.concat_tables(pieces)
        if "explain" not in set(whole.column("split").to_pylist()):
            raise BadInput(
                f"exemplars.corpus.path: too few documents in {self.config.exemplars.corpus.path} to explain with; add text"
            )
        files = range(0, whole.num_rows, SAMPLES_A_FILE)
        return Output([Shard("samples", whole.slice(at, SAMPLES_A_FILE), part=i) for i, at in enumerate(files)])


class VectorsWorker:
    """FastText vectors of the words in the explain documents, as `vectors.bin`."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)

    def __call__(self, unit: Unit) -> Output:
        from raylabel.words.vectors import train_vectors

        samples = self.run.table("samples", columns=["split", "text"])
        texts = [row["text"] for row in samples.to_pylist() if row["split"] == "explain"]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "vectors.bin")
            train_vectors(texts, path)
            with open(path, "rb") as file:
                return Output(blobs=[Blob("vectors.bin", file.read())])


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    corpus = config.exemplars.corpus
    if corpus.path is None:
        raise BadInput("exemplars.corpus.path is required: a text file, a folder, or `stdlib`")
    model = fingerprint(config)
    subject = config.subject.model_dump(mode="json", include={"site", "dtype", "device", "trust_remote_code"})
    # Only where they are asked for: a run without them keeps its units.
    if config.subject.latents is not None:
        subject["latents"] = latents_fingerprint(config)
    if config.subject.polarity == "quadrants":
        subject["quadrants"] = True
    pieces = [{**chunk, "model": model} for chunk in chunks(corpus.path, corpus.column)]
    steps = [
        Step("subject", [{**subject, "model": model, "facts": FACTS_VERSION}], SubjectWorker, model=True),
        Step("read", pieces, ReadWorker),
        Step("samples", [{}], NumberWorker),
    ]
    if config.identify.vectors == "train":
        steps.append(Step("vectors", [{"vectors": "train", "version": VECTORS_VERSION}], VectorsWorker))
    return steps


TOKENIZE = Stage(
    name="tokenize", version=1, needs=(), tables=("samples",), steps=_steps, aside=("subject", "vectors"),
    reads=(
        "subject.model", "subject.revision", "subject.context", "subject.bos", "exemplars.source", "exemplars.corpus",
        "run.format",
    ),
)  # fmt: skip

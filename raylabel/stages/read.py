"""read and fetch: what a source other than a corpus has of the units becomes `samples`, `exemplars` and `statistics`.

The two are the same stage but for their names: `read` takes files, `fetch` takes a site. Steps: `subject` looks the model
up; `agreement` measures a few recordings again (`stages.agreement`); `download` fetches what lies at a site, and keeps it;
`pieces` packs the records of a piece of the source (`sources.records`, `stages.packing`); `samples` numbers the distinct
texts; `units` puts together what the pieces have of each unit; `vectors` trains the word vectors. Later stages see no
difference to a scan, but that the run is about the units that were recorded, at the polarities that were.

Labels that came along lie in `imported_labels/LAYER.arrow` (schema `labels`), for `describe` to take in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sections import NO_MODEL
from raylabel.sources.records import Bad, Record, module, without_model
from raylabel.sources.spelling import Spelling
from raylabel.stages import agreement, packing
from raylabel.stages.arrays import array_bytes, read_table, table_bytes
from raylabel.stages.base import Stage, Step
from raylabel.stages.subject import FACTS_VERSION, SubjectWorker, fingerprint, latents_fingerprint, open_tokenizer
from raylabel.stages.tokenize import SAMPLES_A_FILE, VECTORS_VERSION, VectorsWorker
from raylabel.stages.units import given_units
from raylabel.store.plan import Unit, digest
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output, Shard
from raylabel.tables import from_rows, schema

NEURONS = 256
"""Neurons of a range that is put together at a time."""
PRUNE = 4
"""A unit's rows are pruned whenever they have become this many times more."""
LEAST_KNOWN = 0.5
"""Share of the recorded tokens that the model's tokenizer must know, or it is another model's recording."""
MOST_FAILURES = 10_000
"""Failures of a piece that are listed one by one."""
Row = dict[str, Any]


class PiecesWorker:
    """`texts.L.B.arrow` and `units.L.B.arrow` of each layer and range of neurons, `samples.arrow` and `meta.json` of a piece."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.facts: dict[str, Any] | None = None
        self.spelling: Spelling | None = None
        if not without_model(self.config):
            self.facts = json.loads(self.run.files.read("subject.json"))
            self.spelling = Spelling(open_tokenizer(self.run), self.facts["special_ids"])
        self.source = module(self.config.exemplars.source)
        self.wanted = given_units(self.config)

    def __call__(self, unit: Unit) -> Output:
        facts = self.facts or {}
        bos = facts["bos_id"] if facts.get("prepend_bos") else None
        packer = packing.Packer(self.spelling, bos, facts.get("pad_id") or 0)
        texts: dict[tuple[int, int, int], list[Row]] = {}
        units: dict[tuple[int, int], list[Row]] = {}
        failures: list[Row] = []
        for item in self.source.records(self.config, unit.key):
            if isinstance(item, Bad):
                failures.append(_failure(item))
                continue
            if not self._asked(item):
                continue
            try:
                self._refuse_foreign(item)
                row, rows, wrong = packer.add(item)
            except ValueError as error:
                failures.append(_failure(Bad(_at(item, error), item.layer, item.neuron)))
                continue
            where = f"layer={item.layer},neuron={item.neuron}"
            failures += [{"unit": where, "reason": _at(item, why)} for why in wrong]
            _remember(units.setdefault((item.layer, item.neuron), []), row)
            own = texts.setdefault((item.layer, item.neuron, item.polarity), [])
            own += rows
            limit = self.config.exemplars.top + self.config.exemplars.quantile + self.config.exemplars.random
            if len(own) > PRUNE * packing.FIRING * limit:
                own[:] = packing.pruned(own, self.config.exemplars)
        return self._output(packer, texts, units, failures)

    def _asked(self, record: Record) -> bool:
        if self.config.subject.polarity == "positive" and record.polarity != 1:
            return False
        return self.wanted(record.layer, record.neuron)

    def _refuse_foreign(self, record: Record) -> None:
        """ValueError for a unit that the subject does not have."""
        facts = self.facts
        if facts is None:
            return
        if record.layer not in facts["layers"] or record.neuron >= facts["width"]:
            raise ValueError(
                f"no such unit in {facts['name']} at {facts['site']}: layers {facts['layers'][0]} to {facts['layers'][-1]} have "
                f"{facts['width']} each; set subject.latents to what was recorded, or subject.model: {NO_MODEL}"
            )
        site = facts["sites"][record.layer]
        if record.site is not None and record.site != site:
            raise ValueError(f"recorded at {record.site}, the subject is read at {site}; set subject.site or subject.latents")

    def _output(
        self, packer: packing.Packer, texts: dict[tuple[int, int, int], list[Row]],
        units: dict[tuple[int, int], list[Row]], failures: list[Row],
    ) -> Output:  # fmt: skip
        ranges = sorted({(layer, neuron // NEURONS) for layer, neuron in units})
        grouped: dict[tuple[int, int], tuple[list[Row], list[Row]]] = {at: ([], []) for at in ranges}
        for (layer, neuron, _), rows in sorted(texts.items()):
            grouped[layer, neuron // NEURONS][0].extend(packing.pruned(rows, self.config.exemplars))
        for (layer, neuron), rows in sorted(units.items()):
            grouped[layer, neuron // NEURONS][1].extend(rows)
        blobs, found = [], []
        known = tokens = 0
        for (layer, part), (rows, own) in grouped.items():
            table = pa.Table.from_pylist(rows, schema=packing.TEXTS)
            found.append(packing.samples(table))
            known, tokens = (a + b for a, b in zip((known, tokens), packing.unknown_share(table), strict=True))
            blobs.append(Blob(f"texts.{layer}.{part}.arrow", table_bytes(table), True))
            blobs.append(Blob(f"units.{layer}.{part}.arrow", table_bytes(pa.Table.from_pylist(own, schema=packing.UNITS)), True))
        if found:
            blobs.append(Blob("samples.arrow", table_bytes(pa.concat_tables(found)), True))
        failed = sorted({(f["layer"], f["neuron"]) for f in failures if "neuron" in f})
        if len(failures) > MOST_FAILURES:
            more = f"and {len(failures) - MOST_FAILURES} more in this piece"
            failures = [*failures[:MOST_FAILURES], {"reason": more}]
        meta = {"known": known, "tokens": tokens, "special": sorted(packer.special), "failed": failed}
        return Output(blobs=[*blobs, Blob("meta.json", json.dumps(meta).encode(), True)], failures=failures)


def _remember(rows: list[Row], row: Row) -> None:
    """Adds what a record says of its unit, unless an earlier one of the piece has said the same."""
    same = ("polarity", "site", "statistics", "labels")
    if not any(all(before[name] == row[name] for name in same) for before in rows):
        rows.append(row)


def _at(record: Record, why: Any) -> str:
    return f"{record.place}: {why}" if record.place else str(why)


def _failure(bad: Bad) -> Row:
    reason = " ".join(bad.reason.split())[:300]
    if bad.layer is None or bad.neuron is None:
        return {"unit": reason.partition(": ")[0], "reason": reason}
    return {"layer": bad.layer, "neuron": bad.neuron, "reason": reason}


class DownloadWorker:
    """Has the source fetch and keep what a piece names, where it is not kept yet."""

    def __init__(self, url: str) -> None:
        run = RunDir(url)
        self.config = RunConfig.model_validate(run.config)
        self.source = module(self.config.exemplars.source)

    def __call__(self, unit: Unit) -> Output:
        return Output(notes=self.source.fetch(self.config, unit.key))


class SamplesWorker:
    """The table `samples`, and `numbers.arrow`: the numbers of the texts by digest."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)

    def __call__(self, unit: Unit) -> Output:
        self._refuse_other_model(unit)
        numbers: dict[str, tuple[int, int, str]] = {}
        return Output(self._shards(unit, numbers), self._blobs(numbers))

    def _refuse_other_model(self, unit: Unit) -> None:
        metas = [json.loads(data) for _, data in self.run.temporaries(unit, "pieces", "meta.json")]
        known, tokens = (sum(meta[name] for meta in metas) for name in ("known", "tokens"))
        if tokens == 0:
            source = self.config.exemplars.source
            failures = f"see the failures in {self.run.files.url}"
            raise BadInput(f"exemplars.{source}: no text of a wanted unit could be read; {failures}")
        if known < LEAST_KNOWN * tokens:
            raise BadInput(
                f"subject.model: {self.config.subject.model} has only {known} of {tokens} recorded tokens; name the model that "
                f"was recorded, or {NO_MODEL}"
            )

    def _shards(self, unit: Unit, numbers: dict[str, tuple[int, int, str]]) -> Iterator[Shard]:
        documents: dict[str, int] = {}
        part, waiting = 0, list[pa.Table]()
        for _, data in self.run.temporaries(unit, "pieces", "samples.arrow"):
            waiting.append(_numbered(read_table(data), numbers, documents))
            if sum(table.num_rows for table in waiting) >= SAMPLES_A_FILE:
                yield Shard("samples", pa.concat_tables(waiting), part=part)
                part, waiting = part + 1, []
        if waiting or not part:
            yield Shard("samples", pa.concat_tables([schema("samples").empty_table(), *waiting]), part=part)

    def _blobs(self, numbers: dict[str, tuple[int, int, str]]) -> Iterator[Blob]:
        ordered = sorted(numbers)
        values = [numbers[key] for key in ordered]
        columns = [pa.array([v[i] for v in values], kind) for i, kind in enumerate((pa.int64(), pa.int64(), pa.string()))]
        table = pa.table([pa.array(ordered, pa.string()), *columns], names=["digest", "sample", "document", "split"])
        yield Blob("numbers.arrow", table_bytes(table), True)


def _numbered(table: pa.Table, numbers: dict[str, tuple[int, int, str]], documents: dict[str, int]) -> pa.Table:
    """Rows of `samples` for the texts that are not in `numbers` yet; they are then."""
    keep, given = [], []
    names = ("digest", "document", "split")
    for i, (key, document, split) in enumerate(zip(*(table.column(n).to_pylist() for n in names), strict=True)):
        if key not in numbers:
            numbers[key] = (len(numbers), documents.setdefault(document, len(documents)), split)
            keep.append(i)
            given.append(numbers[key])
    rows = table.take(pa.array(keep, pa.int64()))
    rows = rows.set_column(rows.schema.get_field_index("document"), "document", pa.array([g[1] for g in given], pa.int64()))
    rows = rows.append_column("sample", pa.array([g[0] for g in given], pa.int64()))
    return rows.select(schema("samples").names).cast(pa.schema([*schema("samples")]))


class UnitsWorker:
    """`exemplars` and `statistics`, range of neurons after range, and `records.json`: what later stages must know of them."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.facts = None if without_model(self.config) else json.loads(self.run.files.read("subject.json"))

    def __call__(self, unit: Unit) -> Output:
        numbers = read_table(next(self.run.temporaries(unit, "samples", "numbers.arrow"))[1])
        metas = [json.loads(data) for _, data in self.run.temporaries(unit, "pieces", "meta.json")]
        output = Output()
        summary: Row = {"neurons": {}, "polarities": [], "sites": {}, "special": []}
        summary["special"] = sorted(set().union(*(meta["special"] for meta in metas)))
        for layer, neuron in (pair for meta in metas for pair in meta["failed"]):
            if self.facts is None or (layer in self.facts["layers"] and neuron < self.facts["width"]):
                summary["neurons"].setdefault(layer, set()).add(neuron)
        labels: dict[int, list[Row]] = {}
        output.shards = self._shards(unit, _Numbers(numbers), summary, labels, output.failures)
        output.blobs = self._blobs(summary, labels)
        return output

    def _shards(
        self, unit: Unit, numbers: _Numbers, summary: Row, labels: dict[int, list[Row]], failures: list[Row]
    ) -> Iterator[Shard]:
        files = self._files(unit)
        places = sorted({tuple(map(int, name.split(".")[1:3])) for name in files if name.startswith("units.")})
        for layer, part in places:
            site = self.facts["sites"][layer] if self.facts else None
            texts, units = (
                pa.concat_tables([want.empty_table(), *map(self._read, files.get(f"{name}.{layer}.{part}.arrow", []))])
                for name, want in (("texts", packing.TEXTS), ("units", packing.UNITS))
            )
            source = self.config.exemplars.source
            exemplars, statistics, imported, failed = packing.tables(
                texts, units, numbers.of, self.config.exemplars, source=source, site=site
            )
            failures += [{"unit": f"layer={layer},neuron={f['neuron']}", "reason": f["reason"]} for f in failed]
            summary["neurons"].setdefault(layer, set()).update(statistics.column("neuron").to_pylist())
            summary["polarities"] = sorted({*summary["polarities"], *statistics.column("polarity").to_pylist()}, reverse=True)
            sites = pc.unique(statistics.column("site")).drop_null().to_pylist()
            summary["sites"].setdefault(layer, sites[0] if sites else None)
            labels.setdefault(layer, []).extend(imported)
            yield Shard("exemplars", exemplars, layer, part=part)
            yield Shard("statistics", statistics, layer, part=part)

    def _files(self, unit: Unit) -> dict[str, list[str]]:
        """Paths of the pieces' temporary files by name, in the order of the plan."""
        plan, entries = self.run.plan(unit.stage), self.run.manifest(unit.stage)
        found: dict[str, list[str]] = {}
        for earlier in plan.units if plan else []:
            for file in entries[earlier.id]["files"] if earlier.step == "pieces" else []:
                found.setdefault(file["name"], []).append(file["path"])
        return found

    def _read(self, path: str) -> pa.Table:
        return read_table(self.run.files.read(path))

    def _blobs(self, summary: Row, labels: dict[int, list[Row]]) -> Iterator[Blob]:
        for layer, rows in sorted(labels.items()):
            if rows:
                yield Blob(labels_name(layer), table_bytes(from_rows(rows, "labels")))
        found = {**summary, "neurons": {str(layer): _ranges(n) for layer, n in sorted(summary["neurons"].items())}}
        yield Blob("records.json", json.dumps(found).encode())
        if self.facts is not None:
            # The source has decided which positions count.
            sinks = {f"sink.{layer}": np.array(np.inf, dtype=np.float32) for layer in summary["neurons"]}
            yield Blob("pilot.npz", array_bytes(sinks))


class _Numbers:
    """The numbers of texts by digest."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.select(["sample", "document", "split"])
        self.digests = table.column("digest").to_numpy().astype("U32")

    def of(self, digests: list[str]) -> pa.Table:
        """Columns sample, document and split of the given texts."""
        at = np.searchsorted(self.digests, np.array(digests, dtype="U32"))
        return self.table.take(pa.array(at, pa.int64()))


def labels_name(layer: int) -> str:
    """Where the labels lie that came along with the units of a layer."""
    return f"imported_labels/{layer:02d}.arrow"


def imported_labels(run: RunDir, layer: int) -> pa.Table:
    """The labels that came along with the units of a layer (schema `labels`), in their order; none for a corpus."""
    try:
        return read_table(run.files.read(labels_name(layer)))
    except FileNotFoundError:
        return schema("labels").empty_table()


def _ranges(neurons: Iterable[int]) -> list[list[int]]:
    """[first, last) of each run of consecutive numbers."""
    found: list[list[int]] = []
    for neuron in sorted(neurons):
        if found and found[-1][1] == neuron:
            found[-1][1] += 1
        else:
            found.append([neuron, neuron + 1])
    return found


def resolve(run: RunDir, config: RunConfig) -> None:
    """Fixes the facts that later stages go by, once the records are read: the subject's, for the units that were recorded."""
    found = json.loads(run.files.read("records.json"))
    layers = [int(layer) for layer in found["neurons"]]
    if without_model(config):
        n = max(layers) + 1
        sites = [found["sites"].get(str(layer)) for layer in range(n)]
        facts: dict[str, Any] = {
            "name": NO_MODEL, "revision": None, "n_layers": n, "layers": layers, "sites": sites, "latents": None,
            "width": max(ranges[-1][1] for ranges in found["neurons"].values()), "special_ids": found["special"],
            "site": next((site for site in sites if site), "unknown"), "prepend_bos": False, "bos_id": None, "pad_id": 0,
            "max_context": None, "dtype": "float32", "device": "cpu", "tokenizer": None,
        }  # fmt: skip
    else:
        facts = json.loads(run.files.read("subject.json"))
    n_units = sum(b - a for ranges in found["neurons"].values() for a, b in ranges)
    units = digest([found["neurons"], found["polarities"]])
    facts |= {"recorded": found["neurons"], "polarities": found["polarities"], "units": units, "n_units": n_units}
    run.resolve(facts, of=digest([config.subject.model_dump(mode="json"), facts]))


def _steps(run: RunDir, config: RunConfig) -> list[Step]:
    source = module(config.exemplars.source)
    pieces = source.pieces(config)
    downloads = source.downloads(config) if hasattr(source, "downloads") else []
    model = None if without_model(config) else fingerprint(config)
    steps = []
    if model is not None:
        subject = config.subject.model_dump(mode="json", include={"site", "dtype", "device", "trust_remote_code", "bos"})
        subject |= {"latents": latents_fingerprint(config), "polarity": config.subject.polarity}
        steps.append(Step("subject", [{**subject, "model": model, "facts": FACTS_VERSION}], SubjectWorker, model=True))
    if config.exemplars.source == "neuroscope" and model is not None:
        steps.append(agreement.step(config, model))
    if downloads:
        steps.append(Step("download", downloads, DownloadWorker, limited=True))
    steps += [
        Step("pieces", [{**piece, "model": model} for piece in pieces], PiecesWorker),
        Step("samples", [{}], SamplesWorker),
        Step("units", [{}], UnitsWorker),
    ]
    if config.identify.vectors == "train":
        steps.append(Step("vectors", [{"vectors": "train", "version": VECTORS_VERSION}], VectorsWorker))
    return steps


_READS = (
    "subject.model", "subject.revision", "subject.bos", "subject.site", "subject.latents", "subject.units", "subject.layers",
    "subject.neurons", "subject.polarity", "exemplars.source", "exemplars.top", "exemplars.quantile", "exemplars.random",
    "exemplars.before", "exemplars.after", "run.format",
)  # fmt: skip
_TABLES = ("samples", "exemplars", "statistics")
READ = Stage(
    name="read", version=2, needs=(), tables=_TABLES, steps=_steps, aside=("subject", "vectors"), after=resolve,
    reads=(*_READS, "exemplars.recorded"),
)  # fmt: skip
FETCH = Stage(
    name="fetch", version=2, needs=(), tables=_TABLES, steps=_steps, aside=("subject", "vectors"), after=resolve,
    reads=(
        *_READS, "exemplars.neuroscope.model", "exemplars.neuroscope.url", "exemplars.neuronpedia.model",
        "exemplars.neuronpedia.sources", "exemplars.neuronpedia.url",
    ),
)  # fmt: skip

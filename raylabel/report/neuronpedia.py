"""Exports a run in Neuronpedia's bulk layout.

    OUT/MODEL/SOURCE/{features,activations,explanations}/batch-N.jsonl.gz

SOURCE is `L-raylabel-SITE`, with `__low` (and `-gate0`) added for other polarities: there a feature has one sign. Batch N
holds the features from N * 1024 on. All lines of a folder have the same keys, which are those of Neuronpedia's own export
(utils/neuronpedia-utils, export-data.py); what a run does not know is null or empty. Activations are in the model's
units, times the sign of the polarity; what is larger than a text's maximum stands at a position that does not count, and is
written as 0. Texts of the top have the bin of that group (binContains -1), others none. Explanations carry the label; where a
run has no labeller they say so.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raylabel.errors import BadInput
from raylabel.store.rundir import RunDir
from raylabel.tables import HISTOGRAM_EDGES

BATCH = 1024
EXPLANATION_TYPE = "raylabel"
CREATOR = "raylabel"
FEATURE = (
    "modelId",
    "layer",
    "index",
    "maxActApprox",
    "creatorId",
    "frac_nonzero",
    "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "neuron_alignment_indices",
    "neuron_alignment_l1",
    "neuron_alignment_values",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "decoder_weights_dist",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "sourceSetName",
    "topkCosSimIndices",
    "topkCosSimValues",
    "vector",
    "vectorLabel",
    "hookName",
    "vectorDefaultSteerStrength",
    "hasVector",
)
ACTIVATION = (
    "id",
    "modelId",
    "layer",
    "index",
    "creatorId",
    "dataSource",
    "tokens",
    "maxValue",
    "minValue",
    "values",
    "maxValueTokenIndex",
    "dfaValues",
    "dfaMaxValue",
    "dfaTargetIndex",
    "binContains",
    "binMin",
    "binMax",
)
EXPLANATION = (
    "id",
    "modelId",
    "layer",
    "index",
    "authorId",
    "description",
    "embedding",
    "typeName",
    "explanationModelName",
    "umap_x",
    "umap_y",
    "umap_cluster",
    "umap_log_feature_sparsity",
)
_LISTS = {name for name in FEATURE if name.endswith(("heights", "values", "indices", "l1", "pearson", "_str"))} | {
    "topkCosSimIndices",
    "topkCosSimValues",
    "vector",
    "dfaValues",
    "decoder_weights_dist",
}
Line = dict[str, Any]


def export_neuronpedia(run: RunDir, out: Path) -> int:
    """Writes the layout to the folder `out` and returns how many features; BadInput for a folder that holds something."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise BadInput(f"--out {out}: exists; give a new folder")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error.strerror})") from None
    model = model_id(str(run.resolved.get("name") or run.config["subject"]["model"]))
    whole = run.table("results")
    n = 0
    for layer in sorted(set(whole.column("layer").to_pylist())):
        here = whole.filter(pc.field("layer") == layer)
        for polarity in sorted(set(here.column("polarity").to_pylist()), reverse=True):
            n += _source(run, out, model, layer, polarity, here.filter(pc.field("polarity") == polarity))
    return n


def model_id(name: str) -> str:
    """A model's name as Neuronpedia writes such: the last part of its path, lower case, no blanks."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.rstrip("/").rpartition("/")[2].lower()).strip("-.") or "model"


def source_id(layer: int, site: str, polarity: int) -> tuple[str, str]:
    """(source, its set) of a layer's units of a polarity."""
    name = f"raylabel-{re.sub('[^a-z0-9]+', '-', site.lower()).strip('-')}"
    extra = ("low" if polarity < 0 else "") + ("-gate0" if abs(polarity) == 2 else "")
    return f"{layer}-{name}" + (f"__{extra.strip('-')}" if extra else ""), name


def _source(run: RunDir, out: Path, model: str, layer: int, polarity: int, results: pa.Table) -> int:
    """The three folders of a layer and polarity."""
    site = run.resolved.get("site") or run.config["subject"]["site"]
    source, group = source_id(layer, str((run.config["subject"]["latents"] and "latents") or site), polarity)
    base = {"modelId": model, "layer": source}
    last = max(results.column("neuron").to_pylist(), default=-1)
    condition = pc.field("polarity") == polarity
    for batch, first in enumerate(range(0, last + 1, BATCH)):
        span = (first, first + BATCH)
        inside = (pc.field("neuron") >= span[0]) & (pc.field("neuron") < span[1])
        rows = results.filter(inside).sort_by("neuron").to_pylist()
        if not rows:
            continue
        numbers = {r["neuron"]: r for r in run.table("statistics", layer, span, filter=condition).to_pylist()}
        top = condition & (pc.field("sampling") != "random")
        exemplars = run.table("exemplars", layer, span, filter=top).to_pylist()
        wanted = {row["neuron"] for row in rows}
        lines = {
            "features": (_feature(base, group, row, numbers.get(row["neuron"])) for row in rows),
            "activations": _activations(base, [e for e in exemplars if e["neuron"] in wanted], numbers),
            "explanations": (_explanation(base, row) for row in rows if row["label"] and row["status"] != "failed"),
        }
        for name, found in lines.items():
            write_lines(out / model / source / name / f"batch-{batch}.jsonl.gz", found)
    return results.num_rows


def _feature(base: Line, group: str, row: Line, numbers: Line | None) -> Line:
    line: Line = {name: [] if name in _LISTS else None for name in FEATURE}
    line |= {
        **base,
        "index": str(row["neuron"]),
        "maxActApprox": row["max"] or 0.0,
        "creatorId": CREATOR,
        "sourceSetName": group,
        "hookName": row["site"],
        "hasVector": False,
    }
    if numbers is not None:
        edges, counts = HISTOGRAM_EDGES, numbers["histogram"] or []
        bars = [(edges[i], n) for i, n in enumerate(counts) if n and edges[i] >= 0]
        seen = numbers["tokens_seen"]
        up, down = numbers["logits_up"] or [], numbers["logits_down"] or []
        line |= {
            "frac_nonzero": numbers["fires"] / seen if seen else 0.0,
            "freq_hist_data_bar_values": [value for value, _ in bars],
            "freq_hist_data_bar_heights": [n for _, n in bars],
            "pos_str": [p["token"] for p in up],
            "pos_values": [p["value"] for p in up],
            "neg_str": [p["token"] for p in down],
            "neg_values": [p["value"] for p in down],
        }
    return line


def _activations(base: Line, exemplars: list[Line], numbers: dict[int, Line]) -> Iterator[Line]:
    for row in exemplars:
        if row["tokens"] is None or row["activations"] is None:
            continue
        line: Line = {name: [] if name in _LISTS else None for name in ACTIVATION}
        values = [0.0 if v is None or v > row["activation"] else v for v in row["activations"]]
        index = str(row["neuron"])
        name = [base["modelId"], base["layer"], index, row["sampling"], row["split"], row["rank"]]
        yield line | {
            **base,
            "id": _id(*name),
            "index": index,
            "creatorId": CREATOR,
            "dataSource": row["source"],
            "tokens": row["tokens"],
            "values": values,
            "maxValue": row["activation"],
            "minValue": min(values, default=0.0),
            "maxValueTokenIndex": row["position"],
            **(_top_bin(numbers.get(row["neuron"])) if row["sampling"] == "top" else {}),
        }


def _top_bin(numbers: Line | None) -> Line:
    """How SAEDashboard marks its top group."""
    return {"binContains": -1.0, "binMin": -1.0, "binMax": numbers["max"] if numbers else None}


def _explanation(base: Line, row: Line) -> Line:
    line: Line = dict.fromkeys(EXPLANATION)
    index = str(row["neuron"])
    # An empty embedding would be read as one.
    return line | {
        **base,
        "id": _id(base["modelId"], base["layer"], index, "label"),
        "index": index,
        "authorId": CREATOR,
        "description": row["label"],
        "typeName": EXPLANATION_TYPE,
        "explanationModelName": row["label_source"],
    }


def _id(*parts: Any) -> str:
    """25 letters and digits that begin with c, as Neuronpedia's ids do; the same for the same thing."""
    number = int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16])
    digits = ""
    while len(digits) < 24:
        number, rest = divmod(number, 36)
        digits += "0123456789abcdefghijklmnopqrstuvwxyz"[rest]
    return f"c{digits}"


def write_lines(place: Path, lines: Any) -> None:
    """A .jsonl.gz file; U+0000, which the importer cannot hold, becomes U+FFFD, and the file does not depend on the clock."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        for line in lines:
            file.write(json.dumps(_storable(line), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n")


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, list):
        return [_storable(v) for v in value]
    return {k: _storable(v) for k, v in value.items()} if isinstance(value, dict) else value

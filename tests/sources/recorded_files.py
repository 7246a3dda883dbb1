"""Files of recorded activations as their makers write them, from records; and the same with a byte changed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from hypothesis import strategies as st
from safetensors.numpy import save_file

from raylabel.config import RunConfig, build_config
from raylabel.sources.records import Bad, Record
from raylabel.stages.packing import Packer

values = st.floats(-100, 100, width=32, allow_nan=False)
tokens = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
series = st.integers(1, 6).flatmap(
    lambda n: st.tuples(st.lists(tokens, min_size=n, max_size=n), st.lists(values, min_size=n, max_size=n))
)
numbers = st.integers(0, 40)
BROKEN = [b"NaN", b"1e999", b'"', b"[", b"}", b"\n", b"\x00", b"-1", b"99999999999", b"null"]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    tokens, activations = row.pop("text")
    return {**row, "tokens": tokens, "activations": activations}


plain_row = st.fixed_dictionaries(
    {"layer": numbers, "neuron": numbers, "text": series},
    optional={
        "polarity": st.sampled_from([1, -1]), "document": st.text(max_size=5), "sampling": st.sampled_from(["top", "random"]),
    },
).map(_flat)  # fmt: skip
plain_rows = st.lists(plain_row, min_size=1, max_size=8)


def config_of(path: Path, format: str = "auto", model: str = "none", **sections: Any) -> RunConfig:
    """A configuration that reads a file or folder."""
    exemplars = {"source": "recorded", "recorded": {"path": str(path), "format": format}, **sections}
    return build_config({"subject": {"model": model}, "exemplars": exemplars})


def write_plain(rows: list[dict[str, Any]], path: Path) -> Path:
    """A plain table in the format of the suffix: .feather is a compressed file of Arrow, .ipc a stream."""
    if path.suffix in (".jsonl", ".gz"):
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
        return path
    schema = pa.schema([
        ("layer", pa.int32()), ("neuron", pa.int64()), ("tokens", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())), ("polarity", pa.int8()), ("document", pa.string()), ("sampling", pa.string()),
    ])  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=schema)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    elif path.suffix == ".ipc":
        with pa.ipc.new_stream(path, schema) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        packed = pa.ipc.IpcWriteOptions(compression="zstd" if path.suffix == ".feather" else None)
        with pa.ipc.new_file(path, schema, options=packed) as writer:
            writer.write_table(table, max_chunksize=3)
    return path


def neuron_record(layer: int, neuron: int, texts: list[Any], named: bool) -> dict[str, Any]:
    """A NeuronRecord, with or without `dataclass_name`."""
    def one(name: str, **fields: Any) -> dict[str, Any]:
        return {**({"dataclass_name": name} if named else {}), **fields}

    found = [one("ActivationRecord", tokens=t, activations=a) for t, a in texts]
    return one(
        "NeuronRecord", neuron_id=one("NeuronId", layer_index=layer, neuron_index=neuron), random_sample=found[:1],
        random_sample_by_quantile=[found[:1], found[1:2]], quantile_boundaries=[None, 0.5], mean=0.5, variance=1.0, skewness=None,
        kurtosis=2.0, most_positive_activation_records=found,
    )  # fmt: skip


def dashboard(layer: int, features: dict[int, list[Any]]) -> dict[str, Any]:
    """A batch of SAEDashboard."""
    found = []
    for index, texts in features.items():
        activations = [
            {"bin_min": -1, "bin_max": 2, "bin_contains": -1 if i % 2 else 0.25, "tokens": t, "values": a, "dfa_values": []}
            for i, (t, a) in enumerate(texts)
        ]
        found.append({
            "feature_index": index, "pos_str": [" a"], "pos_values": [1.5], "neg_str": [], "neg_values": [],
            "frac_nonzero": 0.01, "activations": activations, "decoder_weights_dist": [],
        })  # fmt: skip
    return {"model_id": "gpt2-small", "layer": layer, "sae_set": "res-jb", "features": found}


def write_delphi(folder: Path, acts: np.ndarray, ids: np.ndarray, first: int = 0) -> Path:
    """A split of delphi's cache from dense activations [rows, context, latents]."""
    folder.mkdir(parents=True, exist_ok=True)
    at = np.ascontiguousarray(np.argwhere(np.abs(acts) > 1e-5))
    path = folder / f"{first}_{first + acts.shape[2] - 1}.safetensors"
    save_file({
        "locations": at.astype(np.uint16), "activations": acts[tuple(at.T)].astype(np.float16), "tokens": ids.astype(np.int64),
    }, path)  # fmt: skip
    return path


def read_all(config: RunConfig) -> tuple[list[Record], list[Bad]]:
    """Everything that a source has, or says that it has not."""
    from raylabel.sources.records import module

    source = module(config.exemplars.source)
    found = [item for piece in source.pieces(config) for item in source.records(config, json.loads(json.dumps(piece)))]
    return [i for i in found if isinstance(i, Record)], [i for i in found if isinstance(i, Bad)]


def packed(records: list[Record]) -> int:
    """Rows that records give, those refused left out; nothing but ValueError may come of them."""
    packer, n = Packer(None), 0
    for record in records:
        try:
            _, rows, _ = packer.add(record)
        except ValueError:
            continue
        for row in rows:
            assert len(row["tokens"]) == len(row["activations"]) == len(row["token_ids"]) == len(row["ends"])
            assert np.isfinite(row["activations"]).all()
            assert np.float32(row["activation"]) == row["activations"].max() == row["activations"][row["position"]]
        n += len(rows)
    return n


@st.composite
def mutations(draw: Any, data: bytes) -> bytes:
    """The bytes with a few of them changed, cut out, doubled, or cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        how = draw(st.sampled_from(["set", "cut", "insert", "end"]))
        if how == "set" and changed:
            changed[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del changed[at : at + draw(st.integers(1, 20))]
        elif how == "insert":
            changed[at:at] = draw(st.sampled_from(BROKEN))
        else:
            del changed[at:]
    return bytes(changed)

"""Shards and commits: the schema of the table, groups of 64 neurons, and the manifest last."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylabel.store.files import Files, Written
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import NEURONS_A_GROUP, Blob, Output, Shard, commit, encode
from raylabel.tables import conform, from_rows

UNIT = Unit("0123456789abcdef", "scan", "close", {"layer": 3})


def statistics(neurons: int, rows: int = 1) -> pa.Table:
    made = [{"neuron": n, "polarity": 1, "fires": r} for n in range(neurons) for r in range(rows)]
    return from_rows(made, "statistics")


def test_files_lie_where_the_contract_says(tmp_path: Path) -> None:
    shards = [Shard("statistics", statistics(2), 3), Shard("statistics", statistics(1), 3, controls=True)]
    samples = [Shard("samples", from_rows([{"sample": i}], "samples"), part=i) for i in range(2)]
    blobs = [Blob("pilot.npz", b"1"), Blob("state.npz", b"22", temporary=True), Blob("state.npz", b"3", temporary=True, part=1)]
    entry = commit(Files(str(tmp_path)), UNIT, 2, Output([*shards, *samples], blobs, [{"neuron": 1}], {"n": 1}), 5.0)
    assert [(f["path"], f["rows"]) for f in entry["files"]] == [
        ("statistics/layer=03/part-0123456789abcdef-2.parquet", 2),
        ("controls/statistics/layer=03/part-0123456789abcdef-2.parquet", 1),
        ("samples/part-0123456789abcdef-2-00000.parquet", 1),
        ("samples/part-0123456789abcdef-2-00001.parquet", 1),
        ("pilot.npz", 0),
        ("_work/scan/0123456789abcdef-2-state.npz", 0),
        ("_work/scan/0123456789abcdef-2-1.state.npz", 0),
    ]
    for file in entry["files"]:
        data = (tmp_path / file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert RunDir(str(tmp_path)).manifest("scan") == {UNIT.id: entry}
    assert (entry["attempt"], entry["started"], entry["step"]) == (2, 5.0, "close")
    assert (entry["failures"], entry["notes"]) == ([{"neuron": 1}], {"n": 1})
    assert entry["ended"] > 5
    assert entry["host"]


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write = Files.write

    def noted(self: Files, name: str, data: bytes) -> Written:
        order.append(name)
        return write(self, name, data)

    monkeypatch.setattr(Files, "write", noted)
    commit(Files(str(tmp_path)), UNIT, 1, Output([Shard("statistics", statistics(1), 0)], [Blob("x", b"")]), 0.0)
    assert order[-1] == "_manifest/scan/0123456789abcdef.json"
    assert len(order) == 3


def test_a_row_group_holds_64_neurons_whatever_their_rows() -> None:
    file = pq.ParquetFile(io.BytesIO(encode(statistics(150, rows=3), "statistics", "parquet")))
    groups = [file.read_row_group(i).column("neuron").to_pylist() for i in range(file.num_row_groups)]
    assert [(g[0], g[-1], len(g)) for g in groups] == [(0, 63, 192), (64, 127, 192), (128, 149, 66)]
    assert NEURONS_A_GROUP == 64
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("rows", [0, 1, 2500])
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_both_formats_give_the_rows_back(rows: int, format: str) -> None:
    table = from_rows([{"sample": i, "text": "x" * (i % 7), "token_ids": [i]} for i in range(rows)], "samples")
    data = encode(table, "samples", format)
    back = pq.read_table(io.BytesIO(data)) if format == "parquet" else pa.ipc.open_file(data).read_all()
    assert back.equals(table)


def test_a_column_the_schema_does_not_know_is_refused_and_a_missing_one_is_null(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="table samples has no column wrong"):
        commit(Files(str(tmp_path)), UNIT, 1, Output([Shard("samples", pa.table({"wrong": [1]}))]), 0.0)
    assert not (tmp_path / "_manifest").exists()
    assert conform(pa.table({"sample": [1]}), "samples").column("text").to_pylist() == [None]

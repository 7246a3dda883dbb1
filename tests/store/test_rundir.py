"""A run directory shows what is planned and committed, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest

from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput
from raylabel.report.status import broken_files, stage_rows
from raylabel.stages import PIPELINE
from raylabel.store.plan import Plan, make_plan
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Output, Shard, commit
from raylabel.tables import SCHEMA_VERSION, TABLES, from_rows
from tests.rundirs import committed_files, differing, files_of
from tests.runs import tiny_config

PLAN = make_plan("scan", 1, {}, [], {"rows": [{"layer": layer} for layer in range(3)]})


@pytest.fixture(params=["disk", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    made = RunDir(str(tmp_path / "run") if request.param == "disk" else f"memory://{tmp_path.name}-run")
    made.start({"a": 1})
    made.fix_plan(PLAN)
    return made


@pytest.fixture
def copied(finished: RunDir, tmp_path: Path) -> RunDir:
    shutil.copytree(finished.files.root, tmp_path / "run")
    return RunDir(str(tmp_path / "run"))


def put(run: RunDir, plan: Plan, number: int, fires: int = 0, attempt: int = 1) -> dict[str, Any]:
    """Commits the rows of two neurons for a unit of the plan."""
    unit = plan.units[number]
    rows = [{"neuron": n, "polarity": 1, "fires": fires} for n in range(2)]
    shard = Shard("statistics", from_rows(rows, "statistics"), unit.key["layer"])
    return commit(run.files, unit, attempt, Output([shard]), 0.0)


def layers(run: RunDir) -> list[int]:
    return run.table("statistics").column("layer").to_pylist()


# run.json


def test_run_json_is_written_once_and_then_only_extended(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    run.start({"a": 1})
    first = json.loads((tmp_path / "run.json").read_bytes())
    RunDir(str(tmp_path)).start({"a": 1})
    assert json.loads((tmp_path / "run.json").read_bytes()) == first
    RunDir(str(tmp_path)).start({"a": 2})
    second = json.loads((tmp_path / "run.json").read_bytes())
    assert second["configs"][:1] == first["configs"]
    assert [c["config"] for c in second["configs"]] == [{"a": 1}, {"a": 2}]
    assert RunDir(str(tmp_path)).config == {"a": 2}
    assert {"python", "torch", "transformers", "pyarrow"} <= set(second["configs"][0]["versions"])


def test_resolved_values_stay_until_what_they_were_resolved_for_changes(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    run.start({})
    run.resolve({"batch": 8}, of="x")
    run.resolve({"batch": 16, "width": 3}, of="x")
    assert RunDir(str(tmp_path)).resolved == {"batch": 8, "width": 3}
    run.resolve({"batch": 16}, of="y")
    assert RunDir(str(tmp_path)).resolved == {"batch": 16}


@pytest.mark.parametrize("version", ["2.0", "10.3", "?", None])
def test_a_newer_major_schema_is_refused_by_every_reader(copied: RunDir, version: str | None) -> None:
    path = Path(copied.files.path("run.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    readers: list[Callable[[RunDir], Any]] = [
        lambda run: run.table("results"), lambda run: run.dataset("exemplars"), lambda run: run.start({}),
        lambda run: run.config, lambda run: run.controls.table("results"), stage_rows,
    ]  # fmt: skip
    for read in readers:
        with pytest.raises(BadInput, match=f"schema version .* reads up to {SCHEMA_VERSION}"):
            read(RunDir(copied.files.url))


def test_a_newer_minor_schema_is_read(copied: RunDir) -> None:
    path = Path(copied.files.path("run.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": "1.9"}))
    assert RunDir(copied.files.url).table("results").num_rows == 24


def test_what_is_no_run_directory_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"not a run directory \(no run.json\)"):
        RunDir(str(tmp_path)).table("results")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BadInput, match=r"run.json: not valid JSON"):
        RunDir(str(tmp_path)).table("results")


def test_a_folder_that_holds_something_else_is_not_made_a_run_directory(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty and not a run directory"):
        RunDir(str(tmp_path)).start({})
    assert files_of(RunDir(str(tmp_path))) == {"samples/mine.txt"}


def test_an_unknown_table_names_the_known_ones(run: RunDir) -> None:
    with pytest.raises(BadInput, match="no table 'result'; tables are samples, exemplars"):
        run.table("result")
    for name in TABLES:
        assert run.table(name).num_rows == 0


# plan and manifest


def test_rows_count_once_their_unit_is_committed(run: RunDir) -> None:
    assert layers(run) == []
    put(run, PLAN, 1)
    assert layers(run) == [1, 1]
    put(run, PLAN, 0)
    assert layers(run) == [0, 0, 1, 1]
    assert set(run.committed(PLAN)) == {PLAN.units[0].id, PLAN.units[1].id}
    assert run.table("statistics", 1, (1, 2)).column("neuron").to_pylist() == [1]


def test_files_without_a_manifest_entry_are_never_read_and_go_when_the_stage_ends(run: RunDir) -> None:
    entries = [put(run, PLAN, number) for number in range(3)]
    path = entries[0]["files"][0]["path"]
    data = run.files.read(path)
    strays = [
        path.replace("-1.parquet", "-2.parquet"), path.replace("part-", ".tmp-abc-part-"), "statistics/layer=00/half.parquet",
        "statistics/layer=07/part-ffffffffffffffff-1.parquet", "controls/statistics/layer=00/part-ffffffffffffffff-1.parquet",
        "_work/scan/ffffffffffffffff-1-state.npz",
    ]  # fmt: skip
    for name in strays:
        run.files.write(name, data[: len(data) // 2])
    assert layers(run) == [0, 0, 1, 1, 2, 2]
    run.finish(PLAN, ("statistics",))
    assert run.complete("statistics")
    assert layers(run) == [0, 0, 1, 1, 2, 2]
    left = {name for name in run.files.sizes("") if not name.startswith(("_plan", "_manifest", "run.json"))}
    assert left == {entry["files"][0]["path"] for entry in entries} | {"statistics/_SUCCESS"}


def test_what_a_lost_worker_writes_after_the_end_is_not_read(run: RunDir) -> None:
    for number in range(3):
        put(run, PLAN, number)
    run.finish(PLAN, ("statistics",))
    entry = json.loads(run.files.read(f"_manifest/scan/{PLAN.units[0].id}.json"))
    run.files.write("statistics/layer=00/part-ffffffffffffffff-1.parquet", run.files.read(entry["files"][0]["path"]))
    assert layers(run) == [0, 0, 1, 1, 2, 2]


def test_a_second_attempt_takes_the_place_of_the_first(run: RunDir) -> None:
    for number in range(3):
        put(run, PLAN, number)
    put(run, PLAN, 1, fires=7, attempt=2)
    assert run.table("statistics", 1).column("fires").to_pylist() == [7, 7]
    run.finish(PLAN, ("statistics",))
    assert sum("-2.parquet" in name for name in run.files.sizes("statistics")) == 1
    assert len(run.files.sizes("statistics")) == 4


def test_units_of_another_plan_are_not_seen(run: RunDir) -> None:
    for number in range(3):
        put(run, PLAN, number)
    other = make_plan("scan", 1, {"top": 2}, [], {"rows": [{"layer": 1}]})
    run.reopen(("statistics",))
    run.fix_plan(other)
    assert layers(run) == []
    put(run, other, 0)
    run.finish(other, ("statistics",))
    assert layers(run) == [1, 1]
    assert set(run.manifest("scan")) == {other.units[0].id}
    run.forget_plan("scan", ("statistics",))
    assert layers(run) == []
    assert not run.complete("statistics")


def test_a_unit_counts_as_done_only_while_its_files_have_their_size(run: RunDir) -> None:
    entry = put(run, PLAN, 0)
    [file] = entry["files"]
    run.files.write(file["path"], b"x" * file["bytes"])
    assert set(run.committed(PLAN)) == {PLAN.units[0].id}
    run.files.write(file["path"], b"x" * (file["bytes"] - 1))
    assert run.committed(PLAN) == {}
    run.files.delete(file["path"])
    assert run.committed(PLAN) == {}


def test_an_unreadable_manifest_entry_does_not_count(run: RunDir) -> None:
    put(run, PLAN, 0)
    for content in (b"", b"{", b"[]", b"{}", b'"x"'):
        run.files.write(f"_manifest/scan/{PLAN.units[0].id}.json", content)
        assert run.manifest("scan") == {}
        assert layers(run) == []


# whole runs


def test_a_run_in_an_object_store_gives_the_same_tables(
    finished: RunDir, tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylabel.store.lock.SETTLE", 0.0)
    config = tiny_config(tiny_model, tiny_corpus, Path("x"), subject={"neurons": [0, 8]}, run={"out": f"memory://{tmp_path.name}"})
    run_pipeline(config)
    run = RunDir(config.run.out)
    assert differing(finished, run) == []
    assert committed_files(run) <= set(run.files.sizes(""))
    assert not run.files.exists("_lock")
    said: list[str] = []
    run_pipeline(config, said.append)
    assert all(line.endswith("already done") for line in said)


def test_arrow_files_hold_the_rows_of_parquet_files(
    finished: RunDir, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_model, tiny_corpus, tmp_path, subject={"neurons": [0, 8]}, run={"out": str(tmp_path / "run")})
    config = config.model_copy(update={"run": config.run.model_copy(update={"format": "arrow"})})
    run_pipeline(config)
    run = RunDir(str(tmp_path / "run"))
    assert differing(finished, run) == []
    endings = {Path(name).suffix for name in files_of(run) if "part-" in name}
    assert endings == {".arrow"}
    with pa.memory_map(run.files.path(run.paths("samples")[0])) as file:
        assert pa.ipc.open_file(file).read_all().num_rows > 0
    plain = ds.dataset(run.files.path("exemplars"), format="ipc", partitioning="hive", ignore_prefixes=["_"])
    assert plain.count_rows() == run.table("exemplars").num_rows


@pytest.mark.parametrize("table", ["exemplars", "statistics", "candidates", "variants", "verifications", "results"])
def test_other_readers_see_the_rows_and_layers_of_a_finished_table(finished: RunDir, table: str) -> None:
    for run, folder in ((finished, table), (finished.controls, f"controls/{table}")):
        own = run.table(table)
        plain = ds.dataset(finished.files.path(folder), partitioning="hive").to_table()
        assert plain.select(own.column_names).cast(own.schema).equals(own)
        frame = pd.read_parquet(finished.files.path(folder))
        assert frame["layer"].astype(int).tolist() == own.column("layer").to_pylist()
        assert frame["neuron"].tolist() == own.column("neuron").to_pylist()


def test_rows_are_sorted_by_layer_unit_and_polarity(finished: RunDir) -> None:
    for name in ("exemplars", "statistics", "candidates", "variants", "verifications", "results"):
        for run in (finished, finished.controls):
            table = run.table(name)
            keys = list(zip(*(table.column(c).to_pylist() for c in ("layer", "neuron")), strict=True))
            assert keys == sorted(keys)
            assert len(keys) > 0


def test_a_flipped_byte_is_found_and_a_whole_run_is_whole(copied: RunDir) -> None:
    assert broken_files(copied) == []
    path = copied.paths("verifications", 1)[0]
    place = Path(copied.files.path(path))
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    assert broken_files(copied) == [path]
    Path(copied.files.path("vectors.bin")).unlink()
    assert broken_files(copied) == ["vectors.bin", path]


def test_status_counts_units_rows_and_states(copied: RunDir) -> None:
    rows = {row["stage"]: row for row in stage_rows(copied)}
    assert [row["state"] for row in rows.values()] == ["done"] * len(PIPELINE)
    assert rows["identify"]["rows"] == 24 + 15
    for name, row in rows.items():
        plan = copied.plan(name)
        assert plan is not None
        assert (row["done"], row["pending"], row["failed"]) == (len(plan.units), 0, 0)
    place = Path(copied.files.path(copied.paths("variants", 0)[0]))
    place.unlink()
    row = next(row for row in stage_rows(RunDir(copied.files.url)) if row["stage"] == "verify")
    assert row["pending"] > 0
    assert row["state"] == "unfinished"


def test_the_condition_of_a_reader_reaches_the_files(finished: RunDir) -> None:
    found = finished.table("results", filter=pc.field("flagged"), columns=["layer", "neuron", "flagged"])
    whole = finished.table("results").to_pylist()
    assert found.to_pylist() == [{k: r[k] for k in ("layer", "neuron", "flagged")} for r in whole if r["flagged"]]
    assert found.num_rows > 0

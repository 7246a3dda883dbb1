"""Whole runs: on Ray as in this process, around a neuron at fault, under `run.max_failures`, a few stages at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raylabel.config import RunConfig
from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput, RunFailed
from raylabel.stages import identify, tokenize
from raylabel.store.rundir import RunDir
from tests.rundirs import TABLES, assert_tidy, differing
from tests.runs import tiny_config

SMALL: dict[str, Any] = {"subject": {"neurons": [0, 8]}}


@pytest.fixture
def config(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> RunConfig:
    return tiny_config(tiny_model, tiny_corpus, tmp_path / "run", **SMALL)


@pytest.fixture
def copied(finished: RunDir, tmp_path: Path) -> RunDir:
    """The finished run at the place of `config`, to change something and go on."""
    shutil.copytree(finished.files.root, tmp_path / "run")
    return RunDir(str(tmp_path / "run"))


def changed(config: RunConfig, **values: Any) -> RunConfig:
    """The configuration with `section__key=value` set."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    for name, value in values.items():
        section, key = name.split("__")
        tree.setdefault(section, {})[key] = value
    return RunConfig.model_validate(tree)


def started(run: RunDir) -> dict[str, dict[str, float]]:
    """stage -> unit -> when it was started."""
    names = ("tokenize", "scan", "identify", "verify", "optimize", "describe", "score", "results")
    return {name: {i: e["started"] for i, e in run.manifest(name).items()} for name in names}


def test_a_run_on_ray_gives_the_tables_of_one_process(finished: RunDir, config: RunConfig) -> None:
    report = run_pipeline(changed(config, run__address="local"))
    run = RunDir(config.run.out)
    assert report.failures == 0
    assert differing(finished, run) == []
    assert_tidy(run)


def test_a_finished_run_is_left_alone(copied: RunDir, config: RunConfig) -> None:
    before = started(copied)
    said: list[str] = []
    run_pipeline(config, said.append)
    assert said == [f"{name}: already done" for name in before]
    assert started(copied) == before


def test_what_a_killed_process_was_writing_is_swept_away(copied: RunDir, config: RunConfig) -> None:
    for folder in ("", "_manifest/scan/", "_plan/", "samples/", "controls/results/layer=01/", "failures/"):
        Path(copied.files.path(f"{folder}.tmp-0123456789ab-x.parquet")).write_bytes(b"half")
    run_pipeline(config)
    assert_tidy(copied)


@pytest.mark.parametrize(
    ("values", "redone"),
    [
        ({"verify__synonyms": 3}, ["verify", "optimize", "describe", "score", "results"]),
        ({"verify__max_variants": 40}, ["verify", "optimize", "describe", "score", "results"]),
        ({"identify__fdr": 0.4}, ["identify", "verify", "optimize", "describe", "score", "results"]),
        ({"exemplars__top": 5}, ["scan", "identify", "verify", "optimize", "describe", "score", "results"]),
        ({"subject__batch": 2}, ["scan", "identify", "verify", "optimize", "describe", "score", "results"]),
        ({"run__seed": 1}, ["scan", "identify", "verify", "optimize", "describe", "score", "results"]),
        ({"subject__bos": "never"}, ["tokenize", "scan", "identify", "verify", "optimize", "describe", "score", "results"]),
        ({"describe__exemplars": 3}, ["describe", "score", "results"]),
        ({"describe__budget_usd": 3, "describe__timeout": 5}, []),
        ({"optimize__evaluations": 3}, ["optimize", "describe", "score", "results"]),
        ({"score__window": 16}, ["score", "results"]),
        ({"run__workers": 2, "run__max_failures": 0.5}, []),
    ],
    ids=str,
)
def test_a_changed_setting_redoes_what_depends_on_it_and_nothing_else(
    copied: RunDir, config: RunConfig, values: dict[str, Any], redone: list[str]
) -> None:
    before = started(copied)
    run_pipeline(changed(config, **values))
    after = started(RunDir(copied.files.url))
    assert [name for name in before if before[name] != after[name]] == redone
    for name in redone:
        assert set(before[name]).isdisjoint(after[name])
    assert_tidy(RunDir(copied.files.url))


def test_other_word_vectors_redo_identify_but_not_scan(copied: RunDir, config: RunConfig, tmp_path: Path) -> None:
    before = started(copied)
    vectors = tmp_path / "other.bin"
    shutil.copy(Path(copied.files.root) / "vectors.bin", vectors)
    run_pipeline(changed(config, identify__vectors=str(vectors)))
    after = started(copied)
    assert before["scan"] == after["scan"]
    assert set(before["identify"]).isdisjoint(after["identify"])
    # The same name, another file.
    with vectors.open("ab") as file:
        file.write(b"\0")
    run_pipeline(changed(config, identify__vectors=str(vectors)))
    assert set(after["identify"]).isdisjoint(started(copied)["identify"])


def test_another_corpus_redoes_everything_and_leaves_nothing_of_the_old(
    copied: RunDir, config: RunConfig, tmp_path: Path
) -> None:
    old = Path(config.exemplars.corpus.path or "")
    new = tmp_path / "new.jsonl"
    new.write_text("".join(old.read_text(encoding="utf-8").splitlines(keepends=True)[:100]), encoding="utf-8")
    config = changed(config, exemplars__corpus={"path": str(new)})
    run_pipeline(config)
    fresh = changed(config, run__out=str(tmp_path / "fresh"))
    run_pipeline(fresh)
    assert differing(RunDir(fresh.run.out), RunDir(config.run.out)) == []
    assert_tidy(RunDir(config.run.out))


def test_another_site_is_looked_up_again(copied: RunDir, config: RunConfig) -> None:
    run_pipeline(changed(config, subject__site="resid_post"))
    run = RunDir(config.run.out)
    assert set(run.table("results").column("site").to_pylist()) == {f"blocks.{i}.hook_resid_post" for i in range(3)}
    assert run.resolved["width"] == 16
    run_pipeline(changed(config, subject__site="resid_post", subject__layers=[1]))
    assert set(RunDir(config.run.out).table("results").column("layer").to_pylist()) == {1}
    assert RunDir(config.run.out).resolved["n_units"] == 8


def test_a_file_cut_short_is_made_again(copied: RunDir, config: RunConfig, finished: RunDir) -> None:
    path = Path(copied.files.path(copied.paths("exemplars", 1)[0]))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    before = started(copied)
    run_pipeline(config)
    after = started(copied)
    assert before["tokenize"] == after["tokenize"]
    assert len([i for i in before["scan"] if before["scan"][i] != after["scan"][i]]) > 0
    assert before["identify"] == after["identify"]
    assert differing(finished, RunDir(config.run.out)) == []
    assert_tidy(RunDir(config.run.out))


def test_stages_run_one_at_a_time_give_the_same_tables(finished: RunDir, config: RunConfig) -> None:
    for names in (["tokenize", "scan"], ["identify"], ["verify", "optimize", "describe", "score", "results"]):
        run_pipeline(changed(config, run__stages=names))
    assert differing(finished, RunDir(config.run.out)) == []


def test_a_stage_whose_inputs_are_missing_or_of_other_settings_is_refused(copied: RunDir, config: RunConfig) -> None:
    fresh = changed(config, run__out=f"{config.run.out}-fresh", run__stages=["identify"])
    with pytest.raises(BadInput, match="identify needs scan, which is not complete"):
        run_pipeline(fresh)
    with pytest.raises(BadInput, match="verify needs identify, which was done with other settings"):
        run_pipeline(changed(config, identify__fdr=0.4, run__stages=["verify"]))
    with pytest.raises(BadInput, match="identify needs scan, which was done with other settings"):
        run_pipeline(changed(config, exemplars__top=5, run__stages=["identify", "verify"]))
    with pytest.raises(BadInput, match=r"no stage 'scann'"):
        run_pipeline(changed(config, run__stages=["scann"]))


def test_a_neuron_that_breaks_a_stage_is_listed_and_the_others_are_done(
    finished: RunDir, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = identify.measure

    def breaks(exemplars: pa.Table, *rest: Any) -> pa.Table:
        if "control" not in exemplars.column_names and 5 in exemplars.column("neuron").to_pylist() and 1 in layers(exemplars):
            raise ZeroDivisionError("no words")
        return measure(exemplars, *rest)

    def layers(exemplars: pa.Table) -> set[int]:
        return set(exemplars.column("layer").to_pylist())

    monkeypatch.setattr(identify, "measure", breaks)
    report = run_pipeline(changed(config, run__max_failures=0.2))
    run = RunDir(config.run.out)
    [failure] = run.table("failures").to_pylist()
    assert report.failures == 1
    assert (failure["stage"], failure["layer"], failure["neuron"]) == ("identify", 1, 5)
    assert failure["reason"] == "ZeroDivisionError: no words"
    assert failure["unit"] == "layer=1,neuron=5"
    lost = (pc.field("layer") == 1) & (pc.field("neuron") == 5)
    kept = ["layer", "neuron", "polarity", "mats", "phrases", "family_similarity"]
    assert run.table("candidates").select(kept).equals(finished.table("candidates").filter(~lost).select(kept))
    status = {(r["layer"], r["neuron"]): r["status"] for r in run.table("results").to_pylist()}
    assert status[1, 5] == "failed"
    assert len(status) == 24
    assert list(status.values()).count("failed") == 1
    # Nothing of it stays for a run in which it no longer breaks, once the stage is done anew.
    monkeypatch.setattr(identify, "measure", measure)
    run_pipeline(changed(config, identify__window=4))
    assert RunDir(config.run.out).table("failures").num_rows == 0


def test_a_stage_that_cannot_go_on_ends_the_run_with_its_reason(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, unit: Any) -> Any:
        raise RuntimeError("the disk sings")

    monkeypatch.setattr(tokenize.VectorsWorker, "__call__", fails)
    with pytest.raises(RunFailed, match=r"tokenize cannot go on: .*RuntimeError: the disk sings"):
        run_pipeline(config)
    run = RunDir(config.run.out)
    assert not run.complete("samples")
    monkeypatch.undo()
    run_pipeline(config)
    assert RunDir(config.run.out).complete("results")


def test_files_that_go_while_a_stage_runs_are_missed(config: RunConfig, finished: RunDir) -> None:
    def say(line: str) -> None:
        if line.startswith("scan: close 3/3"):
            run = RunDir(config.run.out)
            Path(run.files.path(run.paths("exemplars", 0)[0])).unlink()

    with pytest.raises(RunFailed, match="scan: files of 1 units are gone or cut short; run the same command again"):
        run_pipeline(config, say)
    assert not RunDir(config.run.out).complete("exemplars")
    run_pipeline(config)
    assert differing(finished, RunDir(config.run.out)) == []


@pytest.mark.parametrize("decoys", [0, 3])
def test_a_list_of_units_and_both_ends_of_them(tiny_model: Path, tiny_corpus: Path, tmp_path: Path, decoys: int) -> None:
    units = [[2, 30], [0, 1], [2, 3]]
    config = tiny_config(
        tiny_model, tiny_corpus, tmp_path / "run", subject={"units": units, "polarity": "both"}, controls={"decoys": decoys}
    )
    run_pipeline(config)
    run = RunDir(config.run.out)
    wanted = [(0, 1, 1), (0, 1, -1), (2, 3, 1), (2, 3, -1), (2, 30, 1), (2, 30, -1)]
    for name in ("statistics", "candidates", "results"):
        assert [(r["layer"], r["neuron"], r["polarity"]) for r in run.table(name).to_pylist()] == wanted
        assert run.controls.table(name).num_rows == 2 * decoys
    assert {(r["layer"], r["neuron"]) for r in run.table("exemplars").to_pylist()} <= {(0, 1), (2, 3), (2, 30)}
    assert run.table("calibration").num_rows == (2 if decoys else 0)
    assert run.complete("calibration")


def test_rows_of_an_unfinished_stage_are_read_from_its_manifests(config: RunConfig, finished: RunDir) -> None:
    class Stopped(BaseException):
        pass

    def say(line: str) -> None:
        if line.startswith("scan: close 2/3"):
            raise Stopped

    with pytest.raises(Stopped):
        run_pipeline(config, say)
    run = RunDir(config.run.out)
    assert not run.complete("exemplars")
    assert set(run.table("exemplars").column("layer").to_pylist()) == {0, 1}
    assert run.table("exemplars", 1).equals(finished.table("exemplars", 1))
    assert run.table("candidates").num_rows == 0
    for name in TABLES:
        assert run.table(name).schema.names == finished.table(name).schema.names

"""Recorded files: valid input survives the round trip, broken input is named, whatever was broken in it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from raylabel.config import build_config
from raylabel.errors import BadInput
from raylabel.sources import reading, recorded
from raylabel.sources.records import Record
from raylabel.sources.spelling import SPECIAL
from raylabel.store.rundir import RunDir
from tests.conftest import Command
from tests.shared import SHARED, needs_shared
from tests.sources.recorded_files import (
    config_of,
    dashboard,
    mutations,
    neuron_record,
    packed,
    plain_rows,
    read_all,
    series,
    write_delphi,
    write_plain,
)

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SUFFIXES = ("jsonl", "jsonl.gz", "parquet", "arrow", "feather", "ipc")


def as_rows(records: list[Record]) -> list[dict[str, Any]]:
    return [
        {
            "layer": r.layer, "neuron": r.neuron, "polarity": r.polarity, "tokens": list(t.tokens or []),
            "activations": list(t.activations), "document": t.document, "sampling": t.sampling,
        }
        for r in records for t in r.texts
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
@few
@given(rows=plain_rows)
def test_plain_tables_come_back_as_they_were_written(suffix: str, rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records, bad = read_all(config_of(write_plain(rows, Path(folder) / f"acts.{suffix}")))
    assert not bad
    wanted = [{"polarity": 1, "document": None, "sampling": None, **row} for row in rows]
    assert as_rows(records) == wanted


@few
@given(st.lists(series, min_size=1, max_size=4), st.booleans())
def test_neuron_records_come_back(texts: list[Any], named: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "7.json"
        path.write_text(json.dumps(neuron_record(3, 7, texts, named)))
        [record], bad = read_all(config_of(Path(folder)))
    assert not bad
    assert (record.layer, record.neuron) == (3, 7)
    assert [(t.tokens, t.activations) for t in record.texts if t.sampling == "top"] == [(t, a) for t, a in texts]
    assert record.statistics["mean"] == 0.5 and record.statistics["skewness"] is None


@few
@given(st.dictionaries(st.integers(0, 9), st.lists(series, max_size=3), min_size=1, max_size=3))
def test_dashboards_come_back(features: dict[int, list[Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "batch-0.json").write_text(json.dumps(dashboard(5, features)))
        records, bad = read_all(config_of(Path(folder)))
    assert not bad
    found = {r.neuron: [(t.tokens, t.activations) for t in r.texts] for r in records}
    assert found == {i: [(t, a) for t, a in texts] for i, texts in features.items()}
    assert {r.layer for r in records} == {5}


@few
@given(st.data())
def test_delphis_caches_give_the_strongest_rows_and_exact_statistics(data: Any) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rows, context, latents = (data.draw(st.integers(1, n)) for n in (12, 6, 4))
    acts = draw.normal(size=(rows, context, latents)) * (draw.random((rows, context, latents)) < 0.3)
    acts = acts.astype(np.float16).astype(np.float64)
    ids = draw.integers(0, 50, (rows, context))
    assume((np.abs(acts) > 1e-5).any())
    with tempfile.TemporaryDirectory() as folder:
        write_delphi(Path(folder) / "layers.6.mlp", acts, ids, first=10)
        records, bad = read_all(config_of(Path(folder), model="gpt2", top=4, quantile=2, random=2))
    assert not bad
    for record in records:
        own = acts[:, :, record.neuron - 10]
        assert record.layer == 6
        assert record.statistics["fires"] == (own > 0).sum()
        assert record.statistics["tokens_seen"] == own.size
        assert record.statistics["mean"] == pytest.approx(own.mean(), abs=1e-9)
        assert record.statistics["variance"] == pytest.approx(own.var(), abs=1e-9)
        assert record.statistics["max"] == max(own.max(), 0)
        best = sorted(own.max(1)[own.max(1) > 0], reverse=True)
        assert [max(t.activations) for t in record.texts if t.sampling == "top"] == pytest.approx(best)
        for text in record.texts:
            row = int(str(text.document).rsplit(" ", 1)[1])
            assert list(text.token_ids or []) == ids[row].tolist()
            assert text.activations == pytest.approx(own[row])


def test_stretches_of_a_cache_do_not_change_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    acts = draw.normal(size=(40, 8, 3)) * (draw.random((40, 8, 3)) < 0.4)
    write_delphi(tmp_path / "h.2", acts, draw.integers(0, 50, (40, 8)))
    whole, _ = read_all(config_of(tmp_path, model="gpt2"))
    for size in (1, 7, 50):
        monkeypatch.setattr("raylabel.sources.delphi.ENTRIES", size)
        assert read_all(config_of(tmp_path, model="gpt2"))[0] == whole


@pytest.mark.parametrize("kind", [*SUFFIXES, "openai", "saedashboard", "delphi"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_broken_files_are_named_and_never_crash(kind: str, data: Any) -> None:
    texts = [(["the", " fox", " ran"], [0.0, 1.5, -0.25]), ([" a", "é"], [2.0, 0.5])]
    rows = [{"layer": 1, "neuron": n, "tokens": t, "activations": a} for n in range(3) for t, a in texts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "delphi":
            path = write_delphi(folder / "layers.1", np.eye(4)[:, :, None] * 1.5, np.arange(16).reshape(4, 4))
        elif kind in ("openai", "saedashboard"):
            path = folder / "x.json"
            tree = neuron_record(1, 2, texts, True) if kind == "openai" else dashboard(1, {2: texts, 3: texts})
            path.write_text(json.dumps(tree))
        else:
            path = write_plain(rows, folder / f"x.{kind}")
        kind = recorded.SUFFIXES.get(f".{kind}", kind)
        whole = len(read_all(config_of(path, kind, "gpt2"))[0])
        path.write_bytes(data.draw(mutations(path.read_bytes())))
        try:
            records, _bad = read_all(config_of(path, kind, "gpt2"))
        except BadInput:
            return
    assert len(records) <= whole + 8
    packed(records)


def test_bad_rows_are_failures_that_name_file_and_line(tmp_path: Path) -> None:
    good = {"layer": 0, "neuron": 1, "tokens": ["a"], "activations": [1]}
    lines = [
        json.dumps(good), "{", json.dumps({**good, "layer": "0"}), json.dumps({**good, "activations": [True]}), "",
        json.dumps({**good, "polarity": 0}), "[" * 100_000, json.dumps(good),
    ]  # fmt: skip
    (tmp_path / "acts.jsonl").write_text("\n".join(lines))
    records, bad = read_all(config_of(tmp_path / "acts.jsonl"))
    assert [r.place for r in records] == ["acts.jsonl, line 1", "acts.jsonl, line 8"]
    assert [b.reason.split(":")[0] for b in bad] == [f"acts.jsonl, line {n}" for n in (2, 3, 4, 6, 7)]
    assert "layer: input should be a valid integer" in bad[1].reason


def test_lines_keep_their_numbers_when_a_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"layer": 0, "neuron": n, "tokens": ["a" * n], "activations": [1.0]} for n in range(1, 60)]
    path = write_plain(rows, tmp_path / "acts.jsonl")
    whole = reading.line_pieces(path)
    assert len(whole) == 1
    monkeypatch.setattr(reading, "BLOCK", 100)
    for size in (1, 300, 1000):
        parts = reading.line_pieces(path, size)
        assert [line for p in parts for line in reading.lines(str(path), **p)] == list(reading.lines(str(path), **whole[0]))


def test_formats_are_told_apart_and_unknown_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text(json.dumps(neuron_record(0, 0, [(["a"], [1.0])], False)))
    (tmp_path / "batch-0.json").write_text(json.dumps(dashboard(0, {0: [(["a"], [1.0])]})))
    (tmp_path / "other.json").write_text('{"some": "thing"}')
    write_plain([{"layer": 0, "neuron": 1, "tokens": ["a"], "activations": [1.0]}], tmp_path / "x.parquet")
    [piece] = recorded.pieces(config_of(tmp_path))
    assert {f["name"]: f["format"] for f in piece["files"]} == {
        "n.json": "openai", "batch-0.json": "saedashboard", "x.parquet": "parquet"
    }
    [piece] = recorded.pieces(config_of(tmp_path, "openai"))
    assert [f["name"] for f in piece["files"]] == ["n.json"]
    for path, format, word in (
        (tmp_path, "csv", "formats are auto, openai, saedashboard, delphi, jsonl, parquet, arrow"),
        (tmp_path / "none", "auto", "no such file"),
        (tmp_path, "delphi", "no file of the format delphi"),
    ):
        with pytest.raises(BadInput, match=word):
            recorded.pieces(config_of(path, format))
    write_delphi(tmp_path / "layers.1", np.ones((1, 1, 1)), np.ones((1, 1)))
    with pytest.raises(BadInput, match="name the model whose tokens"):
        recorded.pieces(config_of(tmp_path / "layers.1"))


@needs_shared
def test_real_recordings() -> None:
    records, bad = read_all(config_of(SHARED / "recorded" / "saedashboard-gpt2"))
    assert not bad
    assert {(r.layer, r.neuron) for r in records} == {(0, n) for n in range(4)}
    assert packed(records) == sum(len(r.texts) for r in records) > 50
    [record], bad = read_all(config_of(SHARED / "recorded" / "openai-neuron-explainer", "openai"))[0], []
    assert (record.layer, record.neuron, len(record.texts)) == (1, 1, 200)
    assert packed([record]) == 200
    assert record.statistics["kurtosis"] == 195.6007


REAL = {
    # Units that fire and that do not, format, files, and what the recording's own header says.
    "saedashboard-gpt2": ({(0, 0), (0, 2), (0, 3)}, {(0, 1)}, "saedashboard", 2, {}),
    "openai-neuron-explainer": ({(1, 1)}, set(), "openai", 1, {"kurtosis": 195.6007}),
}


@needs_shared
@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_real_recordings_through_check_and_the_read_stage(name: str, tmp_path: Path, command: Command) -> None:
    units, dead, format, files, header = REAL[name]
    tree = {
        "subject": {"model": "none"}, "identify": {"vectors": "unused.bin"},
        "exemplars": {"source": "recorded", "recorded": {"path": str(SHARED / "recorded" / name)}},
        "run": {"out": str(tmp_path / "run"), "address": "inline", "stages": ["read"]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    code, out, err = command("check", tmp_path / "run.yaml", "--json")
    said = json.loads(out)
    assert (code, said["format"], said["files"], said["requests"], said["decoys"]) == (0, format, files, 0, 0), err
    code, _, err = command("run", tmp_path / "run.yaml")
    assert code == 0, err
    run = RunDir(str(tmp_path / "run"))
    assert run.table("failures").num_rows == 0
    rows = run.table("exemplars").to_pylist()
    assert {(row["layer"], row["neuron"]) for row in rows} == units
    tops = [row for row in rows if row["sampling"] == "top"]
    assert len(tops) >= 25 * len(units)
    for row in rows:
        assert len(row["tokens"]) == len(row["activations"]) == len(row["token_ids"])
        assert row["activations"][row["position"]] == row["activation"] and row["tokens"][row["position"]] not in SPECIAL
        plain = [a for t, a in zip(row["tokens"], row["activations"], strict=True) if t not in SPECIAL]
        assert row["activation"] == max(plain)
    records, _ = read_all(build_config(tree))
    largest = {(r.layer, r.neuron): max(max(t.activations) for t in r.texts if t.sampling == "top") for r in records}
    statistics = run.table("statistics").to_pylist()
    assert {(row["layer"], row["neuron"]) for row in statistics} == units | dead
    for row in statistics:
        if (row["layer"], row["neuron"]) in dead:
            assert row["dead"] and row["max"] == 0 and row["top_mean"] is None
            continue
        best = max(r["activation"] for r in tops if (r["layer"], r["neuron"]) == (row["layer"], row["neuron"]))
        assert row["max"] == pytest.approx(largest[row["layer"], row["neuron"]]) == pytest.approx(best)
        assert all(row[key] == pytest.approx(value) for key, value in header.items())


@needs_shared
@pytest.mark.shared
@pytest.mark.parametrize("name", ["n2g-max-activations", "feature-circuits-annotations", "openai-neuron-explainer/puzzles.json"])
def test_what_lies_beside_them_is_no_recording_and_is_refused_or_listed(name: str, tmp_path: Path, command: Command) -> None:
    """Maxima, labels and puzzles: no text of a unit with its activations."""
    tree = {
        "subject": {"model": "none"}, "exemplars": {"source": "recorded", "recorded": {"path": str(SHARED / "recorded" / name)}},
        "run": {"out": str(tmp_path / "run"), "address": "inline", "stages": ["read"]}, "identify": {"vectors": "unused.bin"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    code, _, err = command("run", tmp_path / "run.yaml")
    assert code == 2 and "exemplars.recorded" in err.strip().splitlines()[-1] and "Traceback" not in err

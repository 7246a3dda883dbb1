"""Neuronpedia: the bulk export from a folder and from a server, the feature API, and labels that come along."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylabel.config import RunConfig, build_config
from raylabel.engine.pipeline import run_pipeline
from raylabel.errors import BadInput
from raylabel.sources import neuronpedia
from raylabel.sources.records import Bad, Record
from raylabel.stages.check import estimate
from raylabel.stages.read import imported_labels
from raylabel.store.rundir import RunDir
from tests.sources.recorded_files import mutations, packed, series

WORDS = ["red", "green", "blue", "fox", "dog", "cat", "house", "garden", "river", "stone"]
SOURCE = "6-res-jb"


def activation(words: list[str], at: int, value: float) -> dict[str, Any]:
    values = [0.0] * len(words)
    values[at] = value
    tokens = [words[0], *(f" {w}" for w in words[1:])]
    return {
        "tokens": tokens, "values": values, "maxValue": value, "maxValueTokenIndex": at, "binContains": -1, "dfaValues": [],
    }  # fmt: skip


def feature_of(index: int) -> dict[str, Any]:
    """What the API says of a feature; every one fires on its own word."""
    texts = []
    for n in range(12):
        words = [WORDS[(index + n * k) % 10] for k in range(1, 6)] + [WORDS[index % 10], f"end{n}"]
        texts.append(activation(words, 5, 3.0 - n / 10))
    return {
        "modelId": "gpt2-small", "layer": SOURCE, "index": str(index), "frac_nonzero": 0.01, "pos_str": [" up"],
        "pos_values": [2.0], "neg_str": [], "neg_values": [], "activations": texts, "vector": [0.1] * 8,
        "explanations": [{"id": "x", "description": f"words like {WORDS[index % 10]}", "typeName": "oai_token-act-pair"}],
    }  # fmt: skip


def export(base: Path, features: range, batch: int = 3) -> Path:
    """The bulk export of some features."""
    for number, at in enumerate(range(features.start, features.stop, batch)):
        rows: dict[str, list[dict[str, Any]]] = {"features": [], "activations": [], "explanations": []}
        for index in range(at, min(at + batch, features.stop)):
            page = feature_of(index)
            key = {"modelId": page["modelId"], "layer": page["layer"], "index": page["index"] if index % 2 else index}
            columns = ("frac_nonzero", "pos_str", "pos_values", "neg_str", "neg_values")
            rows["features"].append({**key, **{k: page[k] for k in columns}})
            rows["activations"] += [{**key, **one} for one in page["activations"]]
            rows["explanations"] += [{**key, "embedding": "[0.1]", **one} for one in page["explanations"]]
        for kind, lines in rows.items():
            path = base / "v1" / "gpt2-small" / SOURCE / kind / f"batch-{number}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode(), mtime=0))
    return base


def config_of(url: str | Path, out: Path, **sections: Any) -> RunConfig:
    site = {"model": "gpt2-small", "sources": [SOURCE], "url": str(url), "requests_per_second": 200, "allow_private": True}
    site |= {"timeout": 10, "attempts": 2, **sections.pop("site", {})}
    return build_config({
        "subject": {"model": "none", **sections.pop("subject", {})},
        "exemplars": {"source": "neuronpedia", "neuronpedia": site, "top": 6}, "run": {"out": str(out), "address": "inline"},
        "optimize": {"evaluations": 4, "examples": 8, "rounds": 0, "restarts": 0},
    })  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """(URL, requests seen): the API of ten features, and the bulk export below /v1."""
    asked: list[tuple[str, str | None]] = []
    files = export(tmp_path / "served", range(7))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("x-api-key")))
            status, body = 404, b'{"error": "none"}'
            if self.path.startswith("/api/feature/gpt2-small/"):
                index = int(self.path.rsplit("/", 1)[1])
                if index == 4:
                    status, body = 200, b"<html>"
                elif index < 10:
                    status, body = 200, json.dumps(feature_of(index)).encode()
            elif self.path.startswith("/v1/") and (files / self.path[1:]).is_file():
                status, body = 200, (files / self.path[1:]).read_bytes()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", asked
    http.shutdown()
    http.server_close()
    thread.join()


def everything(config: RunConfig) -> list[Record | Bad]:
    pieces = json.loads(json.dumps(neuronpedia.pieces(config)))
    return [item for piece in pieces for item in neuronpedia.records(config, piece)]


def merged(items: list[Record | Bad]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for item in items:
        assert isinstance(item, Record) and item.layer == 6
        own = found.setdefault(item.neuron, ([], {}, []))
        own[0].extend((tuple(t.tokens or ()), tuple(t.activations), t.peak, t.sampling) for t in item.texts)
        own[1].update(item.statistics)
        own[2].extend(item.labels)
    return found


def test_the_export_and_the_api_hold_the_same(server: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = server
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "secret-key")
    folder = merged(everything(config_of(export(tmp_path / "bulk", range(4)), tmp_path / "a")))
    config = config_of(url, tmp_path / "b", subject={"neurons": [0, 4]})
    [piece] = neuronpedia.downloads(config)
    assert neuronpedia.fetch(config, piece)["pages"] == 4
    assert merged(everything(config)) == folder
    assert {key for path, key in asked if path.startswith("/api")} == {"secret-key"}
    before = len(asked)
    assert neuronpedia.fetch(config, piece)["cached"] == 4
    assert len(asked) == before
    assert b"secret-key" not in b"".join(p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file())


def test_a_run_over_the_export_at_a_url(server: tuple[str, Any], tmp_path: Path) -> None:
    url, asked = server
    report = run_pipeline(config_of(f"{url}/v1", tmp_path / "run"))
    run = RunDir(str(tmp_path / "run"))
    assert report.failures == 0 and "fetch" in report.stages
    rows = run.table("results").to_pylist()
    assert [(row["layer"], row["neuron"]) for row in rows] == [(6, n) for n in range(7)]
    assert all(WORDS[row["neuron"]] in row["label"] for row in rows)
    labels = imported_labels(run, 6).to_pylist()
    assert [(la["neuron"], la["label"], la["explainer"]) for la in labels] == [
        (n, f"words like {WORDS[n]}", "neuronpedia") for n in range(7)
    ]
    assert all(key is None for _, key in asked)
    assert run.table("statistics").to_pylist()[0]["logits_up"] == [{"token": " up", "value": 2.0}]


def test_features_that_cannot_be_had_or_read_are_failures(server: tuple[str, Any], tmp_path: Path) -> None:
    report = run_pipeline(config_of(server[0], tmp_path / "run", subject={"neurons": [3, 12]}))
    run = RunDir(str(tmp_path / "run"))
    assert report.failures == 3
    failures = {row["neuron"]: row["reason"] for row in run.table("failures").to_pylist()}
    assert set(failures) == {4, 10, 11}
    assert "not valid JSON" in failures[4] and "404" in failures[10]
    rows = {row["neuron"]: row["status"] for row in run.table("results").to_pylist()}
    assert rows == {n: "failed" if n in failures else "ok" for n in range(3, 12)}


def test_rows_about_something_else_are_refused(tmp_path: Path) -> None:
    base = export(tmp_path, range(2))
    path = base / "v1" / "gpt2-small" / SOURCE / "activations" / "batch-0.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    row = json.loads(lines[0])
    wrong = [{**row, "modelId": "gpt2-xl"}, {**row, "layer": "7-res-jb"}, {**row, "index": "x1"}, {**row, "values": [1.0]}]
    path.write_bytes(gzip.compress("\n".join([*map(json.dumps, wrong[:3]), "{", lines[1]]).encode()))
    found = everything(config_of(tmp_path, tmp_path / "run"))
    bad = [item.reason for item in found if isinstance(item, Bad)]
    assert [reason.split(", ")[1].split(":")[0] for reason in bad] == ["line 1", "line 2", "line 3", "line 4"]
    assert "gpt2-xl" in bad[0] and "7-res-jb" in bad[1] and "x1" in bad[2]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), packed_too=st.booleans())
def test_a_broken_export_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: Any, packed_too: bool) -> None:
    base = export(tmp_path_factory.mktemp("np"), range(2))
    kind = data.draw(st.sampled_from(neuronpedia.KINDS))
    path = base / "v1" / "gpt2-small" / SOURCE / kind / "batch-0.jsonl.gz"
    if packed_too:
        path.write_bytes(data.draw(mutations(path.read_bytes())))
    else:
        path.write_bytes(gzip.compress(data.draw(mutations(gzip.decompress(path.read_bytes())))))
    found = everything(config_of(base, base / "run"))
    packed([item for item in found if isinstance(item, Record)])


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(series, min_size=1, max_size=5))
def test_texts_survive_the_export(tmp_path_factory: pytest.TempPathFactory, texts: list[Any]) -> None:
    base = export(tmp_path_factory.mktemp("np"), range(1))
    path = base / "v1" / "gpt2-small" / SOURCE / "activations" / "batch-0.jsonl.gz"
    rows = [{"index": 0, "tokens": t, "values": a, "binContains": 0.1} for t, a in texts]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = merged(everything(config_of(base, base / "run")))[0][0]
    assert found == [(tuple(t), tuple(a), None, "quantile") for t, a in texts]


def answered(base: Path, body: bytes) -> list[Record | Bad]:
    """What is read of the API's answer about feature 0."""
    config = config_of("https://np.example", base / "run", subject={"neurons": [0, 1]})
    url = f"https://np.example/api/feature/gpt2-small/{SOURCE}/0"
    neuronpedia.kept_pages(config).keep(url, body, {})
    return everything(config)


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(series, min_size=1, max_size=5), said=st.lists(st.text(max_size=20), max_size=3))
def test_texts_survive_the_api(tmp_path_factory: pytest.TempPathFactory, texts: list[Any], said: list[str]) -> None:
    page = feature_of(0) | {
        "activations": [
            {"tokens": t, "values": a, "maxValueTokenIndex": a.index(max(a)), "binContains": -1, "dfaValues": None}
            for t, a in texts
        ],
        "explanations": [{"description": text, "scores": []} for text in said],
    }  # fmt: skip
    [record] = answered(tmp_path_factory.mktemp("np"), json.dumps(page).encode())
    assert isinstance(record, Record) and (record.layer, record.neuron) == (6, 0)
    found = [(t.tokens, t.activations, t.peak, t.sampling) for t in record.texts]
    assert found == [(t, a, a.index(max(a)), "top") for t, a in texts]
    assert [label.label for label in record.labels] == [" ".join(text.split()) for text in said if text.strip()]
    assert record.statistics["logits_up"] == [(" up", 2.0)]
    packed([record])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_broken_answer_is_one_failure_or_the_feature_that_was_asked_for(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    whole = feature_of(0)
    whole["activations"] = whole["activations"][:2]
    [found] = answered(tmp_path_factory.mktemp("np"), data.draw(mutations(json.dumps(whole).encode())))
    assert (found.layer, found.neuron) == (6, 0)
    if isinstance(found, Record):
        assert len(found.texts) <= 2 + 8
        packed([found])
    else:
        assert f"/api/feature/gpt2-small/{SOURCE}/0: " in found.reason


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_broken_batch_that_was_fetched_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    base = tmp_path_factory.mktemp("np")
    config = config_of("https://np.example/v1", base / "run")
    for kind in neuronpedia.KINDS:
        body = (export(base, range(2)) / "v1" / "gpt2-small" / SOURCE / kind / "batch-0.jsonl.gz").read_bytes()
        changed = data.draw(mutations(body))
        neuronpedia.kept_pages(config).keep(f"https://np.example/v1/gpt2-small/{SOURCE}/{kind}/batch-0.jsonl.gz", changed, {})
    packed([item for item in everything(config) if isinstance(item, Record)])


def test_a_line_without_an_end_is_a_failure_and_not_all_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylabel.sources.reading.LONGEST_LINE", 10_000)
    config = config_of("https://np.example/v1", tmp_path / "run")
    url = f"https://np.example/v1/gpt2-small/{SOURCE}/activations/batch-0.jsonl.gz"
    neuronpedia.kept_pages(config).keep(url, gzip.compress(b"x" * 1_000_000), {})
    reasons = [item.reason for item in everything(config) if isinstance(item, Bad)]
    assert any("activations/batch-0, after line 0: line 1 is longer than 10000 bytes" in reason for reason in reasons)


def test_what_is_missing_or_wrong_in_the_settings_is_said(tmp_path: Path) -> None:
    for site, subject, word in (
        ({"sources": []}, {}, "sources is required"),
        ({"model": None}, {}, "model is required"),
        ({"sources": ["res-jb"]}, {}, "no source id"),
        ({"sources": ["6-a", "6-b"]}, {}, "of one layer"),
        ({"url": "ftp://x"}, {}, "expected a folder or http"),
        ({"url": "https://user:pass@x"}, {}, "holds a user name or password"),
        ({"url": str(tmp_path / "none")}, {}, "no such folder"),
        ({"url": str(tmp_path)}, {}, "no folder"),
        ({"url": "https://np.example"}, {}, "asked feature by feature"),
        ({"model": "../etc"}, {}, "no name of a model"),
    ):
        with pytest.raises(BadInput, match=word):
            neuronpedia.pieces(config_of("https://np.example", tmp_path / "run", site=site, subject=subject))


def test_check_counts_requests_and_asks_for_nothing(server: tuple[str, Any], tmp_path: Path) -> None:
    found = estimate(config_of(server[0], tmp_path / "run", subject={"neurons": [0, 500]}, site={"requests_per_second": 10}))
    assert found["requests"] == 500 and 50 <= found["fetch seconds"] <= 60 and found["bytes about"] > 10**8
    found = estimate(config_of(export(tmp_path / "bulk", range(4)), tmp_path / "run"))
    assert found["files"] == 6 and found["requests"] == 0
    assert not server[1] and not (tmp_path / "run").exists()

"""Other people's labels in their own formats; what is wrong is named by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylabel.errors import BadInput
from raylabel.sources.labels import MOST, Given, read_labels
from tests.shared import SHARED, needs_shared
from tests.sources.recorded_files import mutations


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_json_lines_with_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(lines(
        {"layer": 0, "neuron": 3, "label": " words\nabout  birds "}, "{not json", {"layer": 1, "index": "7", "description": "x"},
        {"layer": 1, "neuron": 2}, {"layer": 1, "neuron": "two", "label": "x"}, {"layer": 1, "neuron": 2, "label": "  "}, "",
        {"layer": 1, "neuron": 2, "label": "y" * (MOST + 1)}, [1],
        {"Layer": 2.0, "Feature": "5", "Annotation": "z", "polarity": -1},
        {"layer": True, "neuron": 2, "label": "x"}, {"layer": 1, "neuron": 2, "label": "x", "polarity": 3},
    ))  # fmt: skip
    found, wrong = read_labels(str(path))
    name = path.name
    assert found == [
        Given(0, 3, 1, "words about birds", f"{name}, line 1"), Given(1, 7, 1, "x", f"{name}, line 3"),
        Given(2, 5, -1, "z", f"{name}, line 10"),
    ]  # fmt: skip
    assert [(w.place.split("line ")[1], w.reason) for w in wrong] == [
        ("2", "not JSON"), ("4", "no key `label`"), ("5", "`neuron` is no such number"), ("6", "the label is empty"),
        ("8", "the label has 501 characters, more than 500"), ("9", "not an object of keys and values"),
        ("11", "`layer` is no such number"), ("12", "`polarity` is no such number"),
    ]  # fmt: skip


def test_neuronpedias_bulk_explanations(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2-small" / "6-res-jb" / "explanations"
    folder.mkdir(parents=True)
    row = {"id": "c", "modelId": "gpt2-small", "layer": "6-res-jb", "index": "12", "description": "dates", "embedding": "[0.1]"}
    for n in (2, 10):
        data = lines({**row, "index": str(n)}, {**row, "index": n, "typeName": "np_max-act"}).encode()
        (folder / f"batch-{n}.jsonl.gz").write_bytes(gzip.compress(data))
    found, wrong = read_labels(str(tmp_path))
    assert [(g.layer, g.neuron, g.label) for g in found] == [(6, 2, "dates")] * 2 + [(6, 10, "dates")] * 2 and not wrong
    assert read_labels(str(folder / "batch-2.jsonl.gz"))[0][0].place == "batch-2.jsonl.gz, line 1"
    (folder / "batch-3.jsonl.gz").write_bytes(gzip.compress(data)[:-9])
    assert [w.place.rpartition("/")[2] for w in read_labels(str(tmp_path))[1]] == ["batch-3.jsonl.gz"]


def test_delphis_explanation_files(tmp_path: Path) -> None:
    (tmp_path / "layers.5.mlp_latent12.txt").write_text(json.dumps("names of “birds”"))
    (tmp_path / "model.layers.11_latent3.txt").write_text("plain text")
    (tmp_path / "notes.txt").write_text("x")
    found, wrong = read_labels(str(tmp_path))
    assert [(g.layer, g.neuron, g.label) for g in found] == [(5, 12, "names of “birds”"), (11, 3, "plain text")]
    assert [(w.place, w.reason) for w in wrong] == [("notes.txt", "not named HOOKPOINT_latentN.txt")]


def test_openais_explanations(tmp_path: Path) -> None:
    row = {
        "neuron_id": {"layer_index": 1, "neuron_index": 40, "dataclass_name": "NeuronId"},
        "scored_explanations": [{"explanation": "years", "scored_simulation": {}}, {"explanation": ""}],
    }
    place = tmp_path / "1"
    place.mkdir()
    (place / "40.jsonl").write_text(json.dumps(row))
    found, wrong = read_labels(str(tmp_path))
    assert [(g.layer, g.neuron, g.label) for g in found] == [(1, 40, "years")]
    assert [w.reason for w in wrong] == ["the label is empty"]


WRITTEN = st.tuples(st.integers(0, 99), st.integers(0, 10**8), st.text(max_size=30)).filter(lambda row: row[2].strip())


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(WRITTEN, min_size=1, max_size=5), kind=st.sampled_from(["jsonl", "json", "neuronpedia", "delphi", "openai"]))
def test_labels_come_back_from_every_format(rows: list[tuple[int, int, str]], kind: str) -> None:
    with TemporaryDirectory() as name:
        found, wrong = read_labels(str(written(rows, kind, Path(name))))
    wanted = [(la, n, " ".join(text.split())) for la, n, text in rows]
    assert not wrong and sorted((g.layer, g.neuron, g.label) for g in found) == sorted(wanted)


def written(rows: list[tuple[int, int, str]], kind: str, folder: Path) -> Path:
    """Labels as their makers write them: a file or a folder."""
    if kind in ("jsonl", "json"):
        trees = [{"layer": la, "neuron": n, "label": text} for la, n, text in rows]
        (folder / f"x.{kind}").write_text(lines(*trees) if kind == "jsonl" else json.dumps(trees))
        return folder / f"x.{kind}"
    for i, (la, n, text) in enumerate(rows):
        if kind == "neuronpedia":
            row = {"modelId": "m", "layer": f"{la}-res-jb", "index": str(n), "description": text}
            (folder / f"batch-{i}.jsonl.gz").write_bytes(gzip.compress(lines(row).encode()))
        elif kind == "delphi":
            (folder / str(i)).mkdir()
            (folder / str(i) / f"layers.{la}.mlp_latent{n}.txt").write_text(json.dumps(text))
        else:
            row = {"neuron_id": {"layer_index": la, "neuron_index": n}, "scored_explanations": [{"explanation": text}]}
            (folder / f"{i}.jsonl").write_text(lines(row))
    return folder


@settings(max_examples=80, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["jsonl", "json", "neuronpedia", "delphi", "openai"]))
def test_broken_files_of_labels_never_crash_and_what_is_read_can_be_stored(data: st.DataObject, kind: str) -> None:
    with TemporaryDirectory() as name:
        place = written([(1, 2, "names of birds"), (3, 4, "“years” 😀")], kind, Path(name))
        file = place if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())[0]
        file.write_bytes(data.draw(mutations(file.read_bytes())))
        try:
            found, _ = read_labels(str(place))
        except BadInput:
            return
    for one in found:
        assert abs(one.layer) < 2**31 and abs(one.neuron) < 2**31 and one.polarity in (1, -1, 2, -2)
        assert 0 < len(one.label) <= MOST
        one.label.encode()


def test_numbers_and_texts_that_nothing_can_hold_are_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"layer": 1e300, "neuron": 1}, {"layer": "9" * 5000, "neuron": 1}, {"layer": 1, "neuron": "7" * 5000}]
    path.write_text(lines(*({**row, "label": "x"} for row in rows), '{"layer": 1, "neuron": 2, "label": "\\ud800 birds"}'))
    found, wrong = read_labels(str(path))
    assert [(g.layer, g.neuron, g.label) for g in found] == [(1, 2, "\ufffd birds")] and len(wrong) == 3
    (tmp_path / f"layers.{'9' * 50}_latent1.txt").write_text("x")
    assert len(read_labels(str(tmp_path))[1]) == 4


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"layer": 0}\n', "\x00\x01"])
def test_a_file_without_labels_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"^--labels .*x.jsonl: no label in it"):
        read_labels(str(path))
    with pytest.raises(BadInput, match=r"^--labels .*nothing: no such file or folder"):
        read_labels(str(tmp_path / "nothing"))


@needs_shared
def test_labels_that_people_wrote() -> None:
    path = SHARED / "recorded" / "feature-circuits-annotations" / "pythia-70m-deduped.jsonl"
    found, wrong = read_labels(str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    whole = [r for r in rows if str(r.get("Layer", "")).isdigit() and (r.get("Annotation") or "").strip()]
    assert len(found) == len(whole) and len(found) + len(wrong) == len(rows)
    assert (found[0].layer, found[0].neuron, found[0].label) == (5, 3036, "promotes singular verb forms")

"""Corpora of every kind give their documents in order, and what is wrong with one is said with its place."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raylabel.errors import BadInput
from raylabel.sources import corpus
from raylabel.sources.corpus import DOCUMENT_CHARACTERS, chunks, cut_text, documents


def read(path: Path | str, column: str = "text") -> list[str]:
    """All documents of a corpus."""
    return [text for chunk in chunks(str(path), column) for text in documents(chunk, column)]


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# kinds


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert read(file(tmp_path, "a.txt", "One.\n\nTwo, ünï. 🙂\n")) == ["One.\n\nTwo, ünï. 🙂\n"]


def test_marks_and_form_feeds_divide_a_text_file(tmp_path: Path) -> None:
    marked = "One.<|endoftext|>Two.\n<|endoftext|>\n \n<|endoftext|>Three."
    assert read(file(tmp_path, "a.txt", marked)) == ["One.", "Two.\n", "Three."]
    assert read(file(tmp_path, "b.txt", "One.\fTwo.\f\fThree.")) == ["One.", "Two.", "Three."]


def test_a_long_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "word " * 100 + "\n\n" for i in range(40)]
    found = read(file(tmp_path, "a.txt", "".join(paragraphs)))
    assert "".join(found) == "".join(paragraphs)
    assert len(found) > 4
    for text in found[:-1]:
        assert text.startswith("Paragraph")
        assert text.endswith("\n\n")
        assert DOCUMENT_CHARACTERS <= len(text) < DOCUMENT_CHARACTERS + 600


pieces = st.lists(
    st.sampled_from(["\n\n", "\n \t\n", "\n", "\r\n\r\n", " ", "x" * 900, "y" * 3999, "é", "🙂" * 50, "."]), max_size=60
)


@settings(deadline=None, max_examples=300)
@given(pieces)
@example(["x" * 900] * 5 + ["\n\n", " "])
def test_cutting_loses_no_character(parts: list[str]) -> None:
    text = "".join(parts)
    found = cut_text(text)
    # Only what is white space to its end may go.
    assert text.startswith("".join(found))
    assert not text[len("".join(found)) :].strip()
    assert all(part.strip() for part in found)


def test_white_space_at_the_end_of_a_long_file_stays_with_the_last_document() -> None:
    text = ("x" * 5000 + "\n\n") * 2 + "\n" * 3
    assert "".join(cut_text(text)) == text


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read(file(tmp_path, "a.txt", b"\xef\xbb\xbfOne.")) == ["One."]
    assert read(file(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "One."}')) == ["One."]


def test_json_lines_hold_objects_or_strings(tmp_path: Path) -> None:
    lines = '{"text": "One.\\nTwo."}\n\n"Three."\r\n{"text": "\\u2028", "id": 4}\n{"text": ""}\n'
    assert read(file(tmp_path, "a.jsonl", lines)) == ["One.\nTwo.", "Three.", "\u2028", ""]


def test_a_line_separator_within_a_text_ends_no_json_line(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c"
    assert read(file(tmp_path, "a.jsonl", json.dumps({"text": text}, ensure_ascii=False))) == [text]


def test_json_holds_a_list_of_strings_or_of_objects_or_one_under_the_key(tmp_path: Path) -> None:
    assert read(file(tmp_path, "a.json", '["One.", "Two."]')) == ["One.", "Two."]
    assert read(file(tmp_path, "b.json", '[{"text": "One."}, {"text": "Two."}]')) == ["One.", "Two."]
    assert read(file(tmp_path, "c.json", '{"text": ["One.", "Two."]}')) == ["One.", "Two."]
    assert read(file(tmp_path, "d.json", '[{"body": "One."}]'), "body") == ["One."]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_parquet_gives_its_column_in_row_order(tmp_path: Path, kind: pa.DataType) -> None:
    values = [f"Row {i}." for i in range(30)]
    table = pa.table({"id": list(range(30)), "body": pa.array(values).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert read(tmp_path / "a.parquet", "body") == values


def test_a_null_in_parquet_is_an_empty_document(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["One.", None, "Two."]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["One.", "", "Two."]


def test_a_folder_is_read_in_path_order_and_other_files_are_left(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": "B.", "a/z.txt": "AZ.", "a/k.jsonl": '"AK1."\n"AK2."', "c.json": '["C."]', "notes.md": "no", "a/x.csv": "no",
    }.items():  # fmt: skip
        file(tmp_path, name, content)
    pq.write_table(pa.table({"text": ["P."]}), tmp_path / "aa.parquet")
    assert read(tmp_path) == ["AK1.", "AK2.", "AZ.", "P.", "B.", "C."]


def test_the_pieces_of_a_folder_do_not_change_its_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(9):
        file(tmp_path, f"{i}.txt", f"Document {i}.")
    whole = read(tmp_path)
    assert len(chunks(str(tmp_path), "text")) == 1
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 30)
    assert len(chunks(str(tmp_path), "text")) > 3
    assert read(tmp_path) == whole == [f"Document {i}." for i in range(9)]


def test_a_changed_file_makes_another_piece(tmp_path: Path) -> None:
    path = file(tmp_path, "a.txt", "One.")
    before = chunks(str(path), "text")
    assert chunks(str(path), "text") == before
    path.write_text("Two.")
    os.utime(path, ns=(1, 1))
    assert chunks(str(path), "text") != before
    assert json.loads(json.dumps(before)) == before


def test_a_saved_datasets_folder_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["One.", "Two.", "Three."]})
    rows.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"test": rows.select([2]), "train": rows.select([0, 1])}).save_to_disk(str(tmp_path / "split"))
    assert read(tmp_path / "plain") == ["One.", "Two.", "Three."]
    assert read(tmp_path / "split") == ["One.", "Two."]
    with pytest.raises(BadInput, match=r"row 1: no text under 'body'; name the key with exemplars.corpus.column"):
        read(tmp_path / "plain", "body")
    before = chunks(str(tmp_path / "plain"), "text")
    datasets.Dataset.from_dict({"text": ["Other."]}).save_to_disk(str(tmp_path / "plain"))
    assert chunks(str(tmp_path / "plain"), "text") != before


def test_a_name_that_is_no_path_is_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert chunks("some/name", "text") == [{"kind": "hub", "path": "some/name"}]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"'txet' is no file or folder; .* needs `pip install raylabel\[datasets\]`"):
        read("txet")


def test_a_broken_datasets_folder_is_said_to_be_one(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file(tmp_path, "saved/state.json", "{}")
    with pytest.raises(BadInput, match=r"saved' is a folder saved by `datasets`; it cannot be loaded"):
        read(tmp_path / "saved")


def test_the_standard_library_is_a_corpus() -> None:
    [chunk] = chunks("stdlib", "text")
    assert chunk == {"kind": "stdlib", "python": sys.version.split()[0]}
    found = documents(chunk, "text")
    assert all(next(found).strip() for _ in range(100))


# what is wrong


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"ok \xff\xfe", r"a\.txt: not UTF-8 text \(byte 3\); convert it to UTF-8"),
        ("a.txt", "One.".encode("utf-16"), r"a\.txt: not UTF-8 text \(byte 0\)"),
        ("a.jsonl", b'{"text": "\xe9"}', r"a\.jsonl: not UTF-8 text"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n\n{"body": "b"}\n', r"a\.jsonl, line 4: no text under 'text'"),
        ("a.jsonl", '{"text": 5}', r"a\.jsonl, line 1: no text under 'text'; name the key with exemplars\.corpus\.column"),
        ("a.jsonl", '{"text": "\\ud83d"}', r"a\.jsonl, line 1: an escape names half a character"),
        ("a.json", "[", r"a\.json: not valid JSON"),
        ("a.json", '{"body": []}', r"a\.json: expected a JSON list"),
        ("a.json", '"text"', r"a\.json: expected a JSON list"),
        ("a.json", '["a", 3]', r"a\.json, row 2: no text under 'text'"),
        ("a.parquet", b"PAR1 not", r"a\.parquet: not a parquet file"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path: Path, name: str, content: str | bytes, complaint: str) -> None:
    path = file(tmp_path, name, content)
    with pytest.raises(BadInput, match=complaint) as error:
        read(path)
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match=complaint):
        read(tmp_path)


def test_a_parquet_file_without_the_column_or_with_numbers_in_it(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a\.parquet: no column 'text'; name it with exemplars\.corpus\.column"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(BadInput, match=r"b\.parquet, row 1: no text under 'text'"):
        read(tmp_path / "b.parquet")


def test_a_parquet_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [os.urandom(50).hex() for _ in range(5000)]}), path, row_group_size=100)
    data = bytearray(path.read_bytes())
    data[1000:100_000] = bytes(99_000)
    path.write_bytes(data)
    with pytest.raises(BadInput, match=r"a\.parquet"):
        read(path)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("missing.txt", "no such file or folder: missing.txt"),
        ("./missing", r"no such file or folder: \./missing"),
        ("/no/such/folder", "no such file or folder: /no/such/folder"),
        ("a.pdf", r"a\.pdf is none of \.txt \.jsonl \.json \.parquet"),
        ("empty", r"no \.txt \.jsonl \.json \.parquet file in empty"),
    ],
)
def test_a_path_that_holds_no_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(BadInput, match=f"exemplars.corpus.path: {complaint}"):
        chunks(path, "text")

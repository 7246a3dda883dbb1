"""The built-in corpus is the same on every reading, is free of licence headers, and survives odd installations."""

from __future__ import annotations

import itertools
import re
import statistics
from pathlib import Path

import pytest

from raylabel.demo import stdlib


@pytest.fixture(scope="module")
def corpus() -> list[tuple[str, str]]:
    found = list(stdlib.documents())
    if not found:
        pytest.skip("this Python carries no standard library source")
    return found


def test_the_same_documents_every_time(corpus: list[tuple[str, str]]) -> None:
    assert list(itertools.islice(stdlib.documents(), len(corpus) // 8)) == corpus[: len(corpus) // 8]


def test_names_are_unique_and_texts_not_empty(corpus: list[tuple[str, str]]) -> None:
    names = [name for name, _ in corpus]
    assert len(set(names)) == len(names)
    assert all(text.strip() and text == text.strip("\n") for _, text in corpus)


def test_size_of_the_corpus_and_of_its_documents(corpus: list[tuple[str, str]]) -> None:
    if len(corpus) < 2_000:
        pytest.skip("a stripped installation")
    assert 5e6 < sum(len(text) for _, text in corpus) < 2e7
    assert 1_500 < statistics.median(len(text) for _, text in corpus) < 3_000


def test_no_licence_headers_and_no_editor_lines(corpus: list[tuple[str, str]]) -> None:
    header = re.compile(r"copyright \(c\)|all rights reserved|permission to use, copy|^# -\*- coding", re.I | re.M)
    assert [name for name, text in corpus if header.search(text)] == []


def test_no_tests_tables_or_installed_packages(corpus: list[tuple[str, str]]) -> None:
    parts = {part for name, _ in corpus for part in name.split(":")[0].split("/")}
    assert not parts & {"test", "tests", "idle_test", "encodings", "site-packages", "ensurepip", "turtledemo"}
    assert not any(name.startswith(("_sysconfigdata", "html/entities", "stringprep")) for name, _ in corpus)


def test_split_depends_on_the_text_alone(corpus: list[tuple[str, str]]) -> None:
    held_out = [text for _, text in corpus if stdlib.split(text) == "held-out"]
    assert 0.03 < len(held_out) / len(corpus) < 0.07
    assert all(stdlib.split(text) == "held-out" for text in reversed(held_out))
    assert stdlib.split("raylabel") == "train"
    assert stdlib.split("anything", held_out=1.0) == "held-out"


def test_a_module_is_cut_along_its_definitions(tmp_path: Path) -> None:
    functions = [f"# about {k}\n@decorated\ndef f{k}():\n    return {'x' * 900!r}\n" for k in range(5)]
    (tmp_path / "module.py").write_text("# Copyright (C) someone\n# more of it\n\n" + "\n".join(functions))
    found = list(stdlib.documents(tmp_path))
    assert len(found) == 2
    assert all(text.startswith("# about") for _, text in found)
    assert "\n\n".join(text for _, text in found) == "\n".join(functions).strip("\n")


def test_a_large_class_is_cut_at_its_methods(tmp_path: Path) -> None:
    methods = [f"    def m{k}(self):\n        return {'x' * 2_000!r}\n" for k in range(3)]
    (tmp_path / "module.py").write_text("class C:\n    'Doc.'\n\n" + "\n".join(methods))
    found = [text for _, text in stdlib.documents(tmp_path)]
    assert [text.lstrip().split("(")[0] for text in found] == ["class C:\n    'Doc.'\n\n    def m0", "def m1", "def m2"]


def test_odd_files_are_skipped_and_topics_are_read(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "comments.py").write_text("# nothing else\n")
    (tmp_path / "table.py").write_text("T = {\n" + "".join(f"    {k}: {k},\n" for k in range(1_000)) + "}\n")
    assert list(stdlib.documents(tmp_path)) == []
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'b': 'two\\n', 'a': 'one'}\n")
    assert list(stdlib.documents(tmp_path)) == [("topics/a", "one"), ("topics/b", "two")]

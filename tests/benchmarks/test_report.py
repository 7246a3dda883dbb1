"""The table in README.md: what is refreshed, what stays, what is refused; and how rows read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.report import BEGIN, END, NoMarkers, Row, row_from_json, write_table


def row(what: str, value: float = 1.0, **more: object) -> Row:
    values = {"against": "b", "low": value, "high": value, "n": 1, "unit": "×", "how": "h", **more}
    return Row(what=what, value=value, **values)  # type: ignore[arg-type]


def readme(folder: Path, text: str) -> Path:
    path = folder / "README.md"
    path.write_bytes(text.encode())
    return path


def body(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().split("\n")[2:]


def test_everything_outside_the_markers_stays_byte_for_byte(tmp_path: Path) -> None:
    before, after = "# Title — é\r\n\ttab | pipe \n\n", "\n\n## After\n| a | table |\n|---|---|\n no newline at the end"
    path = readme(tmp_path, f"{before}{BEGIN}\nold words\n{END}{after}")
    write_table(path, [row("scan")], "today")
    written = path.read_bytes()
    assert written.startswith((before + BEGIN + "\n| what |").encode())
    assert written.endswith((" |\n" + END + after).encode())
    assert body(path) == ["| scan | b | 1 × |  |  | h | today |"]


def test_rows_not_measured_keep_their_line_and_place(tmp_path: Path) -> None:
    path = readme(tmp_path, f"{BEGIN}\n{END}\n")
    write_table(path, [row("one"), row("two"), row("three")], "monday")
    write_table(path, [row("four"), row("two", 2.0)], "tuesday")
    assert [line.split(" | ")[0] for line in body(path)] == ["| one", "| two", "| three", "| four"]
    assert [line.rsplit(" | ")[-1] for line in body(path)] == ["monday |", "tuesday |", "monday |", "tuesday |"]
    assert "2 ×" in body(path)[1]


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    path = readme(tmp_path, f"x\n{BEGIN}\n{END}\ny\n")
    rows = [row("with a | pipe"), row("and\na line end")]
    write_table(path, rows, "m | n")
    once = path.read_bytes()
    write_table(path, rows, "m | n")
    assert path.read_bytes() == once
    assert len(body(path)) == 2
    assert not [p for p in tmp_path.iterdir() if p != path]


def test_windows_line_ends_stay(tmp_path: Path) -> None:
    path = readme(tmp_path, f"x\r\n{BEGIN}\r\n{END}\r\n")
    write_table(path, [row("one")], "m")
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n")


@pytest.mark.parametrize("text", ["", "no table\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"])
def test_missing_markers_are_refused_and_the_file_is_left_alone(tmp_path: Path, text: str) -> None:
    path = readme(tmp_path, text)
    with pytest.raises(NoMarkers, match=r"README\.md must hold one line"):
        write_table(path, [row("one")], "m")
    assert path.read_bytes() == text.encode()


@pytest.mark.parametrize(
    ("value", "goal", "at_most", "within", "reached"),
    [
        (1.1, 1.1, True, 0.0, True),
        (1.2, 1.1, True, 0.0, False),
        (5.0, 5.0, False, 0.0, True),
        (4.9, 5.0, False, 0.0, False),
        (0.3, 0.0, True, 0.4, True),
        (0.5, 0.0, True, 0.4, False),
        (1.0, None, True, 0.0, None),
    ],
)
def test_goals(value: float, goal: float | None, at_most: bool, within: float, reached: bool | None) -> None:
    assert row("x", value, goal=goal, at_most=at_most, within=within).reached is reached


def test_rows_survive_json_and_read_well() -> None:
    first = row("x", 1.2345, goal=1.1, at_most=True, n=3, low=1.0, high=123456.0, more={"clock": "cpu"})
    assert row_from_json(first.to_json()) == first
    assert first.cells("m")[2:5] == ["1.23 × (1 to 123,456, n = 3)", "≤ 1.1 ×", "no"]
    assert row("x", 3e-05).cells("m")[2] == "3.0e-05 ×"

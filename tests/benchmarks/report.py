"""Rows of measurements: how they read, whether they reach their goal, and the table of them in README.md.

`write_table` replaces what stands between the two markers and nothing else. A row is known by its first cell: rows
measured now take the place of their earlier lines, all others keep theirs, each with its own date and machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
COLUMNS = ("what", "against", "figure", "goal", "reached", "how", "measured")
_CELLS = re.compile(r"(?<!\\)\|")


class NoMarkers(ValueError):
    """The file has no place for the table."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        what, against: the two things compared; `what` names the row for good and holds no size that may change.
        value, low, high: median of `n` measurements and their extremes.
        unit: of the value; `×` for ratios.
        goal: what the value should reach, None where nothing was promised.
        at_most: whether smaller is better.
        within: for a goal of 0, the value that the measurement cannot tell from it.
        how: model, sizes, clock.
        more: further figures, for the JSON file.
    """

    what: str
    against: str
    value: float
    low: float
    high: float
    n: int
    unit: str
    how: str
    goal: float | None = None
    at_most: bool = False
    within: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal + self.within if self.at_most else self.value >= self.goal

    def cells(self, measured: str) -> list[str]:
        """The row as texts, in the order of COLUMNS."""
        figure = f"{number(self.value)} {self.unit}"
        if self.n > 1:
            figure += f" ({number(self.low)} to {number(self.high)}, n = {self.n})"
        goal = "" if self.goal is None else f"{'≤' if self.at_most else '≥'} {number(self.goal)} {self.unit}"
        reached = {None: "", True: "yes", False: "no"}[self.reached]
        return [self.what, self.against, figure, goal, reached, self.how, measured]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "reached": self.reached}


def row_from_json(tree: dict[str, Any]) -> Row:
    """The row that `Row.to_json` gave."""
    return Row(**{name: value for name, value in tree.items() if name != "reached"})


def number(value: float) -> str:
    """Three significant digits, without an exponent where it can be helped."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = f"{value:.3g}"
        return f"{value:,.0f}" if "e" in digits or abs(value) >= 1000 else digits
    return f"{value:.1e}"


def place_of_table(text: str, path: Path) -> tuple[int, int]:
    """Where the table begins and ends in the text of a file; NoMarkers as for `write_table`."""
    begin, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or begin > end:
        raise NoMarkers(f"{path} must hold one line {BEGIN} and, below it, one line {END}")
    return begin + len(BEGIN), end


def write_table(path: Path, rows: Iterable[Row], measured: str) -> None:
    """Refreshes the table in the file; NoMarkers if there is not exactly one pair of markers, in their order."""
    text = path.read_bytes().decode("utf-8")
    begin, end = place_of_table(text, path)
    newline = "\r\n" if text[begin : begin + 2] == "\r\n" else "\n"
    lines = {_key(line): line for line in _rows(text[begin:end])}
    for row in rows:
        line = _line(row.cells(measured))
        lines[_key(line)] = line
    table = [_line(list(COLUMNS)), _line(["---"] * len(COLUMNS)), *lines.values()]
    whole = text[:begin] + newline + "".join(line + newline for line in table) + text[end:]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(whole.encode("utf-8"))
    os.replace(temporary, path)


def _rows(text: str) -> list[str]:
    """The lines of a table's body."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith("|")][2:]


def _key(line: str) -> str:
    return _CELLS.split(line)[1].strip()


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

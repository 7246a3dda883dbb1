"""Plots as inline SVG whose colours come from the page's style sheet, so that they follow light and dark.

A plot is made of an x and a y `Axis` and of marks in their units; every plot has a text alternative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42


@dataclass(frozen=True)
class Axis:
    """A linear scale from `low` to `high` with ticks at given values; `names` stand for the numbers where given."""

    low: float
    high: float
    title: str
    ticks: Sequence[float] = ()
    names: Sequence[str] = ()
    percent: bool = False

    def marks(self) -> list[tuple[float, str]]:
        """(value, text) of each tick."""
        values = list(self.ticks) or nice(self.low, self.high)
        texts = list(self.names) or [f"{v:.0%}" if self.percent else f"{v:g}" for v in values]
        return list(zip(values, texts, strict=True))


@dataclass(frozen=True)
class Plot:
    """A frame of two axes in which marks are placed."""

    x: Axis
    y: Axis
    label: str
    """What it shows, for those who do not see it."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT

    def px(self, value: float) -> float:
        """Pixels from the left of an x value, kept inside the frame."""
        share = (value - self.x.low) / ((self.x.high - self.x.low) or 1)
        return round(self.left + min(max(share, 0), 1) * (self.width - self.left - RIGHT), 1)

    def py(self, value: float) -> float:
        """Pixels from the top of a y value, kept inside the frame."""
        share = (value - self.y.low) / ((self.y.high - self.y.low) or 1)
        return round(self.height - BOTTOM - min(max(share, 0), 1) * (self.height - TOP - BOTTOM), 1)

    def svg(self, marks: Sequence[Markup]) -> Markup:
        """The plot with its marks."""
        parts = []
        for value, text in self.y.marks():
            y = self.py(value)
            parts.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(self.left, self.width - RIGHT, y, y)
            )
            parts.append(
                Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(self.left - 6, y + 4, text)
            )
        for value, text in self.x.marks():
            x, base = self.px(value), self.height - BOTTOM
            parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(x, base + 16, text))
        axis = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        parts.append(axis.format(self.left, self.width - RIGHT, self.height - BOTTOM, self.height - BOTTOM))
        middle = (self.left + self.width - RIGHT) / 2
        parts.append(
            Markup('<text class="title" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                middle, self.height - 6, self.x.title
            )
        )
        if self.y.title:
            up = (TOP + self.height - BOTTOM) / 2
            parts.append(
                Markup('<text class="title" transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
                    up, self.y.title
                )
            )
        return wrap(self.width, self.height, self.label, [*parts, *marks])

    def line(self, points: Sequence[tuple[float, float | None]], css: str) -> Markup:
        """A line through the points; it breaks where there is no value."""
        runs: list[list[str]] = [[]]
        for x, y in points:
            if y is None or not math.isfinite(y):
                runs.append([])
            else:
                runs[-1].append(f"{self.px(x)},{self.py(y)}")
        lines = [Markup('<polyline class="line {}" points="{}"/>').format(css, " ".join(run)) for run in runs if len(run) > 1]
        dots = [Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.5"/>').format(css, *run[0].split(",")) for run in runs
                if len(run) == 1]  # fmt: skip
        return Markup("").join([*lines, *dots])

    def band(self, points: Sequence[tuple[float, float | None, float | None]], css: str) -> Markup:
        """The area between low and high."""
        whole = [(x, low, high) for x, low, high in points if low is not None and high is not None]
        if len(whole) < 2:
            return Markup("")
        around = [f"{self.px(x)},{self.py(high)}" for x, _, high in whole]
        around += [f"{self.px(x)},{self.py(low)}" for x, low, _ in reversed(whole)]
        return Markup('<polygon class="band {}" points="{}"/>').format(css, " ".join(around))

    def dots(self, points: Sequence[tuple[float, float]], css: str, radius: float = 2) -> Markup:
        """One path of many dots."""
        r = radius
        path = "".join(
            f"M{self.px(x) - r:.1f} {self.py(y):.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0" for x, y in points
        )
        return Markup('<path class="dots {}" d="{}"/>').format(css, path)

    def interval(self, y: float, low: float, value: float, high: float, css: str) -> Markup:
        """A value with its interval, lying."""
        at = self.py(y)
        return Markup(
            '<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/><circle class="dot {}" cx="{}" cy="{}" r="4"/>'
        ).format(css, self.px(low), self.px(high), at, at, css, self.px(value), at)

    def threshold(self, value: float, text: str, vertical: bool = False) -> Markup:
        """A dashed line across the frame with its name."""
        if vertical:
            x = self.px(value)
            return Markup(
                '<line class="threshold" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/><text class="note" x="{3}" y="{4}">{5}</text>'
            ).format(x, TOP, self.height - BOTTOM, x + 4, TOP + 10, text)
        y = self.py(value)
        return Markup(
            '<line class="threshold" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="note end" x="{}" y="{}">{}</text>'
        ).format(self.left, self.width - RIGHT, y, y, self.width - RIGHT, y - 4, text)


def wrap(width: int, height: int, label: str, parts: Sequence[Markup]) -> Markup:
    """An SVG with a text alternative."""
    head = f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return Markup(head) + Markup("").join(parts) + Markup("</svg>")


def heat(
    rows: Sequence[str], columns: Sequence[tuple[float, str]], cells: Sequence[Sequence[float]], title: str, label: str
) -> Markup:
    """A row a name, a cell a value from 0 to 1; `columns` are (position among the cells, text)."""
    across = max((len(r) for r in cells), default=1)
    width, left = 2 * WIDTH, 74
    step = max(min(22, 420 // max(len(rows), 1)), 5)
    height = step * len(rows) + 44
    cell = (width - left - RIGHT) / across
    parts = []
    for i, (name, values) in enumerate(zip(rows, cells, strict=True)):
        y = 6 + i * step
        if step >= 10 or i % 4 == 0:
            parts.append(
                Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(left - 6, y + step / 2 + 4, name)
            )
        for j, value in enumerate(values):
            if value > 0:
                place = (round(left + j * cell, 1), y, round(cell - 0.4, 2), step - 1, round(0.08 + 0.92 * value, 3))
                parts.append(Markup('<rect class="heat" x="{}" y="{}" width="{}" height="{}" opacity="{}"/>').format(*place))
    for at, text in columns:
        x = round(left + at * cell, 1)
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(x, height - 22, text))
    middle = (left + width - RIGHT) / 2
    parts.append(Markup('<text class="title" x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, height - 5, title))
    return wrap(width, height, label, parts)


def nice(low: float, high: float, about: int = 5) -> list[float]:
    """Round values between low and high."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]

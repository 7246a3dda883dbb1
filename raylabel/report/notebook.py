"""How a run and a unit show themselves in a notebook: small HTML whose foreign text is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from raylabel.report.texts import name_of, shown

if TYPE_CHECKING:
    from raylabel.api import Run, UnitView

UNITS = 10
EXEMPLARS = 10
BEFORE, AFTER = 20, 8
GLOW = "rgba(238,150,20,{:.2f})"
"""Legible under dark and light text alike, as it is never opaque."""


def run_html(run: Run) -> str:
    """The run in a line, and its most convincing units as a table."""
    from raylabel.cli import top_units

    directory = run.directory
    head = f"<b>raylabel run</b> {_text(directory.files.url)}"
    if directory.in_controls or not directory.complete("results"):
        what = "its controls" if directory.in_controls else "no results yet"
        return f"<div>{head}: {what}</div>"
    rows, exemplars = top_units(directory, UNITS)
    table = run.table("results")
    verified = sum(bool(v) for v in table.column("verified").to_pylist())
    lines = []
    for row in rows:
        place = (row["layer"], row["neuron"], row["polarity"])
        found = exemplars.get(place, [])
        phrase = _phrase(found[0]) if found else ""
        cells = [
            name_of(*place),
            _text(row["label"] or f"({row['status']})"),
            row["kind"] or "·",
            row["evidence"] or "·",
            _number(row["normalised_activation"]),
            _number(row["score"]),
        ]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td>{phrase}</td></tr>")
    names = ("unit", "label", "kind", "evidence", "norm.", "score", "strongest phrase")
    heads = "".join(f"<th>{name}</th>" for name in names)
    counts = f"{table.num_rows:,} units, {verified:,} verified; the most convincing:"
    return f"<div>{head}: {counts}</div><table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def unit_html(unit: UnitView) -> str:
    """The unit's label and verdict, and its strongest exemplars coloured by activation, the token at the peak in bold."""
    head = f"<b>layer {unit.layer}, neuron {unit.neuron}, polarity {unit.polarity:+d}</b>"
    result = unit.result
    facts = [
        ("kind", result.get("kind")),
        ("evidence", result.get("evidence")),
        ("normalised", _number(result.get("normalised_activation"))),
        ("specificity", _number(result.get("specificity"))),
        ("score", _number(result.get("score"))),
        ("verified", "yes" if result.get("verified") else "no"),
    ]
    words = ", ".join(_text(word) for word in (unit.concept.get("words") or [])[:8])
    lines = [f"<div>{head}: {_text(result.get('label') or 'no label')}</div>"]
    if result.get("description"):
        lines.append(f"<div>{_text(result['description'])}</div>")
    lines.append(
        "<div>" + " · ".join(f"{name} {_text(str(value))}" for name, value in facts if value not in (None, "·")) + "</div>"
    )
    if words:
        lines.append(f"<div>concept: {words}</div>")
    return "".join([*lines, *(exemplar_html(row) for row in unit.top()[:EXEMPLARS])])


def exemplar_html(row: dict[str, Any]) -> str:
    """One exemplar's tokens around its peak."""
    peak = max(row["activation"], 1e-30)
    spans = []
    for i, (token, value) in enumerate(zip(row["tokens"], row["activations"], strict=True)):
        if not -BEFORE <= i - row["position"] <= AFTER:
            continue
        depth = 0.75 * min(max((value or 0.0) / peak, 0.0), 1.0)
        style = f"background:{GLOW.format(depth)};unicode-bidi:isolate" + (";font-weight:bold" if i == row["position"] else "")
        spans.append(f'<span style="{style}">{_text(token)}</span>')
    return f'<div style="white-space:pre-wrap;font-family:monospace">{row["activation"]:.3g} {"".join(spans)}</div>'


def _phrase(row: dict[str, Any], window: int = 5) -> str:
    at, tokens = row["position"], row["tokens"]
    before, after = tokens[max(0, at - window) : at], tokens[at + 1 : at + window + 1]
    return f"{_text(''.join(before))}<b>{_text(tokens[at])}</b>{_text(''.join(after))}"


def _text(text: str) -> str:
    return escape(shown(text))


def _number(value: float | None) -> str:
    return "·" if value is None else f"{value:.2f}"

"""Foreign text as pages may show it. HTML is escaped where it is written; here, what no eye sees is made visible."""

from __future__ import annotations

from typing import Any


def clean(text: str) -> str:
    """Line breaks and tabs as signs, other control characters as escapes: nothing a terminal would act on."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)


def shown(text: str | None) -> str:
    """`text` with line breaks and tabs as signs and every other character that prints nothing as an escape."""
    if not text:
        return ""
    return text if text.isprintable() else clean(text)


def short(name: str) -> str:
    """A model's or corpus' name; of a path on this machine, which is nobody else's business, the last part."""
    return shown(
        name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] if name.startswith(("/", ".", "~")) or "\\" in name else name
    )


def name_of(layer: int, neuron: int, polarity: int) -> str:
    """A unit as pages call it: `3.117`, with − for the low end and g≤0 where the gate is not above 0."""
    return f"{layer}.{neuron}{'−' if polarity < 0 else ''}{' g≤0' if abs(polarity) == 2 else ''}"


def rounded(value: Any, digits: int = 4) -> Any:
    """A number with so many significant digits; None for what is none or not finite."""
    if value is None:
        return None
    value = float(value)
    return float(f"{value:.{digits}g}") if value - value == 0 else None

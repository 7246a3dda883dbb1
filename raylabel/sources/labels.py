"""Labels that others gave to units, for an audit.

`read_labels(path)` takes a file or a folder and gives the labels with the place each came from, and the rows that could
not be read. What it takes, by content and not by name:

- JSON lines (also `.gz`) of `layer`, `neuron` (or `feature`, `latent`, `index`, `unit`), `label` (or `description`,
  `explanation`, `annotation`) and optionally `polarity`; keys in any casing, numbers also as text.
- Neuronpedia's explanations: `modelId`, `layer` (a source id such as `6-res-jb`), `index`, `description`; a folder of
  `batch-N.jsonl.gz`, or one of its files.
- delphi's explanations: a folder of `HOOKPOINT_latentN.txt`, each a JSON string; the layer is the hook point's number.
- OpenAI's neuron explainer: `neuron_id` and `scored_explanations`, as `.json` or `.jsonl`; folders `LAYER/NEURON.jsonl`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from raylabel.errors import BadInput
from raylabel.sources.spelling import clean

KEYS = {
    "layer": ("layer",),
    "neuron": ("neuron", "feature", "latent", "index", "unit"),
    "label": ("label", "description", "explanation", "annotation"),
}
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".txt")
_DELPHI = re.compile(r"(?P<hook>.+)_(?:latent|feature)(?P<neuron>\d+)$")
MOST = 500
"""Characters of a label; more is no label."""


class Given(NamedTuple):
    """A label and where it stands."""

    layer: int
    neuron: int
    polarity: int
    label: str
    place: str


class Unreadable(NamedTuple):
    """A row that is no label, and why."""

    place: str
    reason: str


def read_labels(path: str) -> tuple[list[Given], list[Unreadable]]:
    """(labels in the files' order, rows that are none); BadInput for a path without any label."""
    place = Path(path)
    if place.is_dir():
        files = sorted((p for p in place.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES)), key=_natural)
    elif place.is_file():
        files = [place]
    else:
        raise BadInput(f"--labels {path}: no such file or folder")
    found: list[Given] = []
    wrong: list[Unreadable] = []
    for file in files:
        for item in _file(file, str(file.relative_to(place)) if place.is_dir() else file.name):
            found.append(item) if isinstance(item, Given) else wrong.append(item)
    if not found:
        first = f" ({wrong[0].place}: {wrong[0].reason})" if wrong else ""
        raise BadInput(
            f"--labels {path}: no label in it{first}; give JSON lines {{\"layer\": 0, \"neuron\": 1, \"label\": \"…\"}}, or the "
            "explanations of Neuronpedia, delphi or OpenAI"
        )
    return found, wrong


def _natural(path: Path) -> list[Any]:
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]


def _file(path: Path, name: str) -> Iterator[Given | Unreadable]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        yield Unreadable(name, f"cannot be read as UTF-8 text ({type(error).__name__})")
        return
    if path.suffix == ".txt":
        yield _delphi(path, name, text)
        return
    whole = _json(text)
    if isinstance(whole, list):
        for number, row in enumerate(whole, 1):
            yield from _row(row, f"{name}, row {number}")
        return
    if isinstance(whole, dict):
        yield from _row(whole, f"{name}, line 1")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = _json(line)
            if row is None:
                yield Unreadable(f"{name}, line {number}", "not JSON")
            else:
                yield from _row(row, f"{name}, line {number}")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _row(row: Any, place: str) -> Iterator[Given | Unreadable]:
    if not isinstance(row, dict):
        yield Unreadable(place, "not an object of keys and values")
        return
    if "scored_explanations" in row:
        yield from _openai(row, place)
        return
    folded = {str(key).casefold(): value for key, value in row.items()}
    values = {}
    for name, keys in KEYS.items():
        key = next((key for key in keys if folded.get(key) is not None), None)
        if key is None:
            yield Unreadable(place, f"no key `{name}`")
            return
        values[name] = folded[key]
    layer, neuron = _layer(values["layer"]), _number(values["neuron"])
    sign = _number(folded.get("polarity", 1))
    if layer is None or neuron is None or sign not in (1, -1, 2, -2):
        name = "layer" if layer is None else "neuron" if neuron is None else "polarity"
        yield Unreadable(place, f"`{name}` is no such number")
        return
    yield _given(layer, neuron, sign, values["label"], place)


def _given(layer: int, neuron: int, sign: int, label: Any, place: str) -> Given | Unreadable:
    if not isinstance(label, str) or not (label := " ".join(clean(label).split())):
        return Unreadable(place, "the label is empty")
    if len(label) > MOST:
        return Unreadable(place, f"the label has {len(label)} characters, more than {MOST}")
    return Given(layer, neuron, sign, label, place)


def _openai(row: dict[str, Any], place: str) -> Iterator[Given | Unreadable]:
    unit, given = row.get("neuron_id"), row["scored_explanations"]
    layer = _number(unit.get("layer_index")) if isinstance(unit, dict) else None
    neuron = _number(unit.get("neuron_index")) if isinstance(unit, dict) else None
    if layer is None or neuron is None:
        yield Unreadable(place, "`neuron_id` has no layer_index and neuron_index")
        return
    for one in given if isinstance(given, list) else []:
        yield _given(layer, neuron, 1, one.get("explanation") if isinstance(one, dict) else None, place)


def _delphi(path: Path, name: str, text: str) -> Given | Unreadable:
    match = _DELPHI.match(path.stem)
    if match is None:
        return Unreadable(name, "not named HOOKPOINT_latentN.txt")
    layers = re.findall(r"(?<!\d)\d{1,9}(?!\d)", match["hook"])
    if not layers or len(match["neuron"]) > 9:
        return Unreadable(name, "its name has no layer and latent")
    label = _json(text)
    return _given(int(layers[0]), int(match["neuron"]), 1, label if isinstance(label, str) else text, name)


def _layer(value: Any) -> int | None:
    """A number, or the one that a Neuronpedia source id begins with."""
    if isinstance(value, str):
        match = re.match(r"\s*(\d{1,9})(?:-\S*)?\s*$", value)
        return int(match[1]) if match else None
    return _number(value)


def _number(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and abs(value) < 1 << 31 else None

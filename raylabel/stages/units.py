"""Which units a run is about: `subject.units`, `layers`, `neurons` and `polarity` against what the subject has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raylabel.config import RunConfig
from raylabel.errors import BadInput


def wanted_units(config: RunConfig, facts: dict[str, Any]) -> dict[int, list[int]]:
    """The wanted neurons of each wanted layer, ascending; BadInput names the key of one that does not exist."""
    subject = config.subject
    n_layers, width = facts["n_layers"], facts["width"]
    if subject.units != "all":
        pairs = _read(subject.units) if isinstance(subject.units, str) else subject.units
        found: dict[int, set[int]] = {}
        for layer, neuron in pairs:
            _check("subject.units", layer, neuron, n_layers, width)
            found.setdefault(layer, set()).add(neuron)
        if not found:
            raise BadInput("subject.units: the list is empty")
        return {layer: sorted(neurons) for layer, neurons in sorted(found.items())}
    layers = range(n_layers) if subject.layers == "all" else sorted(set(subject.layers))
    first, last = (0, width) if subject.neurons == "all" else subject.neurons
    if not first < last:
        raise BadInput(f"subject.neurons: [{first}, {last}) holds no neuron")
    if not list(layers):
        raise BadInput("subject.layers: the list is empty")
    for layer in layers:
        _check("subject.layers", layer, 0, n_layers, width)
    _check("subject.neurons", 0, last - 1, n_layers, width)
    return {layer: list(range(first, last)) for layer in layers}


def polarities(config: RunConfig, facts: dict[str, Any]) -> tuple[int, ...]:
    """The polarities to work on."""
    wanted = {"both": (1, -1), "positive": (1,)}
    return wanted.get(config.subject.polarity, tuple(facts["polarities"]))


def _check(key: str, layer: int, neuron: int, n_layers: int, width: int) -> None:
    if layer >= n_layers:
        raise BadInput(f"{key}: no layer {layer}; the model has layers 0 to {n_layers - 1}")
    if neuron >= width:
        raise BadInput(f"{key}: no neuron {neuron}; a layer has neurons 0 to {width - 1}")


def _read(path: str) -> list[tuple[int, int]]:
    try:
        pairs = json.loads(Path(path).read_text(encoding="utf-8"))
        return [(int(layer), int(neuron)) for layer, neuron in pairs]
    except FileNotFoundError:
        raise BadInput(f"subject.units: no such file: {path}") from None
    except (ValueError, TypeError, UnicodeDecodeError):
        raise BadInput(f"subject.units: {path} is not a JSON list of [layer, neuron]") from None

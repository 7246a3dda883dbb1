"""Which units a run is about: `subject.units`, `layers`, `neurons` and `polarity` against what the subject has.

A polarity is 1 or -1, a unit's high or low end. With `subject.polarity: quadrants` these two are the ends of act(gate) * up
where the gate is above 0, and 2 and -2 those where it is not. `column` and `sign` say where a unit's activations are among
the columns of `models.subject.Subject.read`, and what to multiply them with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from raylabel.config import RunConfig, listed_units
from raylabel.errors import BadInput

QUADRANTS = (1, -1, 2, -2)
Numbers = TypeVar("Numbers", int, np.ndarray)


def column(neuron: Numbers, polarity: Numbers, width: int) -> Numbers:
    """The unit columns of neurons at polarities, for a layer of `width` units."""
    return neuron + width * (abs(polarity) - 1)


def sign(polarity: Numbers) -> Numbers:
    """1 or -1: what a unit's column is multiplied with."""
    if isinstance(polarity, np.ndarray):
        signs: np.ndarray = np.sign(polarity)
        return signs
    return 1 if polarity > 0 else -1


def wanted_units(config: RunConfig, facts: dict[str, Any]) -> dict[int, list[int]]:
    """The wanted neurons of each wanted layer, ascending; BadInput names the key of one that does not exist."""
    subject = config.subject
    if "recorded" in facts:
        # What was recorded is what was wanted of it.
        return {int(layer): [n for a, b in ranges for n in range(a, b)] for layer, ranges in facts["recorded"].items()}
    there, width = facts["layers"], facts["width"]
    if (pairs := listed_units(subject)) is not None:
        found: dict[int, set[int]] = {}
        for layer, neuron in pairs:
            _check("subject.units", layer, neuron, facts)
            found.setdefault(layer, set()).add(neuron)
        if not found:
            raise BadInput("subject.units: the list is empty")
        return {layer: sorted(neurons) for layer, neurons in sorted(found.items())}
    layers = there if subject.layers == "all" else sorted(set(subject.layers))
    first, last = (0, width) if subject.neurons == "all" else subject.neurons
    if not first < last:
        raise BadInput(f"subject.neurons: [{first}, {last}) holds no neuron")
    if not layers:
        raise BadInput("subject.layers: the list is empty")
    for layer in layers:
        _check("subject.layers", layer, 0, facts)
    _check("subject.neurons", there[0], last - 1, facts)
    return {layer: list(range(first, last)) for layer in layers}


def given_units(config: RunConfig) -> Callable[[int, int], bool]:
    """Whether a layer's neuron is one of the wanted, whatever the subject has."""
    subject = config.subject
    if (pairs := listed_units(subject)) is not None:
        listed = set(pairs)
        return lambda layer, neuron: (layer, neuron) in listed
    layers = None if subject.layers == "all" else set(subject.layers)
    first, last = (0, None) if subject.neurons == "all" else subject.neurons
    return lambda layer, neuron: (layers is None or layer in layers) and neuron >= first and (last is None or neuron < last)


def polarities(config: RunConfig, facts: dict[str, Any]) -> tuple[int, ...]:
    """The polarities to work on."""
    if "recorded" in facts:
        return tuple(facts["polarities"])
    wanted = {"both": (1, -1), "positive": (1,), "quadrants": QUADRANTS}
    return wanted.get(config.subject.polarity, tuple(facts["polarities"]))


def _check(key: str, layer: int, neuron: int, facts: dict[str, Any]) -> None:
    there, last = facts["layers"], facts["n_layers"] - 1
    if layer > last:
        raise BadInput(f"{key}: no layer {layer}; the model has layers 0 to {last}")
    if layer not in there:
        raise BadInput(f"{key}: no latents at layer {layer}; subject.latents has {', '.join(map(str, there))}")
    if neuron >= facts["width"]:
        raise BadInput(f"{key}: no neuron {neuron}; a layer has neurons 0 to {facts['width'] - 1}")

"""The pilot of a scan: one forward over a few samples fixes what must not depend on how the scan is cut.

Per layer: the residual norm above which a position is an attention sink, the units' means (taken off before moments
are summed, so that they do not cancel), and the scale of the decoys. Kept as `pilot.npz` for the whole run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raylabel.config import RunConfig
from raylabel.models.controls import Decoys, draw, fit_decoys
from raylabel.stages.planting import distributions, strong_units
from raylabel.stages.positions import sinks
from raylabel.stages.samples import Samples

PILOT_SAMPLES, PILOT_POSITIONS = 64, 2048


def pilot_samples(n: int) -> np.ndarray:
    """Numbers of the samples that a pilot over n samples looks at, evenly spread."""
    return np.unique(np.linspace(0, n - 1, PILOT_SAMPLES).astype(np.int64))


def run_pilot(subject: Any, samples: Samples, layers: list[int], config: RunConfig) -> dict[str, np.ndarray]:
    """Arrays `sink.L`, `mean.L` [columns], with decoys `centre.L`, `gain.L`, `offset.L`, with text controls `quantiles.L`."""
    ids, lengths = samples.padded(np.arange(len(samples.numbers)), subject.pad_id)
    tokens = torch.from_numpy(ids).to(subject.device)
    inside = torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]
    usual = (inside & ~torch.isin(torch.from_numpy(ids), torch.tensor(sorted(subject.special_ids)))).to(subject.device)
    if not usual.any():
        usual = inside.to(subject.device)
    found: dict[str, np.ndarray] = {}

    def visit(layer: int, acts: torch.Tensor, resid: torch.Tensor) -> None:
        norms = resid.float().norm(dim=-1)
        known = norms[usual.to(norms.device) & torch.isfinite(norms)]
        sink = config.exemplars.sink_factor * float(known.median()) if len(known) else float("inf")
        chosen = acts[usual.to(acts.device) & ~sinks(resid, sink)]
        total: Any = 0.0
        highest: Any = torch.zeros(())
        for part in torch.split(chosen, PILOT_POSITIONS):
            values = finite(subject.read(layer, part))
            total = total + values.double().sum(0)
            highest = torch.maximum(highest.to(values.device), values.amax(0))
        found[f"sink.{layer}"] = np.array(sink, dtype=np.float32)
        found[f"mean.{layer}"] = (total / max(len(chosen), 1)).float().cpu().numpy()
        if config.controls.decoys:
            few = finite(chosen[:: -(-len(chosen) // PILOT_POSITIONS) or 1].float())
            decoys = fit_decoys(few, config.controls.decoys, config.run.seed, layer)
            for name in ("centre", "gain", "offset"):
                found[f"{name}.{layer}"] = getattr(decoys, name).cpu().numpy()
        texts = config.controls.nulls + config.controls.planted
        if texts:
            drawn = strong_units(highest.expand(subject.columns).cpu().numpy(), texts, config.run.seed, layer)
            wanted, at = np.unique(drawn, return_inverse=True)
            some = finite(subject.read(layer, chosen, torch.from_numpy(wanted).to(chosen.device)))
            found[f"quantiles.{layer}"] = distributions(some.cpu().numpy()[:, at])

    subject.run(tokens, layers, visit)
    return found


def finite(acts: torch.Tensor) -> torch.Tensor:
    """With 0 for what is not finite."""
    return torch.nan_to_num(acts, nan=0.0, posinf=0.0, neginf=0.0)


def load_decoys(pilot: dict[str, np.ndarray], layer: int, width: int, seed: int, device: Any) -> Decoys | None:
    """The decoys of a layer as the pilot fixed them; None without decoys."""
    if f"gain.{layer}" not in pilot:
        return None
    n = len(pilot[f"gain.{layer}"])
    parts = {name: torch.from_numpy(pilot[f"{name}.{layer}"]) for name in ("centre", "gain", "offset")}
    return Decoys(drawn=draw(width, n, seed, layer), **parts).to(device)

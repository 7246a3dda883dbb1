"""delphi's cache in a process of its own, in its own environment: a task as JSON in, a line of JSON out.

MLP neurons come to it natively: with `transcode` it reads the inputs of its hookpoints, which here are the MLPs' output
projections, and the sparse coder of each is the identity. Model, token matrix, batch and threads are given. Where
delphi cannot be had, `StandIn` does what its documentation and code say it does, and the task says so.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylabel.models import sites
from raylabel.models.subject import load_subject
from tests.benchmarks.measuring import Memory

SPLITS = 5
LEAST = 1e-5


class StandIn:
    """A full forward a batch; of every hookpoint the entries above 1e-5 in size, their places, moved to lists and joined."""

    def __init__(self, model: Any, encoders: dict[str, Any], batch_size: int, transcode: bool = True, **_: Any) -> None:
        self.model, self.encoders, self.size = model, encoders, batch_size
        self.places: dict[str, Any] = {name: [] for name in encoders}
        self.values: dict[str, Any] = {name: [] for name in encoders}
        self.tokens: dict[str, Any] = {name: [] for name in encoders}
        self.fired: dict[str, torch.Tensor] = {}
        self.width = 0

    def run(self, n_tokens: int, tokens: torch.Tensor) -> None:
        """Fills the lists and joins them."""
        modules, seen = dict(self.model.named_modules()), {}
        hooks = [
            modules[name].register_forward_hook(lambda _m, given, _o, name=name: seen.__setitem__(name, given[0]))
            for name in self.encoders
        ]
        rows = tokens[: n_tokens // tokens.shape[1]]
        for number in range(len(rows) // self.size):
            batch = rows[number * self.size : (number + 1) * self.size]
            with torch.no_grad():
                self.model(batch.to(self.model.device))
                for name in self.encoders:
                    self._add(name, self.encoders[name](seen[name]), batch, number)
        for hook in hooks:
            hook.remove()
        for lists in (self.places, self.values, self.tokens):
            for name, parts in lists.items():
                lists[name] = torch.cat(parts)

    def _add(self, name: str, latents: torch.Tensor, batch: torch.Tensor, number: int) -> None:
        self.width = latents.shape[2]
        places, values = torch.nonzero(latents.abs() > LEAST).cpu(), latents[latents.abs() > LEAST].cpu()
        places[:, 0] += number * self.size
        self.places[name].append(places)
        self.values[name].append(values)
        self.tokens[name].append(batch.cpu())
        fired = (latents.cpu() > 0).sum((0, 1))
        self.fired[name] = self.fired[name] + fired if name in self.fired else fired

    def save_splits(self, n_splits: int, save_dir: Path) -> None:
        """A file for each hookpoint and stretch of units."""
        from safetensors.numpy import save_file

        edges = np.linspace(0, self.width, n_splits + 1).astype(int)
        for name, places in self.places.items():
            folder = save_dir / name
            folder.mkdir(parents=True, exist_ok=True)
            for low, high in zip(edges[:-1], edges[1:] - 1, strict=True):
                mask = (places[:, 2] >= low) & (places[:, 2] <= high)
                inside = places[mask].numpy()
                inside[:, 2] -= low
                small = inside[:, [0, 2]].max() < 2**16
                parts = {
                    "locations": inside.astype(np.uint16 if small else np.uint32),
                    "activations": self.values[name][mask].half().numpy(), "tokens": self.tokens[name].numpy(),
                }  # fmt: skip
                save_file(parts, folder / f"{low}_{high}.safetensors")


class Replay(torch.nn.Module):
    """A model whose forward passes are recorded: its hookpoints are shown what they were once given, batch by batch."""

    def __init__(self, recorded: list[list[torch.Tensor]], device: torch.device) -> None:
        super().__init__()
        self.recorded, self.device, self.at = recorded, device, 0
        self.points = torch.nn.ModuleList([torch.nn.Identity() for _ in recorded[0]])

    def forward(self, ids: torch.Tensor) -> None:
        for point, acts in zip(self.points, self.recorded[self.at % len(self.recorded)], strict=True):
            point(acts)
        self.at += 1


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Runs the cache: `whole` with its files, `lease` without them, `update` without the forward passes."""
    if task["stand_in"]:
        maker: Any = StandIn
    else:
        from delphi.latents import LatentCache as maker
    tokens = torch.from_numpy(np.load(task["tokens"])).long()
    subject = load_subject(task["model"], context=tokens.shape[1], device=task["device"])
    model, batch, layers = subject.anatomy.trunk, task["batch"], list(range(subject.n_layers))
    names = {module: name for name, module in model.named_modules()}
    points = [names[sites.tap(subject.anatomy, subject.site, layer)[0]] for layer in layers]
    if hasattr(model, "head"):
        model.head = torch.nn.Identity()
        model.device = subject.device
    if task["do"] == "update":
        parts = tokens.split(batch)
        recorded = [list(subject.activations(ids, layers).values()) for ids in parts]
        model, points = Replay(recorded, subject.device), [f"points.{i}" for i in range(len(points))]

    def made() -> Any:
        return maker(model, {point: lambda x: x for point in points}, batch_size=batch, transcode=True)

    with Memory() as used:
        made().run(batch * tokens.shape[1], tokens)
        if task["do"] == "update":
            model.at = 0
        cache = made()
        wall, cpu = time.perf_counter(), time.process_time()
        cache.run(tokens.numel(), tokens)
        if task["do"] == "whole":
            cache.save_splits(n_splits=SPLITS, save_dir=Path(task["out"]))
        if subject.device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    kept = cache.values if task["stand_in"] else cache.cache.latent_activations
    entries = sum(len(part) for part in kept.values())
    return {"wall": wall, "cpu": cpu, "peak": used.peak, "threads": torch.get_num_threads(), "entries": entries}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))

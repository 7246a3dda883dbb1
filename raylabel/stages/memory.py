"""What a scan needs of a device's memory: known before it starts, split by layers or by batch where there is too little."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from raylabel.config import RunConfig
from raylabel.stages.scanner import CLOSE_NEURONS, sizes
from raylabel.stages.state import GPU_PASS, state_bytes

STATE_SHARE = 0.6
"""Share of the free memory of a device that states may fill."""
WRITTEN = 6
"""Copies of a part of a layer's state while it is written, or merged and made into rows."""
UPDATE_BYTES = 40
"""Temporary bytes an activation on a GPU, in the pieces of `state.GPU_PASS` that an update handles."""

log = logging.getLogger(__name__)


def layer_bytes(config: RunConfig, columns: int, signs: int, random: int, batch: int, samples: int) -> int:
    """Bytes of the states of a layer with so many unit columns over a lease of `samples`, `random` of them kept for all."""
    kept = sizes(config, random)
    wanted = config.controls
    controls = (wanted.decoys, wanted.nulls + wanted.planted)
    return state_bytes(columns, signs, kept, batch, samples) + sum(state_bytes(n, 1, kept, batch, samples) for n in controls)


def scan_bytes(
    config: RunConfig, units: dict[int, list[int]], signs: tuple[int, ...], batch: int, samples: int
) -> dict[int, int]:  # fmt: skip
    """Bytes of the state of every layer over a lease, at most; `signs` as `units.polarities` gives them."""
    regimes, directions = max(abs(s) for s in signs), len([s for s in signs if abs(s) == 1])
    random = 2 * config.exemplars.random
    return {layer: layer_bytes(config, len(n) * regimes, directions, random, batch, samples) for layer, n in units.items()}


def overhead_bytes(state: int, columns: int, batch: int, context: int, on_gpu: bool) -> int:
    """Bytes that an update, or the writing of a layer's `state` of so many columns, takes beside the states, at most."""
    activations = min(batch * context * columns, GPU_PASS)
    part = state * min(1, CLOSE_NEURONS / max(columns, 1))
    return int(activations * UPDATE_BYTES if on_gpu else WRITTEN * part)


def layer_groups(
    needed: dict[int, int], devices: dict[int, str], free: Callable[[str], float] | None = None
) -> list[list[int]]:
    """Layers in groups whose states fit on their devices together; warns of what more than one group costs.

    Args:
        needed: bytes of each layer's state.
        devices: the device of each layer.
        free: gives the free bytes of a device.
    """
    budget = {name: STATE_SHARE * (free or free_bytes)(name) for name in set(devices.values())}
    groups: list[list[int]] = [[]]
    used = dict.fromkeys(budget, 0.0)
    for layer, size in needed.items():
        device = devices[layer]
        if groups[-1] and used[device] + size > budget[device]:
            groups.append([])
            used = dict.fromkeys(budget, 0.0)
        groups[-1].append(layer)
        used[device] += size
    if len(groups) > 1:
        log.warning(
            "scan: the states of all layers take %.1f GB and do not fit; layers are done in %d groups, at %.1f times the "
            "forward passes; fewer exemplars.quantile, exemplars.top or controls.decoys make them smaller",
            sum(needed.values()) / 1e9, len(groups), sum(max(g) + 1 for g in groups) / (max(needed) + 1),
        )  # fmt: skip
    return groups


def free_bytes(device: str) -> float:
    """Free memory of a device."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    return float(psutil.virtual_memory().available)


def peak_bytes(device: str) -> int:
    """The most memory that this process has held so far: on a GPU by tensors, on a CPU in all."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(torch.device(device)))
    status = Path("/proc/self/status")
    if status.exists():
        # What `getrusage` says is inherited from the process that started this one.
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)

"""On which GPUs a model lies: on one where it fits, else its blocks in turn over several.

`spread` says what transformers is told when it loads a model, `gpus_for` how many GPUs a worker must be given. The size
of the weights comes from the model's configuration: nothing is read or downloaded for it but that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from raylabel.errors import BadInput

ROOM = 1.25
"""What a GPU must hold, in weights: what runs through them and a scan's state need room too."""


def weight_bytes(config: Any, dtype: torch.dtype | None, trust: bool = False) -> int:
    """Bytes of the weights of a transformers model in a precision; None is the checkpoint's own."""
    from transformers import AutoModelForCausalLM

    own = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    size = (dtype or (own if isinstance(own, torch.dtype) else torch.float32)).itemsize
    automatic: Any = AutoModelForCausalLM
    with torch.device("meta"):
        network = automatic.from_config(config, trust_remote_code=trust)
    return sum(parameter.numel() for parameter in network.parameters()) * size


def spread(device: torch.device, gpus: float | None, weights: Callable[[], int]) -> dict[str, Any]:
    """Arguments of `from_pretrained` that spread a model over this process's GPUs; empty where it goes to one device.

    Args:
        device: a GPU with a number is the only one that is used.
        gpus: GPUs of this worker: a model is spread over all of them; None takes those it sees if one is too small.
        weights: gives the bytes of the weights; asked only where it matters.
    """
    if device.type != "cuda" or device.index is not None or (gpus is not None and gpus <= 1):
        return {}
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    if gpus is None and (len(free) == 1 or ROOM * weights() <= free[0]):
        return {}
    if gpus is not None and gpus > len(free):
        raise BadInput(f"subject.gpus_per_worker: {gpus:g}, but there are {len(free)} GPUs here; use auto")
    used = free[: int(gpus or len(free))]
    if weights() > sum(used):
        raise BadInput(
            f"subject.model: its weights take {weights() / 1e9:.1f} GB, and {len(used)} GPUs have {sum(used) / 1e9:.1f} GB "
            f"free; use subject.dtype: bfloat16 or more subject.gpus_per_worker"
        )
    return {"device_map": "balanced", "max_memory": dict(enumerate(used))}


def check_spread(network: torch.nn.Module, device: torch.device) -> None:
    """`BadInput` where a part of a spread model found no room on devices of this kind; on the CPU or on disk it is meta."""
    elsewhere = [name for name, parameter in network.named_parameters() if parameter.device.type != device.type]
    if elsewhere:
        raise BadInput(
            f"subject.model: {len(elsewhere)} of its parameters found no room on the GPUs, {elsewhere[0]} among them; "
            f"use subject.dtype: bfloat16 or more subject.gpus_per_worker"
        )


def gpus_for(size: int, memory: int) -> int:
    """GPUs of so many bytes that weights of `size` bytes need."""
    return max(1, -int(-ROOM * size // memory))

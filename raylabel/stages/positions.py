"""Which positions of a text count: neither padding, nor special tokens, nor attention sinks."""

from __future__ import annotations

import torch
from torch import Tensor


def usable(ids: Tensor, lengths: Tensor, special: Tensor) -> Tensor:
    """[B, T] positions that are neither padding nor a special token."""
    inside = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return inside & ~torch.isin(ids, special)


def sinks(resid: Tensor, sink: float) -> Tensor:
    """[B, T] positions whose residual [B, T, d_model] has a finite norm above `sink`.

    A residual that is not finite is no sink: its position counts, and the units that see it are reported.
    """
    norm = torch.linalg.vector_norm(resid, dim=-1, dtype=torch.float32)
    return torch.isfinite(norm) & (norm > sink)

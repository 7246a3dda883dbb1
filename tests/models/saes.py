"""Random SAEs and transcoders in SAELens's format, written without it, and their activations by the formula alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import tiny

NEEDS_THRESHOLD = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def save_sae(
    folder: Path, hook: str = "blocks.1.hook_resid_pre", d_in: int = tiny.WIDTH, d_sae: int = 30, seed: int = 0,
    dtype: torch.dtype = torch.float32, d_out: int | None = None, weights: dict[str, Tensor] | None = None, **config: Any,
) -> Path:  # fmt: skip
    """A folder as SAELens 6 leaves it; keys of `config` go to `cfg.json`, those named in `weights` beside the random ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.4).to(dtype)

    architecture = config.setdefault("architecture", "standard")
    metadata = {"hook_name": hook, **config.pop("metadata", {})}
    d_out = d_out or d_in
    tensors = {"W_enc": draw(d_in, d_sae), "b_enc": draw(d_sae), "W_dec": draw(d_sae, d_out), "b_dec": draw(d_out)}
    if architecture in NEEDS_THRESHOLD:
        tensors["threshold"] = draw(d_sae).abs()
    if "transcoder" in architecture:
        config.setdefault("apply_b_dec_to_input", False)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **(weights or {})}, folder / "sae_weights.safetensors")
    settings = {"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "metadata": metadata, **config}
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


def by_formula(folder: Path, x: Tensor) -> np.ndarray:
    """Activations [positions, d_sae] of x [positions, d_in], one number after another in float64."""
    config = json.loads((folder / "cfg.json").read_text())
    w = {name: tensor.double().numpy() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    n, out = w["W_enc"].shape[1], []
    norms = [math.sqrt(sum(v * v for v in row)) for row in w["W_dec"]]
    rescaled = config.get("rescale_acts_by_decoder_norm", False)
    for row in x.double().numpy():
        values = list(row)
        if config.get("normalize_activations") == "layer_norm":
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
            values = [(v - mean) / (spread + 1e-5) for v in values]
        if config.get("normalize_activations") == "constant_norm_rescale":
            length = math.sqrt(sum(v * v for v in values))
            values = [v * math.sqrt(len(values)) / length for v in values]
        if config.get("apply_b_dec_to_input", True):
            values = [v - b for v, b in zip(values, w["b_dec"], strict=True)]
        pre = [sum(v * w["W_enc"][i, j] for i, v in enumerate(values)) + w["b_enc"][j] for j in range(n)]
        pre = [p * norm for p, norm in zip(pre, norms, strict=True)] if rescaled else pre
        if "k" in config and config["architecture"] == "topk":
            kept = set(sorted(range(n), key=lambda j: -pre[j])[: config["k"]])
            out.append([max(p, 0.0) if j in kept else 0.0 for j, p in enumerate(pre)])
        elif "threshold" in w:
            out.append([max(p, 0.0) if p > t else 0.0 for p, t in zip(pre, w["threshold"], strict=True)])
        else:
            out.append([max(p, 0.0) for p in pre])
    return np.array(out)

"""Makes tests/models/data/sae_lens: small random SAEs saved by SAELens itself, and what its `encode` and `decode` give.

SAELens does not install beside TransformerLens 4, so it has an environment of its own and the tests read what it wrote:

    python3 -m venv /tmp/saevenv
    /tmp/saevenv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    /tmp/saevenv/bin/pip install sae-lens==6.54.12
    /tmp/saevenv/bin/python tests/models/sae_lens_reference.py

Each folder NAME holds `cfg.json` and `sae_weights.safetensors`. `expected.safetensors` holds the inputs `x` [24, 16] and
for every SAE `NAME/acts` [24, 18], and `NAME/directions` [18, d_out]: what one unit of each latent makes `decode` write.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, POSITIONS = 16, 18, 24
DATA = Path(__file__).parent / "data" / "sae_lens"
RESID = {"metadata": {"hook_name": "blocks.1.hook_resid_pre", "model_name": "tiny"}}
MLP = {"metadata": {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}}
NEW: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard", **RESID},
    "standard-unshifted": {"architecture": "standard", "apply_b_dec_to_input": False, **RESID},
    "standard-layer-norm": {"architecture": "standard", "normalize_activations": "layer_norm", **RESID},
    "standard-rescaled": {"architecture": "standard", "normalize_activations": "constant_norm_rescale", **RESID},
    "topk": {"architecture": "topk", "k": 5, **RESID},
    "topk-norms": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True, **RESID},
    "jumprelu": {"architecture": "jumprelu", **RESID},
    "transcoder": {"architecture": "transcoder", "d_out": 16, "apply_b_dec_to_input": False, **MLP},
    "skip-transcoder": {"architecture": "skip_transcoder", "d_out": 16, "apply_b_dec_to_input": False, **MLP},
    "jumprelu-transcoder": {"architecture": "jumprelu_transcoder", "d_out": 16, "apply_b_dec_to_input": False, **MLP},
}
OLD: dict[str, dict[str, Any]] = {
    "old-standard": {"architecture": "standard", "activation_fn_str": "relu", "hook_name": "blocks.1.hook_resid_pre",
                     "normalize_activations": "none", "hook_layer": 1, "hook_head_index": None},
    "old-topk": {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4},
                 "hook_point": "blocks.1.hook_resid_pre", "normalize_activations": False, "hook_point_head_index": None},
}  # fmt: skip


def randomise(sae: Any, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(drawn.abs() if name == "threshold" else drawn)


def expect(sae: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(activations, directions). Where the input's norm is undone behind the decoder, the directions are before it."""
    with torch.no_grad():
        acts = sae.encode(x)
        if sae.cfg.normalize_activations != "none":
            return acts, sae.W_dec.detach().clone()
        return acts, sae.decode(torch.eye(D_SAE)) - sae.decode(torch.zeros(D_SAE, D_SAE))


def main() -> None:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class, get_sae_training_class

    shutil.rmtree(DATA, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POSITIONS, D_IN, generator=generator)
    found: dict[str, torch.Tensor] = {"x": x}

    def keep(name: str, sae: Any) -> None:
        acts, directions = expect(sae, x)
        found[f"{name}/acts"], found[f"{name}/directions"] = acts.contiguous(), directions.contiguous()

    for name, config in NEW.items():
        kind, settings = get_sae_class(config["architecture"])
        sae = kind(settings.from_dict({"d_in": D_IN, "d_sae": D_SAE, **config}))
        randomise(sae, generator)
        sae.save_model(DATA / name)
        keep(name, sae)
    for name, rescale in (("batchtopk", False), ("batchtopk-norms", True)):
        kind, settings = get_sae_training_class("batchtopk")
        training = kind(settings.from_dict({"d_in": D_IN, "d_sae": D_SAE, "architecture": "batchtopk", "k": 5,
                                            "rescale_acts_by_decoder_norm": rescale, **RESID}))  # fmt: skip
        randomise(training, generator)
        training.topk_threshold = torch.tensor(0.7, dtype=torch.double)
        training.save_model(DATA / f"{name}-training")
        training.save_inference_model(DATA / f"{name}-as-saved")
        for saved in ("training", "as-saved"):
            keep(f"{name}-{saved}", SAE.load_from_disk(DATA / f"{name}-as-saved"))
    for name, config in OLD.items():
        folder = DATA / name
        folder.mkdir()
        weights = load_file(DATA / "standard" / "sae_weights.safetensors")
        extra = {"scaling_factor": torch.ones(D_SAE)} if name == "old-standard" else {}
        save_file({**weights, **extra}, folder / "sae_weights.safetensors")
        settings = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu", **config}
        (folder / "cfg.json").write_text(json.dumps(settings))
        keep(name, SAE.load_from_disk(folder))
    save_file(found, DATA / "expected.safetensors")


if __name__ == "__main__":
    main()

"""Folders of TransformerLens-native models: written, recognised and loaded without a network.

A folder holds `config.json` (`"architecture": "TransformerLensNative"` and the fields the architecture reads),
`model.safetensors` (the parameters under `NativeModel`'s own names, as they are before a bridge wraps them),
`tokenizer.json` and `tokenizer_config.json`. `load_native` gives a `TransformerBridge` in evaluation mode whose
tokenizer is the folder's. Weights may be stored in half precision; they come back in the `dtype` asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.native import NativeModel
from transformers import PreTrainedTokenizerFast

from raylabel.errors import BadInput

ARCHITECTURE = "TransformerLensNative"
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
FIELDS = (
    *("d_model", "d_head", "n_layers", "n_ctx", "n_heads", "n_key_value_heads", "d_mlp", "d_vocab", "d_vocab_out"),
    *("act_fn", "gated_mlp", "attn_only", "attention_dir", "use_attn_scale", "attn_scale"),
    *("attn_scores_soft_cap", "output_logits_soft_cap", "normalization_type", "final_rms", "eps"),
    *("positional_embedding_type", "rotary_dim", "rotary_base", "rope_scaling", "default_prepend_bos"),
)
# A bridge puts every module behind a wrapper, and shows some of them a second time under names of its own.
_WRAPPER = "._original_component"


def is_native(folder: str | Path) -> bool:
    """Whether the folder's config names the native architecture; False for everything else, missing files included."""
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("architecture") == ARCHITECTURE


def save_native(
    folder: str | Path,
    model: TransformerBridge | NativeModel,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes the folder; each file is replaced as a whole, the weights last."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    module = cast(NativeModel, model.original_model if isinstance(model, TransformerBridge) else model)
    config = {"architecture": ARCHITECTURE, **{key: getattr(model.cfg, key, None) for key in FIELDS}}
    config = {key: value for key, value in config.items() if value is not None}
    _replace(target / CONFIG, (json.dumps(config, indent=2) + "\n").encode("utf-8"))
    staging = target / ".tokenizer"
    tokenizer.save_pretrained(staging)
    for path in sorted(staging.iterdir()):
        path.replace(target / path.name)
    staging.rmdir()
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in plain_state(module).items()}
    _replace(target / WEIGHTS, save(state))


def load_native(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> TransformerBridge:
    """The folder's model as a bridge, on `device`, in `dtype`; `BadInput` names the file that is missing or wrong."""
    source = Path(folder)
    config = _read_config(source)
    state = _read_weights(source / WEIGHTS)
    tokenizer = _read_tokenizer(source)
    model = NativeModel(config)
    try:
        model.load_state_dict({name: value.to(torch.float32) for name, value in state.items()}, strict=True)
    except RuntimeError as error:
        raise BadInput(f"{source / WEIGHTS} does not fit {source / CONFIG}: {_one_line(error)}") from error
    model = model.to(device=device, dtype=dtype).eval()
    bridge = build_bridge_from_module(
        model,
        architecture=ARCHITECTURE,
        tl_config=config,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        model_name=source.name,
    )
    return bridge.eval()


def plain_state(module: NativeModel) -> dict[str, torch.Tensor]:
    """The parameters by their names in an unwrapped `NativeModel`, whether or not a bridge has wrapped it."""
    with torch.device("meta"):
        names = NativeModel(module.cfg).state_dict().keys()
    unwrapped = {name.replace(_WRAPPER, ""): value for name, value in module.state_dict().items()}
    return {name: unwrapped[name] for name in names}


def _read_config(folder: Path) -> TransformerBridgeConfig:
    if not is_native(folder):
        raise BadInput(f"{folder / CONFIG} is not the config of a {ARCHITECTURE} model")
    raw: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        return TransformerBridgeConfig.from_dict({**raw, "init_weights": False})
    except (TypeError, ValueError) as error:
        raise BadInput(f"{folder / CONFIG}: {_one_line(error)}") from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise BadInput(f"{path} is missing: the folder has no weights")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is not a readable safetensors file: {_one_line(error)}") from error


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / TOKENIZER).is_file():
        raise BadInput(f"{folder / TOKENIZER} is missing: the folder has no tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

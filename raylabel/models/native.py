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
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.sources.native import NativeAttention, NativeModel
from transformer_lens.utilities.activation_functions import apply_softcap
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


class FastAttention(NativeAttention):
    """The same attention in one kernel. A mask [B, 1, Q, Q] is added to the scores and is all there is to mask."""

    def forward(  # type: ignore[override]  # the pattern, which no block reads, is not there
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        capped, masked = self.attn_scores_soft_cap > 0, attention_mask is not None and attention_mask.dim() == 4
        if kwargs or (capped if attention_mask is None else not masked):
            plain: tuple[Tensor, Tensor] = super().forward(hidden_states, attention_mask, position_ids, **kwargs)
            return plain
        parts = (part(hidden_states).unflatten(-1, (-1, self.d_head)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k, v = parts
        if self.rotary is not None:
            q, k = self.rotary.apply_rope(q, k, position_ids=position_ids)
        if self.kv_repeats > 1:
            k, v = (x.repeat_interleave(self.kv_repeats, dim=1) for x in (k, v))
        if capped and attention_mask is not None:
            scores = apply_softcap(q @ k.transpose(-2, -1) / self.scale, self.attn_scores_soft_cap)
            mixed = F.softmax(scores + attention_mask, dim=-1) @ v
        else:
            causal = attention_mask is None and self.causal
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=causal, scale=1 / self.scale)
        return self.o(mixed.transpose(1, 2).flatten(2)), None


def unwrapped(bridge: TransformerBridge) -> NativeModel:
    """The model inside a native bridge, sharing its weights, without the hook points that make it up to a third slower.

    Its attention is `FastAttention`.
    """
    state = plain_state(cast(NativeModel, bridge.original_model))
    reference = next(iter(state.values()))
    network = NativeModel(bridge.cfg)
    for block in network.layers:
        block.attn = FastAttention(bridge.cfg, rotary=network.rotary)
    network.to(device=reference.device, dtype=reference.dtype)
    # A bridge shows parameters under further names of its own and adds a bias to the head.
    network.load_state_dict({name: state[name] for name in network.state_dict()}, strict=True, assign=True)
    return network.eval()


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

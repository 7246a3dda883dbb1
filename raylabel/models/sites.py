"""Where a decoder's activations are read, and what its units write, for every supported architecture.

`FAMILIES` holds one line per `model_type` of transformers; `transformers_anatomy` and `native_anatomy` find the modules
in a loaded model, and everything after that is the same for all of them. A unit of a site is one coordinate of it:

- `mlp_post`: what the MLP's output projection is given, act(x), or act(gate) * up in a gated MLP; [B, T, d_mlp]
- `mlp_mid`: the same before the LayerNorm that SoLU-LN models put after the activation; they alone have it
- `resid_pre`, `resid_mid`, `resid_post`: the residual stream before the block, between its attention and its MLP, and
  after it; [B, T, d_model]. Parallel blocks (GPT-NeoX, GPT-J, Phi) have no `resid_mid`
- `attn_out`: what attention adds to the residual stream (after the norm on it in Gemma 2, 3 and OLMo 2, 3)

SAEs and transcoders are also trained at `LATENT_HOOKS`, which have no units of their own:

- `mlp_in`: what the MLP is given; `mlp_normed`: the same before its norm's gain and bias, float32
- `mlp_raw`: what the MLP gives; `mlp_out`: what it adds to the stream (another thing where a norm follows)

`BadInput` names `subject.model`, `subject.site`, `subject.latents` or `subject.polarity`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from raylabel.errors import BadInput
from raylabel.models.suffix import Tree, call_native, call_transformers

HOOK_NAMES = {
    "mlp_post": "mlp.hook_post",
    "mlp_mid": "mlp.hook_mid",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
}
MLP_SITES = ("mlp_post", "mlp_mid")
LATENT_HOOKS = {
    "mlp_in": "mlp.hook_in",
    "mlp_normed": "ln2.hook_normalized",
    "mlp_raw": "mlp.hook_out",
    "mlp_out": "hook_mlp_out",
}
# Scores held at once by `logit_effects`, and unembedding rows turned to float32 at once.
_SCORES, _VOCABULARY = 1 << 24, 1 << 14


@dataclass(frozen=True)
class Family:
    """Module paths of an architecture: `blocks` and `final_norm` from the trunk, the others from a block."""

    blocks: str
    final_norm: str
    attention: str
    """The module whose output is added to the residual stream for attention."""
    middle: str | None
    """The module that is given the residual stream between attention and MLP; None in parallel blocks."""
    mlp_out: str | None
    gate: str | None = None
    """The projection whose output is the gate's pre-activation; None in MLPs without one."""
    mlp_norm: str | None = None
    """The norm between the activation and `mlp_out`."""
    post_mlp: str | None = None
    """The norm between `mlp_out` and the residual stream."""
    centred: bool = True
    """The final norm subtracts the mean."""
    gain_offset: float = 0.0
    """Added to the weights of the norms that scale by `gain_offset + weight`."""
    masks: str | None = "one"
    """How a forward pass takes a finished attention mask: `one` for all layers, `by layer` by the kinds of attention in
    `config.layer_types`; None where its attention makes a mask of its own in any case."""

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def mlp(self) -> str | None:
        """The module of the whole MLP."""
        return self.mlp_out.partition(".")[0] if self.mlp_out else None


_GPT2 = Family("h", "ln_f", "attn", "ln_2", "mlp.c_proj")
_NEOX = Family("layers", "final_layer_norm", "attention", "post_attention_layernorm", "mlp.dense_4h_to_h")
_LLAMA = Family(
    "layers", "norm", "self_attn", "post_attention_layernorm", "mlp.down_proj", gate="mlp.gate_proj", centred=False
)  # fmt: skip
_QWEN = replace(_LLAMA, masks="by layer")
_OLMO2 = replace(_LLAMA, attention="post_attention_layernorm", middle="mlp", post_mlp="post_feedforward_layernorm")
_GEMMA2 = replace(_OLMO2, middle="pre_feedforward_layernorm", gain_offset=1.0, masks="by layer")

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neo": replace(_GPT2, masks=None),
    "gptj": replace(_GPT2, middle=None, mlp_out="mlp.fc_out"),
    "gpt_neox": _NEOX,
    "phi": Family("layers", "final_layernorm", "self_attn", None, "mlp.fc2"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "gemma": replace(_LLAMA, gain_offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "olmo": replace(_LLAMA, centred=True),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, masks="by layer"),
}


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A loaded model taken apart. `trunk(ids)` runs everything up to the last site, whatever comes after it."""

    kind: str
    family: Family
    trunk: nn.Module
    call: Callable[[Tensor], Any]
    """One forward pass of the trunk: ids [B, T] in; what it gives back is not used."""
    blocks: tuple[nn.Module, ...]
    d_model: int
    d_mlp: int | None
    unembedding: nn.Module
    """Holds `weight` [vocabulary, d_model]; never called."""
    call_tree: Callable[[Tensor, Tree], Any] | None
    """The same over rows of nodes, see `models.suffix`; None where the architecture cannot."""

    @property
    def vocabulary(self) -> int:
        return int(_weight(self.unembedding).shape[0])


def family_of(config: Any, model: str) -> Family:
    """The family of a transformers config; `BadInput` with the model type where there is none."""
    kind = str(getattr(config, "model_type", None))
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise BadInput(f"subject.model: {model} is of the type {kind!r}, which is not supported; supported are {known}")
    if kind == "gpt_neox" and config.use_parallel_residual:
        return replace(_NEOX, middle=None)
    return FAMILIES[kind]


def transformers_anatomy(model: Any, name: str) -> Anatomy:
    """Anatomy of an `AutoModelForCausalLM`."""
    family = family_of(model.config, name)
    trunk = model.base_model
    trunk = getattr(trunk, "language_model", trunk)
    config, masks = model.config.get_text_config(), family.masks
    return _anatomy(
        model.config.model_type,
        family,
        trunk,
        lambda ids: trunk(input_ids=ids, use_cache=False),
        int(config.hidden_size),
        model.get_output_embeddings(),
        None if masks is None else lambda ids, tree: call_transformers(trunk, config, ids, tree, masks),
    )


def native_anatomy(model: Any) -> Anatomy:
    """Anatomy of TransformerLens's own architecture: a `NativeModel` as `native.unwrapped` gives it."""
    cfg = model.cfg
    with_mlp, gated = not cfg.attn_only, bool(cfg.gated_mlp)
    mlp_out = ("mlp.out" if gated else "mlp.fc_out") if with_mlp else None
    family = Family(
        blocks="layers",
        final_norm="ln_out",
        attention="attn",
        middle="ln2" if with_mlp else None,
        mlp_out=mlp_out,
        gate="mlp.gate" if with_mlp and gated else None,
        mlp_norm="mlp.ln" if with_mlp and getattr(model.layers[0].mlp, "ln", None) is not None else None,
        centred=not cfg.final_rms and (cfg.normalization_type or "").upper() in ("LN", "LNPRE"),
    )
    return _anatomy(
        "TransformerLensNative",
        family,
        model,
        model,
        int(cfg.d_model),
        model.head,
        (lambda ids, tree: call_native(model, ids, tree)) if cfg.attention_dir == "causal" else None,
    )


def _anatomy(
    kind: str,
    family: Family,
    trunk: nn.Module,
    call: Callable[[Tensor], Any],
    d_model: int,
    unembedding: nn.Module,
    call_tree: Callable[[Tensor, Tree], Any] | None,
) -> Anatomy:
    blocks = tuple(cast(nn.ModuleList, trunk.get_submodule(family.blocks)))
    d_mlp = _rows(blocks[0].get_submodule(family.mlp_out)).shape[0] if family.mlp_out else None
    return Anatomy(kind, family, trunk, call, blocks, d_model, d_mlp, unembedding, call_tree)


def check_site(anatomy: Anatomy, site: str) -> None:
    """`BadInput` where the model has no such site, with the one to use instead."""
    family, kind = anatomy.family, anatomy.kind
    if site not in HOOK_NAMES:
        raise BadInput(f"subject.site: no site {site!r}; use one of {', '.join(HOOK_NAMES)}")
    if site in MLP_SITES and family.mlp_out is None:
        raise BadInput(f"subject.site: {site} does not exist in a model without MLPs: use attn_out or resid_post")
    if site == "mlp_mid" and family.mlp_norm is None:
        raise BadInput(
            f"subject.site: mlp_mid exists only in models with a LayerNorm after the activation (SoLU-LN), "
            f"and this one ({kind}) has none: use mlp_post"
        )
    if site == "resid_mid" and family.middle is None:
        raise BadInput(
            f"subject.site: resid_mid does not exist in this model ({kind}), as nothing reads the stream "
            f"between its attention and its MLP: use resid_pre or resid_post"
        )


def check_latent_hook(anatomy: Anatomy, site: str, hook: str) -> None:
    """`BadInput` where the model has nothing to read, or to write to, at the hook of an SAE or transcoder."""
    family, kind = anatomy.family, anatomy.kind
    if site in LATENT_HOOKS:
        missing = family.mlp is None or (site == "mlp_normed" and family.middle in (None, family.mlp))
        if missing:
            raise BadInput(f"subject.latents: {hook} does not exist in this model ({kind}): use latents of another hook point")
        return
    try:
        check_site(anatomy, site)
    except BadInput as error:
        raise BadInput(f"subject.latents: {hook}: {str(error).partition(': ')[2]}") from None


def check_quadrants(anatomy: Anatomy, site: str) -> None:
    """`BadInput` where units have no gate whose sign could tell two regimes apart."""
    if site != "mlp_post":
        raise BadInput(f"subject.polarity: quadrants exist at mlp_post only, not at {site}: use both")
    if not anatomy.family.gated:
        raise BadInput(f"subject.polarity: quadrants need a gated MLP, and this model ({anatomy.kind}) has none: use both")


def width(anatomy: Anatomy, site: str) -> int:
    """Width of the activations at the site, which are as many units at those that have units."""
    return cast(int, anatomy.d_mlp) if site in MLP_SITES else anatomy.d_model


def polarities(anatomy: Anatomy, site: str) -> tuple[int, ...]:
    """(1, -1) where a unit's low end is as much a signal as its high end, else (1,)."""
    return (1,) if site in MLP_SITES and not anatomy.family.gated else (1, -1)


def sister_site(anatomy: Anatomy, site: str) -> str | None:
    """The other site that a recording of these units may have been made at."""
    if anatomy.family.mlp_norm is None or site not in MLP_SITES:
        return None
    return "mlp_mid" if site == "mlp_post" else "mlp_post"


def tap(anatomy: Anatomy, site: str, layer: int) -> tuple[nn.Module, bool]:
    """The module that shows the site's activations, and whether as its output (True) or its input (False)."""
    block, family = anatomy.blocks[layer], anatomy.family
    if site == "resid_pre":
        return block, False
    if site == "resid_post":
        return block, True
    if site == "attn_out":
        return block.get_submodule(family.attention), True
    if site == "mlp_normed":
        norm = block.get_submodule(cast(str, family.middle))
        return norm, getattr(norm, "weight", None) is None
    if site in ("mlp_raw", "mlp_out"):
        path = family.mlp if site == "mlp_raw" or family.post_mlp is None else family.post_mlp
        return block.get_submodule(cast(str, path)), True
    path = {"resid_mid": family.middle, "mlp_post": family.mlp_out, "mlp_mid": family.mlp_norm, "mlp_in": family.mlp}[site]
    return block.get_submodule(cast(str, path)), False


def device_of(anatomy: Anatomy, layer: int) -> torch.device:
    """The device of a layer: blocks may lie on several, but none is divided."""
    return next(anatomy.blocks[layer].parameters()).device


def gate(anatomy: Anatomy, layer: int) -> nn.Module:
    """The module of a gated MLP whose output [B, T, d_mlp] is the gate before its activation function."""
    return anatomy.blocks[layer].get_submodule(cast(str, anatomy.family.gate))


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """float32 of x's shape: what a LayerNorm or RMSNorm with a gain makes of x before the gain (and bias)."""
    x = x.float()
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    eps = getattr(norm, "eps", None)
    scale = x.square().mean(-1, keepdim=True) + cast(float, norm.variance_epsilon if eps is None else eps)
    return x / scale.sqrt()


def output_directions(anatomy: Anatomy, site: str, layer: int) -> Tensor:
    """float32 [width, d_model]: what one unit of activation writes into the residual stream.

    A LayerNorm or RMSNorm on the way counts with its gain (and its centring), without its division, which depends on
    the text: directions are then exact up to a positive factor a position. The identity at residual sites, attn_out and
    mlp_out, and at `mlp_in` and `mlp_normed` for want of a better one, as nothing writes from there to the stream.
    """
    family, block = anatomy.family, anatomy.blocks[layer]
    if site in MLP_SITES:
        directions = _rows(block.get_submodule(cast(str, family.mlp_out))).detach().float()
    else:
        directions = torch.eye(anatomy.d_model, device=_weight(anatomy.unembedding).device)
    if site == "mlp_mid":
        gain = _gain(block.get_submodule(cast(str, family.mlp_norm)), 0.0)
        if gain is not None:
            directions = directions * gain[:, None]
        directions = directions - directions.mean(dim=0, keepdim=True)
    if family.post_mlp is not None and site in (*MLP_SITES, "mlp_raw"):
        gain = _gain(block.get_submodule(family.post_mlp), family.gain_offset)
        directions = directions if gain is None else directions * gain
    return directions


def logit_effects(anatomy: Anatomy, directions: Tensor, k: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k most raised and k most lowered of the first `tokens` vocabulary entries, for each direction [n, d_model].

    Gives (values_up, ids_up, values_down, ids_down), each [n, k] on the CPU, float32 and int64, most affected first. A
    value is the change of the logit per unit along the direction through the final norm's gain (and centring) and the
    unembedding, before the final norm's division. Memory is bounded whatever n and the vocabulary.
    """
    weight = _weight(anatomy.unembedding).detach()[:tokens]
    k = min(k, int(weight.shape[0]))
    x = directions.to(weight.device, torch.float32)
    if anatomy.family.centred:
        x = x - x.mean(dim=1, keepdim=True)
    gain = _gain(anatomy.trunk.get_submodule(anatomy.family.final_norm), anatomy.family.gain_offset)
    if gain is not None:
        x = x * gain.to(x.device)
    rows = max(1, _SCORES // _VOCABULARY)
    parts = [_extreme_logits(block, weight, k) for block in torch.split(x, rows)]
    values_up, ids_up, values_down, ids_down = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return values_up, ids_up, values_down, ids_down


def _extreme_logits(x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`logit_effects` of a few prepared directions, one stretch of the vocabulary after another."""
    best: list[tuple[Tensor, Tensor] | None] = [None, None]
    for start in range(0, weight.shape[0], _VOCABULARY):
        scores = x @ weight[start : start + _VOCABULARY].float().T
        for side, largest in enumerate((True, False)):
            values, ids = scores.topk(min(k, scores.shape[1]), dim=1, largest=largest)
            ids = ids + start
            held = best[side]
            if held is not None:
                values, ids = torch.cat((held[0], values), 1), torch.cat((held[1], ids), 1)
                values, order = values.topk(min(k, values.shape[1]), dim=1, largest=largest)
                ids = ids.gather(1, order)
            best[side] = (values, ids)
    up, down = cast(list[tuple[Tensor, Tensor]], best)
    return *up, *down


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _rows(projection: nn.Module) -> Tensor:
    """[inputs, outputs] of an `nn.Linear` (stored the other way round) or a transformers `Conv1D`."""
    return _weight(projection).T if isinstance(projection, nn.Linear) else _weight(projection)


def _gain(norm: nn.Module, offset: float) -> Tensor | None:
    """float32 scale of a norm, None for one without parameters."""
    weight = getattr(norm, "weight", None)
    return None if weight is None else weight.detach().float() + offset

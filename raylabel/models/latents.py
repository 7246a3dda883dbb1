"""Latents of SAEs and transcoders as units: what they read of a site's activations, and what they write.

`open_latents` gives the `Latents` of one or more layers. Everything is float32 whatever the model's precision. Weights
of a layer are loaded when it is first encoded, and stay on the layer's device; decoders are read when asked for.

A latent's activation is that of SAELens's `encode`, up to float rounding and one thing: of pre-activations that tie at
the k-th place of a TopK, all are kept. Latents are computed `BLOCK` at a time, TopK all at once, so the same activations
[..., d_in] give a latent the same bits whichever others are asked for. Given other positions beside it, a position may
come out different in the last bits, as it may from the model itself; at a threshold that is all or nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raylabel.errors import BadInput
from raylabel.models import latent_files, sites
from raylabel.models.latent_files import Spec
from raylabel.models.sites import Anatomy

BLOCK = 256
"""Latents computed together."""
CELLS = 1 << 26
"""Pre-activations of a TopK held at once where only some of its latents are wanted."""
# Sites that are sums of what is written to the residual stream: centred writing weights show there.
_WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_raw", "mlp_out")


@dataclass(frozen=True, eq=False)
class Encoder:
    """The reading half of one SAE or transcoder, on one device."""

    weight: Tensor
    """[n, d_in]: a row a latent."""
    bias: Tensor
    """[n]"""
    shift: Tensor | None
    """[d_in], taken off the input."""
    threshold: Tensor | None
    """[n]: pre-activations up to it are 0; None for none."""
    scale: Tensor | None
    """[n], times the pre-activations before anything is chosen."""
    k: int | None
    """Pre-activations kept of a TopK."""
    centred: bool
    normalisation: str

    def __call__(self, acts: Tensor, columns: Tensor | None = None) -> Tensor:
        """Activations [..., d_in] to those of the latents, float32 [..., n], or of some [..., columns] (int64)."""
        x = self._prepared(acts.float())
        n = len(self.weight) if columns is None else len(columns)
        flat = x.reshape(-1, x.shape[-1])
        rows = torch.empty((len(flat), n), dtype=torch.float32, device=x.device)
        if self.k is not None:
            step = max(CELLS // len(self.weight), 1) if columns is not None else max(len(flat), 1)
            for at in range(0, len(flat), step):
                rows[at : at + step] = self._top(flat[at : at + step], columns)
            return rows.view(*x.shape[:-1], n)
        blocks = range(-(-len(self.weight) // BLOCK)) if columns is None else torch.unique(columns // BLOCK).tolist()
        for block in blocks:
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            found = self._block(flat, part)
            if columns is None:
                rows[:, part] = found
            else:
                here = (columns // BLOCK == block).nonzero().flatten()
                rows[:, here] = found[:, columns[here] - part.start]
        return rows.view(*x.shape[:-1], n)

    def _prepared(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        if self.normalisation == "constant_norm_rescale":
            x = x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
        elif self.normalisation == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.std(-1, keepdim=True) + 1e-5)
        return x if self.shift is None else x - self.shift

    def _block(self, x: Tensor, part: slice) -> Tensor:
        pre = F.linear(x, self.weight[part], self.bias[part])
        if self.scale is not None:
            pre *= self.scale[part]
        if self.threshold is not None:
            pre.masked_fill_(pre <= self.threshold[part], 0.0)
        return pre.relu_()

    def _top(self, x: Tensor, columns: Tensor | None) -> Tensor:
        pre = F.linear(x, self.weight, self.bias)
        if self.scale is not None:
            pre *= self.scale
        least = pre.topk(self.k or 0, dim=-1).values[..., -1:]
        pre = pre if columns is None else pre[..., columns]
        return pre.masked_fill_(pre < least, 0.0).relu_()


class Latents:
    """The latents of a model's layers, at one site, the same number in each.

    Attributes:
        layers: those that have latents, ascending.
        width: latents a layer.
        site: where they read, one of `sites.HOOK_NAMES` or `sites.LATENT_HOOKS`.
    """

    def __init__(self, specs: Sequence[Spec], anatomy: Anatomy) -> None:
        self._specs = {spec.layer: spec for spec in specs}
        self._anatomy = anatomy
        self._encoders: dict[int, Encoder] = {}
        self.layers, self.width, self.site = tuple(self._specs), specs[0].d_sae, specs[0].site

    def hook_name(self, layer: int) -> str:
        """SAELens's name of the latents' activations, e.g. `blocks.5.hook_resid_pre.hook_sae_acts_post`."""
        return f"{self._specs[layer].hook}.hook_sae_acts_post"

    def encode(self, layer: int, acts: Tensor, columns: Tensor | None = None) -> Tensor:
        """float32 [..., n] of activations [..., d_in] at the site; see `Encoder`. KeyError for a layer without latents."""
        if layer not in self._encoders:
            # A visitor calls in inference mode; what is kept must be of use outside of it too.
            with torch.inference_mode(False), torch.no_grad():
                self._encoders[layer] = self._load(self._specs[layer])
        return self._encoders[layer](acts, columns)

    def output_directions(self, layer: int) -> Tensor:
        """float32 [width, d_model]: what one unit of a latent's activation makes the decoder write to the stream.

        Norms on the way count as in `sites.output_directions`, and so does a normalisation of the input that the decoder
        undoes: exact up to a positive factor a position.
        """
        spec = self._specs[layer]
        on = sites.device_of(self._anatomy, spec.out_layer)
        rows = latent_files.read(spec, "W_dec").to(on)
        if spec.rescales:
            rows = rows / _norms(rows)[:, None]
        if spec.out_site not in (*sites.MLP_SITES, "mlp_raw"):
            return rows
        return rows @ sites.output_directions(self._anatomy, spec.out_site, spec.out_layer).to(on)

    def _load(self, spec: Spec) -> Encoder:
        tensors = {name: latent_files.read(spec, name) for name in ("W_enc", "b_enc")}
        on = sites.device_of(self._anatomy, spec.layer)
        return Encoder(
            weight=tensors["W_enc"].T.to(on, memory_format=torch.contiguous_format).contiguous(),
            bias=tensors["b_enc"].to(on),
            shift=latent_files.read(spec, "b_dec").to(on) if spec.subtracts else None,
            threshold=latent_files.threshold(spec).to(on) if spec.activation == "jumprelu" else None,
            scale=_norms(latent_files.read(spec, "W_dec")).to(on) if spec.rescales else None,
            k=spec.k,
            centred=spec.centred and self._anatomy.family.centred and spec.site in _WRITTEN,
            normalisation=spec.normalisation,
        )


def open_latents(name: str, anatomy: Anatomy, site: str | None = None) -> Latents:
    """The latents of `subject.latents` for a model, checked against it; `site` is the one that was asked for, if any."""
    specs = latent_files.find(name)
    if site is not None and site != specs[0].site:
        raise BadInput(f"subject.site: {site}, but the latents in {name} read {specs[0].hook}; leave subject.site out")
    for spec in specs:
        for hook, at, layer, size in (
            (spec.hook, spec.site, spec.layer, spec.d_in),
            (spec.out_hook, spec.out_site, spec.out_layer, spec.d_out),
        ):
            sites.check_latent_hook(anatomy, at, hook)
            if layer >= len(anatomy.blocks):
                last = len(anatomy.blocks) - 1
                raise BadInput(f"subject.latents: {spec.folder} is of {hook}, but the model has layers 0 to {last}")
            wanted = sites.width(anatomy, at)
            if size != wanted:
                raise BadInput(
                    f"subject.latents: {spec.folder} has {size} coordinates at {hook}, and the model {wanted}; "
                    f"use the model that it was trained on"
                )
    return Latents(specs, anatomy)


def _norms(rows: Tensor) -> Tensor:
    """[n] lengths of decoder rows, none of them 0."""
    return rows.norm(dim=-1).clamp(min=1e-8)

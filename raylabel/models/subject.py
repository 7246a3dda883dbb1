"""The model under study behind one interface: token ids in, activations at one site out.

`load_subject` gives a `Subject`; `Subject.run` makes one forward pass, shows every wanted layer's activations to a
callback while they exist, and ends right after the last of them: nothing of the size tokens x units is kept and the
LM head never runs. All sites, families and directions are described in `sites.py`, names and errors of loading in
`loading.py`.

What the callback sees has `site_width` coordinates; `Subject.read` makes unit columns of it. A plain unit's column is its
coordinate. Latents (`latents.py`) are computed. With quadrants, a unit of a gated MLP has two columns, its activation
where its gate is above 0 and where it is not, each 0 elsewhere: neuron n and polarity p are column n + width * (|p| - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raylabel.errors import BadInput
from raylabel.models import sites
from raylabel.models.latents import Latents, open_latents
from raylabel.models.loading import load, resolve_device, special_ids
from raylabel.models.sites import Anatomy
from raylabel.models.suffix import Tree

Visit = Callable[[int, Tensor, Tensor], None]


class _Finished(Exception):
    """Ends a forward pass whose last site has been read; never leaves `run`."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded model read at one site. Not for use by two threads at once: hooks belong to the modules."""

    name: str
    revision: str | None
    n_layers: int
    site: str
    width: int
    """Units a layer."""
    site_width: int
    """Coordinates of the activations that `run` shows."""
    layers: tuple[int, ...]
    """Layers that have units, ascending."""
    d_model: int
    polarities: tuple[int, ...]
    """What `polarity: auto` means here."""
    dtype: torch.dtype
    device: torch.device
    """Where ids go; see `layer_device`."""
    tokenizer: Any
    prepend_bos: bool
    """Whether samples begin with `bos_id`."""
    bos_id: int | None
    special_ids: frozenset[int]
    pad_id: int
    """A valid id to fill the right of short samples with."""
    max_context: int | None
    model: Any
    anatomy: Anatomy
    latents: Latents | None = None
    """The units, where they are not the site's coordinates."""
    quadrants: bool = False
    """Whether units are read apart by the sign of their gate."""

    def hook_name(self, layer: int) -> str:
        """TransformerLens's or SAELens's name of the units' activations, as in the `site` column of the tables."""
        if self.latents is not None:
            return self.latents.hook_name(layer)
        return f"blocks.{layer}.{sites.HOOK_NAMES[self.site]}"

    def layer_device(self, layer: int) -> torch.device:
        """Where `run` shows a layer's activations: a model may lie on several devices."""
        return sites.device_of(self.anatomy, layer)

    @property
    def columns(self) -> int:
        """Unit columns a layer, of which `read` takes numbers: 2 * width with quadrants, else width."""
        return self.width * (2 if self.quadrants else 1)

    def at(self, site: str) -> Subject:
        """The same loaded model, read at another site: its coordinates are the units."""
        sites.check_site(self.anatomy, site)
        width = sites.width(self.anatomy, site)
        return replace(
            self, site=site, width=width, site_width=width, layers=tuple(range(self.n_layers)), latents=None,
            quadrants=False, polarities=sites.polarities(self.anatomy, site),
        )  # fmt: skip

    def sister_site(self) -> str | None:
        """The other site at which a recording of these units may have been made, None where there is none."""
        return None if self.latents is not None else sites.sister_site(self.anatomy, self.site)

    @property
    def shares_beginnings(self) -> bool:
        """Whether `run` takes a tree: texts that begin alike then need one pass over their beginning."""
        return self.anatomy.call_tree is not None

    def run(self, ids: Tensor, layers: Sequence[int], visit: Visit, tree: Tree | None = None) -> None:
        """One forward pass over ids [B, T]; calls visit(layer, activations [B, T, site_width], residual [B, T, d_model]).

        Layers come in ascending order, each once; `residual` is the stream entering the block, and both tensors are in
        the model's dtype (at `mlp_normed` float32), on `layer_device(layer)`, and valid during the call only. Samples
        shorter than T are filled on the right with any valid id: the models are causal, so no attention mask is needed
        and what follows a position does not change it. Activations at filled positions mean nothing. Errors of `visit`
        pass through; hooks always go. With a `tree`, on `device`, rows are nodes of tries instead of texts, see
        `models.suffix`.
        """
        wanted = sorted(set(layers))
        if not wanted:
            return
        residual: dict[int, Tensor] = {}
        above: dict[int, Tensor] = {}
        handles = []

        def show(layer: int, activations: Tensor) -> None:
            if self.quadrants:
                opened, nothing = above.pop(layer), activations.new_zeros(())
                pair = (torch.where(opened, activations, nothing), torch.where(opened, nothing, activations))
                activations = torch.cat(pair, dim=-1)
            # What a block is given may still lie where the one before it does.
            device = self.layer_device(layer)
            visit(layer, activations.to(device), residual.pop(layer).to(device))
            if layer == wanted[-1]:
                raise _Finished

        def on_block(layer: int) -> Callable[..., None]:
            def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                residual[layer] = _given(args, kwargs)

            return hook

        def on_gate(layer: int) -> Callable[..., None]:
            def hook(_module: Any, _args: tuple[Any, ...], output: Tensor) -> None:
                above[layer] = output > 0

            return hook

        def on_input(layer: int) -> Callable[..., None]:
            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = _given(args, kwargs)
                show(layer, sites.normalised(module, given) if self.site == "mlp_normed" else given)

            return hook

        def on_output(layer: int) -> Callable[..., None]:
            return lambda _module, _args, output: show(layer, output[0] if isinstance(output, tuple) else output)

        try:
            for layer in wanted:
                block = self.anatomy.blocks[layer]
                handles.append(block.register_forward_pre_hook(on_block(layer), with_kwargs=True))
                if self.quadrants:
                    handles.append(sites.gate(self.anatomy, layer).register_forward_hook(on_gate(layer)))
                module, output = sites.tap(self.anatomy, self.site, layer)
                if output:
                    handles.append(module.register_forward_hook(on_output(layer)))
                else:
                    handles.append(module.register_forward_pre_hook(on_input(layer), with_kwargs=True))
            with torch.inference_mode():
                if tree is None:
                    self.anatomy.call(ids.to(self.device))
                elif self.anatomy.call_tree is None:
                    raise ValueError(f"{self.name} cannot share the beginnings of texts")
                else:
                    self.anatomy.call_tree(ids.to(self.device), tree)
        except _Finished:
            pass
        else:
            raise RuntimeError(f"{self.name}: a forward pass ended before it reached {self.hook_name(wanted[-1])}")
        finally:
            for handle in handles:
                handle.remove()

    def activations(self, ids: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """The activations of `run`, collected: layer -> [B, T, site_width]. For small things."""
        collected: dict[int, Tensor] = {}

        def keep(layer: int, activations: Tensor, _residual: Tensor) -> None:
            with torch.inference_mode(False):
                collected[layer] = activations.clone()

        self.run(ids, layers, keep)
        return collected

    def read(self, layer: int, activations: Tensor, columns: Tensor | None = None) -> Tensor:
        """float32 [..., columns] of activations [..., site_width] of a layer, as `run` shows them, at any positions.

        Args:
            columns: int64 [n] on the same device, the wanted unit columns; None for all, in their order.

        Exact for coordinates of the site, which may be given back as they are: do not write into them. For latents see
        `models.latents`. KeyError for a layer without latents.
        """
        if self.latents is not None:
            return self.latents.encode(layer, activations, columns)
        return (activations if columns is None else activations[..., columns]).float()

    def output_directions(self, layer: int) -> Tensor:
        """float32 [width, d_model]: what one unit of a unit's activation writes into the residual stream."""
        if self.latents is not None:
            return self.latents.output_directions(layer)
        return sites.output_directions(self.anatomy, self.site, layer)

    def site_directions(self, layer: int) -> Tensor:
        """float32 [site_width, d_model]: the same for the coordinates that `run` shows."""
        directions = sites.output_directions(self.anatomy, self.site, layer)
        return torch.cat((directions, directions)) if self.quadrants else directions

    def logit_effects(self, directions: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(values_up, ids_up, values_down, ids_down), each [n, k]: tokens that directions [n, d_model] raise and lower.

        From the weights alone; entries of the vocabulary that no token has are left out.
        """
        tokens = max(self.tokenizer.get_vocab().values()) + 1
        return sites.logit_effects(self.anatomy, directions, k, tokens)


def load_subject(
    model: str,
    *,
    revision: str | None = None,
    site: str | None = None,
    latents: str | None = None,
    quadrants: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    bos: str = "auto",
    context: int = 128,
    trust_remote_code: bool = False,
    gpus: float | None = None,
) -> Subject:
    """Loads the model once; every bad argument is a `BadInput` of one line that names its key.

    Args:
        site: None is `mlp_post`, or where the latents read.
        latents: a folder or release of SAEs or transcoders, see `latent_files`; their latents are the units.
        quadrants: reads units of a gated MLP apart by the sign of their gate.
        gpus: GPUs of this worker; None spreads a model over those there are if the first is too small for it.
    """
    if quadrants and latents is not None:
        raise BadInput("subject.polarity: latents have no gate whose sign could make quadrants: use auto")
    site = "mlp_post" if site is None and latents is None else site
    if site is not None and site not in sites.HOOK_NAMES:
        raise BadInput(f"subject.site: no site {site!r}; use one of {', '.join(sites.HOOK_NAMES)}")
    loaded = load(
        model,
        revision=revision,
        dtype=dtype,
        device=resolve_device(device),
        context=context,
        trust_remote_code=trust_remote_code,
        gpus=gpus,
    )
    anatomy, tokenizer = loaded.anatomy, loaded.tokenizer
    weight = next(anatomy.trunk.parameters())
    units = None if latents is None else open_latents(latents, anatomy, site)
    if units is not None:
        site = units.site
    else:
        assert site is not None
        sites.check_site(anatomy, site)
    if quadrants:
        sites.check_quadrants(anatomy, site)
    prepend, bos_id = resolve_bos(tokenizer, bos, loaded.prepends_bos)
    coordinates, n_layers = sites.width(anatomy, site), len(anatomy.blocks)
    return Subject(
        name=loaded.name,
        revision=loaded.revision,
        n_layers=n_layers,
        site=site,
        width=units.width if units is not None else coordinates,
        site_width=coordinates * (2 if quadrants else 1),
        layers=units.layers if units is not None else tuple(range(n_layers)),
        d_model=anatomy.d_model,
        # No latent of the supported kinds goes below 0.
        polarities=(1,) if units is not None else sites.polarities(anatomy, site),
        dtype=weight.dtype,
        device=weight.device,
        tokenizer=tokenizer,
        prepend_bos=prepend,
        bos_id=bos_id,
        special_ids=special_ids(tokenizer),
        pad_id=pad_id_of(tokenizer, anatomy.vocabulary),
        max_context=loaded.max_context,
        model=loaded.model,
        anatomy=anatomy,
        latents=units,
        quadrants=quadrants,
    )


def resolve_bos(tokenizer: Any, policy: str, convention: bool | None) -> tuple[bool, int | None]:
    """(whether samples begin with BOS, its id). `auto` asks the model's convention, else what the tokenizer does."""
    bos_id = tokenizer.bos_token_id
    if policy == "never":
        return False, bos_id
    if policy == "always" or (policy == "auto" and convention):
        if bos_id is None:
            raise BadInput("subject.bos: always, but the tokenizer has no BOS token; use auto or never")
        return True, bos_id
    if policy != "auto":
        raise BadInput(f"subject.bos: {policy!r} is none of auto, always, never")
    if convention is False:
        return False, bos_id
    full, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if full[:1] != bare[:1] and full[0] in special_ids(tokenizer):
        return True, full[0]
    return False, bos_id


def pad_id_of(tokenizer: Any, vocabulary: int) -> int:
    """A valid id for positions that do not count."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and token < vocabulary:
            return int(token)
    return 0


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with."""
    given: Tensor = args[0] if args else kwargs["hidden_states"]
    return given

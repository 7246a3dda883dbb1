"""The model under study behind one interface: token ids in, activations at one site out.

`load_subject` gives a `Subject`; `Subject.run` makes one forward pass, shows every wanted layer's activations to a
callback while they exist, and ends right after the last of them: nothing of the size tokens x units is kept and the
LM head never runs. All sites, families and directions are described in `sites.py`, names and errors of loading in
`loading.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raylabel.errors import BadInput
from raylabel.models import sites
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
    """Units a layer at the site."""
    d_model: int
    polarities: tuple[int, ...]
    """What `polarity: auto` means here."""
    dtype: torch.dtype
    device: torch.device
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

    def hook_name(self, layer: int) -> str:
        """TransformerLens's name of the site, as in the `site` column of the tables."""
        return f"blocks.{layer}.{sites.HOOK_NAMES[self.site]}"

    def at(self, site: str) -> Subject:
        """The same loaded model, read at another site."""
        sites.check_site(self.anatomy, site)
        return replace(self, site=site, width=sites.width(self.anatomy, site), polarities=sites.polarities(self.anatomy, site))

    def sister_site(self) -> str | None:
        """The other site at which a recording of these units may have been made, None where there is none."""
        return sites.sister_site(self.anatomy, self.site)

    @property
    def shares_beginnings(self) -> bool:
        """Whether `run` takes a tree: texts that begin alike then need one pass over their beginning."""
        return self.anatomy.call_tree is not None

    def run(self, ids: Tensor, layers: Sequence[int], visit: Visit, tree: Tree | None = None) -> None:
        """One forward pass over ids [B, T]; calls visit(layer, activations [B, T, width], residual [B, T, d_model]).

        Layers come in ascending order, each once; `residual` is the stream entering the block, and both tensors are in
        the model's dtype, on its device, and valid during the call only. Samples shorter than T are filled on the right
        with any valid id: the models are causal, so no attention mask is needed and what follows a position does not
        change it. Activations at filled positions mean nothing. Errors of `visit` pass through; hooks always go.
        With a `tree`, on the model's device, rows are nodes of tries instead of texts, see `models.suffix`.
        """
        wanted = sorted(set(layers))
        if not wanted:
            return
        residual: dict[int, Tensor] = {}
        handles = []

        def show(layer: int, activations: Tensor) -> None:
            visit(layer, activations, residual.pop(layer))
            if layer == wanted[-1]:
                raise _Finished

        def on_block(layer: int) -> Callable[..., None]:
            def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                residual[layer] = _given(args, kwargs)

            return hook

        def on_input(layer: int) -> Callable[..., None]:
            return lambda _module, args, kwargs: show(layer, _given(args, kwargs))

        def on_output(layer: int) -> Callable[..., None]:
            return lambda _module, _args, output: show(layer, output[0] if isinstance(output, tuple) else output)

        try:
            for layer in wanted:
                block = self.anatomy.blocks[layer]
                handles.append(block.register_forward_pre_hook(on_block(layer), with_kwargs=True))
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
        """The activations of `run`, collected: layer -> [B, T, width]. For small things."""
        collected: dict[int, Tensor] = {}

        def keep(layer: int, activations: Tensor, _residual: Tensor) -> None:
            with torch.inference_mode(False):
                collected[layer] = activations.clone()

        self.run(ids, layers, keep)
        return collected

    def output_directions(self, layer: int) -> Tensor:
        """float32 [width, d_model]: what one unit of activation writes into the residual stream."""
        return sites.output_directions(self.anatomy, self.site, layer)

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
    site: str = "mlp_post",
    dtype: str = "auto",
    device: str = "auto",
    bos: str = "auto",
    context: int = 128,
    trust_remote_code: bool = False,
) -> Subject:
    """Loads the model once; every bad argument is a `BadInput` of one line that names its key."""
    if site not in sites.HOOK_NAMES:
        raise BadInput(f"subject.site: no site {site!r}; use one of {', '.join(sites.HOOK_NAMES)}")
    loaded = load(
        model,
        revision=revision,
        dtype=dtype,
        device=resolve_device(device),
        context=context,
        trust_remote_code=trust_remote_code,
    )
    anatomy, tokenizer = loaded.anatomy, loaded.tokenizer
    sites.check_site(anatomy, site)
    prepend, bos_id = _resolve_bos(tokenizer, bos, loaded.prepends_bos)
    weight = next(anatomy.trunk.parameters())
    return Subject(
        name=loaded.name,
        revision=loaded.revision,
        n_layers=len(anatomy.blocks),
        site=site,
        width=sites.width(anatomy, site),
        d_model=anatomy.d_model,
        polarities=sites.polarities(anatomy, site),
        dtype=weight.dtype,
        device=weight.device,
        tokenizer=tokenizer,
        prepend_bos=prepend,
        bos_id=bos_id,
        special_ids=special_ids(tokenizer),
        pad_id=_pad_id(tokenizer, anatomy.vocabulary),
        max_context=loaded.max_context,
        model=loaded.model,
        anatomy=anatomy,
    )


def _resolve_bos(tokenizer: Any, policy: str, convention: bool | None) -> tuple[bool, int | None]:
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


def _pad_id(tokenizer: Any, vocabulary: int) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and token < vocabulary:
            return int(token)
    return 0


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with."""
    given: Tensor = args[0] if args else kwargs["hidden_states"]
    return given

"""SAEs and transcoders on disk or on the hub: found, their settings read, their tensors checked without loading them.

`find(name)` takes `subject.latents` and gives a `Spec` for each SAE or transcoder in SAELens's format: a folder with
`cfg.json` and `sae_weights.safetensors`. The name is such a folder, a folder of such folders, or a place on the hub:
`OWNER/REPO`, `OWNER/REPO/PATH`, `OWNER/REPO:PATH`, or one of `RELEASES` with an id behind a colon or slash. PATH may be
a pattern (`blocks.*.hook_resid_pre`). `read(spec, tensor)` gives a tensor as float32.

Formats of SAELens 3 to 6 are read; what would need numbers that the files do not hold is refused. Its own loader is not
used: version 6.54 neither installs nor imports beside TransformerLens 4. `BadInput` names `subject.latents`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raylabel.errors import BadInput
from raylabel.models.sites import HOOK_NAMES, LATENT_HOOKS

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# Architecture as saved -> what its activation function does. BatchTopK is JumpReLU with one threshold once it is trained.
ARCHITECTURES = {
    "standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu",
    "transcoder": "relu", "skip_transcoder": "relu", "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu",
}  # fmt: skip
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
_OAI = {f"gpt2-small-{site}-v5-{n}k": (f"jbloom/GPT2-Small-OAI-v5-{n}k-{site}-SAEs", f"v5_{n}k_layer_{{layer}}")
        for site in ("resid-mid", "mlp-out", "attn-out", "resid-post") for n in (32, 128)}  # fmt: skip
_OAI["gpt2-small-resid-post-v5-32k"] = (_OAI["gpt2-small-resid-post-v5-32k"][0], "v5_32k_layer_{layer}.pt")
RELEASES = {
    "gpt2-small-res-jb": ("jbloom/GPT2-Small-SAEs-Reformatted", "{id}"),
    "gpt2-small-res-jb-feature-splitting": ("jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8", "{id}"),
    "gemma-2-9b-res-matryoshka-dc": ("chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60", "{id}"),
    "gemma-3-1b-res-matryoshka-dc": ("chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40", "{id}"),
    **_OAI,
}
"""SAELens's names of releases in its own format: the repository, and the folder of an SAE id, which is a hook's name."""
# What the files of some repositories do not say, by SAELens's directory of releases.
_CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
_UNSAID: dict[str, dict[str, Any]] = {
    RELEASES["gpt2-small-res-jb"][0]: _CENTRED,
    RELEASES["gpt2-small-res-jb-feature-splitting"][0]: _CENTRED,
    "tommmcgrath/gpt2-small-mlp-out-saes": _CENTRED,
    "JoshEngels/Mistral-7B-Residual-Stream-SAEs": {"normalize_activations": "constant_norm_rescale"},
}
_REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:[:/](?P<path>.+))?")
_RELEASE = re.compile(r"(?P<name>[\w.-]+)(?:[:/](?P<id>.+))?")
_LENS = re.compile(r"blocks\.(\d+)\.(.+)")
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d+)(?:\.(.+))?")
_SITES = {
    **{hook: site for site, hook in (*HOOK_NAMES.items(), *LATENT_HOOKS.items())},
    "hook_mlp_in": "resid_mid", "hook_in": "resid_pre", "hook_out": "resid_post",
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What the files of one SAE or transcoder say."""

    folder: Path
    hook: str
    """The hook point it reads, by the name it was saved with."""
    layer: int
    site: str
    """One of `sites.HOOK_NAMES` or `sites.LATENT_HOOKS`."""
    out_hook: str
    out_layer: int
    out_site: str
    """Where its decoder writes: for an SAE, where it reads."""
    activation: str
    """`relu`, `topk` or `jumprelu`."""
    k: int | None
    d_in: int
    d_sae: int
    d_out: int
    subtracts: bool
    """The decoder's bias is taken off the input."""
    rescales: bool
    """Activations are in units of the decoder rows' norms."""
    normalisation: str
    centred: bool
    """It was trained on a model whose residual stream has no mean over its coordinates."""

    @property
    def transcoder(self) -> bool:
        return self.out_hook != self.hook


def find(name: str) -> list[Spec]:
    """The SAEs of a folder or a hub name, by layer; `BadInput` where there is none or they do not belong together."""
    folder, unsaid = Path(name).expanduser(), dict[str, Any]()
    if folder.is_dir():
        pattern = "."
    elif folder.exists():
        raise BadInput(f"subject.latents: {name} is a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    elif folder.is_absolute() or name.startswith((".", "~")):
        raise BadInput(f"subject.latents: no such folder: {name}")
    else:
        folder, pattern, unsaid = _download(name)
    configs = sorted(folder.glob(f"{pattern}/{CONFIG}")) or sorted(folder.glob(f"{pattern}/*/{CONFIG}"))
    if not configs:
        raise BadInput(f"subject.latents: no {CONFIG} in {name} or in the folders in it; give the folder of a saved SAE")
    specs = sorted((_spec(config.parent, unsaid) for config in configs), key=lambda spec: spec.layer)
    for one, other in pairwise(specs):
        pair = f"{one.folder.name} and {other.folder.name} in {name}"
        if (one.site, one.transcoder) != (other.site, other.transcoder):
            raise BadInput(f"subject.latents: {pair} read {one.hook} and {other.hook}, two sites; give those of one site")
        if one.layer == other.layer:
            raise BadInput(f"subject.latents: {pair} both read {one.hook}; give one of them a layer")
        if one.d_sae != other.d_sae:
            raise BadInput(f"subject.latents: {pair} have {one.d_sae} and {other.d_sae} latents; give those of one size")
    return specs


def read(spec: Spec, name: str) -> Tensor:
    """A tensor of the weights file as float32 on the CPU."""
    with safe_open(spec.folder / WEIGHTS, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor.float()


def threshold(spec: Spec) -> Tensor:
    """float32 [d_sae] of a JumpReLU, whatever it was saved as."""
    with safe_open(spec.folder / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
    if "threshold" in names:
        return read(spec, "threshold")
    if "log_threshold" in names:
        return read(spec, "log_threshold").exp()
    return read(spec, "topk_threshold").expand(spec.d_sae)


def parse_hook(hook: str, transcoder: bool = False) -> tuple[int, str] | None:
    """(layer, site) of a hook's name, TransformerLens's or a module's in transformers; None for what is not known.

    `model.layers.5` is what the block gives, `model.layers.5.mlp` what the MLP gives, or is given by a transcoder's input.
    """
    lens, module = _LENS.fullmatch(hook), _MODULE.fullmatch(hook)
    if lens:
        site = _SITES.get(lens[2])
        return None if site is None else (int(lens[1]), site)
    if module and module[2] in (None, "mlp"):
        return int(module[1]), "resid_post" if module[2] is None else "mlp_in" if transcoder else "mlp_raw"
    return None


def _download(name: str) -> tuple[Path, str, dict[str, Any]]:
    """(local folder of the repository, pattern of the SAEs' folders in it, settings that their files do not hold)."""
    from huggingface_hub import snapshot_download

    release, repository = _RELEASE.fullmatch(name), _REPOSITORY.fullmatch(name)
    if release and release["name"] in RELEASES:
        repo, template = RELEASES[release["name"]]
        number = re.search(r"\d+", release["id"] or "")
        path = template.format(id=release["id"] or "*", layer=number[0] if number else "*")
    elif repository:
        repo, path = repository["repo"], (repository["path"] or ".").strip("/")
    else:
        raise BadInput(
            f"subject.latents: no folder {name} here, and no release of that name is known; give a folder or OWNER/REPO:PATH"
        )
    folders = ["", "*/"] if path == "." else [f"{path}/"]
    wanted = [f"{folder}{file}" for folder in folders for file in (CONFIG, WEIGHTS)]
    try:
        where = snapshot_download(repo, allow_patterns=wanted)
    except Exception as error:
        gist = str(error).strip().splitlines()
        raise BadInput(
            f"subject.latents: no folder {name} here, and {repo} could not be fetched from the hub "
            f"({type(error).__name__}: {gist[0][:120] if gist else ''}); give a folder"
        ) from error
    return Path(where), path, _UNSAID.get(repo, {})


def _spec(folder: Path, unsaid: dict[str, Any]) -> Spec:
    config = {**_config(folder), **unsaid}
    metadata = {**(config.get("metadata") or {}), **unsaid}

    def said(*names: str) -> Any:
        """The first of some settings that is there, which newer files keep apart."""
        places = [place[name] for name in names for place in (metadata, config) if place.get(name) is not None]
        return places[0] if places else None

    architecture, k = config.get("architecture", "standard"), config.get("k")
    function = said("activation_fn", "activation_fn_str") or "relu"
    if function == "topk" and architecture == "standard":
        architecture, k = "topk", (config.get("activation_fn_kwargs") or {}).get("k", k)
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BadInput(f"subject.latents: {folder} is of the architecture {architecture!r}; supported are {known}")
    if function not in ("relu", "topk"):
        raise BadInput(f"subject.latents: {folder} has the activation function {function!r}; relu and topk are supported")
    normalisation = config.get("normalize_activations") or "none"
    normalisation = "expected_average_only_in" if normalisation is True else normalisation
    if normalisation not in NORMALISATIONS:
        raise BadInput(
            f"subject.latents: {folder} has normalize_activations {normalisation}, whose numbers are not in the folder; "
            f"fold them into the weights with SAELens and save it again"
        )
    hook, out_hook = said("hook_name", "hook_point"), said("hook_name_out")
    reads_elsewhere = "transcoder" in architecture or (out_hook is not None and out_hook != hook)
    place = parse_hook(hook, reads_elsewhere) if isinstance(hook, str) else None
    if said("hook_head_index", "hook_point_head_index") is not None or config.get("reshape_activations", "none") != "none":
        raise BadInput(f"subject.latents: {folder} reads attention heads ({hook}), which are no site; use other latents")
    if place is None:
        sites = ", ".join(sorted(_SITES))
        raise BadInput(f"subject.latents: {folder} reads {hook}, which is no site; blocks.N. with {sites} can be read")
    if not reads_elsewhere and place[1] in ("mlp_in", "mlp_normed"):
        raise BadInput(f"subject.latents: {folder} is an SAE of what the MLP is given ({hook}); only transcoders are read there")
    out_hook = (out_hook or f"blocks.{place[0]}.hook_mlp_out") if reads_elsewhere else hook
    target = (parse_hook(out_hook) if reads_elsewhere else place) if isinstance(out_hook, str) else None
    if target is None:
        raise BadInput(f"subject.latents: {folder} writes to {out_hook}, which is no site; use other latents")
    kwargs = said("model_from_pretrained_kwargs") or {}
    spec = Spec(
        folder=folder, hook=hook, layer=place[0], site=place[1], out_hook=out_hook, out_layer=target[0], out_site=target[1],
        activation=ARCHITECTURES[architecture], k=int(k) if architecture == "topk" and k else None,
        **_sizes(folder, architecture),
        subtracts=not reads_elsewhere and bool(config.get("apply_b_dec_to_input", True)),
        rescales="topk" in architecture and bool(config.get("rescale_acts_by_decoder_norm", False)),
        normalisation=normalisation, centred=bool(kwargs.get("center_writing_weights")),
    )  # fmt: skip
    if architecture == "topk" and not 0 < (spec.k or 0) <= spec.d_sae:
        raise BadInput(f"subject.latents: {folder}/{CONFIG} has k: {k} for {spec.d_sae} latents; set it as it was in training")
    return spec


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"subject.latents: {folder}/{CONFIG} is no valid JSON ({type(error).__name__}); save it again") from None
    if not isinstance(config, dict):
        raise BadInput(f"subject.latents: {folder}/{CONFIG} holds no settings; give the folder of a saved SAE")
    return config


def _sizes(folder: Path, architecture: str) -> dict[str, int]:
    """d_in, d_sae and d_out of the weights, whose tensors are checked against each other."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise BadInput(f"subject.latents: {folder} has no {WEIGHTS}; put the weights beside {CONFIG}")
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            scaled = file.get_tensor("scaling_factor") if "scaling_factor" in shapes else torch.ones(1)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"subject.latents: {path} is not readable ({str(error)[:120]}); save it again") from None
    if not torch.allclose(scaled.float(), torch.ones(1)):
        raise BadInput(f"subject.latents: {path} was fine-tuned with a scaling_factor, which is not supported; use other latents")
    for name in ("W_enc", "W_dec"):
        if len(shapes.get(name, ())) != 2:
            raise BadInput(f"subject.latents: {path} has no matrix {name}; give weights in SAELens's format")
    (d_in, d_sae), (_, d_out) = shapes["W_enc"], shapes["W_dec"]
    wanted: dict[str, tuple[int, ...]] = {"W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)}
    if ARCHITECTURES[architecture] == "jumprelu":
        names = [name for name in ("threshold", "log_threshold", "topk_threshold") if name in shapes]
        wanted[names[0] if names else "threshold"] = () if names == ["topk_threshold"] else (d_sae,)
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            has = f"is {list(shapes[name])}" if name in shapes else "is missing"
            raise BadInput(f"subject.latents: {name} of {path} {has}, not {list(shape)}; give weights in SAELens's format")
    return {"d_in": d_in, "d_sae": d_sae, "d_out": d_out}

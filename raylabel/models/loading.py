"""Finds, checks and loads the model under study: a hub name, a folder, a TransformerLens name, or `demo`.

`load(...)` gives a `Loaded`: the model in evaluation mode, taken apart (`sites.Anatomy`), and its fast tokenizer.
Three kinds are told apart: folders and hub names as plain transformers models, folders of TransformerLens's own
architecture (`native`), and TransformerLens's own published models (SoLU, GELU, …), whose weights only its loader
reads. TransformerLens is imported for the last two, and to look up a bare name that the hub does not have. Weights are
safetensors unless `trust_remote_code` is asked for; TransformerLens's published models are `.pth`, which its loader
reads with `weights_only`.

Every failure is a `BadInput` of one line that names the key and the mend.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from raylabel.errors import BadInput
from raylabel.models import placement
from raylabel.models.sites import Anatomy, family_of, native_anatomy, transformers_anatomy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# TransformerLens's own models by its short names, and the hub accounts that hold them.
_OWN_NAME = re.compile(r"(solu|gelu|attn-only)-\d+l(-.*)?|attn-only-demo|othello-gpt|redwood_attn_2l", re.IGNORECASE)
_OWN_ACCOUNT = re.compile(r"(NeelNanda|ArthurConmy|Baidicoot)/", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Loaded:
    name: str
    """The name or folder that was loaded in the end."""
    revision: str | None
    model: Any
    """What holds the weights; kept alive beside the anatomy."""
    anatomy: Anatomy
    tokenizer: Any
    max_context: int | None
    prepends_bos: bool | None
    """Whether the model's own convention is to begin with BOS; None asks the tokenizer."""


def load(
    model: str,
    *,
    revision: str | None,
    dtype: str,
    device: torch.device,
    context: int,
    trust_remote_code: bool,
    gpus: float | None = None,
) -> Loaded:
    """The model in `dtype` ('auto': float32 on CPU, else the checkpoint's own) on `device`, with room for `context`.

    Args:
        device: `meta` gives the model's shape alone: no weights are looked for.
        gpus: of this worker, see `placement.spread`; TransformerLens's own models lie on one in any case.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise BadInput(f"subject.dtype: {dtype!r} is none of auto, {', '.join(DTYPES)}")
    precision = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else None)
    with _quiet():
        source = _folder(model)
        if source is not None:
            _refuse_outside(source)
        own = source is None and bool(_OWN_NAME.fullmatch(model) or _OWN_ACCOUNT.match(model))
        native = source is not None and _names_native(source)
        if device.type == "meta" and (own or native):
            raise BadInput(f"subject.model: {model} is not planned without its weights; only plain transformers models are")
        if source is not None and native:
            loaded = _load_native(model, source, precision, device)
        elif own:
            loaded = _load_published(model, revision, precision, device)
        else:
            loaded = _load_transformers(model, source, revision, precision, device, context, trust_remote_code, gpus)
    check_context(loaded.name, context, loaded.max_context)
    _check_vocabulary(loaded.tokenizer, loaded.anatomy.vocabulary, loaded.name)
    return loaded


def _refuse_outside(folder: Path) -> None:
    """BadInput where a model folder names weights that lie elsewhere."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            outside = sorted(name for name in names if Path(name).name != name or "\\" in name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise BadInput(f"subject.model: {index} is no index of weights; download the model again") from None
        if outside:
            raise BadInput(f"subject.model: {index} names weights outside of its folder, {outside[0]!r}; do not use this model")


def resolve_device(device: str) -> torch.device:
    """'auto' is CUDA where there is one; a device that is not there is a `BadInput`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(f"subject.device: no device {device!r} here; use auto or cpu") from error
    return resolved


def check_context(name: str, context: int, positions: int | None) -> None:
    if positions is not None and context > positions:
        raise BadInput(f"subject.context: {context} tokens, but {name} has {positions} positions; use at most {positions}")


def _folder(model: str) -> Path | None:
    """The folder that the name stands for, None for a name to look up elsewhere."""
    if model == "demo":
        return Path(__file__).resolve().parent.parent / "demo" / "model"
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"subject.model: the folder {model} has no config.json; give the folder of a saved model")
        return path
    if path.exists():
        raise BadInput(f"subject.model: {model} is a file; give the folder that holds the model")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise BadInput(f"subject.model: no such folder: {model}")
    return None


def _names_native(folder: Path) -> bool:
    """Whether it is worth importing TransformerLens to look closer at this folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "architecture" in config


def _load_native(name: str, folder: Path, dtype: torch.dtype | None, device: torch.device) -> Loaded:
    from transformers import PreTrainedTokenizerFast

    from raylabel.models.native import is_native, load_native, unwrapped

    if not is_native(folder):
        raise BadInput(f"subject.model: {folder}/config.json names no architecture that is supported")
    network = unwrapped(load_native(folder, dtype=dtype or torch.float32, device=device))
    # The bridge gives its copy a BOS of its own making; what the folder says is what counts.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return Loaded(name, None, network, native_anatomy(network), tokenizer, int(network.cfg.n_ctx), None)


def _load_published(name: str, revision: str | None, dtype: torch.dtype | None, device: torch.device) -> Loaded:
    if revision is not None:
        raise BadInput(f"subject.revision: TransformerLens's own models ({name}) have no revisions; leave it out")
    from transformer_lens.model_bridge.sources import boot_tl_legacy

    from raylabel.models.native import unwrapped

    official = _alias(name) or name
    try:
        bridge: Any = boot_tl_legacy(official, device=device, dtype=dtype or torch.float32)
    except Exception as error:
        raise BadInput(f"subject.model: {name} ({official}) could not be loaded: {_why(error)}") from error
    if bridge.tokenizer is None:
        raise BadInput(f"subject.model: {official} names no tokenizer, so no text can be given to it; use another model")
    network, begins = unwrapped(bridge), bool(bridge.cfg.default_prepend_bos)
    positions = int(bridge.cfg.n_ctx)
    commit = _commit(official, None)
    return Loaded(official, commit, network, native_anatomy(network), bridge.tokenizer, positions, begins)


def _load_transformers(
    name: str,
    folder: Path | None,
    revision: str | None,
    dtype: torch.dtype | None,
    device: torch.device,
    context: int,
    trust: bool,
    gpus: float | None,
) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, where, config = _transformers_config(name, folder, revision, trust)
    source = str(folder or name)
    family_of(config, name)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    check_context(name, context, positions)

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, **where)
    except Exception as error:
        raise BadInput(
            f"subject.model: {name} has no tokenizer that can be read ({_why(error)}); "
            f"save one beside the weights (tokenizer.json)"
        ) from error
    _check_tokenizer(tokenizer, name)

    automatic: Any = AutoModelForCausalLM
    network: Any
    notes: dict[str, Any]
    spread = placement.spread(device, gpus, cache(lambda: placement.weight_bytes(config, dtype, trust)))
    try:
        if device.type == "meta":
            own = {} if dtype is None else {"dtype": dtype}
            with device:
                network, notes = automatic.from_config(config, trust_remote_code=trust, **own), {"missing_keys": []}
        else:
            network, notes = automatic.from_pretrained(
                source, dtype=dtype or "auto", use_safetensors=None if trust else True, output_loading_info=True, **where,
                **spread,
            )  # fmt: skip
        network = (network if spread else network.to(device)).eval()
    except Exception as error:
        raise BadInput(f"subject.model: {_no_weights(name, folder, trust, error)}") from error
    placement.check_spread(network, device)
    missing = sorted(notes["missing_keys"])
    if missing:
        raise BadInput(f"subject.model: the weights of {name} lack {len(missing)} parameters, {missing[0]} among them")
    anatomy = transformers_anatomy(network, name)
    commit = None if folder is not None else _commit(name, revision) or revision
    return Loaded(name, commit, network, anatomy, tokenizer, positions, None)


def _transformers_config(
    name: str, folder: Path | None, revision: str | None, trust: bool
) -> tuple[str, dict[str, Any], Any]:  # fmt: skip
    """(the name it was found under, what transformers needs beside it, the configuration)."""
    from transformers import AutoConfig

    where: dict[str, Any] = {"trust_remote_code": trust}
    if folder is None:
        where["revision"] = revision
    try:
        return name, where, AutoConfig.from_pretrained(str(folder or name), **where)
    except Exception as error:
        official = _alias(name) if folder is None and "/" not in name else None
        if official is not None and official != name:
            return _transformers_config(official, None, revision, trust)
        raise BadInput(f"subject.model: {_no_config(name, folder, error)}") from error


def gpus_needed(model: str, revision: str | None, dtype: str, trust: bool) -> int:
    """GPUs that a model needs if all are as large as this process's first; 1 where nothing speaks against it."""
    if not torch.cuda.is_available():
        return 1
    try:
        with _quiet():
            _, _, config = _transformers_config(model, _folder(model), revision, trust)
            size = placement.weight_bytes(config, DTYPES.get(dtype), trust)
    except Exception:
        # No transformers model, or one with which something is wrong: loading it will tell.
        return 1
    return placement.gpus_for(size, torch.cuda.get_device_properties(0).total_memory)


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    if not tokenizer.is_fast:
        raise BadInput(
            f"subject.model: {name} has only a slow tokenizer, which cannot say where in the text a token lies; "
            f"save its fast form beside the weights (tokenizer.json)"
        )
    # Without tokenizer files transformers makes up a tokenizer that knows its special tokens and nothing else.
    if len(tokenizer) <= len(special_ids(tokenizer)):
        raise BadInput(f"subject.model: {name} has no tokenizer; save one beside the weights (tokenizer.json)")


def _check_vocabulary(tokenizer: Any, rows: int, name: str) -> None:
    """Refuses a tokenizer of another model. Added tokens beyond the embedding are common and harmless in plain text."""
    added = set(tokenizer.added_tokens_decoder)
    largest = max((i for i in tokenizer.get_vocab().values() if i not in added), default=-1)
    if largest >= rows:
        raise BadInput(
            f"subject.model: the tokenizer of {name} has ids up to {largest}, its embedding only {rows} rows; "
            f"the two are not of one model"
        )


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of all special tokens, those of added tokens that are marked as special included."""
    marked = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids) | frozenset(marked)


def _alias(name: str) -> str | None:
    """What TransformerLens calls the model on the hub, None for a name that it does not know."""
    from transformer_lens.supported_models import get_official_model_name

    try:
        return get_official_model_name(name)
    except ValueError:
        return None


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of the hub's files as they lie in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _no_config(name: str, folder: Path | None, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{name} brings its own code; set subject.trust_remote_code: true if you trust it"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        kind = re.search(r"model type `([^`]*)`", text)
        return f"{name} is of a type that transformers does not know{f' ({kind[1]})' if kind else ''}"
    if folder is not None:
        return f"{name}/config.json cannot be read: {_why(error)}"
    if any("Gated" in type(cause).__name__ for cause in _causes(error)):
        return f"{name} is gated on the hub; accept its terms there and log in with `hf auth login`"
    return f"no folder {name} here, and the hub has no such model, or it is out of reach; give a folder or a hub name"


def _no_weights(name: str, folder: Path | None, trust: bool, error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"{name} does not fit in this device's memory; use subject.dtype: bfloat16, or another device"
    if "no file named" in text or ("safetensors" in text and "does not appear" in text):
        asked = "" if trust else " (other formats only with subject.trust_remote_code: true)"
        return f"{name} has no safetensors weights{asked}; save the model with save_pretrained"
    return f"the weights of {name} could not be loaded: {_why(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _why(error: Exception) -> str:
    """The gist of another library's error: its first line, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars, advice and warnings of the libraries from the terminal while a model loads."""
    from transformers.utils import logging as transformers_logging

    reports: Any = transformers_logging
    bars, level, disabled = reports.is_progress_bar_enabled(), reports.get_verbosity(), logging.root.manager.disable
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()

"""The subject as the stages use it: loaded from the config, its facts as `subject.json`, its identity as a fingerprint."""

from __future__ import annotations

import hashlib
import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sections import SubjectConfig
from raylabel.stages.units import wanted_units
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output

_DEFAULT_SITE = SubjectConfig.model_fields["site"].default
FACTS_VERSION = 2
"""Raised when later stages need other facts: a run directory of an earlier version then looks its subject up again."""
PACE_SAMPLES = 8
"""Samples of the forward pass that is timed."""
HASHED_WHOLE = 64_000_000
"""Weights files up to this many bytes are hashed whole, larger ones at their two ends."""


def open_subject(config: RunConfig, facts: dict[str, Any] | None = None) -> Any:
    """The loaded subject of a configuration (see raylabel.models.subject); the last one opened is kept.

    With the facts of a run that has begun, `auto` means what it meant then: the same precision on the same kind of device.
    """
    subject = config.subject
    if facts is not None:
        device = facts["device"].split(":")[0] if subject.device == "auto" else subject.device
        subject = subject.model_copy(update={"dtype": facts["dtype"], "device": device})
    return _open(subject.model_dump_json(), fingerprint(config), latents_fingerprint(config))


@lru_cache(maxsize=1)
def _open(text: str, *_prints: str | None) -> Any:
    from raylabel.models.subject import load_subject

    subject = SubjectConfig.model_validate_json(text)
    # The default gives way to the site that the latents name; what was set by hand is checked in `refuse_contradiction`.
    site = None if subject.latents is not None and subject.site == _DEFAULT_SITE else subject.site
    return load_subject(
        subject.model, revision=subject.revision, site=site, latents=subject.latents,
        quadrants=subject.polarity == "quadrants", dtype=subject.dtype, device=subject.device, bos=subject.bos,
        context=subject.context, trust_remote_code=subject.trust_remote_code,
        gpus=None if subject.gpus_per_worker == "auto" else subject.gpus_per_worker,
    )  # fmt: skip


def refuse_contradiction(config: RunConfig) -> None:
    """BadInput where `subject.site` was set to the default's value, and the latents read at another site."""
    subject = config.subject
    if subject.latents is None or "site" not in subject.model_fields_set or subject.site != _DEFAULT_SITE:
        return
    from raylabel.models.latent_files import find

    first = find(subject.latents)[0]
    if first.site != subject.site:
        raise BadInput(f"subject.site: {subject.site}, but subject.latents read {first.hook}; leave subject.site out")


def open_tokenizer(run: RunDir) -> Any:
    """The subject's `tokenizers.Tokenizer`, as the run directory keeps it: no model is loaded for it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(run.files.read("tokenizer.json").decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def fingerprint(config: RunConfig) -> str:
    """Tells one model from another under the same name: a hash of a folder's files, else name and revision."""
    name = config.subject.model
    return model_fingerprint(name, config.subject.revision, "model")


def model_fingerprint(name: str, revision: str | None, built_in: str) -> str:
    """The same of any model; `demo` is the built-in one in the folder `demo/<built_in>`."""
    folder = Path(__file__).parent.parent / "demo" / built_in if name == "demo" else Path(name)
    if not folder.is_dir():
        return f"{name}@{revision}"
    return _hashed([file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors", ".model", ".txt")])


def latents_fingerprint(config: RunConfig) -> str | None:
    """The same of `subject.latents`: a hash of the SAEs in a folder, else the name; None without latents."""
    name = config.subject.latents
    folder = Path(name or "").expanduser()
    if name is None or not folder.is_dir():
        return name
    return _hashed([f for kind in ("cfg.json", "sae_weights.safetensors") for f in sorted(folder.rglob(kind))], folder)


def _hashed(files: list[Path], base: Path | None = None) -> str:
    """A hash of files and of their names, which are those within `base` if it is given."""
    found = []
    for file in files:
        if file.is_file():
            name, status = file.name if base is None else str(file.relative_to(base)), file.stat()
            found.append((name, str(file), status.st_size, status.st_mtime_ns))
    return _hash(tuple(found))


@lru_cache(maxsize=16)
def _hash(files: tuple[tuple[str, str, int, int], ...]) -> str:
    """The hash of files (name, path, size, time); kept, as a worker asks for its subject again and again."""
    found = hashlib.sha256()
    for name, path, size, _time in files:
        found.update(name.encode())
        with open(path, "rb") as opened:
            if size <= HASHED_WHOLE:
                found.update(opened.read())
            else:
                found.update(str(size).encode() + opened.read(HASHED_WHOLE // 2))
                opened.seek(-HASHED_WHOLE // 2, 2)
                found.update(opened.read())
    return found.hexdigest()[:16]


def facts(config: RunConfig) -> dict[str, Any]:
    """What later stages need to know of the subject without loading it.

    `width` units a layer, `columns` unit columns (see `units.column`), `site_width` coordinates of what `run` shows;
    `layers` that have units; `sites`: the units' hook by layer, None in a layer without any.
    """
    subject = open_subject(config)
    sites = [subject.hook_name(layer) if layer in subject.layers else None for layer in range(subject.n_layers)]
    tokenizer = subject.tokenizer.backend_tokenizer.to_str()
    return {
        "name": subject.name, "revision": subject.revision, "n_layers": subject.n_layers, "width": subject.width,
        "polarities": list(subject.polarities), "prepend_bos": subject.prepend_bos, "bos_id": subject.bos_id,
        "pad_id": subject.pad_id, "special_ids": sorted(subject.special_ids), "site": subject.site,
        "sites": sites, "layers": list(subject.layers), "site_width": subject.site_width, "columns": subject.columns,
        "latents": latents_fingerprint(config),
        "max_context": subject.max_context, "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest()[:16],
        "dtype": str(subject.dtype).removeprefix("torch."), "device": str(subject.device),
    }  # fmt: skip


def tokens_per_second(subject: Any, batch: int, context: int, layers: list[int]) -> float:
    """Tokens a second of forward passes that read the units of some layers, timed once the model is warm."""
    ids = torch.randint(0, subject.anatomy.vocabulary, (batch, context), device=subject.device)

    def visit(layer: int, acts: Any, _resid: Any) -> None:
        if subject.latents is not None:
            subject.read(layer, acts)

    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        subject.run(ids, layers, visit)
        if subject.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return batch * context / seconds


class SubjectWorker:
    """Loads the subject once and writes its facts, its tokenizer and its pace."""

    def __init__(self, url: str) -> None:
        self.config = RunConfig.model_validate(RunDir(url).config)

    def __call__(self, unit: Unit) -> Output:
        subject, found = open_subject(self.config), facts(self.config)
        if subject.device.type == "meta":
            raise BadInput("subject.device: meta holds no weights; `raylabel check` plans with it, a run needs auto, cpu or cuda")
        tokenizer = subject.tokenizer.backend_tokenizer
        # Refuses units that the subject does not have before the corpus is read.
        units = wanted_units(self.config, found)
        pace = tokens_per_second(subject, PACE_SAMPLES, self.config.subject.context, list(units))
        return Output(blobs=[
            Blob("subject.json", json.dumps(found, indent=1).encode()),
            Blob("tokenizer.json", tokenizer.to_str().encode()),
            Blob("pace.json", json.dumps({"tokens_per_second": pace}).encode()),
        ])  # fmt: skip

"""The subject as the stages use it: loaded from the config, its facts as `subject.json`, its identity as a fingerprint."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.stages.units import wanted_units
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output

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
    return _open(subject.model_dump_json(), fingerprint(config))


@lru_cache(maxsize=1)
def _open(text: str, _print: str) -> Any:
    from raylabel.config import SubjectConfig
    from raylabel.models.subject import load_subject

    subject = SubjectConfig.model_validate_json(text)
    if subject.latents is not None:
        raise BadInput("subject.latents: SAE latents are not part of this version; leave it out")
    return load_subject(
        subject.model, revision=subject.revision, site=subject.site, dtype=subject.dtype, device=subject.device,
        bos=subject.bos, context=subject.context, trust_remote_code=subject.trust_remote_code,
    )  # fmt: skip


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
    folder = Path(__file__).parent.parent / "demo" / "model" if name == "demo" else Path(name)
    if not folder.is_dir():
        return f"{name}@{config.subject.revision}"
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".model", ".txt") and file.is_file():
            found.update(file.name.encode())
            with file.open("rb") as opened:
                size = file.stat().st_size
                if size <= HASHED_WHOLE:
                    found.update(opened.read())
                else:
                    found.update(str(size).encode() + opened.read(HASHED_WHOLE // 2))
                    opened.seek(-HASHED_WHOLE // 2, 2)
                    found.update(opened.read())
    return found.hexdigest()[:16]


def facts(config: RunConfig) -> dict[str, Any]:
    """What later stages need to know of the subject without loading it."""
    subject = open_subject(config)
    tokenizer = subject.tokenizer.backend_tokenizer.to_str()
    return {
        "name": subject.name, "revision": subject.revision, "n_layers": subject.n_layers, "width": subject.width,
        "polarities": list(subject.polarities), "prepend_bos": subject.prepend_bos, "bos_id": subject.bos_id,
        "pad_id": subject.pad_id, "special_ids": sorted(subject.special_ids), "site": subject.site,
        "sites": [subject.hook_name(layer) for layer in range(subject.n_layers)],
        "max_context": subject.max_context, "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest()[:16],
        "dtype": str(subject.dtype).removeprefix("torch."), "device": str(subject.device),
    }  # fmt: skip


class SubjectWorker:
    """Loads the subject once and writes its facts and its tokenizer."""

    def __init__(self, url: str) -> None:
        self.config = RunConfig.model_validate(RunDir(url).config)

    def __call__(self, unit: Unit) -> Output:
        tokenizer = open_subject(self.config).tokenizer.backend_tokenizer
        found = facts(self.config)
        # Refuses units that the subject does not have before the corpus is read.
        wanted_units(self.config, found)
        return Output(blobs=[
            Blob("subject.json", json.dumps(found, indent=1).encode()),
            Blob("tokenizer.json", tokenizer.to_str().encode()),
        ])  # fmt: skip

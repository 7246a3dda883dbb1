"""The scan beside delphi's activation cache (eai-delphi, PyPI) of the same model, units and tokens.

delphi is installed without its own dependencies on vLLM and others that its cache never imports, into an environment
that finds torch, transformers and all else that both need in the project's: both sides run the same builds. Its cache
keeps every entry above 1e-5, which of MLP neurons is nearly all of them: 28 bytes an entry, twice while it joins them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from raylabel.config import RunConfig
from raylabel.stages.samples import load_samples
from raylabel.store.rundir import RunDir
from tests.benchmarks import models, runs
from tests.benchmarks.measuring import Pairs, Settings, child, cores_used_by_others, cost_of, memory_available
from tests.benchmarks.report import Row

VERSION = "0.1.3"
NEEDED = ("jaxtyping", "blobfile", "orjson", "asyncer", "simple_parsing", "faiss-cpu", "sentence-transformers", "tqdm")
"""What `delphi.latents` imports beside what the project has."""
BATCH, ENTRY = 32, 28
GB = 1e9


def delphi(settings: Settings) -> Iterator[Row]:
    """End to end and the update step alone on the demo model; without files on a larger one, where files are vast."""
    python, words = _installed(settings.peers)
    large = "tiny-gpt2" if settings.quick else "gpt2"
    sizes = {"demo": 64 if settings.quick else 320, large: 64 if settings.quick else 32}
    for name, jobs in {"demo": ("whole", "update"), large: ("lease", "update")}.items():
        wanted, n, tokens = _prepared(settings, name, sizes[name])
        facts = RunDir(wanted.run.out).resolved
        entries = facts["n_units"] * tokens.size
        if memory_available() < 3 * ENTRY * entries:
            raise RuntimeError(f"delphi would need about {3 * ENTRY * entries / GB:.0f} GB of memory for {models.words(name)}")
        for job in jobs:
            pairs = _pairs(settings, name, job, wanted, n, tokens, python)
            size = f"{facts['n_units']:,} units, {tokens.size:,} tokens in rows of {tokens.shape[1]}"
            yield _row(name, job, pairs, f"{words}, {size}")
        shutil.rmtree(wanted.run.out)


def _row(name: str, job: str, pairs: Pairs, how: str) -> Row:
    what = {
        "whole": ("scan end to end, tables written", "delphi's cache, its files written", 2.0),
        "lease": ("scan, forward passes and update", "delphi's cache in memory, no files", None),
        "update": ("scan, update step alone", "delphi's cache, forward passes taken out of both", 5.0),
    }[job]
    peaks = [max(cost.peak for cost in side) / GB for side in (pairs.second, pairs.first)]
    figures = pairs.figures()
    figures["more"]["peak bytes, ours and theirs"] = [[a.peak, b.peak] for a, b in zip(pairs.first, pairs.second, strict=True)]
    return Row(
        f"{what[0]}: {models.words(name)}", what[1], **figures, unit="×", goal=what[2],
        how=f"{how}, batch {BATCH}; peak memory {peaks[0]:.2g} GB theirs, {peaks[1]:.2g} GB ours; {pairs.note}",
    )  # fmt: skip


def _prepared(settings: Settings, name: str, rows: int) -> tuple[RunConfig, int, np.ndarray]:
    """A run with its samples and pilot, their number, and the full rows among them as the matrix that delphi takes."""
    context = 128
    out = settings.folder / f"delphi-{name}"
    wanted = runs.config(
        models.build(name, settings.folder, settings.device), out, settings.device, context, rows * context, runs.NO_VECTORS,
        {"exemplars": {"corpus": {"path": str(models.long_corpus(settings.folder, 100_000))}}},
        {"subject": {"batch": BATCH}, "controls": {"decoys": 0}},
    )  # fmt: skip
    run = runs.run_stages(wanted, "tokenize")
    tokenized = runs.copied(wanted, Path(f"{out}-tokenized"))
    runs.up_to(wanted, "scan", "accumulate")
    samples = load_samples(run)
    full = np.flatnonzero(samples.lengths == context)
    full = full[: len(full) // BATCH * BATCH]
    tokens = np.stack([samples.ids[samples.offsets[i] : samples.offsets[i + 1]] for i in full]).astype(np.int64)
    np.save(out / "tokens.npy", tokens)
    shutil.move(tokenized.run.out, out / "tokenized")
    return wanted, len(samples.numbers), tokens


def _pairs(
    settings: Settings, name: str, job: str, wanted: RunConfig, n: int, tokens: np.ndarray, python: str | None
) -> Pairs:
    """Processes of both sides in turn, each with a warm-up of its own; the first pair does not count."""
    out, pairs = Path(wanted.run.out), Pairs(settings.device)
    theirs = {
        "do": job, "model": wanted.subject.model, "tokens": str(out / "tokens.npy"), "batch": BATCH, "device": settings.device,
        "out": str(out / "theirs"), "stand_in": python is None,
    }  # fmt: skip
    for i in range(1 + (1 if settings.quick else 3 if name == "demo" else 2)):
        others = cores_used_by_others()
        found = {"ours": child("tests.benchmarks.ours", _task(job, wanted, n, tokens), settings.threads)}
        found["theirs"] = child("tests.benchmarks.peer", theirs, settings.threads, python or sys.executable)
        shutil.rmtree(out / "theirs", ignore_errors=True)
        shutil.rmtree(out / "copy", ignore_errors=True)
        if {side["threads"] for side in found.values()} != {settings.threads}:
            raise RuntimeError(f"threads differ: {found}")
        if i:
            pairs.first.append(cost_of(found["ours"]))
            pairs.second.append(cost_of(found["theirs"]))
            pairs.others.append(others)
    return pairs


def _task(job: str, wanted: RunConfig, n: int, tokens: np.ndarray) -> dict[str, Any]:
    out = Path(wanted.run.out)
    if job != "whole":
        # Leases begin at multiples of the batch; what is over is a short row or two of the text's end.
        return {"do": job, "url": str(out), "last": min(n, len(tokens)), "batch": BATCH}
    shutil.copytree(out / "tokenized", out / "copy")
    run = wanted.run.model_copy(update={"out": str(out / "copy"), "stages": ["scan"]})
    return {"do": job, "config": wanted.model_copy(update={"run": run}).model_dump(mode="json"), "batch": BATCH}


def _installed(peers: Path) -> tuple[str | None, str]:
    """The interpreter of delphi's environment, made if it is not there, and what it is in words; None if it cannot be had."""
    torch, transformers = metadata.version("torch"), metadata.version("transformers")
    folder = peers / f"delphi-{VERSION}-python{sysconfig.get_python_version()}-torch{torch}-transformers{transformers}"
    python, ready = folder / "bin" / "python", folder / "ready"
    try:
        if not ready.exists():
            _install(folder, python)
            _run([str(python), "-c", "import delphi.latents"])
            ready.touch()
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()
        why = said[-1] if said else type(error).__name__
        return None, f"its documented algorithm written anew, as eai-delphi {VERSION} cannot be installed here ({why[:120]})"
    return str(python), f"eai-delphi {VERSION} itself, beside transformers {transformers} and torch {torch}"


def _install(folder: Path, python: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    own = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
    here = sysconfig.get_paths()["purelib"]
    Path(own, "zz_project.pth").write_text(f"import site; site.addsitedir({here!r})\n", encoding="utf-8")
    fixed = {d.name: d.version for d in metadata.distributions() if d.name and d.name != "raylabel"}
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in fixed.items()), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "-c", str(constraints), *NEEDED])
    _run([*pip, "--no-deps", f"eai-delphi=={VERSION}"])


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout

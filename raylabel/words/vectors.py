"""FastText word vectors: trained on the run's own text, or loaded from a fastText `.bin`.

`train_vectors` writes a skip-gram model (Bojanowski et al. 2017) of cased words, with punctuation split off as in
`segment`; the same text gives the same bytes. `Vectors(path).matrix(words)` is float32 [n, dim],
out-of-vocabulary words included; words without a letter, digit or punctuation mark have a zero row. BadInput names
`identify.vectors`.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fasttext
import numpy as np

from raylabel.errors import BadInput, RunFailed
from raylabel.words.segment import words

MAGIC, HEADER = 793712314, "<ii12id3iqq"
# A narrow window, hierarchical softmax and hardly any subsampling separate kinds of words best where text is scarce;
# the usual settings (window 5, negative sampling, t = 1e-4) need many times the text. `tests.benchmarks --only
# neighbours` measures it.
SMALL, LARGE = 100_000, 20_000_000

# fastText with one thread draws initial values for a tenth of its matrix and takes the rest as the allocator gives
# it. Only in a fresh process whose large blocks come from the system are those zeros; elsewhere they are old memory,
# which makes every model different and some of them NaN.
_TRAIN = """
import json, sys, fasttext
source, target, settings = sys.argv[1:]
model = fasttext.train_unsupervised(source, model="skipgram", thread=1, verbose=0, **json.loads(settings))
model.save_model(target)
"""

_LONG_RUN = re.compile(r"(.)\1{8,}", re.DOTALL)


def normal(word: str) -> str:
    """`word` as the vectors see it: at most eight times the same character on end and 64 characters in all.

    Longer runs repeat one n-gram so often that its gradient diverges.
    """
    return _LONG_RUN.sub(lambda m: m.group(1) * 8, word)[:64] if len(word) > 8 else word


def train_vectors(
    texts: Iterable[str], path: str | Path, dim: int = 64, epochs: int | None = None, bucket: int = 50_000
) -> None:
    """Trains on `texts`, one document each, and writes the model to `path`; nothing is left behind on failure.

    `epochs` None gives small texts more: 10 up to 2.4 MB, 5 from 4.8 MB on. One core, about
    0.4 s a MB and epoch. The file has (vocabulary x 2 + bucket) x dim x 4 bytes.
    """
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".vectors-") as folder:
        source, model = Path(folder, "text"), Path(folder, "model.bin")
        with source.open("w", encoding="utf-8", errors="replace", newline="\n") as out:
            size = sum(out.write(" ".join(map(normal, words(text))) + "\n") - 1 for text in texts)
            # Line ends count as a word; enough of them, and there is always a second word to tell a word from.
            out.write("\n" * 5)
        if not size:
            raise BadInput("identify.vectors: no words in the explain documents to train on; give a fastText .bin file")
        settings: dict[str, Any] = {
            "dim": dim, "bucket": bucket, "minn": 3, "maxn": 5, "ws": 3, "loss": "hs",
            "epoch": epochs or min(max(round(24e6 / max(size, 1)), 5), 10),
            "minCount": 1 if size < SMALL else 2 if size < LARGE else 5,
            "t": 1e-2 if size < LARGE else 1e-4,
        }  # fmt: skip
        for rate in (0.05, 0.02):
            problem = _train(source, model, {**settings, "lr": rate})
            if "NaN" not in problem:
                break
        if problem:
            raise RunFailed(f"training of the word vectors failed: {problem.splitlines()[-1]}")
        shutil.move(model, target)


def _train(source: Path, model: Path, settings: dict[str, Any]) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN, str(source), str(model), json.dumps(settings)],
        env=environment, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"


class Vectors:
    """The vectors of a fastText `.bin` file, of whatever training; `dim` is their length."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._model = _load(Path(path))
        self.dim: int = self._model.get_dimension()

    def matrix(self, items: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]: the vector of each word; zeros where a word has nothing but white space."""
        out = np.zeros((len(items), self.dim), np.float32)
        for row, word in zip(out, items, strict=True):
            if word and not word.isspace():
                row[:] = self._model.get_word_vector(normal(word))
        return np.nan_to_num(out, copy=False, posinf=0, neginf=0)

    def __reduce__(self) -> tuple[type[Vectors], tuple[str]]:
        return Vectors, (self.path,)


def _load(path: Path) -> Any:
    bad = f"identify.vectors: {path}"
    try:
        problem = _check(path)
        if not problem:
            return fasttext.load_model(str(path))
    except OSError as error:
        problem = "no such file" if not path.exists() else str(error.strerror)
    except (ValueError, RuntimeError, MemoryError):
        problem = "not a fastText .bin file"
    raise BadInput(f"{bad}: {problem}")


def _check(path: Path) -> str:
    """What is wrong with the file's frame: fastText hangs in a cut dictionary and reads on past a cut matrix."""
    start, cut = struct.calcsize(HEADER), "the file is cut short"
    if path.stat().st_size < start:
        return "not a fastText .bin file"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = struct.unpack_from(HEADER, data)
        if head[0] != MAGIC:
            return "not a fastText .bin file"
        entries, pruned, at = head[-5], head[-1], start
        for _ in range(entries):
            end = data.find(b"\0", at)
            if end < 0:
                return cut
            at = end + 10
        at += 8 * max(pruned, 0)
        if len(data) < at + 17:
            return cut
        quantised, rows, columns = struct.unpack_from("<?qq", data, at)
        return "" if quantised or len(data) >= at + 17 + rows * columns * 4 else cut

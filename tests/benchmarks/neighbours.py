"""How good substitutes are: whether a word's neighbours mean alike, and whether its random words are as ordinary as it is.

Word vectors are trained, and neighbours looked up, as a run does it, on children's stories, on encyclopedic text (both
only where they lie beside the repository) and on the built-in corpus. A neighbour is right if it stands in a built-in
word list with the word. Asked are the words of the lists that occur three times or more and have K such list mates that
are not their inflections, in the lists' own casing; each list counts for the share of its words.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raylabel.demo.stdlib import documents
from raylabel.words.background import Background, fit_background
from raylabel.words.contexts import fit_contexts
from raylabel.words.families import stem
from raylabel.words.lists import load_lists, mates
from raylabel.words.segment import spans
from raylabel.words.substitutes import Substitutes
from raylabel.words.vectors import Vectors, train_vectors
from tests.benchmarks.measuring import Settings
from tests.benchmarks.report import Row
from tests.shared import SHARED, STORIES

K, OFTEN, SEED = 5, 3, 0
CONTEXT = 64
"""Words of a sample."""
DEMO = 1_200_000
"""Characters of the built-in corpus: about the 350,000 tokens that the demo reads."""


@dataclass(frozen=True)
class Quality:
    """What is known of the substitutes of a text.

    Attributes:
        words, lists: how many were asked, and in how many lists they stand.
        near, chance: share of neighbours, and of random words, that are list mates.
        error: standard error of `near`, over lists.
        frequency, length: median difference of a word from its random words, in octaves and in characters.
        free_frequency, free_length: the same from words drawn at random from all that occur three times or more.
    """

    words: int
    lists: int
    near: float
    chance: float
    error: float
    frequency: float
    length: float
    free_frequency: float
    free_length: float


def neighbours(settings: Settings) -> Iterator[Row]:
    """One row a text."""
    lists = load_lists("built-in")
    for name, texts in corpora():
        samples = list(cut(texts[:60] if settings.quick else texts))
        path = settings.folder / "neighbours.bin"
        start = time.perf_counter()
        train_vectors((sample["text"] for sample in samples), path)
        seconds = time.perf_counter() - start
        background = fit_background(samples, Vectors(path), 5, "sif", SEED)
        contexts = fit_contexts(lambda samples=samples: (sample["text"] for sample in samples))
        found = measure(Substitutes(replace(background, contexts=contexts), SEED), background, lists)
        alone = measure(Substitutes(background, SEED), background, lists)
        size = path.stat().st_size
        path.unlink()
        yield Row(
            f"neighbours that share a word list with the word: {name}", f"random words of its frequency: {found.chance:.1%}",
            100 * found.near, 100 * found.near, 100 * found.near, 1, "%",
            how=f"{K} neighbours of {found.words:,} words in {found.lists} lists, standard error {found.error:.1%}; by "
            f"word vectors alone {alone.near:.1%}; "
            f"random words differ by {found.frequency:.2g} octaves of frequency and {found.length:.2g} characters "
            f"(unmatched ones by {found.free_frequency:.2g} and {found.free_length:.2g}); training "
            f"{sum(len(s['text']) for s in samples) / 1e6:.2g} MB took {seconds:.0f} s",
            more={
                **asdict(found), "near, vectors alone": alone.near, "training, wall seconds": seconds,
                "bytes of the vectors": size,
            },
        )  # fmt: skip


def corpora() -> Iterator[tuple[str, list[str]]]:
    """Name and documents of each text there is."""
    if STORIES.is_file():
        yield "TinyStories, 1,000 stories", json.loads(STORIES.read_text(encoding="utf-8"))
    else:
        print(f"no {STORIES}: left out", file=sys.stderr)
    files = [SHARED / "wikitext-2" / f"{part}.txt" for part in ("valid", "test")]
    if all(file.is_file() for file in files):
        yield "wikitext-2, valid and test", [text for file in files for text in _lines(file)]
    else:
        print(f"no {files[0].parent}: left out", file=sys.stderr)
    texts: list[str] = []
    for _, text in documents():
        texts.append(text)
        if sum(map(len, texts)) >= DEMO:
            break
    if texts:
        yield "the built-in corpus", texts


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def cut(texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Samples of at most CONTEXT words, a token a word, as `fit_background` takes them."""
    for text in texts:
        ends = [end for _, end in spans(text)]
        for low in range(0, len(ends), CONTEXT):
            start = ends[low - 1] if low else 0
            some = ends[low : low + CONTEXT]
            yield {"text": text[start : some[-1]], "ends": [end - start for end in some]}


def measure(substitutes: Substitutes, background: Background, lists: dict[str, list[str]]) -> Quality:
    """The quality of the substitutes for the words of the lists."""
    count: dict[str, int] = {}
    for word, n in zip(background.vocabulary, background.counts.tolist(), strict=True):
        # By falling count: the commonest casing, which is the one that substitutes are.
        count.setdefault(word.casefold(), n)
    often = [word for word, n in count.items() if n >= OFTEN]
    known = set(often)
    wanted = {word: {m for m in found & known if stem(m) != stem(word)} for word, found in mates(lists).items()}
    home: dict[str, str] = {}
    for name, listed in lists.items():
        for word in listed:
            rank = background.index.get(word)
            if rank is not None and background.counts[rank] >= OFTEN and len(wanted[word.casefold()]) >= K:
                home.setdefault(word, name)
    if not home:
        raise RuntimeError("no word of a list is in the text")
    words = list(home)
    near, drawn = substitutes.neighbours(words, K), substitutes.random(words, K)
    share = [_share(found, wanted[word.casefold()]) for word, found in zip(words, near, strict=True)]
    chance = [_share(found, wanted[word.casefold()]) for word, found in zip(words, drawn, strict=True)]
    rng = np.random.default_rng(SEED)
    free = [[often[i] for i in rng.integers(len(often), size=K).tolist()] for _ in words]
    own = np.log2([background.counts[background.index[word]] for word in words])
    return Quality(
        len(words), len(set(home.values())), float(np.mean(share)), float(np.mean(chance)),
        _error(np.array(share), list(home.values())), _frequency(own, drawn, count), _length(words, drawn),
        _frequency(own, free, count), _length(words, free),
    )  # fmt: skip


def _share(found: Sequence[str], wanted: set[str]) -> float:
    return sum(word.casefold() in wanted for word in found) / K


def _error(share: np.ndarray, names: list[str]) -> float:
    """Standard error of the mean where words of a list go together."""
    rest = share - share.mean()
    sums = [rest[[other == name for other in names]].sum() for name in dict.fromkeys(names)]
    return float(np.sqrt(np.square(sums).sum()) / len(share))


def _frequency(own: np.ndarray, given: list[list[str]], count: dict[str, int]) -> float:
    return float(np.median([abs(a - np.log2(count[w.casefold()])) for a, found in zip(own, given, strict=True) for w in found]))


def _length(words: list[str], given: list[list[str]]) -> float:
    return float(np.median([abs(len(word) - len(w)) for word, found in zip(words, given, strict=True) for w in found]))

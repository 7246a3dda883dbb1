"""score, its negatives: windows of the score split at which the units' activations are measured again, with the model.

Random windows are the same for all units of a run, so that whoever reads them reads them once. Hard windows hold a token at
which the unit peaks on the explain split, or a word near such a word by the run's vectors. `Negatives` measures the
maximum over each window, and at the word asked about, exactly as verify does, and gives each unit those at which it is
silent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylabel.config import RunConfig
from raylabel.stages.fixed import Fixed, measure_all
from raylabel.stages.hashing import hashed
from raylabel.stages.samples import Samples, load_samples
from raylabel.stages.score import LEAST_TOKENS, SILENT, Unit, Window, number
from raylabel.stages.subject import open_subject, open_tokenizer
from raylabel.stages.verify import TEXTS
from raylabel.store.rundir import RunDir
from raylabel.words.substitutes import Substitutes

SEARCHED = 2000
"""Samples of the score split that negatives come from, at most."""
RANDOM = 5
"""Random windows tried, for each that is wanted: a unit is silent in few windows where it is often active."""
PEAKS, NEAR = 8, 3
"""Peak words whose like is looked for, and their neighbours."""
SALT = 0x5C0E


class Place(NamedTuple):
    """A window of a sample: its row, tokens [start, end), and the token asked about."""

    row: int
    start: int
    end: int
    focus: int
    hard: bool


class Wish(NamedTuple):
    """A unit, its maximum, and where it peaks on the explain split: token ids and words, the strongest first."""

    unit: Unit
    largest: float
    ids: list[int]
    words: list[str]


class Negatives:
    """Silent windows of units of a run whose activations can be measured."""

    def __init__(self, run: RunDir, config: RunConfig, background: Any) -> None:
        self.run, self.config, self.facts = run, config, run.resolved
        self.size, self.many, self.seed = config.score.window, config.score.negatives, config.run.seed
        self.substitutes = Substitutes(background, self.seed)
        self.tokenizer = open_tokenizer(run)
        self.fixed = Fixed(run, self.seed)

    @cached_property
    def subject(self) -> Any:
        """The model."""
        return open_subject(self.config, self.facts)

    @cached_property
    def samples(self) -> Samples:
        """Those that negatives come from, drawn by hash."""
        table = self.run.table("samples", columns=["sample", "split"])
        numbers = table["sample"].to_numpy()[pc.equal(table["split"], "score").to_numpy()]
        drawn = numbers[np.argsort(hashed(self.seed, SALT, numbers))][:SEARCHED]
        return load_samples(self.run, among=drawn)

    @cached_property
    def strings(self) -> list[list[str]]:
        """Token texts of each sample, empty for special tokens."""
        flat, starts = self.samples.strings(np.arange(len(self.samples.numbers)), {})
        found = flat.to_pylist()
        return [found[a:b] for a, b in zip(starts, [*starts[1:], len(found)], strict=True)]

    @cached_property
    def random(self) -> list[Place]:
        """Random windows, the same for all units."""
        order = np.argsort(hashed(self.seed, SALT, 1, self.samples.numbers))
        found: list[Place] = []
        for row in order.tolist():
            if len(found) == RANDOM * self.many:
                break
            n = len(self.strings[row])
            draw = number(self.seed, (None, 0, 0), ("random", int(self.samples.numbers[row])))
            start = draw % max(n - self.size + 1, 1)
            end = min(start + self.size, n)
            wordy = [t for t in range(start, end) if any(c.isalnum() for c in self.strings[row][t])]
            if wordy and end - start >= LEAST_TOKENS:
                found.append(Place(row, start, end, wordy[(draw >> 20) % len(wordy)], False))
        return found

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """(token ids in order, their flat positions)."""
        order = np.argsort(self.samples.ids, kind="stable")
        return self.samples.ids[order], order

    def hard(self, wish: Wish) -> list[Place]:
        """Windows that hold a peak token or a word near one, as many as negatives are wanted, of different samples."""
        near = self.substitutes.neighbours(wish.words, NEAR) if wish.words else []
        texts = [text for found in near for word in found for text in (f" {word}", word)]
        encoded = [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)] if texts else []
        wanted = list(dict.fromkeys([*wish.ids, *(ids[0] for ids in encoded if len(ids) == 1)]))
        ids, order = self._index
        queues: list[list[int]] = []
        for i in wanted:
            low, high = np.searchsorted(ids, [i, i + 1])
            flat = order[low:high]
            queues.append(flat[np.argsort(hashed(self.seed, SALT, 2, wish.unit[1], flat))][: self.many].tolist())
        found: list[Place] = []
        taken: set[int] = set()
        for depth in range(self.many):
            for queue in queues:
                if depth < len(queue) and len(found) < self.many:
                    row = int(np.searchsorted(self.samples.offsets, queue[depth], side="right")) - 1
                    at = queue[depth] - int(self.samples.offsets[row])
                    if row not in taken and self.strings[row][at].strip():
                        taken.add(row)
                        n = len(self.strings[row])
                        first, last = max(at - self.size + 1, 0), max(min(at, n - self.size), 0)
                        start = first + number(self.seed, wish.unit, row) % (max(last - first, 0) + 1)
                        found.append(Place(row, start, min(start + self.size, n), at, True))
        return found

    def __call__(self, layer: int, wishes: Iterable[Wish]) -> dict[Unit, list[Window]]:
        """Windows at which each unit is silent, hard ones first; a unit without a finite activation has none."""
        wishes = sorted(wishes, key=lambda w: (w.unit[0] or "", w.unit[1], w.unit[2]))
        given = {w.unit: [*self.hard(w), *self.random] for w in wishes}
        rows, texts = self._plan(given)
        values = self._measure(layer, rows, texts)
        largest = {w.unit: w.largest for w in wishes}
        found: dict[Unit, list[Window]] = {}
        for unit, places in given.items():
            limit = SILENT * largest[unit]
            for k, place in enumerate(places):
                whole, word = values.get((unit, 2 * k)), values.get((unit, 2 * k + 1))
                silent = whole is not None and whole < limit
                if silent or (not place.hard and word is not None and word < limit):
                    found.setdefault(unit, []).append(self._window(place, silent))
        return found

    def _window(self, place: Place, silent: bool) -> Window:
        at = slice(place.start, place.end)
        ids = self.samples.ids[self.samples.offsets[place.row] : self.samples.offsets[place.row + 1]]
        return Window(
            int(self.samples.numbers[place.row]), int(self.samples.documents[place.row]), place.start,
            tuple(self.strings[place.row][at]), tuple(ids[at].tolist()), place.focus - place.start, False, silent, place.hard,
        )  # fmt: skip

    def _plan(self, given: dict[Unit, list[Place]]) -> tuple[pa.Table, list[int]]:
        """(requests, for each text its sample's row): for each place the window, then the token asked about."""
        text: dict[int, int] = {}
        columns: dict[str, list[Any]] = {
            n: [] for n in ("control", "neuron", "polarity", "text", "start", "end", "place")
        }
        for unit, places in given.items():
            for k, place in enumerate(places):
                number_ = text.setdefault(place.row, len(text))
                for i, span in enumerate(((place.start, place.end), (place.focus, place.focus + 1))):
                    for name, value in zip(columns, (*unit, number_, *span, 2 * k + i), strict=True):
                        columns[name].append(value)
        kinds = [pa.string(), pa.int32(), pa.int8(), pa.int32(), pa.int32(), pa.int32(), pa.int32()]
        return pa.table({n: pa.array(v, t) for (n, v), t in zip(columns.items(), kinds, strict=True)}), list(text)

    def _measure(self, layer: int, rows: pa.Table, texts: Sequence[int]) -> dict[tuple[Unit, int], float]:
        """Activations by unit and number of the request; masked ones are missing."""
        of = [self.samples.ids[self.samples.offsets[r] : self.samples.offsets[r + 1]].tolist() for r in texts]
        plan = {"rows": rows, "texts": pa.table({"ids": of}, schema=TEXTS)}
        table = measure_all(self.fixed, self.subject, layer, plan)[0]
        table = table.select(["control", "neuron", "polarity", "place", "activation"])
        return {
            ((row["control"], row["neuron"], row["polarity"]), row["place"]): row["activation"]
            for row in table.to_pylist() if row["activation"] is not None
        }  # fmt: skip

"""A step of fetch: a few of a site's recordings are measured again before the rest is asked for.

`agreement.json` says how many of a sample of recordings the subject gives back at its site, and where it does not, what
would: another site, or the other BOS policy. A run whose recordings are another model's, or of another place in it, stops
there.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.sections import NO_MODEL
from raylabel.sources import neuroscope
from raylabel.sources.records import Bad
from raylabel.sources.spelling import Spelling
from raylabel.stages import measure, packing
from raylabel.stages.base import Step
from raylabel.stages.subject import open_subject, open_tokenizer
from raylabel.stages.units import column, sign
from raylabel.store.plan import Unit
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Blob, Output

NEURONS, TEXTS = 16, 3
"""Neurons of the sample, and texts of each."""


class AgreementWorker:
    """Fetches a sample of pages and measures what was recorded on them."""

    def __init__(self, url: str) -> None:
        self.run = RunDir(url)
        self.config = RunConfig.model_validate(self.run.config)
        self.facts = json.loads(self.run.files.read("subject.json"))

    def __call__(self, unit: Unit) -> Output:
        pairs = [(layer, neuron) for layer, neuron in unit.key["sample"]]
        notes = neuroscope.fetch_pages(self.config, pairs)
        subject = open_subject(self.config, self.facts)
        recordings, wrong = self._recordings(pairs, subject.max_context)
        if not recordings:
            raise BadInput(f"exemplars.neuroscope: none of {len(pairs)} sampled pages can be compared with the model: {wrong}")
        found = agreement(subject, recordings)
        report = {"recordings": len(recordings), "reproduced": found, "pages": len(pairs), "wrong": wrong}
        expected, *others = found
        if found[expected] < measure.LEAST_REPRODUCED * len(recordings):
            raise BadInput(self._refusal(found, expected, others, len(recordings)))
        return Output(blobs=[Blob("agreement.json", json.dumps(report, indent=1).encode())], notes={**notes, "agreement": report})

    def _recordings(self, pairs: list[tuple[int, int]], longest: int | None) -> tuple[list[Recording], str]:
        """Recordings that can be compared, and what was wrong with the last page that could not be read."""
        special = self.facts["special_ids"]
        spelling = Spelling(open_tokenizer(self.run), special)
        bos = self.facts["bos_id"] if self.facts["prepend_bos"] else None
        packer = packing.Packer(spelling, bos, self.facts["pad_id"] or 0)
        found: list[Recording] = []
        wrong = "no activation is above 0"
        for layer, neuron in pairs:
            record = neuroscope.record(self.config, layer, neuron)
            if isinstance(record, Bad):
                wrong = record.reason
                continue
            _, rows, bad = packer.add(record)
            wrong = bad[0] if bad else wrong
            taken = 0
            for row in rows:
                at, ids = row["position"], row["own_ids"]
                known = min(ids[: at + 1]) >= 0 and ids[at] not in special
                if not known:
                    wrong = "tokens that the model's tokenizer does not have"
                if known and row["activation"] > 0 and (longest is None or at < longest) and taken < TEXTS:
                    found.append((layer, neuron, ids, at, row["activation"]))
                    taken += 1
        return found, wrong

    def _refusal(self, found: dict[str, int], expected: str, others: list[str], n: int) -> str:
        section, subject = self.config.exemplars.neuroscope, self.config.subject
        text = f"exemplars.neuroscope.model: {subject.model} gives back {found[expected]} of {n} sampled recordings"
        text += f" of {section.model} {expected}"
        best = max(others, key=lambda name: found[name], default=None)
        if best is not None and found[best] >= measure.LEAST_REPRODUCED * n:
            return f"{text}, but {found[best]} {best}; set subject.site or subject.bos to that"
        tried = "".join(f", {found[name]} {name}" for name in others)
        return f"{text}{tried}; name the model that was recorded, or subject.model: {NO_MODEL}"


Recording = tuple[int, int, list[int], int, float]
"""(layer, neuron, token ids, index of the MAT, activation there)."""


def agreement(subject: Any, recordings: list[Recording]) -> dict[str, int]:
    """How many recordings are given back, by where and how the model is read: as it is first, then, if that fails, otherwise.

    Recordings are in half precision (`measure.COARSE`).
    """
    recorded = np.array([activation for *_, activation in recordings])
    largest: dict[tuple[int, int], float] = {}
    for layer, neuron, _, _, activation in recordings:
        largest[layer, neuron] = max(largest.get((layer, neuron), 0.0), activation)
    most = np.array([largest[layer, neuron] for layer, neuron, *_ in recordings])

    def given_back(other: Any, shift: int) -> int:
        values = [
            measure.peak_at(other, layer, ids, at, shift, column(neuron, 1, other.width)) * sign(1)
            for layer, neuron, ids, at, _ in recordings
        ]
        return int(measure.reproduces(recorded, np.array(values), most, True, 0.0).sum())

    with_bos = all(ids[:1] == [subject.bos_id] for _, _, ids, _, _ in recordings)
    found = {f"at {subject.site} {'with' if with_bos else 'without'} BOS": given_back(subject, 0)}
    if next(iter(found.values())) < measure.LEAST_REPRODUCED * len(recordings):
        exemplars = [(ids, at) for _, _, ids, at, _ in recordings]
        found |= {name: given_back(other, shift) for name, other, shift in measure.alternatives(subject, exemplars)}
    return found


def step(config: RunConfig, model: str) -> Step:
    """The step; `model` tells one subject from another."""
    pairs = [(layer, neuron) for layer, neurons in neuroscope.wanted(config).items() for neuron in neurons]
    at = np.linspace(0, len(pairs) - 1, min(NEURONS, len(pairs))).astype(int)
    key = {"sample": [pairs[i] for i in at], "model": model, "site": config.subject.site, "bos": config.subject.bos}
    return Step("agreement", [key], AgreementWorker, model=True, limited=True)

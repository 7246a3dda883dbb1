"""Units that fire in a text: equal to whole forward passes read unit by unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import raylabel
from raylabel.config import RunConfig
from raylabel.errors import BadInput
from raylabel.stages.subject import open_subject
from raylabel.store.rundir import RunDir

TEXT = "the cat sat on a red mat with five dozen old liquor jugs and two young brown foxes jump over the lazy dog at the river"


def brute(run: RunDir, text: str, share: float) -> dict[tuple[int, int, int, int], float]:
    """(position, layer, neuron, polarity) -> activation, window by window and value by value."""
    config = RunConfig.model_validate(run.config)
    subject = open_subject(config, run.resolved)
    ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    size = config.subject.context - (1 if subject.prepend_bos else 0)
    found = {}
    for first in range(0, len(ids), size):
        body = ids[first : first + size]
        whole = [subject.bos_id, *body] if subject.prepend_bos else body
        for row in run.table("results").to_pylist():
            if row["label"] is None:
                continue
            values = subject.activations(torch.tensor([whole]), [row["layer"]])[row["layer"]][0, :, row["neuron"]]
            for i, value in enumerate(values.tolist()[len(whole) - len(body) :]):
                own = value * row["polarity"]
                if own > 0 and own >= share * row["max"] and body[i] not in subject.special_ids:
                    found[first + i, row["layer"], row["neuron"], row["polarity"]] = own
    return found


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_active_units_are_those_of_whole_forward_passes(finished: RunDir, share: float) -> None:
    frame = raylabel.open_run(finished.files.url).active_on(TEXT, share=share)
    wanted = brute(finished, TEXT, share)
    keys = list(zip(frame["position"], frame["layer"], frame["neuron"], frame["polarity"], strict=True))
    assert set(keys) == set(wanted) and len(keys) == len(wanted) > 0
    assert frame["activation"].tolist() == pytest.approx([wanted[key] for key in keys], rel=1e-5)
    assert frame["position"].is_monotonic_increasing
    assert frame["position"].max() > 16, "the text is longer than a sample"
    by_token = frame.groupby("position")["share"]
    assert all(group.is_monotonic_decreasing for _, group in by_token)


def test_tokens_are_pieces_of_the_text_and_labels_those_of_the_results(finished: RunDir) -> None:
    run = raylabel.open_run(finished.files.url)
    frame = run.active_on(TEXT, share=0.0)
    tokens = dict(zip(frame["position"], frame["token"], strict=True))
    assert all(token in TEXT for token in tokens.values())
    if len(tokens) == max(tokens) + 1:
        assert "".join(tokens[i] for i in range(len(tokens))) == TEXT
    labels = {(r["layer"], r["neuron"], r["polarity"]): r["label"] for r in finished.table("results").to_pylist()}
    assert all(labels[row.layer, row.neuron, row.polarity] == row.label for row in frame.itertuples())
    assert run.active_on(TEXT, verified=True)["verified"].all()


def test_an_empty_text_is_refused(finished: RunDir) -> None:
    with pytest.raises(BadInput, match="text: has no tokens"):
        raylabel.open_run(finished.files.url).active_on("")


def test_the_columns(finished: RunDir) -> None:
    frame: Any = raylabel.open_run(finished.files.url).active_on("fox", share=1e9)
    assert list(frame.columns) == ["position", "token", "layer", "neuron", "polarity", "activation", "share", "label", "verified"]
    assert len(frame) == 0

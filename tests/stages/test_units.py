"""Units, their columns and signs; what a run knows of a subject with latents or quadrants, and when it starts anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raylabel.config import RunConfig, build_config
from raylabel.errors import BadInput
from raylabel.stages.subject import facts, latents_fingerprint, open_subject, refuse_contradiction
from raylabel.stages.units import QUADRANTS, column, polarities, sign, wanted_units
from tests.models import tiny
from tests.models.saes import save_sae


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save("llama", tmp_path_factory.mktemp("models") / "llama"))


def config(model: str, **subject: Any) -> RunConfig:
    return build_config({"subject": {"model": model, "context": 16, "device": "cpu", **subject}})


def test_columns_and_signs_of_numbers_and_arrays() -> None:
    pairs = [(column(5, p, 40), sign(p)) for p in QUADRANTS]
    assert pairs == [(5, 1), (5, -1), (45, 1), (45, -1)]
    neurons, signs = np.array([5, 5, 5, 5]), np.array(QUADRANTS, dtype=np.int8)
    assert column(neurons, signs, 40).tolist() == [5, 5, 45, 45] and sign(signs).tolist() == [1, -1, 1, -1]
    assert column(neurons, signs.astype(np.int64), 100_000)[2] == 100_005


def test_facts_of_plain_units_quadrants_and_latents(model: str, tmp_path: Path) -> None:
    plain = facts(config(model))
    assert (plain["width"], plain["site_width"], plain["columns"], plain["layers"]) == (40, 40, 40, [0, 1, 2])
    assert plain["latents"] is None and plain["site"] == "mlp_post"
    four = facts(config(model, polarity="quadrants"))
    assert (four["width"], four["site_width"], four["columns"]) == (40, 80, 80)
    assert polarities(config(model, polarity="quadrants"), four) == QUADRANTS
    assert polarities(config(model), four) == polarities(config(model, polarity="both"), four) == (1, -1)
    folder = save_sae(tmp_path / "sae")
    latent = facts(config(model, latents=str(folder)))
    assert (latent["width"], latent["site_width"], latent["columns"], latent["layers"]) == (30, 16, 30, [1])
    assert latent["sites"] == [None, "blocks.1.hook_resid_pre.hook_sae_acts_post", None]
    assert latent["site"] == "resid_pre" and polarities(config(model), latent) == (1,)
    json.dumps([plain, four, latent])


def test_layers_without_latents_are_refused_and_all_means_the_others(model: str, tmp_path: Path) -> None:
    for layer in (0, 2):
        save_sae(tmp_path / str(layer), f"blocks.{layer}.hook_resid_pre")
    found = facts(config(model, latents=str(tmp_path)))

    def wanted(**subject: Any) -> dict[int, list[int]]:
        return wanted_units(config(model, latents=str(tmp_path), **subject), found)

    assert {layer: len(neurons) for layer, neurons in wanted().items()} == {0: 30, 2: 30}
    assert wanted(layers=[2], neurons=[3, 5]) == {2: [3, 4]} and wanted(units=[[0, 29]]) == {0: [29]}
    for key, subject in (("layers", {"layers": [0, 1]}), ("units", {"units": [[1, 3]]})):
        with pytest.raises(BadInput, match=rf"subject\.{key}: no latents at layer 1; subject\.latents has 0, 2"):
            wanted(**subject)
    with pytest.raises(BadInput, match=r"subject\.layers: no layer 3; the model has layers 0 to 2"):
        wanted(layers=[3])
    with pytest.raises(BadInput, match=r"subject\.neurons: no neuron 30; a layer has neurons 0 to 29"):
        wanted(neurons=[0, 31])


def test_changed_latents_are_other_latents(model: str, tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae" / "a")
    both = config(model, latents=str(tmp_path / "sae"))
    first, opened = latents_fingerprint(both), open_subject(both)
    assert latents_fingerprint(both) == first and open_subject(both) is opened
    save_sae(folder, seed=1)
    assert latents_fingerprint(both) != first and open_subject(both) is not opened
    second = latents_fingerprint(both)
    save_sae(folder, seed=1, normalize_activations="layer_norm")
    assert latents_fingerprint(both) not in (first, second)
    assert latents_fingerprint(config(model)) is None
    assert latents_fingerprint(config(model, latents="someone/saes")) == "someone/saes"


def test_a_site_set_by_hand_must_be_that_of_the_latents(model: str, tmp_path: Path) -> None:
    folder = str(save_sae(tmp_path / "sae"))
    refuse_contradiction(config(model, latents=folder))
    refuse_contradiction(config(model, latents=folder, site="resid_pre"))
    refuse_contradiction(config(model, site="mlp_post"))
    with pytest.raises(BadInput, match=r"subject\.site: mlp_post, but subject\.latents read blocks\.1\.hook_resid_pre; leave"):
        refuse_contradiction(config(model, latents=folder, site="mlp_post"))
    with pytest.raises(BadInput, match=r"subject\.site: resid_post, but the latents in .* read blocks\.1\.hook_resid_pre; leave"):
        open_subject(config(model, latents=folder, site="resid_post"))
    # What a run directory holds names every setting, defaults among them.
    stored = RunConfig.model_validate(config(model, latents=folder).model_dump(mode="json"))
    assert open_subject(stored).site == "resid_pre" and torch.is_tensor(open_subject(stored).site_directions(0))

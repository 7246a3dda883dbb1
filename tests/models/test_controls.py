"""Decoys: the same everywhere, with real units' spread, and indifferent to how samples are batched."""

from __future__ import annotations

import math

import pytest
import torch

from raylabel.models.controls import draw_directions, fit_decoys, stretches


def pilot(rows: int = 4000, width: int = 24, seed: int = 0) -> torch.Tensor:
    """Units whose means and spreads differ by orders of magnitude, some correlated, two without spread."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(rows, width, generator=generator)
    acts[:, 1:5] += 2 * acts[:, :1]
    acts = acts * torch.logspace(-2, 2, width) + torch.linspace(-50, 50, width)
    acts[:, 7] = 0.0
    acts[:, 11] = 123.456
    return acts


def test_directions_are_unit_vectors_and_the_same_everywhere() -> None:
    directions = draw_directions(32, 200, seed=3, layer=5)
    assert directions.shape == (32, 200) and directions.dtype == torch.float32
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(200))
    torch.manual_seed(99)
    assert torch.equal(directions, draw_directions(32, 200, seed=3, layer=5))
    assert not torch.equal(directions, draw_directions(32, 200, seed=3, layer=6))
    assert not torch.equal(directions, draw_directions(32, 200, seed=4, layer=5))
    # A fixed value: another machine or version that draws otherwise would mix two sets of decoys in one run.
    assert directions[:2, 0].tolist() == pytest.approx([0.12930477, 0.19580163], abs=1e-6)
    # Gaussian columns point every way: their mean is near zero and they are nearly orthogonal.
    assert directions.mean(dim=1).abs().max() < 4 / math.sqrt(32 * 200)
    assert (directions.T @ directions - torch.eye(200)).abs().mean() < 0.2


def test_every_decoy_has_the_moments_of_a_real_unit() -> None:
    acts = pilot()
    decoys = fit_decoys(acts, 300, seed=0, layer=2)
    values = decoys(acts.view(40, 100, 24))
    assert values.shape == (40, 100, 300) and values.dtype == torch.float32
    real = torch.stack((acts.double().mean(0), acts.double().std(0, correction=0)), 1)
    mine = values.flatten(0, 1).double()
    mine = torch.stack((mine.mean(0), mine.std(0, correction=0)), 1)
    lively = [unit for unit in range(24) if unit not in (7, 11)]
    relative = (mine[:, None] - real[None, lively]).abs() / real[None, lively, 1:]
    nearest = relative.amax(dim=2).min(dim=1)
    assert nearest.values.max() < 1e-3
    assert set(nearest.indices.tolist()) == set(range(22))


def test_decoys_are_deterministic_and_do_not_see_the_batch() -> None:
    acts = pilot()
    decoys, again = (fit_decoys(acts, 16, seed=1, layer=0) for _ in range(2))
    assert torch.equal(decoys.gain, again.gain) and torch.equal(decoys.offset, again.offset)
    assert torch.equal(decoys.directions, draw_directions(24, 16, 1, 0))
    samples = acts[:60].view(6, 10, 24)
    together = decoys(samples)
    alone = torch.cat([decoys(sample[None]) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_half_precision_comes_in_and_float32_goes_out() -> None:
    acts = pilot().to(torch.bfloat16)
    decoys = fit_decoys(acts, 8, seed=0, layer=0)
    assert decoys(acts[None]).dtype == torch.float32 and decoys.centre.dtype == torch.float32
    torch.testing.assert_close(decoys(acts[None])[0], decoys(acts.float()[None])[0])


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_a_dead_layer_has_dead_decoys(rows: int) -> None:
    decoys = fit_decoys(torch.zeros(rows, 8), 5, seed=0, layer=0)
    assert torch.equal(decoys(torch.randn(2, 3, 8)), torch.zeros(2, 3, 5))


def test_pilots_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="finite"):
        fit_decoys(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]), 4, seed=0, layer=0)
    with pytest.raises(ValueError, match="width"):
        fit_decoys(torch.zeros(2, 3, 4), 4, seed=0, layer=0)


def test_decoys_of_a_wide_layer_mix_the_units_of_their_stretch() -> None:
    acts = torch.randn(300, 1100, generator=torch.Generator().manual_seed(0)) + 3
    decoys = fit_decoys(acts, 7, seed=0, layer=0)
    parts = stretches(1100, 7)
    assert [(u.start, u.stop, d.start, d.stop) for u, d in parts] == [(0, 550, 0, 3), (550, 1100, 3, 7)]
    for units, columns in parts:
        outside = decoys.directions[:, columns].clone()
        outside[units] = 0
        assert not outside.any()
    torch.testing.assert_close(decoys.directions.norm(dim=0), torch.ones(7))
    by_definition = decoys.offset + decoys.gain * ((acts - decoys.centre) @ decoys.directions)
    torch.testing.assert_close(decoys(acts), by_definition, rtol=1e-4, atol=1e-4)
    assert stretches(512, 256) == [(slice(0, 512), slice(0, 256))]
    assert len(stretches(14336, 256)) == 8

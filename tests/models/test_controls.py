"""Decoys: the same everywhere, with real units' spread, and indifferent to how samples are batched."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

from raylabel.models.controls import draw, fit_decoys, unscaled
from raylabel.models.hadamard import hadamard


def pilot(rows: int = 4000, width: int = 24, seed: int = 0) -> torch.Tensor:
    """Units whose means and spreads differ by orders of magnitude, some correlated, two without spread."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(rows, width, generator=generator)
    acts[:, 1:5] += 2 * acts[:, :1]
    acts = acts * torch.logspace(-2, 2, width) + torch.linspace(-50, 50, width)
    acts[:, 7] = 0.0
    acts[:, 11] = 123.456
    return acts


def test_what_is_drawn_is_the_same_everywhere() -> None:
    signs = draw(32, 200, seed=3, layer=5)
    assert signs.shape == (7, 2, 32) and signs.dtype == torch.float32 and set(signs.unique().tolist()) == {-1, 1}
    torch.manual_seed(99)
    assert torch.equal(signs, draw(32, 200, seed=3, layer=5))
    assert not torch.equal(signs, draw(32, 200, seed=3, layer=6))
    assert not torch.equal(signs, draw(32, 200, seed=4, layer=5))
    # A fixed value: another machine or version that draws otherwise would mix two sets of decoys in one run.
    assert signs[0, 1, :12].tolist() == [1, -1, -1, -1, 1, -1, 1, 1, -1, 1, -1, -1]


@pytest.mark.parametrize(("width", "n"), [(512, 256), (300, 256), (24, 16), (24, 100), (3, 5), (1, 3), (700, 1), (2048, 40)])
def test_directions_have_length_one_and_differ(width: int, n: int) -> None:
    acts = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    found = fit_decoys(acts, n, seed=3, layer=5).directions
    assert found.shape == (width, n)
    torch.testing.assert_close(found.norm(dim=0), torch.ones(n))
    if width >= 24:
        assert (found.T @ found - torch.eye(n)).abs().max() < min(0.99, 6 / math.sqrt(min(width, 256)))


@pytest.mark.parametrize(("width", "n"), [(512, 256), (300, 256), (2048, 40)])
def test_weights_are_as_good_as_gaussian(width: int, n: int) -> None:
    drawn = [unscaled(draw(width, n, seed, 0), width, n).double() for seed in range(40)]
    weights = torch.stack([raw[:256, seed] for seed, raw in enumerate(drawn)]) / 16
    assert weights.square().mean() == pytest.approx(1, abs=1e-6)
    assert weights.pow(4).mean() == pytest.approx(3, abs=0.25)
    # Sums of 256 signs fall on a grid: 0.06 is what its coarseness alone makes.
    assert kstest(weights.flatten().numpy(), "norm").statistic < 0.075
    # No unit weighs most in many decoys of a layer.
    strongest = (drawn[0] / drawn[0].norm(dim=0)).abs().argmax(dim=0)
    assert torch.bincount(strongest).max() <= 4


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 256])
def test_the_matrix_is_a_hadamard_matrix(size: int) -> None:
    matrix = hadamard(size)
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix.T @ matrix, size * torch.eye(size))


@pytest.mark.parametrize(("width", "n"), [(512, 256), (1100, 7), (300, 256), (24, 100), (3, 5), (1, 1), (40, 17), (600, 33)])
def test_decoys_are_what_their_directions_say(width: int, n: int) -> None:
    acts = torch.randn(300, width, generator=torch.Generator().manual_seed(0)) + 3
    decoys = fit_decoys(acts, n, seed=0, layer=0)
    by_definition = decoys.offset + decoys.gain * ((acts - decoys.centre) @ decoys.directions)
    for found in (decoys(acts), decoys.in_torch(acts)):
        torch.testing.assert_close(found, by_definition, rtol=1e-4, atol=1e-3)


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
    assert torch.equal(decoys.drawn, draw(24, 16, 1, 0))
    samples = acts[:60].view(6, 10, 24)
    together = decoys(samples)
    alone = torch.cat([decoys(sample[None]) for sample in samples])
    assert torch.equal(together, alone)


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

"""The state of a scan against brute force, the compiled update against tensor operations, any cut against any other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylabel.stages import device, kept
from raylabel.stages import state as state_module
from raylabel.stages.close import merge
from raylabel.stages.kept import lots
from raylabel.stages.state import LISTS, Batch, Sizes, UnitState
from raylabel.stages.statistics import Merged
from raylabel.tables import HISTOGRAM_BINS, HISTOGRAM_EDGES, MAGNITUDES

SALT = 2
SIZES = Sizes(lists=(5, 6, 3, 6), before=3, after=2, window=6, random=0)
KERNEL = state_module._update_cpu
BACKENDS = {"kernel": KERNEL, "device": device.update}


@dataclass(frozen=True)
class Corpus:
    """Activations of numbered samples, as a model would give them.

    Attributes:
        acts: [N, T, W] float32, of which a sample has its first `lengths` positions. mask: [N, T] what counts of them.
        split: [N]. drawn: numbers of the samples kept for all units.
    """

    acts: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray
    split: np.ndarray
    drawn: np.ndarray
    signs: tuple[int, ...] = (1, -1)
    sizes: Sizes = SIZES
    seed: int = 0

    @property
    def shift(self) -> np.ndarray:
        """Something near the units' means, as a pilot finds it."""
        return np.nan_to_num(self.acts[0].mean(0), posinf=0.0, neginf=0.0).astype(np.float32)


def corpus(
    samples: int = 21, length: int = 9, width: int = 67, values: str = "normal", seed: int = 0, **more: Any
) -> Corpus:
    """Random activations; `values`: normal, ties, negative, small, broken."""
    draw = np.random.default_rng([seed, samples, length, width])
    acts = draw.normal(size=(samples, length, width)).astype(np.float32) * 3
    if values == "ties":
        acts = np.where(draw.random(acts.shape) < 0.1, -0.0, np.round(acts / 2) * np.float32(0.5)).astype(np.float32)
    elif values == "negative":
        acts = -np.abs(acts) - np.float32(1e-3)
    elif values == "small":
        acts = (acts * 10.0 ** draw.uniform(-30, 8, acts.shape)).astype(np.float32)
    elif values == "broken":
        for unit, value in zip(range(0, width, 7), (np.nan, np.inf, -np.inf) * width, strict=False):
            acts[draw.integers(samples), draw.integers(length), unit] = value
    lengths = draw.integers(1, length + 1, samples)
    mask = (np.arange(length) < lengths[:, None]) & (draw.random((samples, length)) < 0.85)
    # A sample in which nothing counts, drawn for all units, and one that counts whole.
    mask[samples // 3] = False
    lengths[-1], mask[-1] = length, True
    drawn = np.unique(np.append(draw.choice(samples, min(4, samples), replace=False), samples // 3))
    return Corpus(acts, lengths, mask, draw.integers(0, 2, samples), drawn, seed=seed, **more)


def scanned(c: Corpus, update: Any = KERNEL, batch: int = 4, cuts: tuple[int, ...] = (), order: Any = None) -> Merged:
    """The merged state over leases that begin at 0 and at the cuts, multiples of the batch."""
    ends = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(c.acts)), len(c.acts)]
    parts = [lease(c, first, last, batch, update) for first, last in pairwise(ends)]
    return merge([parts[i] for i in (order or (lambda n: range(n)))(len(parts))])


def lease(c: Corpus, first: int, last: int, batch: int, update: Any) -> dict[str, np.ndarray]:
    drawn = np.array([n for n in c.drawn if first <= n < last], dtype=np.int64)
    state = UnitState(torch.from_numpy(c.shift), c.signs, replace(c.sizes, random=len(drawn)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_module, "_update_cpu", update)
        for at in range(first, last, batch):
            numbers = np.arange(at, at + batch)
            # Rows behind the end repeat another's values: nothing of them may count.
            rows = np.where(numbers < last, numbers, first)
            there = (numbers < last).astype(bool)
            lengths = np.where(there, c.lengths[rows], 0)
            size = max(int(lengths.max()), 1)
            place = [int(np.flatnonzero(drawn == n)[0]) if n in drawn else -1 for n in numbers]
            acts = torch.from_numpy(c.acts[rows, :size])
            mask = torch.from_numpy(c.mask[rows, :size] & there[:, None])
            here = Batch(at, numbers, lots(numbers, c.seed, SALT), c.split[rows], np.array(place), lengths)
            state.add(lambda part, acts=acts: acts[part], mask, here)
    return {**state.arrays(), "tokens": np.array(c.mask[first:last].sum()), "random": drawn}


def expected_lists(c: Corpus, unit: int, sign: int) -> tuple[dict[str, list[Any]], dict[int, Any]]:
    """Entries (order's sample, value, place, ties, window) of one unit's lists and random samples, by loops."""
    found: dict[int, tuple[float, Any]] = {}
    for n in range(len(c.acts)):
        series, counts = sign * c.acts[n, :, unit], np.flatnonzero(c.mask[n])
        if len(counts) == 0:
            continue
        peak = max(series[t] for t in counts)
        at = [int(t) for t in counts if series[t] == peak]
        window = [series[t] for t in range(max(at[0] - c.sizes.before, 0), min(at[0] + c.sizes.after + 1, c.lengths[n]))]
        window += [0.0] * (c.sizes.window - len(window))
        found[n] = (float(peak), (n, float(peak), at[0], len(at) - 1, np.array(window, np.float32)))
    tickets = lots(np.arange(len(c.acts)), c.seed, SALT)
    lists = {}
    for name, k in zip(LISTS, c.sizes.lists, strict=True):
        split = name.startswith("score")
        fires = [n for n, (peak, _) in found.items() if peak > 0 and c.split[n] == split]
        fires.sort(key=(lambda n: (-found[n][0], n)) if name.endswith("top") else (lambda n: -tickets[n]))
        lists[name] = [found[n][1] for n in fires[:k]]
    return lists, {n: found[n][1] if n in found else None for n in c.drawn.tolist()}


def same_entries(arrays: dict[str, np.ndarray], column: int, wanted: list[Any]) -> None:
    n = len(wanted)
    assert (arrays["order"][column, n:] == kept.EMPTY).all()
    assert kept.samples_of(arrays["order"][column])[:n].tolist() == [w[0] for w in wanted]
    for i, name in enumerate(("value", "place", "ties"), start=1):
        assert arrays[name][column, :n].tolist() == [w[i] for w in wanted], name
    for i, entry in enumerate(wanted):
        np.testing.assert_array_equal(arrays["window"][column, i], entry[4])


def histogram(values: np.ndarray) -> list[int]:
    """Counts of float32 values: above the middle a bin holds its lower edge, below it its upper one."""
    wide, edges = values.astype(np.float64), np.array(HISTOGRAM_EDGES)
    bins = np.where(wide < 0, np.searchsorted(edges, wide, "left"), np.searchsorted(edges, wide, "right")) - 1
    found: list[int] = np.bincount(bins, minlength=HISTOGRAM_BINS).tolist()
    return found


def check(c: Corpus, merged: Merged, units: range | None = None) -> None:
    """The whole state against loops over everything."""
    width = c.acts.shape[2]
    assert merged.tokens == c.mask.sum()
    shift = c.shift.astype(np.float64)
    for unit in units or range(width):
        x = c.acts[c.mask][:, unit]
        broken = not np.isfinite(x).all()
        assert merged.bad[unit] == broken
        if broken:
            continue
        assert (merged.high[unit], merged.low[unit]) == (x.max(initial=-np.inf), x.min(initial=np.inf))
        assert merged.fires[:, unit].tolist() == [(x > 0).sum(), (x < 0).sum()]
        assert merged.histogram[unit].tolist() == histogram(x)
        moved = (x - c.shift[unit]).astype(np.float64) if len(x) else np.zeros(0)
        for i in range(4):
            scale = (np.abs(moved) ** (i + 1)).sum() + abs(shift[unit]) * 1e-6
            assert abs(merged.powers[i, unit] - (moved ** (i + 1)).sum()) <= 2e-6 * scale
        for i, sign in enumerate(c.signs):
            column = i * width + unit
            lists, drawn = expected_lists(c, unit, sign)
            for name, wanted in lists.items():
                same_entries(merged.lists[name], column, wanted)
            random = merged.random(c.drawn)
            for at, entry in enumerate(drawn.values()):
                one = {name: values[:, at : at + 1] for name, values in random.items()}
                same_entries(one, column, [] if entry is None else [entry])


def assert_same(a: Merged, b: Merged, c: Corpus, powers: bool = True) -> None:
    """All bits of two states, those of broken units apart; without `powers` their sums to 1e-6."""
    good = ~a.bad
    columns = np.tile(good, len(c.signs))
    assert a.tokens == b.tokens
    np.testing.assert_array_equal(a.bad, b.bad)
    for name in ("high", "low", "histogram"):
        np.testing.assert_array_equal(getattr(a, name)[good], getattr(b, name)[good], err_msg=name)
    np.testing.assert_array_equal(a.fires[:, good], b.fires[:, good])
    for x, y in [(a.lists[name], b.lists[name]) for name in LISTS] + [(a.random(c.drawn), b.random(c.drawn))]:
        for field in kept.FIELDS:
            np.testing.assert_array_equal(x[field][columns], y[field][columns], err_msg=field)
    if powers:
        np.testing.assert_array_equal(a.powers[:, good], b.powers[:, good])
    else:
        moved = np.where(c.mask[..., None], c.acts[..., good] - c.shift[good], 0.0).astype(np.float64)
        for i in range(4):
            scale = (np.abs(moved) ** (i + 1)).sum((0, 1))
            assert (np.abs(a.powers[i, good] - b.powers[i, good]) <= 1e-6 * scale).all()


EVERYTHING: dict[str, Corpus] = {
    "normal": corpus(),
    "ties": corpus(values="ties"),
    "small and large": corpus(values="small"),
    "negative": corpus(values="negative"),
    "broken": corpus(values="broken"),
    "one sign": corpus(values="ties", signs=(1,)),
    "the low end alone": corpus(signs=(-1,)),
    "one position": corpus(length=1),
    "one sample": corpus(samples=1),
    "one unit": corpus(width=1, values="ties"),
    "all of the text": corpus(length=5, sizes=Sizes((5, 6, 3, 6), 50, 10, 5, 0)),
    "long lists": corpus(samples=9, sizes=Sizes((50, 40, 25, 40), 3, 2, 6, 0)),
    "no firing list": corpus(sizes=Sizes((5, 0, 3, 0), 3, 2, 6, 0)),
    "peaks alone": corpus(values="ties", sizes=Sizes((5, 6, 3, 6), 0, 0, 1, 0)),
    "a block and a bit": corpus(samples=6, length=4, width=321),
    "a long text": corpus(samples=3, length=150, width=5, values="ties"),
}


@pytest.mark.parametrize("update", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("case", EVERYTHING)
def test_the_state_is_that_of_brute_force(case: str, update: Any) -> None:
    c = EVERYTHING[case]
    check(c, scanned(c, update))


@pytest.mark.parametrize("case", EVERYTHING)
def test_both_updates_give_the_same_bits(case: str) -> None:
    c = EVERYTHING[case]
    assert_same(scanned(c), scanned(c, device.update), c, powers=False)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 3, 63, 64, 65, 130, 256, 257]),
    st.sampled_from(["normal", "ties", "small", "negative", "broken"]), st.sampled_from([(1,), (1, -1), (-1,)]),
    st.sampled_from([1, 2, 4, 8]), st.lists(st.integers(1, 39), max_size=4), st.randoms(use_true_random=False),
    st.integers(0, 99),
)  # fmt: skip
def test_any_cut_and_any_order_of_merging_give_the_same_bits(
    samples: int, length: int, width: int, values: str, signs: tuple[int, ...], batch: int, cuts: list[int], random: Any,
    seed: int,
) -> None:  # fmt: skip
    c = corpus(samples, length, width, values, seed, signs=signs)
    whole = scanned(c, batch=batch)

    def shuffled(n: int) -> list[int]:
        return random.sample(range(n), n)

    places = tuple(cut // batch * batch for cut in cuts)
    assert_same(whole, scanned(c, batch=batch, cuts=places, order=shuffled), c)
    tensors = scanned(c, device.update, batch)
    assert_same(tensors, scanned(c, device.update, batch, places, shuffled), c)
    assert_same(whole, tensors, c, powers=False)
    check(c, whole, range(0, width, max(width // 4, 1)))


@pytest.mark.parametrize("update", BACKENDS.values(), ids=BACKENDS)
def test_another_batch_gives_the_same_bits(update: Any) -> None:
    """But for the sums of tensor operations, in which how far a batch is filled up decides the order of additions."""
    c = corpus(40, 7, 30, "ties")
    for batch in (1, 2, 8, 64):
        assert_same(scanned(c, update), scanned(c, update, batch), c, powers=update is KERNEL)


@pytest.mark.parametrize("update", BACKENDS.values(), ids=BACKENDS)
def test_a_batch_handled_in_pieces(monkeypatch: pytest.MonkeyPatch, update: Any) -> None:
    c = EVERYTHING["ties"]
    whole = scanned(c, update, 16)
    for cells in (1, 3 * 9 * 67):
        monkeypatch.setattr(state_module, "CPU_PASS", cells)
        assert_same(whole, scanned(c, update, 16), c)


@pytest.mark.parametrize("values", ["normal", "broken"])
def test_threads_change_nothing(values: str) -> None:
    c, before = corpus(12, 6, 700, values), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(scanned(c))
    finally:
        torch.set_num_threads(before)
    assert_same(found[0], found[1], c)
    assert_same(found[0], found[2], c)


@pytest.mark.parametrize("update", BACKENDS.values(), ids=BACKENDS)
def test_activations_that_lie_apart_in_memory(update: Any) -> None:
    c = EVERYTHING["ties"]
    spread = np.zeros((*c.acts.shape[:2], 2 * c.acts.shape[2]), np.float32)
    spread[..., ::2] = c.acts
    assert_same(scanned(c, update), scanned(replace(c, acts=spread[..., ::2]), update), c)


def test_a_part_of_the_units_is_what_they_are_alone() -> None:
    c = EVERYTHING["ties"]
    state = UnitState(torch.from_numpy(c.shift), c.signs, replace(c.sizes, random=len(c.drawn)))
    every = np.arange(32)
    place = np.array([int(np.flatnonzero(c.drawn == n)[0]) if n in c.drawn else -1 for n in every])
    rows, there = np.minimum(every, 20), every < 21
    here = Batch(0, every, lots(every, 0, SALT), c.split[rows], place, np.where(there, c.lengths[rows], 0))
    acts = torch.from_numpy(c.acts[rows])
    state.add(lambda part: acts[part], torch.from_numpy(c.mask[rows] & there[:, None]), here)
    whole, units = state.arrays(), torch.tensor([2, 40, 66])
    columns = torch.cat([units, units + 67])
    for name, values in state.arrays(units).items():
        if name.startswith("moments"):
            at = whole[name][..., units] if name.endswith("sums") else whole[name]
        else:
            at = whole[name][columns] if "." in name else whole[name][..., units] if name == "fires" else whole[name][units]
        np.testing.assert_array_equal(values, at, err_msg=name)


def test_firing_samples_are_a_uniform_draw_from_those_that_fire() -> None:
    samples, k, seeds = 60, 10, 400
    draw = np.random.default_rng(5)
    acts = -np.ones((samples, 2, 2), np.float32)
    fires = np.sort(draw.choice(samples, 40, replace=False))
    acts[fires, 1] = draw.uniform(0.1, 9, (40, 1))
    lengths, everywhere, explain = np.full(samples, 2), np.ones((samples, 2), bool), np.zeros(samples, int)
    c = Corpus(acts, lengths, everywhere, explain, np.array([0]), (1,), Sizes((1, k, 1, 1), 0, 0, 1, 0))
    counts = np.zeros(samples)
    for seed in range(seeds):
        order = scanned(replace(c, seed=seed), batch=64).lists["explain.firing"]["order"]
        assert (order[0] == order[1]).all()
        counts[kept.samples_of(order[0])] += 1
    assert counts.sum() == seeds * k and counts[np.setdiff1d(np.arange(samples), fires)].sum() == 0
    mean, share = seeds * k / len(fires), k / len(fires)
    statistic = ((counts[fires] - mean) ** 2).sum() / (mean * (1 - share)) * (len(fires) - 1) / len(fires)
    assert 1e-3 < scipy.stats.chi2.sf(statistic, len(fires) - 1) < 1 - 1e-3


def test_every_finite_value_lies_in_one_bin_and_the_other_sign_mirrors_them() -> None:
    around = [np.nextafter(np.float32(m), np.float32(d)) for m in MAGNITUDES for d in (0, np.inf)]
    extreme = [0.0, -0.0, 1e-45, 1e-38, 1.49, 1e30, np.finfo(np.float32).max]
    one = np.array([*MAGNITUDES, *around, *extreme], np.float32)
    values = np.concatenate([one, -one])
    acts = np.stack([values, -values], 1)[None]
    n = len(values)
    sizes = replace(SIZES, before=0, after=0)
    c = Corpus(acts, np.array([n]), np.ones((1, n), bool), np.zeros(1, int), np.array([0]), sizes=sizes)
    for update in BACKENDS.values():
        counts = scanned(c, update, 1).histogram
        assert counts.shape == (2, HISTOGRAM_BINS) and counts.sum(1).tolist() == [n, n]
        assert counts[0].tolist() == counts[1][::-1].tolist()
        assert counts[0].tolist() == histogram(values)

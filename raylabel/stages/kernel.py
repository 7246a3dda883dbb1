"""The update of a scan's state with one batch on a CPU: one pass over the activations, compiled.

For each unit (a column of `acts`) and sample: maximum and minimum over the positions that count, power sums, counts,
histogram; then, where a sample enters one of the unit's lists, its peak, ties and the window around the peak.
`state.py` says what the arrays mean; `device.py` does the same with tensor operations and must give the same bits.

Units are independent of each other: `update` works on the columns [first, last), so that threads share nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from raylabel.compiled import compiled
from raylabel.tables import HISTOGRAM_LOW, MAGNITUDES

BLOCK = 256
"""Units whose sums are in the cache together."""
BIN_BLOCK = 64
"""Units whose histograms are in the cache together."""
PEAK_SHARE = 16
"""One in so many columns of a block that has a peak to look for makes it worth to look at all."""
FLUSH = 64
"""Positions whose powers are summed in float32 before they are added in float64."""
HALF = np.int32(len(MAGNITUDES))
OCTAVE_ZERO = np.int32((127 + HISTOGRAM_LOW) << 1)
_LOW = np.int64(0xFFFFFFFF)


@compiled
def _powers(rows: Any, first: int, n: int, at: Any, count: int, shift: Any, high: Any, low: Any, fires: Any, sums: Any) -> None:
    """Maxima, minima, counts and power sums of the columns first .. first + n of one sample's [T, W] rows."""
    one, zero = np.int32(1), np.int32(0)
    nought = np.float32(0)
    s1, s2 = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    s3, s4 = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    h = shift[first : first + n]
    k = 0
    while k < count:
        end = min(k + FLUSH, count)
        s1[:n], s2[:n], s3[:n], s4[:n] = nought, nought, nought, nought
        while k + 4 <= end:
            r0, r1 = rows[at[k], first : first + n], rows[at[k + 1], first : first + n]
            r2, r3 = rows[at[k + 2], first : first + n], rows[at[k + 3], first : first + n]
            for c in range(n):
                v0, v1, v2, v3 = r0[c], r1[c], r2[c], r3[c]
                a, b = v0 if v0 > v1 else v1, v2 if v2 > v3 else v3
                a = a if a > b else b
                high[c] = a if a > high[c] else high[c]
                a, b = v0 if v0 < v1 else v1, v2 if v2 < v3 else v3
                a = a if a < b else b
                low[c] = a if a < low[c] else low[c]
                fires[0, c] += (
                    (one if v0 > nought else zero) + (one if v1 > nought else zero)
                    + (one if v2 > nought else zero) + (one if v3 > nought else zero)
                )  # fmt: skip
                fires[1, c] += (
                    (one if v0 < nought else zero) + (one if v1 < nought else zero)
                    + (one if v2 < nought else zero) + (one if v3 < nought else zero)
                )  # fmt: skip
                d0, d1, d2, d3 = v0 - h[c], v1 - h[c], v2 - h[c], v3 - h[c]
                q0, q1, q2, q3 = d0 * d0, d1 * d1, d2 * d2, d3 * d3
                s1[c] += (d0 + d1) + (d2 + d3)
                s2[c] += (q0 + q1) + (q2 + q3)
                s3[c] += (q0 * d0 + q1 * d1) + (q2 * d2 + q3 * d3)
                s4[c] += (q0 * q0 + q1 * q1) + (q2 * q2 + q3 * q3)
            k += 4
        while k < end:
            r0 = rows[at[k], first : first + n]
            for c in range(n):
                v0 = r0[c]
                high[c] = v0 if v0 > high[c] else high[c]
                low[c] = v0 if v0 < low[c] else low[c]
                fires[0, c] += one if v0 > nought else zero
                fires[1, c] += one if v0 < nought else zero
                d0 = v0 - h[c]
                q0 = d0 * d0
                s1[c] += d0
                s2[c] += q0
                s3[c] += q0 * d0
                s4[c] += q0 * q0
            k += 1
        for c in range(n):
            sums[0, first + c] += s1[c]
            sums[1, first + c] += s2[c]
            sums[2, first + c] += s3[c]
            sums[3, first + c] += s4[c]


@compiled
def _extremes(sums: Any, highest: Any, lowest: Any, n: int, begin: int, high: Any, low: Any, bad: Any) -> None:
    """Enters one sample's extremes in those of the whole, and units that gave no finite value in `bad`."""
    for c in range(n):
        up, down = highest[c], lowest[c]
        high[begin + c] = up if up > high[begin + c] else high[begin + c]
        low[begin + c] = down if down < low[begin + c] else low[begin + c]
        bad[begin + c] |= np.isnan(sums[c]) | (up == np.inf) | (down == -np.inf)


@compiled
def _top_key(extreme: Any, sample: Any) -> Any:
    """See `kept.top_orders`."""
    return (np.int64(np.float32(extreme).view(np.int32)) << 32) | (_LOW - sample)


@compiled
def _entering(
    bits: Any, n: int, sign: Any, sample: Any, lot: Any, always: bool, top: Any, firing: Any, todo: Any
) -> int:  # fmt: skip
    """Lists, in `todo`, the columns whose sample enters a list; `bits` [n] of the extremes, before the sign."""
    tail = _LOW - sample
    found = 0
    for c in range(n):
        # Of sign * extreme; positive floats are ordered as their bits.
        i = bits[c] if sign > 0 else bits[c] ^ np.int32(-0x80000000)
        enters = (i > 0) & ((((np.int64(i) << 32) | tail) > top[c]) | (lot > firing[c]))
        todo[found] = c
        found += 1 if (enters or always) else 0
    return found


@compiled
def _count_bins(rows: Any, first: int, n: int, at: Any, count: int, bins: Any, counts: Any) -> None:
    """Adds one sample's values to the histograms `counts` [.., 128] (flat) of the columns first .. first + n."""
    for k in range(count):
        row = rows[at[k], first : first + n]
        for c in range(n):
            # A float's sign, exponent and first mantissa bit are its bin.
            i = row[c]
            octave = ((i & np.int32(0x7FFFFFFF)) >> np.int32(22)) - OCTAVE_ZERO
            octave = min(max(octave, np.int32(-1)), HALF - np.int32(1)) + np.int32(1)
            bins[c] = np.uint32(np.int32(c << 7) + (HALF - octave if i < 0 else HALF + octave))
        for c in range(n):
            counts[bins[c]] += np.uint32(1)


@compiled
def _insert(order: Any, value: Any, place: Any, ties: Any, slot: Any, key: Any, peak: Any, at: Any, tied: Any) -> Any:
    """Puts an entry where it belongs among a unit's entries of falling order; gives the slot of its window."""
    k = order.shape[0]
    free = slot[k - 1]
    j = k - 1
    while j > 0 and order[j - 1] < key:
        order[j], value[j], place[j], ties[j], slot[j] = order[j - 1], value[j - 1], place[j - 1], ties[j - 1], slot[j - 1]
        j -= 1
    order[j], value[j], place[j], ties[j], slot[j] = key, peak, at, tied, free
    return free


@compiled
def _peaks(rows: Any, first: int, n: int, at: Any, count: int, extremes: Any, todo: Any, place: Any, found: Any) -> None:
    """For the columns `todo` of first .. first + n: first position of the extreme, -1 for none, and number of positions."""
    if len(todo) * PEAK_SHARE < n:
        for c in todo:
            place[c], found[c] = -1, 0
            for k in range(count):
                if rows[at[k], first + c] == extremes[c]:
                    place[c] = at[k] if found[c] == 0 else place[c]
                    found[c] += 1
        return
    # Where many samples enter, whole rows are faster than single columns.
    place[:n], found[:n] = -1, 0
    for k in range(count):
        row, here = rows[at[k], first : first + n], np.int32(at[k])
        for c in range(n):
            same = row[c] == extremes[c]
            place[c] = here if same and found[c] == 0 else place[c]
            found[c] += np.int32(1) if same else np.int32(0)


@compiled
def _window(rows: Any, column: int, sign: Any, start: int, stop: int, into: Any) -> None:
    for t in range(start, stop):
        into[t - start] = sign * rows[t, column]
    for t in range(stop - start, into.shape[0]):
        into[t] = 0


@compiled
def update(
    acts: Any, bits: Any, first: int, last: int, mask: Any, lengths: Any,
    split: Any, samples: Any, lots: Any, chosen: Any, shift: Any, signs: Any, before: int, after: int,
    high: Any, low: Any, fires: Any, bad: Any, histogram: Any, sums: Any,
    order: Any, value: Any, place: Any, ties: Any, slot: Any, window: Any, floor: Any,
    random_value: Any, random_place: Any, random_ties: Any, random_window: Any,
) -> None:  # fmt: skip
    """Adds a batch to the state of the columns [first, last).

    Args:
        acts, bits: [B, T, W] float32, and the same memory as int32.
        mask: [B, T] positions that count; lengths: [B] tokens of each sample.
        split: [B] 0 or 1; samples: [B] numbers; lots: [B] orders of the firing list; chosen: [B] place among the
            random samples, -1 for none.
        shift: [W]; signs: [P] of the polarities; before, after: positions kept around a peak.
        high, low, fires [2, W], bad [W], histogram [W, 128], sums [B, 4, W]: see state.UnitState; sums are set.
        order … floor: tuples of the lists' arrays, list 2 * split + (0 top, 1 firing), [P * W, k]; floor [P * W] is the
            order that an entry must exceed.
        random_…: [P * W, R].
    """
    batch, length, width = acts.shape
    at, counts = np.empty((batch, length), np.int64), np.zeros(batch, np.int64)
    for b in range(batch):
        for t in range(length):
            if mask[b, t]:
                at[b, counts[b]] = t
                counts[b] += 1
    highest, lowest = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    fired = np.empty((2, BLOCK), np.int32)
    bits_high, bits_low = highest.view(np.int32), lowest.view(np.int32)
    bins, todo = np.empty(BIN_BLOCK, np.uint32), np.empty(BLOCK, np.int32)
    peaks, found = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    for begin in range(first, last, BLOCK):
        n = min(BLOCK, last - begin)
        fired[:] = 0
        for b in range(batch):
            highest[:] = -np.inf
            lowest[:] = np.inf
            sums[b, :, begin : begin + n] = 0
            if counts[b] == 0:
                continue
            rows, here, count = acts[b], at[b], counts[b]
            _powers(rows, begin, n, here, count, shift, highest, lowest, fired, sums[b])
            _extremes(sums[b, 0, begin : begin + n], highest, lowest, n, begin, high, low, bad)
            s = split[b]
            for p in range(signs.shape[0]):
                sign = signs[p]
                offset = p * width + begin
                entering = _entering(
                    bits_high if sign > 0 else bits_low, n, sign, samples[b], lots[b], chosen[b] >= 0,
                    floor[2 * s][offset : offset + n], floor[2 * s + 1][offset : offset + n], todo,
                )  # fmt: skip
                if entering:
                    extremes = highest if sign > 0 else lowest
                    _peaks(rows, begin, n, here, count, extremes, todo[:entering], peaks, found)
                for j in range(entering):
                    c = todo[j]
                    extreme = highest[c] if sign > 0 else -lowest[c]
                    peak, tied = peaks[c], found[c] - 1
                    if peak < 0:
                        continue
                    unit = offset + c
                    start, stop = max(peak - before, 0), min(peak + after + 1, lengths[b])
                    for kind in range(2):
                        k = 2 * s + kind
                        key = _top_key(extreme, samples[b]) if kind == 0 else lots[b]
                        if extreme > 0 and key > floor[k][unit]:
                            free = _insert(
                                order[k][unit], value[k][unit], place[k][unit], ties[k][unit], slot[k][unit],
                                key, extreme, peak, tied,
                            )  # fmt: skip
                            _window(rows, begin + c, sign, start, stop, window[k][unit, free])
                            floor[k][unit] = order[k][unit, -1]
                    if chosen[b] >= 0:
                        r = chosen[b]
                        random_value[unit, r], random_place[unit, r], random_ties[unit, r] = extreme, peak, tied
                        _window(rows, begin + c, sign, start, stop, random_window[unit, r])
            for at_bin in range(begin, begin + n, BIN_BLOCK):
                m = min(BIN_BLOCK, begin + n - at_bin)
                flat = histogram[at_bin : at_bin + m].reshape(-1)
                # With a constant number of units the compiler makes a loop twice as fast.
                if m == BIN_BLOCK:
                    _count_bins(bits[b], at_bin, BIN_BLOCK, here, count, bins, flat)
                else:
                    _count_bins(bits[b], at_bin, m, here, count, bins, flat)
        for c in range(n):
            fires[0, begin + c] += fired[0, c]
            fires[1, begin + c] += fired[1, c]

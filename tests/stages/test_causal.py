from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy import stats
from torch import Tensor

from raylabel.sections import VerifyConfig
from raylabel.stages import causal
from raylabel.stages.measure import measure
from raylabel.tables import conform, schema
from tests.stages.known_units import CUE, ID, RULES, WINDOW, Fake, Given, Known, make_plan, scan


@pytest.mark.parametrize("name", list(RULES))
def test_known_units_get_their_evidence(known: Known, name: str) -> None:
    row = known.verifications.to_pylist()[list(RULES).index(name)]
    assert row["evidence"] == name
    assert row["reproduced"] == 1 and row["note"] is None


def test_numbers_of_known_units(known: Known) -> None:
    concept, token, context, none = known.verifications.to_pylist()
    assert concept["retention_mat"] > 0.5 and concept["specificity_low"] > 0.3
    assert token["retention_mat"] == pytest.approx(0, abs=0.05) and token["retention_context"] > 0.95
    assert context["retention_by_offset"][4] == pytest.approx(0, abs=0.05)
    assert context["retention_mat"] > 0.95
    assert none["retention"] == pytest.approx(1) and none["promoted"] == []
    assert concept["n_variants"] == 600
    assert concept["drop_mat"] < 0.6 and token["drop_mat_low"] > 0.95
    assert (context["drop_context_offset"], context["drop_context"]) == (-1, pytest.approx(1, abs=0.05))
    assert none["drop_mat_low"] <= none["drop_mat"] == pytest.approx(0) == none["drop_context"]
    assert token["retention_random_mat"] == pytest.approx(0, abs=0.05) and token["retention_random_context"] > 0.95
    assert context["retention_random_by_offset"][4] == pytest.approx(0, abs=0.05)


def test_context_is_kept(samples: pa.Table) -> None:
    """The original method ran the phrase alone: a unit that needs a cue further back would seem to need every word."""
    def needs_far_cue(tokens: Tensor) -> Tensor:
        cue = (tokens == ID[CUE]).cumsum(1) > 0
        return 10 * (cue & (tokens == ID["dog"])).float()

    exemplars, _ = scan(Fake([needs_far_cue]), samples)
    rows, _ = measure(Fake([needs_far_cue]), 0, make_plan(exemplars, samples, Given(["cat"], ["fox"])))
    far = []
    texts = dict(zip(samples["sample"].to_pylist(), samples["text"].to_pylist(), strict=True))
    for row in rows.filter((pc.field("offset") < 0) & (pc.field("recorded") > 9)).to_pylist():
        words = texts[row["sample"]].split()
        if CUE not in words[row["position"] - 1 - WINDOW : row["position"]]:
            far.append(row["activation"])
    assert len(far) > 20 and min(far) == 10


def test_a_variant_that_was_not_measured_is_no_zero(known: Known) -> None:
    """In the original method rejected variants counted as activations of zero."""
    exemplars, statistics, rows, *_ = known
    variant = pc.field("kind") != "original"
    lost = rows.filter(variant & (pc.field("neuron") == 0)).slice(0, 200)["substitute"].unique()
    gone = pc.and_(pc.is_in(rows["substitute"], lost), pc.equal(rows["neuron"], 0)).combine_chunks()
    gone = pc.and_(gone, pc.not_equal(rows["kind"], "original")).combine_chunks()
    masked = pc.if_else(gone, pa.scalar(None, pa.float32()), rows["activation"])
    nulls = rows.set_column(rows.schema.get_field_index("activation"), "activation", masked)
    absent = rows.filter(pc.invert(gone))
    a, b = (causal.summarise(t, exemplars, statistics, layer=0, seed=0) for t in (nulls, absent))
    assert a[0].equals(b[0]) and a[1].equals(b[1])
    assert a[1]["n_variants"].to_pylist()[0] < known.verifications["n_variants"].to_pylist()[0]


def test_formulas_equal_plain_loops(known: Known) -> None:
    rng = np.random.default_rng(5)
    exemplars, statistics, rows, *_ = known
    shaken = rows["activation"].to_numpy().copy()
    variant = np.array(rows["kind"].to_pylist()) != "original"
    shaken[variant] = rng.uniform(0, 12, int(variant.sum()))
    keeps = pa.array(rng.random(rows.num_rows) < 0.3)
    rows = rows.set_column(rows.schema.get_field_index("activation"), "activation", pa.array(shaken, pa.float32()))
    rows = rows.set_column(rows.schema.get_field_index("keeps_token"), "keeps_token", keeps)
    documents = pa.array(rows["document"].to_numpy() // 10, pa.int64())
    rows = rows.set_column(rows.schema.get_field_index("document"), "document", documents)
    _, verifications = causal.summarise(rows, exemplars, statistics, layer=0, seed=0)
    for line in verifications.to_pylist():
        expected = by_loops(line["neuron"], rows.to_pylist(), exemplars.to_pylist(), statistics.to_pylist())
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-5), name
        assert line["specificity_low"] <= line["specificity"] <= line["specificity_high"]


def by_loops(unit: int, rows: list[Any], exemplars: list[Any], statistics: list[Any]) -> dict[str, Any]:
    mine = [row for row in rows if row["neuron"] == unit]
    drawn = [e["activations"] for e in exemplars if e["neuron"] == unit and e["sampling"] == "random"]
    b = float(np.median([max(a[i : i + 11]) for a in drawn for i in range(len(a) - 10)]))
    top = next(s["max"] for s in statistics if s["neuron"] == unit)
    original = {row["rank"]: row["activation"] for row in mine if row["kind"] == "original"}
    both = ("neighbour", "random")

    def chosen(kinds: Sequence[str], offsets: Sequence[int], fresh: bool = False, among: set[int] | None = None) -> list[Any]:
        """Document, a_v - b and a_o - b of variants; extra ones only where both kinds are compared."""
        found = []
        for row in mine:
            a_o = original[row["rank"]]
            if row["extra"] and among is None:
                continue
            if row["kind"] not in kinds or row["offset"] not in offsets or a_o - b < 0.05 * (top - b):
                continue
            if (not fresh or not row["keeps_token"]) and (among is None or row["rank"] in among):
                found.append((row["document"], row["activation"] - b, a_o - b))
        return found

    def retention(*which: Any) -> float:
        return ratio(chosen(*which))

    seed = causal.draw_seed(0, 0, (None, unit, 1))

    def costs(name: str, found: list[Any]) -> dict[str, float]:
        low, high = by_resampling([], found, seed)
        return {name: 1 - ratio(found), f"{name}_low": low, f"{name}_high": high}

    fresh = [{r["rank"] for r in mine if r["kind"] == k and r["offset"] == 0 and not r["keeps_token"]} for k in both]
    paired = [chosen([kind], [0], True, fresh[0] & fresh[1]) for kind in both]
    low, high = by_resampling(*paired, seed)
    near = [row["activation"] for row in mine if row["kind"] == "neighbour" and not row["extra"]]
    worst = min(range(-5, 0), key=lambda o: retention(both, [o]))
    numbers = {
        "specificity": ratio(paired[0]) - ratio(paired[1]),
        "specificity_low": low,
        "specificity_high": high,
        **costs("drop_mat", chosen(both, [0], True)),
        **costs("drop_context", chosen(both, [worst])),
        "drop_context_offset": worst,
        "average_activation": sum(near) / len(near),
        "background": b,
        "n_variants": sum(not row["extra"] for row in mine) - len(original),
    }
    for name, kind in (("retention", "neighbour"), ("retention_random", "random")):
        numbers[name] = retention([kind], range(-5, 1))
        numbers[f"{name}_mat"] = retention([kind], [0])
        numbers[f"{name}_context"] = retention([kind], range(-5, 0))
        numbers[f"{name}_by_offset"] = [retention([kind], [o]) for o in range(-5, 1)]
    return numbers


def ratio(found: list[Any]) -> float:
    """Of sums; 1 of nothing, as a drop is 1 - a retention."""
    return sum(gain for _, gain, _ in found) / sum(base for _, _, base in found) if found else 1.0


def by_resampling(more: list[Any], less: list[Any], seed: int) -> tuple[float, float]:
    """The interval of a difference of ratios, document by document."""
    documents = sorted({document for document, *_ in less})
    n, value = len(documents), ratio(more) - ratio(less)
    of = [[[row for row in part if row[0] == d] for d in documents] for part in (more, less)]
    found = []
    for draw in np.random.default_rng(seed).integers(n, size=(1000, n)):
        again = [[row for i in draw for row in part[i]] for part in of]
        found.append(ratio(again[0]) - ratio(again[1]))
    low, high = np.percentile(found, (2.5, 97.5))
    stretch = stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975) * (n / (n - 1)) ** 0.5
    return value - stretch * (value - low), value + stretch * (high - value)


def test_promoted_are_the_substitutes_that_raise_most(known: Known) -> None:
    exemplars, statistics, rows, *_ = known
    rng = np.random.default_rng(6)
    variant = np.array(rows["kind"].to_pylist()) != "original"
    values = np.where(variant, rng.uniform(5, 15, rows.num_rows), rows["activation"].to_numpy())
    rows = rows.set_column(rows.schema.get_field_index("activation"), "activation", pa.array(values, pa.float32()))
    _, verifications = causal.summarise(rows, exemplars, statistics, layer=0, seed=0)
    for line, top in zip(verifications.to_pylist(), statistics["max"].to_pylist(), strict=True):
        mine = [row for row in rows.to_pylist() if row["neuron"] == line["neuron"]]
        before = {row["rank"]: row["activation"] for row in mine if row["kind"] == "original"}
        raised = [row for row in mine if row["activation"] > before[row["rank"]] + 1e-3 * top]
        best = sorted(raised, key=lambda row: -row["activation"])
        assert line["promoted"] == list(dict.fromkeys(row["substitute"] for row in best))[:10]
        assert len(line["promoted"]) == 10


@pytest.mark.parametrize("more", [0.2, 2.0])
def test_a_certain_specificity_of_one_word_alone_is_no_concept(known: Known, more: float) -> None:
    """The same few neighbours in every exemplar leave the bootstrap over documents nothing to vary."""
    rows = known.rows
    near = pc.and_(pc.and_(pc.equal(rows["neuron"], 1), pc.equal(rows["kind"], "neighbour")), pc.equal(rows["offset"], 0))
    lifted = pc.if_else(near.fill_null(False), pc.add(rows["activation"], pa.scalar(more, pa.float32())), rows["activation"])
    rows = rows.set_column(rows.schema.get_field_index("activation"), "activation", lifted)
    _, verifications = causal.summarise(rows, known.exemplars, known.statistics, layer=0, seed=0)
    line = verifications.to_pylist()[1]
    assert line["specificity_low"] > 0 and line["specificity"] == pytest.approx(more / 10, abs=0.01)
    assert line["evidence"] == "token"


def test_too_few_exemplars_give_no_retention(known: Known) -> None:
    exemplars, statistics, rows, *_ = known
    few = rows.filter((pc.field("neuron") == 0) & (pc.field("rank") < 4))
    line = causal.summarise(few, exemplars, statistics, layer=0, seed=0)[1].to_pylist()[0]
    assert line["retention"] is None and line["specificity"] is None and line["evidence"] == "none"
    absent = ("retention_random", "retention_random_mat", "drop_mat", "drop_mat_low", "drop_context", "drop_context_offset")
    assert all(line[name] is None for name in absent) and line["retention_random_by_offset"][5] is not None
    assert line["average_activation"] is not None and line["retention_by_offset"][5] is not None


def test_one_document_gives_no_interval(known: Known) -> None:
    exemplars, statistics, rows, *_ = known
    one = rows.filter(pc.field("neuron") == 0)
    one = one.set_column(5, "document", pa.array([7] * one.num_rows, pa.int64()))
    line = causal.summarise(one, exemplars, statistics, layer=0, seed=0)[1].to_pylist()[0]
    assert line["specificity_low"] is None and line["evidence"] != "concept"
    assert (line["drop_mat_low"], line["drop_mat_high"], line["drop_context_low"]) == (None, None, None)


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        documents = 15
        level = rng.normal(0.5, 0.2, (2, documents))
        base = rng.uniform(5, 10, documents)
        value = (level[0] * base).sum() / base.sum() - (level[1] * base).sum() / base.sum()
        interval = causal.bootstrap(value, (level[0] * base, base), (level[1] * base, base), trial)
        assert interval.low <= interval.value <= interval.high
        inside += interval.low <= 0 <= interval.high
    assert 0.88 <= inside / 300 <= 0.98


def test_seeds_belong_to_the_unit() -> None:
    units = [(None, 0, 1), (None, 0, -1), (None, 1, 1), ("decoy", 0, 1)]
    seeds = {causal.draw_seed(seed, layer, unit) for unit in units for seed in (0, 1) for layer in (0, 1)}
    assert len(seeds) == 16


def test_a_bootstrap_does_not_depend_on_the_other_units(known: Known) -> None:
    exemplars, statistics, rows, variants, verifications = known
    alone = causal.summarise(rows.filter(pc.field("neuron") == 1), exemplars, statistics, layer=0, seed=0)
    assert alone[0].equals(variants.filter(pc.field("neuron") == 1))
    assert alone[1].equals(verifications.filter(pc.field("neuron") == 1))


def test_a_frequent_words_unit_stands_out_from_its_background(known: Known, samples: pa.Table) -> None:
    """The cue is in every sample, but not in every phrase."""
    assert all(CUE in text.split() for text in samples["text"].to_pylist())
    drawn = known.exemplars.filter((pc.field("sampling") == "random") & (pc.field("neuron") == 2))
    assert min(drawn["activation"].to_pylist()) > 9 and known.verifications["background"].to_pylist()[2] < 1


def test_phrase_maxima() -> None:
    series = pa.chunked_array([pa.array([[1.0, 3.0, 2.0, 0.0], [5.0, float("nan")], [], None, [4.0, 1.0, 1.0]])])
    found = [part.tolist() for part in causal.phrase_maxima(series, 3)]
    assert found == [[3.0, 3.0], [5.0], [], [], [4.0]]


def test_a_unit_that_is_as_high_everywhere_has_no_retention(known: Known) -> None:
    exemplars, statistics, rows, *_ = known
    high = [[x + 9.7 for x in row] for row in exemplars["activations"].to_pylist()]
    column = pa.array(high, pa.list_(pa.float32()))
    exemplars = exemplars.set_column(exemplars.schema.get_field_index("activations"), "activations", column)
    line = causal.summarise(rows, exemplars, statistics, layer=0, seed=0)[1].to_pylist()[1]
    assert line["background"] > 9.5 and line["retention"] is None and line["evidence"] == "none"


def test_without_random_exemplars_the_mean_is_the_background(known: Known) -> None:
    exemplars, statistics, rows, *_ = known
    top = exemplars.filter(pc.field("sampling") == "top")
    assert set(causal.summarise(rows, top, statistics, layer=0, seed=0)[1]["background"].to_pylist()) == {0.0}


def own_controls() -> pa.Table:
    return schema("verifications", True).empty_table()


def lines(values: list[float | None], **changes: list[Any]) -> pa.Table:
    n = len(values)
    columns = {"neuron": list(range(n)), "polarity": [1] * n, "average_activation": values,
               "evidence": ["token"] * n, "reproduced": [1.0] * n} | changes  # fmt: skip
    controls = "control" in changes
    want = schema("verifications", controls)
    return conform(pa.table({k: pa.array(v, want.field(k).type) for k, v in columns.items()}), "verifications", controls)


def test_closing_with_the_99th_percentile_of_the_top_means() -> None:
    tops = np.append(np.arange(1.0, 101.0), np.nan)
    flagged = {(None, n, 1): True for n in range(3)}
    units, controls = causal.close(
        lines([99.01 / 2, 300.0, 10.0]), lines([990.1, 49.505], control=["decoy"] * 2), tops, flagged, VerifyConfig()
    )
    assert units["normalised_activation"].to_pylist() == pytest.approx([0.5, 1.0, 10 / 99.01])
    assert units["verified"].to_pylist() == [True, True, False]
    assert controls["normalised_activation"].to_pylist() == pytest.approx([1.0, 0.5])
    assert controls["verified"].to_pylist() == [False, False], "the controls were not flagged"


def test_closing_with_the_layers_largest_as_originally() -> None:
    config = VerifyConfig(normaliser="max", normalised=0.5)
    flagged = {(None, n, 1): True for n in range(3)} | {("decoy", 0, 1): True}
    units, controls = causal.close(lines([8.0, 4.0, 3.9]), lines([6.0], control=["decoy"]), np.array([]), flagged, config)
    assert units["normalised_activation"].to_pylist() == pytest.approx([1.0, 0.5, 3.9 / 8])
    assert units["verified"].to_pylist() == [True, True, False]
    assert controls["normalised_activation"].to_pylist() == pytest.approx([0.75])
    assert controls["verified"].to_pylist() == [True]


def test_verified_needs_every_condition() -> None:
    table = lines(
        [9.0, 9.0, 9.0, 9.0, None, 1.0], evidence=["concept", "none", "token", "token", "token", "context"],
        reproduced=[1.0, 1.0, 0.79, 1.0, 1.0, 1.0],
    )  # fmt: skip
    flagged = {(None, n, 1): n != 3 for n in range(6)}
    units, _ = causal.close(table, own_controls(), np.array([10.0]), flagged, VerifyConfig())
    assert units["verified"].to_pylist() == [True, False, False, False, False, False]
    assert units["normalised_activation"].to_pylist()[4] is None


def test_a_layer_without_scale_verifies_nothing() -> None:
    flagged = {(None, 0, 1): True}
    for tops in (np.array([]), np.array([np.nan]), np.array([0.0])):
        units, _ = causal.close(lines([9.0]), own_controls(), tops, flagged, VerifyConfig())
        assert units["verified"].to_pylist() == [False] and units["normalised_activation"].null_count == 1
    assert causal.close(lines([]), own_controls(), np.array([1.0]), {}, VerifyConfig(normaliser="max"))[0].num_rows == 0


def test_tables_conform_and_divide(known: Known) -> None:
    *_, variants, verifications = known
    for table, name in ((variants, "variants"), (verifications, "verifications")):
        assert table.schema.equals(schema(name, True))
        own, controls = causal.divide(table, name)
        assert own.schema.equals(schema(name)) and own.num_rows == table.num_rows and controls.num_rows == 0
    assert variants["neuron"].to_pylist() == sorted(variants["neuron"].to_pylist())

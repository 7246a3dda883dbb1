from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tokenizers import Tokenizer, decoders, models

from raylabel.sections import VerifyConfig
from raylabel.stages import causal
from raylabel.stages.measure import measure
from raylabel.stages.tokenize import cut, number
from raylabel.stages.verify import ROWS, plan_variants
from raylabel.tables import conform, schema
from raylabel.words.splice import Splicer
from raylabel.words.substitutes import Substitutes
from tests.stages.known_units import BOS, ID, SIZE, WINDOW, Fake, Given, Known, by_first_word, make_plan


def test_a_variant_replaces_the_words_own_span_and_nothing_else(known: Known, samples: pa.Table) -> None:
    """The original method replaced every occurrence of a character."""
    texts = dict(zip(samples["sample"].to_pylist(), samples["text"].to_pylist(), strict=True))
    plan = make_plan(known.exemplars, samples, Given(["dog", "cat"], ["red"]))
    ids = plan["texts"]["ids"].to_pylist()
    for row in plan["rows"].to_pylist():
        words = texts[row["sample"]].split()
        if row["kind"] != "original":
            at = row["position"] - 1 + row["offset"]
            assert words[at] == row["word"]
            words[at] = row["substitute"]
        expected = [BOS, *(ID[w] for w in words)][: row["end"]]
        assert ids[row["text"]][: row["end"]] == expected
        assert row["phrase"].split() == words[row["start"] - 1 : row["end"] - 1]
    assert len(set(map(tuple, ids))) == len(ids) < plan["rows"].num_rows, "each distinct text once"


def test_later_words_are_never_varied_and_context_words_reach_five_back(known: Known) -> None:
    offsets = set(pc.unique(known.rows["offset"]).drop_null().to_pylist())
    assert offsets == {0, -1, -2, -3, -4, -5}


def test_windows_are_as_far_around_the_mat_as_the_phrase(known: Known) -> None:
    length = SIZE + 1
    for row in known.rows.to_pylist():
        assert row["start"] == max(row["position"] - WINDOW, 1)
        assert row["end"] == min(row["position"] + WINDOW + 1, length)


def test_texts_end_with_the_last_window_in_them(known: Known, samples: pa.Table, substitutes: Substitutes) -> None:
    plan = make_plan(known.exemplars, samples, substitutes)
    ends = plan["rows"].group_by("text").aggregate([("end", "max")]).sort_by("text")
    assert ends["end_max"].to_pylist() == pc.list_value_length(plan["texts"]["ids"]).to_pylist()


def test_the_cap_keeps_mat_words_and_spreads_the_rest(known: Known, samples: pa.Table, substitutes: Substitutes) -> None:
    exemplars = known.exemplars
    everything = make_plan(exemplars, samples, substitutes, max_variants=10_000)["rows"]
    capped = make_plan(exemplars, samples, substitutes, max_variants=400)["rows"]
    again = make_plan(exemplars, samples, substitutes, max_variants=400)["rows"]
    assert capped.equals(again)
    for unit in range(3):
        def count(table: pa.Table, condition: pc.Expression, unit: int = unit) -> int:
            return table.filter((pc.field("neuron") == unit) & condition).num_rows

        mat, context, extra = pc.field("offset") == 0, pc.field("offset") < 0, pc.field("extra")
        assert count(capped, mat & ~extra) == count(everything, mat & ~extra) == 200
        assert count(capped, context) == 200 < count(everything, context)
        assert count(capped, extra) == 200 == count(everything, extra)
        near = capped.filter((pc.field("neuron") == unit) & context).group_by(["rank", "offset", "kind"])
        numbers = near.aggregate([([], "count_all")])["count_all"].to_pylist()
        assert max(numbers) - min(numbers) <= 1


def test_a_unit_has_the_same_variants_whatever_is_planned_with_it(
    known: Known, samples: pa.Table, substitutes: Substitutes
) -> None:
    exemplars = known.exemplars
    together = make_plan(exemplars, samples, substitutes)["rows"].filter(pc.field("neuron") == 2)
    alone = make_plan(exemplars.filter(pc.field("neuron") == 2), samples, substitutes)["rows"]
    assert together.drop_columns("text").equals(alone.drop_columns("text"))


def test_random_words_differ_from_exemplar_to_exemplar(known: Known) -> None:
    """With the same few everywhere, what is special about them would look like the unit."""
    rows = known.rows.filter((pc.field("neuron") == 1) & (pc.field("offset") == 0) & ~pc.field("extra"))
    near, far = (rows.filter(pc.field("kind") == kind) for kind in ("neighbour", "random"))
    assert pc.all(pc.equal(rows["word"], "dog")).as_py()
    assert pc.count_distinct(near["substitute"]).as_py() == 5
    assert pc.count_distinct(far["substitute"]).as_py() > 10


def test_keeps_token_says_whether_the_mats_id_stays() -> None:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("<hontkey >.")} | {"ho": 11}, [("h", "o")]))
    tokenizer.decoder = decoders.Fuse()
    text = "the honk ."
    (samples,) = number([cut(tokenizer, [text], 64, None, 10**6)], 10**6, False)
    samples = samples.set_column(2, "split", pa.array(["explain"]))
    mat = samples["token_ids"].to_pylist()[0].index(11)
    row = {"neuron": 0, "polarity": 1, "sampling": "top", "split": "explain", "rank": 0, "sample": 0, "activation": 1.0,
           "start": 0, "position": mat, "document": 0}  # fmt: skip
    plan = plan_variants(
        pa.Table.from_pylist([row], schema("exemplars")), samples, Given(["hoot", "key"], ["then"]),
        Splicer(tokenizer), VerifyConfig(), window=9, special_ids=[], seed=0,
    )  # fmt: skip
    rows = plan["rows"].filter(pc.field("offset") == 0)
    assert dict(zip(rows["substitute"].to_pylist(), rows["keeps_token"].to_pylist(), strict=True)) == {
        "hoot": True, "key": False, "then": False,
    }  # fmt: skip
    assert set(rows["word"].to_pylist()) == {"honk"}
    # ids of "the h o n k ." with the MAT's word one token longer or shorter: the window's end moves with it.
    assert dict(zip(rows["substitute"].to_pylist(), rows["end"].to_pylist(), strict=True)) == {
        "hoot": 9, "key": 9, "then": 10,
    }  # fmt: skip
    assert plan["rows"].filter(pc.field("kind") == "original")["end"].to_pylist() == [9]


def test_variants_beyond_the_models_context_are_dropped_and_counted(known: Known, samples: pa.Table) -> None:
    exemplars = known.exemplars.filter(pc.field("neuron") == 0)
    free = make_plan(exemplars, samples, Given(["dog"], ["red"]))["rows"]
    tight = make_plan(exemplars, samples, Given(["dog"], ["red"]), limit=20)["rows"]
    assert pc.sum(free["dropped"]).as_py() == 0
    lost = free.num_rows - tight.num_rows
    assert lost > 0 and pc.sum(tight["dropped"]).as_py() == lost
    variants = tight.filter(pc.field("kind") != "original")
    assert pc.max(variants["end"]).as_py() == 20 and pc.max(variants["position"]).as_py() < 20


def test_no_exemplars_give_an_empty_plan(samples: pa.Table) -> None:
    plan = make_plan(schema("exemplars").empty_table(), samples, Given([], []))
    rows, failures = measure(Fake([by_first_word]), 0, plan)
    variants, verifications = causal.summarise(
        rows, schema("exemplars").empty_table(), schema("statistics").empty_table(), layer=0, seed=0
    )
    assert plan["rows"].schema.equals(ROWS)
    assert (rows.num_rows, failures, variants.num_rows, verifications.num_rows) == (0, [], 0, 0)


def test_a_sample_that_is_missing_is_named(known: Known, samples: pa.Table) -> None:
    gone = known.exemplars["sample"][0].as_py()
    with pytest.raises(ValueError, match=f"sample {gone}"):
        make_plan(known.exemplars, samples.filter(pc.field("sample") != gone), Given(["dog"], []))


def test_words_without_substitutes_leave_the_original(known: Known, samples: pa.Table) -> None:
    plan = make_plan(known.exemplars, samples, Given([], []))
    assert set(plan["rows"]["kind"].to_pylist()) == {"original"}


def test_the_models_own_units_come_before_controls(known: Known, samples: pa.Table, substitutes: Substitutes) -> None:
    exemplars = known.exemplars.slice(0, 30)
    control = conform(exemplars.append_column("control", pa.array(["decoy"] * 30)), "exemplars", True)
    both = pa.concat_tables([control, conform(exemplars, "exemplars", True)])
    rows = make_plan(both, samples, substitutes)["rows"]
    half = rows.num_rows // 2
    assert rows["control"].to_pylist() == [None] * half + ["decoy"] * half

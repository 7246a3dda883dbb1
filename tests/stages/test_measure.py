from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from torch import Tensor

from raylabel.models.controls import fit_decoys
from raylabel.models.subject import Subject, load_subject
from raylabel.sections import VerifyConfig
from raylabel.stages import causal
from raylabel.stages.measure import diagnose, measure, reproduced, unreproduced
from raylabel.stages.tokenize import cut, number
from raylabel.stages.verify import plan_variants
from raylabel.tables import conform, schema
from raylabel.words.background import fit_background
from raylabel.words.splice import Splicer
from raylabel.words.substitutes import Substitutes
from tests.shared import STORIES, STORIES_MODEL, needs_shared
from tests.stages.known_units import BOS, ID, RULES, TOP, WINDOW, Fake, Given, Known, by_first_word, make_plan, on_words, scan
from tests.words.planted import LISTS, PlantedVectors


@pytest.mark.parametrize("batch_tokens", [1, 37, 100, 10**6])
def test_the_batch_size_changes_nothing(
    known: Known, samples: pa.Table, substitutes: Substitutes, batch_tokens: int
) -> None:
    exemplars = known.exemplars.filter(pc.field("rank") < 2)
    plan = make_plan(exemplars, samples, substitutes, synonyms=2)
    subject = Fake(list(RULES.values()))
    rows, _ = measure(subject, 0, plan, batch_tokens=batch_tokens)
    expected, _ = measure(Fake(list(RULES.values())), 0, plan)
    assert rows.equals(expected)
    assert all(b * t <= max(batch_tokens, t) for b, t in subject.longest)


def test_special_tokens_and_sinks_do_not_count(samples: pa.Table) -> None:
    exemplars, _ = scan(Fake([on_words(["dog"])]), samples)
    plan = make_plan(exemplars, samples, Given(["cat"], ["fox"]))
    rows, _ = measure(Fake([on_words(["dog", "cat", "fox"])], norms={ID["cat"]: 99.0}), 0, plan, sink=50.0)
    mat = rows.filter(pc.field("offset") == 0)
    lost = mat.filter(pc.field("substitute") == "cat")["activation"].to_numpy()
    assert lost.max() < 1 and mat.filter(pc.field("substitute") == "fox")["activation"].to_numpy().min() > 9
    nothing, failures = measure(Fake([on_words(["dog"])], special_ids=frozenset(range(len(ID)))), 0, plan)
    assert failures == [] and nothing["activation"].null_count == nothing.num_rows


def test_polarity_and_controls(samples: pa.Table, substitutes: Substitutes) -> None:
    rule = on_words(LISTS["animals"])
    exemplars, _ = scan(Fake([rule]), samples)
    minus = exemplars.set_column(1, "polarity", pa.array([-1] * exemplars.num_rows, pa.int8()))
    decoy = exemplars.set_column(0, "neuron", pa.array([2] * exemplars.num_rows, pa.int32()))
    decoy = conform(decoy.append_column("control", pa.array(["decoy"] * decoy.num_rows)), "exemplars", True)
    both = pa.concat_tables([conform(minus, "exemplars", True), decoy])

    def decoys(acts: Tensor) -> Tensor:
        return torch.cat([acts * 0, acts * 0, acts + 1], dim=-1)

    rows, failures = measure(Fake([lambda t: -rule(t)]), 0, make_plan(both, samples, substitutes), decoys)
    assert failures == []
    low, high = (rows.filter(pc.field("control").is_valid() == is_control) for is_control in (False, True))
    # The decoy reads the negated unit plus one, the unit's low end reads it negated: what the rule gives.
    assert np.allclose(low["activation"].to_numpy().max(), 10, atol=0.2)
    assert high["activation"].to_numpy().max() <= 1


def test_a_unit_without_finite_activations_fails_and_the_others_do_not(samples: pa.Table) -> None:
    """An exception or a NaN was an activation of zero in the original method."""
    def broken(tokens: Tensor) -> Tensor:
        return torch.where(tokens == ID["cat"], torch.nan, rule(tokens))

    rule = on_words(["dog"])
    exemplars, _ = scan(Fake([rule, rule]), samples)
    exemplars = exemplars.filter(pc.invert(pc.is_in(exemplars["sample"], holding("cat", samples))))
    plan = make_plan(exemplars, samples, Given(["cat"], ["fox"]))
    rows, failures = measure(Fake([broken, rule]), 0, plan)
    assert failures == [((None, 0, 1), "activations are not finite")]
    assert set(rows["neuron"].to_pylist()) == {1}


def test_a_failing_model_is_not_an_activation_of_zero(samples: pa.Table, known: Known) -> None:
    """The original method swallowed every exception of the model."""
    def fails(tokens: Tensor) -> Tensor:
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer"):
        measure(Fake([fails] * 4), 0, make_plan(known.exemplars, samples, Given(["cat"], ["fox"])))


def test_a_batch_too_large_for_the_memory_is_cut(known: Known, samples: pa.Table) -> None:
    def hungry(tokens: Tensor) -> Tensor:
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("too much")
        return RULES["token"](tokens)

    exemplars = known.exemplars.filter(pc.field("neuron") == 1)
    exemplars = exemplars.set_column(0, "neuron", pa.array([0] * exemplars.num_rows, pa.int32()))
    plan = make_plan(exemplars, samples, Given(["cat"], ["fox"]))
    assert measure(Fake([hungry]), 0, plan)[0].equals(measure(Fake([RULES["token"]]), 0, plan)[0])


def test_activations_of_another_site_are_not_compared(samples: pa.Table, substitutes: Substitutes) -> None:
    """The original method compared recordings from before a LayerNorm with measurements from after it."""
    def doubled(tokens: Tensor) -> Tensor:
        return 2 * RULES["token"](tokens)

    recording = Fake([doubled], site="mlp_mid")
    subject = Fake([RULES["token"]], sister=recording)
    exemplars, statistics = scan(recording, samples)
    rows, _ = measure(subject, 0, make_plan(exemplars, samples, substitutes))
    assert unreproduced(rows, coarse=False) == [(None, 0, 1)]
    note = diagnose(subject, rows, samples, 0, (None, 0, 1))
    assert note == "recordings are reproduced at mlp_mid"
    notes = {(None, 0, 1): note}
    variants, verifications = causal.summarise(rows, exemplars, statistics, layer=0, seed=0, notes=notes)
    (line,) = verifications.to_pylist()
    assert variants.num_rows == 0 and line["n_variants"] == 0 and line["evidence"] == "none"
    assert line["reproduced"] == 0 and line["average_activation"] is None
    assert line["note"] == "20 of 20 exemplars are not reproduced: recordings are reproduced at mlp_mid"
    own, _ = causal.divide(verifications, "verifications")
    none = schema("verifications", True).empty_table()
    closed, _ = causal.close(own, none, np.array([10.0]), {(None, 0, 1): True}, VerifyConfig())
    assert closed["verified"].to_pylist() == [False]


def test_the_other_bos_policy_is_named(samples: pa.Table, substitutes: Substitutes) -> None:
    def with_bos(tokens: Tensor) -> Tensor:
        return (tokens[:, :1] == BOS).float() * RULES["token"](tokens) + (tokens[:, :1] != BOS).float() * 3.0

    exemplars, _ = scan(Fake([RULES["token"]]), samples)
    bare = samples.set_column(3, "token_ids", pa.array([ids[1:] for ids in samples["token_ids"].to_pylist()]))
    bare = bare.set_column(5, "ends", pa.array([ends[1:] for ends in samples["ends"].to_pylist()]))
    shifted = exemplars.set_column(7, "start", pa.array([0] * exemplars.num_rows, pa.int32()))
    assert shifted.schema.names == exemplars.schema.names
    subject = Fake([with_bos])
    rows, _ = measure(subject, 0, make_plan(shifted, bare, substitutes))
    assert unreproduced(rows, coarse=False) == [(None, 0, 1)]
    assert diagnose(subject, rows, bare, 0, (None, 0, 1)) == "recordings are reproduced with BOS"
    assert diagnose(Fake([by_first_word]), rows, bare, 0, (None, 0, 1)) is None


def test_the_tolerance_depends_on_the_precision(known: Known) -> None:
    rows = known.rows
    off = pc.multiply(rows["activation"], pa.scalar(1.01, pa.float32()))
    rows = rows.set_column(rows.schema.get_field_index("activation"), "activation", off)
    units = set(rows["neuron"].to_pylist())
    assert {unit for _, unit, _ in unreproduced(rows, coarse=False)} == units
    assert unreproduced(rows, coarse=True) == []
    assert unreproduced(rows, coarse=False, rounding=0.5) == []


def test_an_exemplar_that_is_not_reproduced_is_dropped(known: Known) -> None:
    exemplars, statistics, rows, *_ = known
    values = rows["recorded"].to_numpy().copy()
    wrong = (rows["rank"].to_numpy() == 3) & (rows["neuron"].to_numpy() == 1)
    values[wrong] += 1
    rows = rows.set_column(rows.schema.get_field_index("recorded"), "recorded", pa.array(values, pa.float32()))
    assert (~reproduced(rows, False)).tolist() == wrong.tolist()
    variants, verifications = causal.summarise(rows, exemplars, statistics, layer=0, seed=0)
    line = verifications.to_pylist()[1]
    assert line["reproduced"] == pytest.approx(0.95) and line["note"] is None and line["evidence"] == "token"
    ranks = variants.filter(pc.field("neuron") == 1)["rank"].to_pylist()
    assert set(ranks) == set(range(TOP)) - {3}


def holding(word: str, samples: pa.Table) -> pa.Array:
    return samples.filter(pc.match_substring(samples["text"], word))["sample"].combine_chunks()


# The real model


def stories(subject: Subject, n: int) -> pa.Table:
    texts = json.loads(STORIES.read_text(encoding="utf-8"))[:n]
    parts = number([cut(subject.tokenizer.backend_tokenizer, texts, 96, subject.bos_id, 10**6)], 10**6, True)
    samples = pa.concat_tables(list(parts))
    return samples.set_column(2, "split", pa.array(["explain"] * samples.num_rows))


@needs_shared
@pytest.mark.shared
def test_activations_equal_a_full_forward_on_the_edited_text_encoded_anew() -> None:
    """By plain transformers, one variant at a time: its whole text, its own encoding, its own window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    layer = 1
    subject = load_subject(str(STORIES_MODEL), device="cpu", dtype="float32")
    samples = stories(subject, 60)
    exemplars, _ = scan(subject, samples, layer, units=[0, 7, 200])
    exemplars = exemplars.filter((pc.field("sampling") == "top") & (pc.field("rank") < 6))
    substitutes = Substitutes(fit_background(samples.to_pylist(), PlantedVectors(), WINDOW, "sif", 0), 0)
    splicer = Splicer(subject.tokenizer, subject.special_ids)
    plan = plan_variants(exemplars, samples, substitutes, splicer, VerifyConfig(max_variants=150), window=WINDOW,
                         special_ids=subject.special_ids, seed=0)  # fmt: skip
    rows, failures = measure(subject, layer, plan, batch_tokens=1000)
    assert failures == []

    model, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES_MODEL), AutoTokenizer.from_pretrained(STORIES_MODEL)
    seen: list[Tensor] = []
    model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    by_number = {row["sample"]: row for row in samples.to_pylist()}
    compared = 0
    for row in rows.to_pylist():
        sample = by_number[row["sample"]]
        if not sample["round_trips"]:
            continue
        text, mat = sample["text"], row["position"]
        before = tokenizer(text)["input_ids"]
        assert before == sample["token_ids"]
        low, high = max(mat - WINDOW, 1), min(mat + WINDOW + 1, len(before))
        ids = before
        if row["kind"] != "original":
            phrase = text[: sample["ends"][high - 1]]
            at = word_place(phrase, row["word"], row["phrase"], row["substitute"], sample["ends"][low - 1])
            ids = tokenizer(text[:at] + row["substitute"] + text[at + len(row["word"]) :])["input_ids"]
            common = next(i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b)
            # A word that begins before the window ends in it: the window keeps what it had to the right of it.
            low = low if low <= common else max(common, low + len(ids) - len(before))
            high += len(ids) - len(before)
        seen.clear()
        with torch.inference_mode():
            model(torch.tensor([ids]))
        expected = float(seen[0][0, row["start"] : high, row["neuron"]].max())
        assert abs(row["start"] - low) <= 1 and row["end"] == high
        assert row["activation"] == pytest.approx(expected, abs=1e-4)
        compared += 1
    assert compared > 150


def word_place(text: str, word: str, phrase: str, substitute: str, begin: int) -> int:
    """Where in `text` the word stands that gives `phrase` when it is replaced."""
    for at in range(len(text) - len(word), -1, -1):
        if text[at : at + len(word)] == word:
            first = min(begin, at)
            if phrase.startswith(text[first:at] + substitute + text[at + len(word) :]):
                return at
    raise AssertionError(f"{word} is not in {text}")


@needs_shared
@pytest.mark.shared
def test_decoys_and_units_of_a_real_model_are_reproduced() -> None:
    layer = 1
    subject = load_subject(str(STORIES_MODEL), device="cpu", dtype="float32")
    samples = stories(subject, 20)
    whole = [ids for ids in samples["token_ids"].to_pylist() if len(ids) == 96]
    acts = subject.activations(torch.tensor(whole), [layer])[layer]
    decoys = fit_decoys(acts.flatten(0, 1), 4, 0, layer)
    ours, theirs = scan(subject, samples, layer, units=range(4))[0], scan(subject, samples, layer, decoys)[0]
    both = pa.concat_tables([theirs, conform(ours, "exemplars", True)])
    splicer = Splicer(subject.tokenizer, subject.special_ids)
    plan = plan_variants(both, samples, Given(["dog"], ["red"]), splicer, VerifyConfig(), window=WINDOW,
                         special_ids=subject.special_ids, seed=0)  # fmt: skip
    rows, failures = measure(subject, layer, plan, decoys)
    assert failures == [] and unreproduced(rows, coarse=False) == []
    assert reproduced(rows, coarse=False).all()
    assert set(rows["control"].to_pylist()) == {None, "decoy"}
    wrong, _ = measure(subject, 0, plan, decoys)
    assert len(unreproduced(wrong, coarse=False)) == 8, "another layer gives nothing back"

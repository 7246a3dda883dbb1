"""The Python API, and that tokens and labels, which anyone may have written, stay text wherever they are shown."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as ds
import pytest
from rich.console import Console

import raylabel
from raylabel.api import UnitView
from raylabel.errors import BadInput
from raylabel.report import terminal
from raylabel.report.summary import Share
from raylabel.store.rundir import RunDir
from tests.rundirs import config_file, differing
from tests.runs import tiny_config

HOSTILE = [
    "<script>alert(1)</script>", "[bold]", "[/bold]", "[link=http://x]", "\x1b[31m", "\x07", "&amp;", '"', "a\nb\tc", "\u202e",
    "\\[x]",
]  # fmt: skip
# The same as a terminal may show them.
HARMLESS = (
    "<script>alert(1)</script>", "[bold]", "[/bold]", "[link=http://x]", r"\x1b[31m", r"\x07", "&amp;", "a⏎b⇥c", r"\x202e",
)  # fmt: skip


def hostile() -> UnitView:
    """A unit whose tokens, words and labels try to be markup."""
    tokens = list(HOSTILE)
    exemplar = {
        "sampling": "top", "split": "explain", "rank": 0, "activation": 2.0, "position": 1, "tokens": tokens,
        "activations": [float(i) for i in range(len(tokens))],
    }  # fmt: skip
    text = "".join(HOSTILE)
    result = {
        "label": text, "label_source": "MAT words", "status": "ok", "kind": "meaning", "evidence": "token", "q_value": 0.1,
        "decoy_rate": 0.2, "normalised_activation": 0.5, "verified": True, "family_similarity": 0.1, "phrase_similarity": None,
        "retention": 0.3,
    }  # fmt: skip
    verification = {
        "retention_by_offset": None, "retention": 0.1, "retention_context": None, "specificity": 0.1, "specificity_low": None,
        "specificity_high": 0.2, "reproduced": 1.0, "promoted": HOSTILE,
    }  # fmt: skip
    logits = [{"token": token, "value": 1.0} for token in HOSTILE]
    variants = [
        {"word": word, "offset": 0, "substitute": word, "substitute_kind": kind, "activation": 1.0, "activation_original": 2.0}
        for word in HOSTILE for kind in ("neighbour", "random")
    ]  # fmt: skip
    statistics = {"site": "blocks.0.mlp.hook_post", "logits_up": logits, "logits_down": logits}
    return UnitView(0, 1, 1, result, statistics, {}, verification, [exemplar], variants)


def shown(renderable: Any, colour: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=400, force_terminal=colour, color_system="truecolor" if colour else None).print(renderable)
    return out.getvalue()


# the public names


def test_the_package_names_its_api_and_imports_it_late() -> None:
    assert set(raylabel.__all__) == {"RunConfig", "open_run", "run"}
    for name in raylabel.__all__:
        assert callable(getattr(raylabel, name))
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = raylabel.runn  # type: ignore[attr-defined]


def test_a_configuration_or_a_file_of_one_is_run(tiny_model: Path, tiny_corpus: Path, finished: RunDir, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, tiny_corpus, tmp_path / "run", subject={"neurons": [0, 8]})
    found = raylabel.run(config_file(config, tmp_path / "c.yaml"))
    assert differing(finished, RunDir(str(tmp_path / "run"))) == []
    assert found.config.subject.neurons == (0, 8)
    again = raylabel.run(config)
    assert again.table("results").equals(found.table("results"))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a run directory"):
        raylabel.open_run(tmp_path)


def test_tables_datasets_and_controls(finished: RunDir) -> None:
    run = raylabel.open_run(finished.files.url)
    assert repr(run) == f"Run({finished.files.url!r})"
    for name in ("exemplars", "results"):
        assert run.table(name).equals(finished.table(name))
        assert isinstance(run.dataset(name), ds.Dataset)
        assert run.dataset(name).count_rows() == run.table(name).num_rows
        assert set(run.controls.table(name).column("control").to_pylist()) == {"decoy"}
    assert "control" not in run.table("results").column_names
    with pytest.raises(BadInput, match="no table 'nothing'"):
        run.table("nothing")


def test_feature_neurons_are_the_verified_units_strongest_first(finished: RunDir) -> None:
    frame = raylabel.open_run(finished.files.url).feature_neurons()
    assert list(frame.columns) == [
        "layer", "index", "polarity", "average_activation", "normalised_activation", "description", "phrases"
    ]  # fmt: skip
    assert frame["normalised_activation"].is_monotonic_decreasing
    wanted = {(r["layer"], r["neuron"]) for r in finished.table("results").to_pylist() if r["verified"]}
    assert set(zip(frame["layer"], frame["index"], strict=True)) == wanted
    assert len(frame) == len(wanted) > 0
    assert list(frame.index) == list(range(len(frame)))
    assert all(len(phrases) > 0 for phrases in frame["phrases"])
    assert isinstance(frame, pd.DataFrame)


def test_a_unit_is_everything_about_it(finished: RunDir) -> None:
    run = raylabel.open_run(finished.files.url)
    row = next(r for r in finished.table("results").to_pylist() if r["verified"])
    unit = run.unit(row["layer"], row["neuron"])
    assert unit.result == row
    assert (unit.statistics["max"], unit.candidate["flagged"], unit.verification["verified"]) == (row["max"], True, True)
    top = unit.top()
    assert [r["rank"] for r in top] == list(range(len(top)))
    assert [r["activation"] for r in top] == sorted((r["activation"] for r in top), reverse=True)
    assert len(unit.top("score")) <= 3
    assert unit.variants
    assert set(unit.to_dict()) >= {"layer", "neuron", "polarity", "result", "exemplars", "variants"}
    control = run.controls.unit(0, 0)
    assert control.result["control"] == "decoy"
    for place in ((9, 0, 1), (0, 39, 1), (0, 0, -1)):
        with pytest.raises(BadInput, match=rf"no unit layer {place[0]}, neuron {place[1]}, polarity \{place[2]:+d}"):
            run.unit(*place)


# foreign text


def test_a_notebook_shows_tokens_as_text() -> None:
    page = hostile()._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&amp;amp;" in page
    assert re.findall(r"</?([a-z]+)", page) and set(re.findall(r"</?([a-z]+)", page)) == {"div", "b", "span"}
    assert all('"' not in style for style in re.findall(r'style="([^"]*)"', page))


def test_a_notebook_shows_a_unit_of_a_run(finished: RunDir) -> None:
    row = next(r for r in finished.table("results").to_pylist() if r["verified"])
    page = raylabel.open_run(finished.files.url).unit(row["layer"], row["neuron"])._repr_html_()
    assert f"layer {row['layer']}, neuron {row['neuron']}" in page
    assert page.count("font-weight:bold") >= 1


def test_a_terminal_shows_tokens_as_text() -> None:
    unit = hostile()
    row = {**unit.result, "layer": 0, "neuron": 1, "polarity": 1}
    for text in (shown(terminal.unit_card(unit)), shown(terminal.units_table([row], {(0, 1, 1): unit.exemplars}))):
        for token in HARMLESS:
            assert token in text
        assert not set(text) & set("\x1b\x07\t\u202e")


CAUSAL = {
    "retention_by_offset": [0.9, 0.91, 0.92, 0.69, 0.94, 0.35], "retention": 0.61, "retention_context": 0.88,
    "retention_random_by_offset": [0.8, 0.81, None, 0.6, 0.84, 0.23], "retention_random": 0.5, "retention_random_context": 0.78,
    "retention_random_mat": 0.23, "specificity": 0.12, "specificity_low": 0.05, "specificity_high": 0.2, "drop_mat": 0.77,
    "drop_mat_low": 0.7, "drop_mat_high": 0.83, "drop_context": 0.31, "drop_context_low": 0.21, "drop_context_high": 0.4,
    "drop_context_offset": -2, "evidence": "concept", "reproduced": 0.95, "promoted": [],
}  # fmt: skip


def card(verification: dict[str, Any]) -> list[str]:
    """The words of each line of a unit's card, without the lines of tables."""
    text = shown(terminal.unit_card(replace(hostile(), verification=verification)))
    return [" ".join(re.sub("[│┃]", " ", line).split()) for line in text.splitlines()]


def test_the_causal_card() -> None:
    found = card(CAUSAL)
    at = found.index("what is kept of the activation when a word gives way to")
    assert "-5 -4 -3 -2 -1 MAT word all context" in found[at:]
    assert "neighbours 0.90 0.91 0.92 0.69 0.94 0.35 0.61 0.88" in found[at:]
    assert "random words 0.80 0.81 · 0.60 0.84 0.23 0.50 0.78" in found[at:]
    verdict = (
        "MAT word costs 0.77 [0.70, 0.83]; the word 2 back costs 0.31 [0.21, 0.40]; "
        "neighbours keep 0.12 [0.05, 0.20] more than random words → concept"
    )
    assert found[found.index(verdict) + 1] == "reproduced 95%"


def test_the_causal_card_of_nulls_and_of_a_run_without_the_newer_columns() -> None:
    newer = {name for name in CAUSAL if name.startswith(("drop_", "retention_random"))}
    for verification in (dict.fromkeys(CAUSAL), {k: v for k, v in CAUSAL.items() if k not in newer}):
        found = card(verification)
        assert "random words · · · · · · · ·" in found
        assert any(line.startswith("MAT word costs · [·, ·]; the word · back costs · [·, ·]; neighbours") for line in found)
    assert "neighbours 0.90 0.91 0.92 0.69 0.94 0.35 0.61 0.88" in found
    assert "reproduced ·" in card(dict.fromkeys(CAUSAL))


def test_colours_are_the_programs_own() -> None:
    text = shown(terminal.unit_card(hostile()), colour=True)
    # Every escape is a colour that rich wrote, and no token made one.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b" not in plain
    assert "\x1b]8" not in text
    assert "[bold]" in plain


def test_the_shares_of_a_run_are_a_table() -> None:
    text = shown(terminal.shares_table({"flagged": (Share(90, 100), Share(5, 100)), "verified": (Share(1, 2), Share(0, 0))}))
    assert "90.0% [82.4%, 95.1%] of 100" in text
    assert re.search(r"flagged.*yes", text)
    assert re.search(r"verified.*none.*no", text)

"""Unit ids: equal exactly when everything that decides a unit's rows is equal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylabel.store.plan import Plan, Unit, make_plan

KEYS: dict[str, list[dict[str, Any]]] = {"first": [{"layer": 0}, {"layer": 1}], "second": [{"layer": 0}], "third": [{}]}


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {"stage": "scan", "version": 1, "settings": {"top": 5}, "inputs": ["a", "b"], "steps": KEYS}
    return make_plan(**{**given, **changes})


def ids(made: Plan, *steps: str) -> list[str]:
    return [u.id for u in made.units if not steps or u.step in steps]


def test_the_same_inputs_give_the_same_ids_in_the_same_order() -> None:
    assert plan() == plan()
    assert plan().digest == plan(inputs=["b", "a"]).digest
    assert len(set(ids(plan()))) == 4
    assert plan().steps() == ["first", "second", "third"]


@pytest.mark.parametrize(
    "changes", [{"stage": "verify"}, {"version": 2}, {"settings": {"top": 6}}, {"inputs": ["a", "c"]}], ids=str
)
def test_any_change_of_what_a_stage_depends_on_changes_every_id(changes: dict[str, Any]) -> None:
    assert set(ids(plan())).isdisjoint(ids(plan(**changes)))
    assert plan().digest != plan(**changes).digest


def test_a_changed_step_changes_itself_and_what_follows_but_not_what_went_before() -> None:
    other = plan(steps={**KEYS, "second": [{"layer": 0}, {"layer": 2}]})
    assert ids(plan(), "first") == ids(other, "first")
    assert ids(plan(), "second")[0] == ids(other, "second")[0]
    assert set(ids(plan(), "third")).isdisjoint(ids(other, "third"))


def test_a_changed_key_changes_its_own_unit_only_within_the_step() -> None:
    other = plan(steps={**KEYS, "first": [{"layer": 0}, {"layer": 9}]})
    assert ids(plan(), "first")[0] == ids(other, "first")[0]
    assert ids(plan(), "first")[1] != ids(other, "first")[1]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), plain | st.lists(plain, max_size=2), max_size=3), max_size=3))
def test_plans_and_units_come_back_from_json_as_they_were(keys: list[dict[str, Any]]) -> None:
    made = plan(steps={"only": keys})
    assert Plan.from_json(made.to_json()) == made
    assert [Unit.from_json(u.to_json()) for u in made.units] == made.units

"""Schemas: the columns of the contract, by name and type, and a version that readers can check."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from raylabel.tables import (
    HISTOGRAM_BINS,
    HISTOGRAM_EDGES,
    PER_UNIT,
    SCHEMA_VERSION,
    TABLES,
    conform,
    from_rows,
    schema,
)

# The contract's columns; others may be added, none may be renamed.
COLUMNS = {
    "samples": "sample document split token_ids text",
    "exemplars": "sampling split rank sample activation start position mat_ties tokens token_ids activations site source",
    "statistics": "site tokens_seen fires mean variance skewness kurtosis max min histogram top_mean logits_up logits_down "
    "dead dense",
    "candidates": "n_exemplars n_families mats phrases token_similarity family_similarity phrase_similarity knn_similarity "
    "p_value q_value decoy_rate kind flagged status",
    "variants": "rank offset word substitute substitute_kind phrase activation_original activation",
    "verifications": "n_variants average_activation normalised_activation retention retention_mat retention_context "
    "specificity specificity_low specificity_high retention_by_offset evidence promoted reproduced verified",
    "results": "label description concept_words agreement score average_activation normalised_activation family_similarity "
    "phrase_similarity q_value decoy_rate retention specificity kind evidence flagged verified status mats phrases max site",
    "calibration": "control difficulty layer n flagged verified labelled",
    "failures": "stage unit reason attempts",
}
TYPES = {
    ("samples", "sample"): pa.int64(), ("samples", "token_ids"): pa.list_(pa.int32()), ("exemplars", "rank"): pa.int16(),
    ("exemplars", "activation"): pa.float32(), ("exemplars", "tokens"): pa.list_(pa.string()),
    ("exemplars", "activations"): pa.list_(pa.float32()), ("statistics", "fires"): pa.int64(),
    ("statistics", "histogram"): pa.list_(pa.int64()), ("candidates", "flagged"): pa.bool_(),
    ("variants", "offset"): pa.int8(), ("verifications", "n_variants"): pa.int32(), ("results", "max"): pa.float32(),
    ("calibration", "n"): pa.int64(),
}  # fmt: skip


@pytest.mark.parametrize("name", list(COLUMNS))
def test_the_columns_of_the_contract_are_there(name: str) -> None:
    assert name in TABLES
    names = schema(name).names
    assert set(COLUMNS[name].split()) <= set(names)
    assert len(set(names)) == len(names)
    for (table, column), kind in TYPES.items():
        if table == name:
            assert schema(name).field(column).type == kind


@pytest.mark.parametrize("name", PER_UNIT)
def test_units_lead_and_controls_are_named(name: str) -> None:
    assert schema(name).names[:2] == ["neuron", "polarity"]
    assert schema(name).types[:2] == [pa.int32(), pa.int8()]
    assert schema(name, controls=True).names == ["control", *schema(name).names]
    assert "layer" not in schema(name).names


def test_files_say_their_table_and_version() -> None:
    for name in TABLES:
        assert schema(name).metadata[b"raylabel.table"] == name.encode()
        assert schema(name).metadata[b"raylabel.schema_version"] == SCHEMA_VERSION.encode()


def test_the_edges_of_the_histogram_are_published_and_mirror_each_other() -> None:
    told = [float(e) for e in json.loads(schema("statistics").metadata[b"raylabel.histogram_edges"])]
    assert told == HISTOGRAM_EDGES
    assert len(told) == HISTOGRAM_BINS + 1
    assert told == sorted(told)
    assert np.array_equal(-np.array(told)[::-1], told)


def test_rows_and_tables_take_the_shape_of_the_schema() -> None:
    made = from_rows([{"neuron": 1, "polarity": -1, "fires": 2}], "statistics")
    assert made.schema.equals(schema("statistics"))
    assert made.to_pylist()[0]["site"] is None
    wide = conform(pa.table({"polarity": [1], "neuron": pa.array([2], pa.int64())}), "statistics")
    assert wide.schema.equals(schema("statistics"))
    assert (wide.to_pylist()[0]["neuron"], wide.to_pylist()[0]["fires"]) == (2, None)
    with pytest.raises(ValueError, match="table statistics has no column x"):
        conform(pa.table({"x": [1]}), "statistics")
    with pytest.raises(ValueError, match="control"):
        conform(pa.table({"control": ["decoy"]}), "statistics")

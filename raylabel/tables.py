"""The Arrow schema of every table: the contract between stages.

`schema(name)` gives a table's columns. `layer` is not among them: it is the hive partition of the path. In `controls/`
every per-unit table has a `control` column as well (`schema(name, controls=True)`).
Activations are in the model's own units, times the sign of the polarity.

`polarity` is 1 for a unit's high end and -1 for its low end. With `subject.polarity: quadrants` a unit of a gated MLP,
act(gate) * up, has four: 1 and -1 where gate > 0 and the product is positive or negative, 2 and -2 the same where
gate <= 0. What belongs to the other sign of the gate counts as an activation of 0.
"""

from __future__ import annotations

import json
from functools import cache

import pyarrow as pa

SCHEMA_VERSION = "1.0"

# Histogram of sign(polarity) * activation. Magnitudes are cut at 2^e and 1.5 * 2^e (half octaves), which a float32 shows in
# its own leading bits, so that counting needs no comparison with edges. The middle bin holds magnitudes below 2^-12;
# above it a bin holds its lower edge, below it its upper one, so that the other polarity's histogram is the mirror image.
HISTOGRAM_LOW, HISTOGRAM_HIGH = -12, 12
MAGNITUDES = [m * 2.0**e for e in range(HISTOGRAM_LOW, HISTOGRAM_HIGH) for m in (1.0, 1.5)] + [2.0**HISTOGRAM_HIGH]
HISTOGRAM_EDGES = [-float("inf"), *(-m for m in reversed(MAGNITUDES)), *MAGNITUDES, float("inf")]
HISTOGRAM_BINS = len(HISTOGRAM_EDGES) - 1

_token_value = pa.list_(pa.struct([("token", pa.string()), ("value", pa.float32())]))
_strings, _ints, _floats = pa.list_(pa.string()), pa.list_(pa.int32()), pa.list_(pa.float32())
_unit = [("neuron", pa.int32()), ("polarity", pa.int8())]

_TABLES: dict[str, list[tuple[str, pa.DataType]]] = {
    "samples": [
        ("sample", pa.int64()), ("document", pa.int64()), ("split", pa.string()), ("token_ids", _ints),
        ("text", pa.string()),
        # end of each token in `text`, in characters; the prepended BOS has 0
        ("ends", _ints),
        # whether encoding `text` again gives `token_ids`
        ("round_trips", pa.bool_()),
    ],
    "exemplars": [
        *_unit, ("sampling", pa.string()), ("split", pa.string()), ("rank", pa.int16()), ("sample", pa.int64()),
        ("activation", pa.float32()), ("start", pa.int32()), ("position", pa.int32()), ("mat_ties", pa.int16()),
        ("tokens", _strings), ("token_ids", _ints), ("activations", _floats), ("site", pa.string()),
        ("source", pa.string()), ("document", pa.int64()),
    ],
    "statistics": [
        *_unit, ("site", pa.string()), ("tokens_seen", pa.int64()), ("fires", pa.int64()), ("mean", pa.float32()),
        ("variance", pa.float32()), ("skewness", pa.float32()), ("kurtosis", pa.float32()), ("max", pa.float32()),
        ("min", pa.float32()), ("histogram", pa.list_(pa.int64())), ("top_mean", pa.float32()),
        ("logits_up", _token_value), ("logits_down", _token_value), ("dead", pa.bool_()), ("dense", pa.bool_()),
    ],
    "candidates": [
        *_unit, ("n_exemplars", pa.int16()), ("n_families", pa.int16()), ("mats", _strings), ("phrases", _strings),
        ("token_similarity", pa.float32()), ("family_similarity", pa.float32()), ("phrase_similarity", pa.float32()),
        ("knn_similarity", pa.float32()), ("p_value", pa.float32()), ("q_value", pa.float32()),
        ("decoy_rate", pa.float32()), ("kind", pa.string()), ("flagged", pa.bool_()), ("status", pa.string()),
        # MAT words by rank, their family numbers, and the share of exemplars in the three largest families
        ("mat_words", _strings), ("families", _ints), ("top_families", pa.float32()),
    ],
    "variants": [
        *_unit, ("rank", pa.int16()), ("offset", pa.int8()), ("word", pa.string()), ("substitute", pa.string()),
        ("substitute_kind", pa.string()), ("phrase", pa.string()), ("activation_original", pa.float32()),
        ("activation", pa.float32()),
        # whether the substitute's encoding holds the MAT's own token id
        ("keeps_token", pa.bool_()),
    ],
    "verifications": [
        *_unit, ("n_variants", pa.int32()), ("average_activation", pa.float32()),
        ("normalised_activation", pa.float32()), ("retention", pa.float32()), ("retention_mat", pa.float32()),
        ("retention_context", pa.float32()), ("specificity", pa.float32()), ("specificity_low", pa.float32()),
        ("specificity_high", pa.float32()), ("retention_by_offset", _floats), ("evidence", pa.string()),
        ("promoted", _strings), ("reproduced", pa.float32()), ("verified", pa.bool_()),
        # median activation over random exemplars, and what reproduces where the recorded site does not
        ("background", pa.float32()), ("note", pa.string()),
        # the retentions again, for random words
        ("retention_random", pa.float32()), ("retention_random_mat", pa.float32()),
        ("retention_random_context", pa.float32()), ("retention_random_by_offset", _floats),
        # 1 - retention over both kinds of substitute: at the MAT word, where they do not hold its token, and at the
        # context offset where it is largest
        *((f"drop_{where}{end}", pa.float32()) for where in ("mat", "context") for end in ("", "_low", "_high")),
        ("drop_context_offset", pa.int8()),
    ],
    "concepts": [
        *_unit, ("words", _strings), ("weights", _floats), ("label", pa.string()), ("cross_entropy", pa.float32()),
        ("entropy", pa.float32()), ("kl", pa.float32()), ("auroc", pa.float32()), ("auroc_low", pa.float32()),
        ("auroc_high", pa.float32()), ("auroc_unseen", pa.float32()), ("p_value", pa.float32()),
        ("q_value", pa.float32()), ("claimed", pa.bool_()), ("proposer", pa.string()), ("evaluations", pa.int32()),
        # `ok`, `untested` (too few words of the score split) or `too_few`; and the share of the examples' words that the
        # judge's tokenizer knows
        ("status", pa.string()), ("known", pa.float32()),
    ],
    "labels": [
        *_unit, ("label", pa.string()), ("description", pa.string()),
        ("meanings", pa.list_(pa.struct([("label", pa.string()), ("share", pa.float32())]))),
        ("explainer", pa.string()), ("prompt_hash", pa.string()), ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ],
    "scores": [
        *_unit, ("label_source", pa.string()), ("scorer", pa.string()), ("value", pa.float32()),
        ("shuffled", pa.float32()), ("corrected", pa.float32()), ("low", pa.float32()), ("high", pa.float32()),
        ("lookup", pa.float32()), ("n", pa.int32()), ("n_failed", pa.int32()),
        # the same against hard negatives: windows that hold what the unit fires on, or what is near it, and leave it silent
        *((f"{name}_hard", pa.float32()) for name in ("value", "shuffled", "corrected", "low", "high", "lookup")),
        ("n_hard", pa.int32()),
        # of a label with several meanings: each by itself, on the active windows that belong to it and all silent ones
        ("meanings", pa.list_(pa.struct([
            ("label", pa.string()), ("corrected", pa.float32()), ("low", pa.float32()), ("high", pa.float32()), ("n", pa.int32()),
        ]))),
    ],
    "results": [
        *_unit, ("label", pa.string()), ("description", pa.string()), ("concept_words", _strings),
        ("agreement", pa.float32()), ("score", pa.float32()), ("average_activation", pa.float32()),
        ("normalised_activation", pa.float32()), ("family_similarity", pa.float32()),
        ("phrase_similarity", pa.float32()), ("q_value", pa.float32()), ("decoy_rate", pa.float32()),
        ("retention", pa.float32()), ("specificity", pa.float32()), ("kind", pa.string()), ("evidence", pa.string()),
        ("flagged", pa.bool_()), ("verified", pa.bool_()), ("status", pa.string()), ("mats", _strings),
        ("phrases", _strings), ("max", pa.float32()), ("site", pa.string()),
        # where the label comes from; MAT words until a labeller has run
        ("label_source", pa.string()),
        # whether the concept is borne out on the score split
        ("claimed", pa.bool_()),
        # the mean of the scorers' intervals: the label says something where it lies above 0
        ("score_low", pa.float32()), ("score_high", pa.float32()),
    ],
    "calibration": [
        ("control", pa.string()), ("difficulty", pa.string()), ("layer", pa.int32()), ("n", pa.int64()),
        ("flagged", pa.int64()), ("verified", pa.int64()), ("labelled", pa.int64()),
        *((f"{what}_{which}", pa.float32()) for what in ("flagged", "verified", "labelled")
          for which in ("rate", "low", "high")),
        # concepts that were claimed, and those of planted units whose first words name or are of the planted list
        ("claimed", pa.int64()), ("recovered", pa.int64()),
        *((f"{what}_{which}", pa.float32()) for what in ("claimed", "recovered") for which in ("rate", "low", "high")),
    ],
    "failures": [
        ("stage", pa.string()), ("unit", pa.string()), ("reason", pa.string()), ("attempts", pa.int32()),
        ("layer", pa.int32()), ("neuron", pa.int32()), ("polarity", pa.int8()), ("control", pa.string()),
    ],
}

TABLES = tuple(_TABLES)
PER_UNIT = (
    "exemplars", "statistics", "candidates", "variants", "verifications", "concepts", "labels", "scores", "results",
)  # fmt: skip
SPLITS = ("explain", "score")


@cache
def schema(name: str, controls: bool = False) -> pa.Schema:
    """The schema of table `name`; `controls` adds the column `control` in front of a per-unit table."""
    columns = list(_TABLES[name])
    if controls and name in PER_UNIT:
        columns.insert(0, ("control", pa.string()))
    metadata = {"raylabel.schema_version": SCHEMA_VERSION, "raylabel.table": name}
    if name == "statistics":
        metadata["raylabel.histogram_edges"] = json.dumps([str(e) if abs(e) == float("inf") else e for e in HISTOGRAM_EDGES])
    return pa.schema([pa.field(n, t) for n, t in columns], metadata=metadata)


def conform(table: pa.Table, name: str, controls: bool = False) -> pa.Table:
    """`table` with exactly the columns of the schema, in its order and types; absent nullable columns become null.

    Raises ValueError for a column the schema does not know.
    """
    want = schema(name, controls)
    unknown = set(table.column_names) - set(want.names)
    if unknown:
        raise ValueError(f"table {name} has no column {sorted(unknown)[0]}")
    columns = [
        table.column(f.name).cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type)
        for f in want
    ]
    return pa.table(columns, schema=want)


def from_rows(rows: list[dict[str, object]], name: str, controls: bool = False) -> pa.Table:
    """A table of schema `name` from a list of dicts; missing keys become null."""
    return pa.Table.from_pylist(rows, schema=schema(name, controls))

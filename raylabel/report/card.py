"""A dataset card for a run: README.md as the Hugging Face hub and `datasets` read it.

Beside the tables it makes each of them a configuration of its own: `load_dataset(RUN, "results")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from raylabel.errors import BadInput
from raylabel.report.texts import short, shown
from raylabel.store.rundir import RunDir
from raylabel.tables import PER_UNIT, TABLES

ABOUT = {
    "results": "one row per unit and polarity: label, evidence, thresholds passed",
    "candidates": "likeness of the words and phrases at each unit's peaks, with q-values and the decoys' rate",
    "verifications": "what is left of each unit's activation when words are swapped",
    "variants": "every swapped word and the activation measured after it",
    "exemplars": "texts in which units fire: tokens and activations around the peak",
    "statistics": "moments and histogram of each unit's activations, output tokens raised and lowered",
    "concepts": "words found by a search against a judge, tested on held-back text",
    "labels": "labels and descriptions, and who wrote them",
    "scores": "tests of the labels on held-back text, corrected by other units' labels",
    "samples": "the scanned text, tokenised",
    "calibration": "how controls fared under the same settings",
    "failures": "what could not be done, and why",
}


def card(run: RunDir) -> str:
    """The card's text."""
    config, facts = run.config, run.resolved
    model = _text(short(str(facts.get("name") or config["subject"]["model"])))
    site = _text(short(str(config["subject"]["latents"] or facts.get("site") or config["subject"]["site"])))
    there = [name for name in TABLES if run.complete(name) and run.paths(name)]
    suffix = "parquet" if config["run"]["format"] == "parquet" else "arrow"
    # Quantities of a run, the first table being what a viewer opens.
    there.sort(key=lambda name: (name != "results", TABLES.index(name)))
    files = {name: f"{name}/*/*.{suffix}" if name in PER_UNIT else f"{name}/*.{suffix}" for name in there}
    head: dict[str, Any] = {
        "pretty_name": f"raylabel: units of {model}",
        "tags": ["interpretability", "neurons", "raylabel"],
        "configs": [
            {"config_name": name, "data_files": files[name], **({"default": True} if name == "results" else {})} for name in there
        ],
    }
    results = run.table("results", columns=["flagged", "verified"])
    flagged, verified = (sum(bool(v) for v in results.column(name).to_pylist()) for name in ("flagged", "verified"))
    source = config["exemplars"]["source"]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {_text(head['pretty_name'])}",
        "",
        f"Units of `{model}` at `{site}`, "
        f"found, tested and labelled by [raylabel](https://pypi.org/project/raylabel/). Exemplars come from: {source}"
        + (f" (`{_text(short(str(config['exemplars']['corpus']['path'])))}`)." if source == "corpus" else "."),
        "",
        f"{results.num_rows:,} rows of units and polarities, {flagged:,} flagged, {verified:,} verified.",
        "",
        "| table | what it holds |",
        "|---|---|",
        *(f"| `{name}` | {ABOUT[name]} |" for name in there),
        "",
        "Per-unit tables lead with `layer`, `neuron` and `polarity`; `layer` lies in the path. Activations are in the model's",
        "units, times the sign of the polarity. Verified is not proven: look at what the same settings do to the controls, in",
        "`calibration` and `controls/`. The scanned text has its own licence, which is its owner's to state.",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'load_dataset("parquet", data_files="results/*/*.parquet")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _text(text: str) -> str:
    """Foreign text in Markdown: one line, without characters that would end code or begin HTML."""
    return shown(text).replace("`", "'").replace("<", "‹").replace("|", "¦")


def write_card(run: RunDir, path: str) -> None:
    """Writes the card to a file; BadInput where that cannot be."""
    place = Path(path)
    if place.is_dir():
        raise BadInput(f"--out {path}: is a folder; give a file name, such as {place / 'README.md'}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(card(run), encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadInput(f"--out {path}: cannot be written ({error.strerror})") from None

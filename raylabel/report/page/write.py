"""Writes the report of a run: index.html (overview), units.html (all units), unit.html (any one), and their data.

    OUT/index.html units.html unit.html      pages; report.css and .js beside them
    OUT/data/units-NNN.js phrases-NNN.js     the table of all units, see `table`
    OUT/data/unit-L/NNNNN.js                 what unit.html shows, see `units`

The pages load their data by `<script>` tags, ask the network for nothing and open from disk.
"""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from raylabel.errors import BadInput
from raylabel.report.page.links import links
from raylabel.report.page.near import Near, by_cofiring, by_direction, by_logits
from raylabel.report.page.overview import overview
from raylabel.report.page.packing import write_json
from raylabel.report.page.table import words_of, write_table
from raylabel.report.page.units import BLOCK, unit_blocks
from raylabel.report.texts import shown
from raylabel.store.rundir import RunDir

PAGES = ("index.html", "units.html", "unit.html")
MARK = "raylabel-report"
"""What a folder holds that a report was written to, and that another may replace."""
MANY = 20_000
"""Units from which on several processes write their pages: starting them takes seconds."""
WEIGHTS = 8_000_000_000
"""Bytes of a local model's files up to which it is loaded for its output directions."""


def write_report(run: RunDir, out: Path, workers: int = 1) -> Path:
    """Writes the report of a finished run to the folder `out`, which is made, and returns its first page.

    `workers` processes share the pages of large runs' units, by layers; the module that calls with more than one is
    imported by each of them. Raises BadInput for a run without results and for a folder that holds something else.
    """
    if not run.complete("results"):
        run.info  # noqa: B018  (a folder that is no run is the likelier mistake)
        raise BadInput(f"{run.files.url}: no results yet; run `raylabel run` again to finish it")
    _prepare(out)
    results = run.table("results")
    data = out / "data"
    index = write_table(run, results, data)
    places = [results.column(n).to_numpy().astype(np.int64) for n in ("layer", "neuron", "polarity")]
    units = np.stack(places, axis=1)
    labels = [shown(label) or words for label, words in zip(results.column("label").to_pylist(), words_of(results), strict=True)]
    nearest, notes = near_units(run, units)
    shared = (run.files.url, data, nearest, units, labels)
    if workers == 1 or len(units) < MANY:
        for layer in index["layers"]:
            write_layer(*shared, layer)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(index["layers"])), context, _share, shared) as pool:
            list(pool.map(_write_shared, index["layers"]))
    tree = {
        **index, "block": BLOCK, "links": links(run.config, run.resolved), "nearest": notes,
        "last": {layer: int(units[units[:, 0] == layer, 1].max()) for layer in index["layers"]},
    }  # fmt: skip
    write_pages(out, {**overview(run, results), "index": tree})
    return out / PAGES[0]


def write_layer(
    url: str, data: Path, nearest: dict[str, Near], units: np.ndarray, labels: list[str], layer: int
) -> None:  # fmt: skip
    """The files of a layer's units, see `units.unit_blocks`."""
    run = RunDir(url)
    for block, trees in unit_blocks(run, layer, run.table("results", layer), nearest, units, labels):
        write_json(data, f"unit-{layer}/{block:05d}", trees)


_shared: list[Any] = []


def _share(*given: Any) -> None:
    """Keeps what all layers of a process have in common."""
    _shared[:] = given


def _write_shared(layer: int) -> None:
    url, data, nearest, units, labels = _shared
    write_layer(url, data, nearest, units, labels, layer)


def _prepare(out: Path) -> None:
    """An empty folder, or one with an earlier report, which goes."""
    try:
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).exists())):
            raise BadInput(f"--out {out}: holds something else; give another folder")
        shutil.rmtree(out / "data", ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).write_text("The report of a raylabel run. Writing it again replaces what lies here.\n")
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error.strerror})") from None


def write_pages(out: Path, values: dict[str, Any]) -> None:
    """The pages and what they share, from the values that the templates ask for."""
    assets = resources.files("raylabel.report.page") / "assets"
    for file in assets.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raylabel.report.page"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    for name in PAGES:
        (out / name).write_text(environment.get_template(name).render(**values, page=name), encoding="utf-8", errors="replace")


def near_units(run: RunDir, units: np.ndarray) -> tuple[dict[str, Near], dict[str, str]]:
    """(units near each unit by kind, what each kind is)."""
    found: dict[str, Near] = {}
    notes: dict[str, str] = {}
    directions = output_directions(run)
    if directions is not None:
        found["direction"] = by_direction(units, directions)
        where = "of the same layer" if found["direction"].within else "of all layers"
        notes["direction"] = f"cosine of output directions, from the model's weights; units {where}"
    elif run.complete("statistics"):
        table = run.table("statistics", columns=["layer", "neuron", "polarity", "logits_up", "logits_down"])
        keys = zip(*(table.column(n).to_pylist() for n in ("layer", "neuron", "polarity")), strict=True)
        rows = {key: i for i, key in enumerate(keys)}
        lists = [table.column(n).to_pylist() for n in ("logits_up", "logits_down")]
        at = [rows.get(tuple(unit)) for unit in units.tolist()]
        up, down = ([None if i is None else values[i] for i in at] for values in lists)
        if any(up):
            found["logits"] = by_logits(units, up, down)
            notes["logits"] = (
                "cosine over the few output tokens raised and lowered most, all others taken as 0: "
                "the model's weights were not at hand for the output directions themselves"
            )
    if run.complete("exemplars"):
        found["firing"] = _cofiring(run, units)
        notes["firing"] = "share of the unit's top samples in which the other has a top exemplar too, and at the same token"
    return found, notes


def _cofiring(run: RunDir, units: np.ndarray) -> Near:
    import pyarrow.compute as pc

    names = ["layer", "neuron", "polarity", "sample", "start", "position"]
    table = run.table("exemplars", filter=pc.field("sampling") == "top", columns=names)
    columns = {n: table.column(n).to_numpy().astype(np.int64) for n in names}
    theirs = _numbers(*(columns[n] for n in ("layer", "neuron", "polarity")))
    mine = _numbers(*units.T)
    order = np.argsort(mine)
    at = np.minimum(np.searchsorted(mine, theirs, sorter=order), len(mine) - 1)
    hit = mine[order[at]] == theirs
    which = order[at][hit]
    return by_cofiring(units, which, columns["sample"][hit], (columns["start"] + columns["position"])[hit])


def _numbers(layer: np.ndarray, neuron: np.ndarray, polarity: np.ndarray) -> np.ndarray:
    return (layer << 40) + (neuron << 8) + (polarity + 8)


def output_directions(run: RunDir) -> dict[int, np.ndarray] | None:
    """layer -> [width, d_model] of what the units write, from the model's weights; None where they are not at hand.

    Only models that lie on this machine as files of a bearable size are loaded, on the CPU.
    """
    from raylabel.config import RunConfig
    from raylabel.stages.subject import open_subject

    # A newer version's configuration, which this one cannot use, is no reason to give no report.
    try:
        config = RunConfig.model_validate(run.config)
    except ValueError:
        return None
    folder = Path(config.subject.model)
    if config.subject.model != "demo" and not folder.is_dir():
        return None
    if folder.is_dir() and sum(f.stat().st_size for f in folder.glob("*.safetensors")) > WEIGHTS:
        return None
    subject = config.subject.model_copy(update={"device": "cpu", "dtype": "float32"})
    try:
        model = open_subject(config.model_copy(update={"subject": subject}))
        return {layer: model.output_directions(layer).detach().float().cpu().numpy() for layer in model.layers}
    except BadInput:
        return None

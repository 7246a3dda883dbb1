"""A run directory: what is planned, what is committed, and readers that see nothing else.

Readers take plan ∩ manifest: a half-written, orphaned or late duplicate file is never seen. `run.json` is written once
and then only extended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from raylabel.errors import BadInput
from raylabel.store.files import Files
from raylabel.store.plan import Plan, Unit
from raylabel.store.shards import TEMPORARY, manifest_name
from raylabel.tables import PER_UNIT, SCHEMA_VERSION, TABLES, schema

PARTITIONS = ds.partitioning(pa.schema([("layer", pa.int32())]), flavor="hive")
OWN = ("_lock", ".tmp-")
"""What a run that was stopped before its first word may have left."""
STRETCH = 1_000
"""Manifest entries that are read together: from an object store many at a time are faster."""
PACKAGES = ("raylabel", "torch", "transformers", "transformer_lens", "ray", "pyarrow", "fasttext-numpy2", "numpy")


class RunDir:
    """A run directory at a local path or fsspec URL.

    `controls` gives the same readers for the control units of the run.
    """

    def __init__(self, url: str, controls: bool = False) -> None:
        self.files = Files(url)
        self.in_controls = controls
        self._info: dict[str, Any] | None = None
        self._known: dict[str, tuple[set[str], list[tuple[Unit, list[dict[str, Any]]]]]] = {}

    @property
    def controls(self) -> RunDir:
        """The control units of this run."""
        return RunDir(self.files.url, controls=True)

    # run.json

    @property
    def info(self) -> dict[str, Any]:
        """run.json; BadInput if there is none, it is not JSON, or it is of a newer major schema version."""
        if self._info is None:
            try:
                self._info = json.loads(self.files.read("run.json"))
            except FileNotFoundError:
                raise BadInput(f"{self.files.url}: not a run directory (no run.json)") from None
            except (ValueError, RecursionError):
                raise BadInput(f"{self.files.url}/run.json: not valid JSON") from None
            if not _is_info(self._info):
                self._info = None
                raise BadInput(f"{self.files.url}/run.json: not what raylabel writes; use another --out, or delete the run")
            version = str(self._info.get("schema_version", "?"))
            if not version.split(".")[0].isdigit() or int(version.split(".")[0]) > int(SCHEMA_VERSION.split(".")[0]):
                raise BadInput(
                    f"{self.files.url}: written with schema version {version}, this raylabel reads up to "
                    f"{SCHEMA_VERSION}; upgrade raylabel"
                )
        return self._info

    def refuse_foreign(self) -> None:
        """BadInput for a folder that holds something else: finishing a stage would delete what lies in its tables' folders."""
        if not self.files.exists("run.json") and any(not name.startswith(OWN) for name in self.files.names()):
            raise BadInput(f"{self.files.url}: not empty and not a run directory; give another --out")

    def start(self, config: dict[str, Any]) -> None:
        """Makes run.json, or adds a changed configuration to the one that is there."""
        if self.files.exists("run.json"):
            info = self.info
        else:
            self.refuse_foreign()
            info = {"schema_version": SCHEMA_VERSION, "created": time.time(), "resolved": {}, "configs": []}
        if not info["configs"] or info["configs"][-1]["config"] != config:
            info["configs"].append({"started": time.time(), "config": config, "versions": versions()})
            self._write_info(info)
        self._info = info

    def resolve(self, values: dict[str, Any], of: str) -> None:
        """Adds resolved values to run.json; the ones already there stay, unless they were resolved for another `of`."""
        kept = self.info["resolved"] if self.info.get("resolved_of", of) == of else {}
        new = {**self.info, "resolved": {**values, **kept}, "resolved_of": of}
        if new != self.info:
            self._write_info(new)

    @property
    def resolved(self) -> dict[str, Any]:
        """`auto` values and facts about the subject, fixed once for the run."""
        return dict(self.info["resolved"])

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the latest run, as plain values."""
        return dict(self.info["configs"][-1]["config"])

    def _write_info(self, info: dict[str, Any]) -> None:
        self.files.write("run.json", json.dumps(info, indent=1).encode())
        self._info = info

    # plans and manifests

    def plan(self, stage: str) -> Plan | None:
        """The plan of a stage, None before it started."""
        try:
            return Plan.from_json(self.files.read(f"_plan/{stage}.json"))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise BadInput(f"{self.files.url}/_plan/{stage}.json: not a plan; delete it and run the same command again") from None

    def fix_plan(self, plan: Plan) -> None:
        """Writes the plan of a stage that starts, unless the same one is there."""
        data = plan.to_json()
        name = f"_plan/{plan.stage}.json"
        if not self.files.exists(name) or self.files.read(name) != data:
            self.files.write(name, data)

    def manifest(self, stage: str) -> dict[str, dict[str, Any]]:
        """Manifest entries of a stage by unit id, failed attempts included; unreadable entries do not count."""
        names = self.files.sizes(f"_manifest/{stage}")
        wanted = [name for name in names if name.endswith(".json") and "/.tmp-" not in name]
        return {entry["unit"]: entry for entry in self._entries(wanted)}

    def _entries(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Those that can be read, a stretch of them in memory at a time."""
        for at in range(0, len(names), STRETCH):
            for data in self.files.read_all(names[at : at + STRETCH]).values():
                with contextlib.suppress(ValueError, RecursionError):
                    entry = json.loads(data)
                    if _is_entry(entry):
                        yield entry

    def committed(self, plan: Plan, entries: dict[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
        """Entries of the plan's units, in its order, whose files are all there with the recorded size.

        Temporary files count until the last step is committed, after which nobody needs them. A blob has no unit in
        its name, so that a run with other settings may have put its own in the place: its content counts.
        `entries` are those of the stage's manifest, where they have just been read.
        """
        entries = self.manifest(plan.stage) if entries is None else entries
        sizes = self._sizes(entries)
        whole = {
            unit.id: entries[unit.id]
            for unit in plan.units
            if unit.id in entries and not entries[unit.id]["failed"]
        }

        def same(file: dict[str, Any]) -> bool:
            if sizes.get(file["path"]) != file["bytes"]:
                return False
            named = "name" in file and not file["temporary"]
            return not named or hashlib.sha256(self.files.read(file["path"])).hexdigest() == file["sha256"]

        def there(entry: dict[str, Any], temporaries: bool) -> bool:
            return all(same(f) for f in entry["files"] if temporaries or not f.get("temporary"))

        steps = plan.steps()
        last = {u.id for u in plan.units if steps and u.step == steps[-1]}
        closed = all(i in whole and there(whole[i], True) for i in last)
        return {i: e for i, e in whole.items() if there(e, not closed)}

    def _sizes(self, entries: dict[str, dict[str, Any]]) -> dict[str, int]:
        tops = {f["path"].split("/")[0] for e in entries.values() for f in e["files"]}
        sizes: dict[str, int] = {}
        for top in tops:
            sizes |= self.files.sizes(top)
        return sizes

    def broken(self, stage: str) -> list[str]:
        """Files of committed units whose sha256 is not the recorded one, or that are gone."""
        plan = self.plan(stage)
        if plan is None:
            return []
        wrong, units = [], {u.id for u in plan.units}
        for entry in self.manifest(stage).values():
            if entry["unit"] not in units:
                continue
            for file in entry["files"]:
                try:
                    whole = hashlib.sha256(self.files.read(file["path"])).hexdigest() == file["sha256"]
                except FileNotFoundError:
                    whole = bool(file.get("temporary"))
                if not whole:
                    wrong.append(file["path"])
        return sorted(wrong)

    def temporaries(self, unit: Unit, step: str, name: str | None = None) -> Iterator[tuple[Unit, bytes]]:
        """(unit, bytes) of the temporary files that a step of the same stage committed (as `name`), in plan order."""
        for earlier, files in self._earlier(unit, step):
            for file in files:
                if name in (None, file["name"]):
                    yield earlier, self.files.read(file["path"])

    def _earlier(self, unit: Unit, step: str) -> list[tuple[Unit, list[dict[str, Any]]]]:
        """Units of an earlier step and their temporary files; kept, as that step is over when a unit of the next runs."""
        if unit.id not in self._known.get(step, (set[str](), []))[0]:
            plan = self.plan(unit.stage)
            units = {u.id: u for u in plan.units if u.step == step} if plan else {}
            entries = self._entries([f"_manifest/{unit.stage}/{i}.json" for i in units])
            kept = {e["unit"]: [f for f in e["files"] if f.get("temporary")] for e in entries}
            found = [(u, kept[i]) for i, u in units.items() if kept.get(i)]
            self._known = {step: ({u.id for u in plan.units} if plan else set(), found)}
        return self._known[step][1]

    def finish(
        self, plan: Plan, tables: tuple[str, ...], committed: dict[str, dict[str, Any]] | None = None
    ) -> None:  # fmt: skip
        """Deletes superseded, orphaned and temporary files of the stage, then writes `_SUCCESS` of its tables.

        `_SUCCESS` lists the table's files, so that what a lost worker writes later is not read either. `committed` are
        the plan's entries, where they have just been read.
        """
        entries = self.committed(plan) if committed is None else committed
        rows = {f["path"]: f["rows"] for e in entries.values() for f in e["files"]}
        of = _by_table(rows)
        tops = [top for table in tables for top in (table, f"controls/{table}")]
        for top in tops:
            for name in self.files.sizes(top):
                if name not in rows and not name.endswith("/_SUCCESS"):
                    self.files.delete(name)
        for name in self.files.sizes(f"{TEMPORARY}/{plan.stage}"):
            self.files.delete(name)
        wanted = {manifest_name(unit) for unit in plan.units}
        for name in self.files.sizes(f"_manifest/{plan.stage}"):
            if name not in wanted:
                self.files.delete(name)
        for top in reversed(tops):
            files = of.get(top, [])
            if files or not top.startswith("controls/"):
                mark = {"stage": plan.stage, "plan": plan.digest, "rows": sum(rows[f] for f in files), "files": files}
                self.files.write(f"{top}/_SUCCESS", json.dumps(mark).encode())

    def tidy(self, plan: Plan, tables: tuple[str, ...], committed: dict[str, dict[str, Any]]) -> bool:
        """Whether the files that `_SUCCESS` lists are the committed ones: a worker that was given up may end late."""
        of = _by_table(f["path"] for e in committed.values() for f in e["files"])
        for table in tables:
            for top in (table, f"controls/{table}"):
                files = self._listed(top)
                if (files is None and top == table) or set(files or ()) != set(of.get(top, ())):
                    return False
        return True

    def _listed(self, table: str) -> list[str] | None:
        """The files that `_SUCCESS` of a table lists; None where there is none that can be read."""
        try:
            files = json.loads(self.files.read(f"{table}/_SUCCESS"))["files"]
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return files if isinstance(files, list) and all(isinstance(name, str) for name in files) else None

    def forget_plan(self, stage: str, tables: tuple[str, ...]) -> None:
        """Hides the rows of a stage whose inputs are about to change; its files stay until it is finished again."""
        self.reopen(tables)
        self.files.delete(f"_plan/{stage}.json")

    def reopen(self, tables: tuple[str, ...]) -> None:
        """Takes `_SUCCESS` away from tables that are about to change."""
        for table in tables:
            self.files.delete(f"{table}/_SUCCESS")
            self.files.delete(f"controls/{table}/_SUCCESS")

    def complete(self, table: str) -> bool:
        """Whether the table is whole."""
        return self.files.exists(f"{table}/_SUCCESS")

    # readers

    def paths(self, table: str, layer: int | None = None) -> list[str]:
        """Committed files of a table, in the order of the plan: by layer and neuron."""
        top = f"controls/{table}" if self.in_controls else table
        prefix = f"{top}/" if layer is None else f"{top}/layer={layer:02d}/"
        listed = self._listed(top)
        if listed is not None:
            return [name for name in listed if name.startswith(prefix)]
        found: list[str] = []
        for name in self.files.sizes("_plan"):
            stage = name.removeprefix("_plan/").removesuffix(".json")
            plan = self.plan(stage) if name.endswith(".json") and "/.tmp-" not in name else None
            if plan is None:
                continue
            entries = self.manifest(stage)
            for entry in (entries[unit.id] for unit in plan.units if unit.id in entries):
                found += [f["path"] for f in entry["files"] if f["path"].startswith(prefix)]
        return found

    def dataset(self, table: str, layer: int | None = None) -> ds.Dataset:
        """A table as a pyarrow dataset, with the column `layer` from its path where it is per unit."""
        if table not in TABLES:
            raise BadInput(f"no table {table!r}; tables are {', '.join(TABLES)}")
        self.info  # noqa: B018  (refuses what this version cannot read)
        want = schema(table, self.in_controls)
        if table in PER_UNIT:
            want = pa.schema([pa.field("layer", pa.int32()), *want], metadata=want.metadata)
        paths = self.paths(table, layer)
        if not paths:
            return ds.dataset(want.empty_table())
        format = "parquet" if paths[0].endswith(".parquet") else "ipc"
        return ds.dataset(
            [self.files.path(p) for p in paths], filesystem=self.files.arrow(), format=format, schema=want,
            partitioning=PARTITIONS if table in PER_UNIT else None, partition_base_dir=self.files.root,
        )  # fmt: skip

    def table(
        self,
        table: str,
        layer: int | None = None,
        neurons: tuple[int, int] | None = None,
        filter: Any = None,
        columns: list[str] | None = None,
    ) -> pa.Table:
        """A table, or its rows of one layer and of neurons [first, last), sorted by unit."""
        condition = filter
        if neurons is not None:
            inside = (pc.field("neuron") >= neurons[0]) & (pc.field("neuron") < neurons[1])
            condition = inside if condition is None else condition & inside
        found = self.dataset(table, layer)
        try:
            return found.to_table(columns=columns, filter=condition)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise BadInput(
                f"{self.files.url}: a file of the table {table} is not what was committed ({str(error)[:200]}); delete it and "
                f"run the same command again"
            ) from None


def _by_table(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths by the folder of their table, in their order."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split("/")
        found.setdefault("/".join(parts[: 1 + (parts[0] == "controls")]), []).append(path)
    return found


def _is_info(tree: Any) -> bool:
    """Whether this is what a run.json holds."""
    if not isinstance(tree, dict) or "schema_version" not in tree:
        return False
    configs = tree.get("configs", [])
    whole = isinstance(configs, list) and all(isinstance(c, dict) and isinstance(c.get("config"), dict) for c in configs)
    return whole and isinstance(tree.get("resolved", {}), dict)


_FILE = {"path": str, "bytes": int, "rows": int, "sha256": str}
_ENTRY = {
    "unit": str, "attempt": int, "started": int | float, "ended": int | float, "files": list, "failures": list, "failed": bool,
}  # fmt: skip


def _is_entry(tree: Any) -> bool:
    """Whether this is what a manifest entry holds."""
    if not _has(tree, _ENTRY) or not all(isinstance(row, dict) for row in tree["failures"]):
        return False
    return all(_has(file, _FILE) for file in tree["files"])


def _has(tree: Any, kinds: dict[str, Any]) -> bool:
    return isinstance(tree, dict) and all(isinstance(tree.get(key), kind) for key, kind in kinds.items())


def versions() -> dict[str, str]:
    """Versions of what the rows depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

"""Units in this process and on Ray: the same rows, and a fault costs no more than the neuron it belongs to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from raylabel.engine.execute import UnitFailed
from raylabel.engine.inline import InlinePool
from raylabel.engine.pipeline import open_pool
from raylabel.errors import BadInput
from raylabel.stages.base import Step
from raylabel.store.plan import Plan
from raylabel.store.rundir import RunDir
from tests.engine.steps import Linked, Plain, Unopened, step_of

WORKERS = (Plain, Linked)


@pytest.fixture(scope="module")
def ray_pool() -> Iterator[Any]:
    # CPUs by name only: a new actor need not wait until those of a pipeline that broke are gone.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 4)
        pool = open_pool("local", 2)
    yield pool
    pool.close()


@pytest.fixture(params=["inline", "ray"])
def pool(request: pytest.FixtureRequest) -> Any:
    return InlinePool() if request.param == "inline" else request.getfixturevalue("ray_pool")


def do(pool: Any, made: tuple[Step, Plan], folder: Path) -> tuple[RunDir, list[dict[str, Any]]]:
    """The run directory after the step, and its manifest entries in the plan's order."""
    step, plan = made
    run = RunDir(str(folder))
    run.start({})
    run.fix_plan(plan)
    entries: dict[str, dict[str, Any]] = {}
    pool.run(step, [(u, 1) for u in plan.units], run.files, "parquet", lambda entry: entries.update({entry["unit"]: entry}))
    assert entries == run.manifest("made") or pool is None
    return run, [entries[u.id] for u in plan.units]


def names(run: RunDir, plan: Plan, layer: int) -> list[str]:
    """Neurons in the temporary files of a unit, as a later step reads them."""
    unit = plan.units[layer]
    return [n for u, data in run.temporaries(unit, "rows", "names.txt") if u == unit for n in data.decode().split(",")]


@pytest.mark.parametrize("worker", WORKERS)
def test_a_neuron_that_raises_costs_itself_only(worker: type[Any], tmp_path: Path) -> None:
    check_troubled(InlinePool(), worker, tmp_path, {1: {"raise": 5}})


@pytest.mark.parametrize("worker", WORKERS)
def test_on_ray_too_and_a_worker_that_is_killed_once_costs_nothing(worker: type[Any], ray_pool: Any, tmp_path: Path) -> None:
    flag = tmp_path / "died"
    check_troubled(ray_pool, worker, tmp_path, {1: {"raise": 5}, 2: {"kill_once": 3, "flag": str(flag)}})
    assert flag.exists()


def check_troubled(pool: Any, worker: type[Any], folder: Path, faults: dict[int, dict[str, Any]]) -> None:
    """All rows but those of neuron 5 of layer 1, which is a failure; what the halves hand on is all there, in order."""
    made = step_of(worker, faults)
    run, entries = do(pool, made, folder / "run")
    assert [e["failures"] for e in entries] == [
        [], [{"layer": 1, "neuron": 5, "reason": "ArithmeticError: neuron 5 is odd"}], []
    ]  # fmt: skip
    whole, _ = do(InlinePool(), step_of(worker), folder / "whole")
    lost = (pc.field("layer") == 1) & (pc.field("neuron") == 5)
    assert run.table("statistics").equals(whole.table("statistics").filter(~lost))
    assert whole.table("statistics").num_rows == 3 * 8 * 2
    assert [names(run, made[1], layer) for layer in (0, 1)] == [list("01234567"), list("0123467")]


def test_a_neuron_that_kills_its_workers_every_time_is_found_and_listed(
    ray_pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylabel.engine.cluster.ATTEMPTS", 1)
    run, entries = do(ray_pool, step_of(Linked, {1: {"kill": 1}}, neurons=2), tmp_path)
    [failure] = entries[1]["failures"]
    assert (failure["layer"], failure["neuron"]) == (1, 1)
    assert "worker process" in failure["reason"]
    found = run.table("statistics").select(["layer", "neuron"]).to_pylist()
    assert {(r["layer"], r["neuron"]) for r in found} == {(layer, n) for layer in range(3) for n in range(2)} - {(1, 1)}


def test_what_cannot_be_cut_stops_the_stage_and_keeps_what_was_done(pool: Any, tmp_path: Path) -> None:
    with pytest.raises(UnitFailed, match=r"made rows .*neuron 5 is odd"):
        do(pool, step_of(Plain, {1: {"raise": 5}}, cut=False), tmp_path)
    # On Ray the first unit may still be on its way when the second gives up.
    done = [entry["key"]["layer"] for entry in RunDir(str(tmp_path)).manifest("made").values()]
    assert done == [0] or not isinstance(pool, InlinePool)


def test_a_worker_that_cannot_be_made_says_why(pool: Any, tmp_path: Path) -> None:
    with pytest.raises(UnitFailed, match="no room for the model"):
        do(pool, step_of(Unopened), tmp_path)


@pytest.mark.parametrize("worker", WORKERS)
def test_bad_input_found_by_a_worker_is_the_users_to_mend(worker: type[Any], pool: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^subject\.model: mend this$"):
        do(pool, step_of(worker, {1: {"refuse": 2}}), tmp_path)


def test_a_transient_fault_is_tried_three_times_in_this_process(tmp_path: Path) -> None:
    tries: list[int] = []

    class Shaky(Plain):
        def __call__(self, unit: Any) -> Any:
            tries.append(unit.key["layer"])
            if tries.count(1) < 3 and unit.key["layer"] == 1:
                raise OSError("not now")
            return super().__call__(unit)

    _, entries = do(InlinePool(), step_of(Shaky, cut=False), tmp_path)
    assert tries == [0, 1, 1, 1, 2]
    assert [e["attempt"] for e in entries] == [1, 3, 1]
    assert "-3.parquet" in entries[1]["files"][0]["path"]


def test_ray_listens_on_loopback_only(ray_pool: Any) -> None:
    import ray

    mine = set(descendants(os.getpid())) | {os.getpid()}
    assert ray.is_initialized()
    places = [place for pid, place in listening() if pid in mine]
    assert len(places) > 3
    assert [place for place in places if not place.startswith("127.")] == []


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


def listening() -> Iterator[tuple[int, str]]:
    """(process, address) of every listening TCP socket."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                raw = bytes.fromhex(fields[1].split(":")[0])
                # An IPv4 address, bare or mapped into IPv6, lies in the last four bytes, lowest first.
                mapped = len(raw) == 4 or raw[:12] == bytes(8) + b"\xff\xff\0\0"
                sockets[fields[9]] = ".".join(str(b) for b in reversed(raw[-4:])) if mapped else raw.hex()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                for handle in (process / "fd").iterdir():
                    target = os.readlink(handle)
                    if target.startswith("socket:[") and target[8:-1] in sockets:
                        yield int(process.name), sockets[target[8:-1]]
            except OSError:
                continue

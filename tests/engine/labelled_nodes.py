"""Runs a step with a model and one without on labelled machines: `python -m tests.engine.labelled_nodes FOLDER`.

Prints as JSON where the units of each ran, once with a machine of CPUs beside the one with (made up) GPUs and once without.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import ray
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from raylabel.engine.cluster import POOL, RayPool
from raylabel.stages.base import Step
from raylabel.store.plan import Unit, make_plan
from raylabel.store.rundir import RunDir
from raylabel.store.shards import Output

STORE = 100_000_000


class Placed:
    """Notes which machine it is on."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, unit: Unit) -> Output:
        time.sleep(0.2)
        return Output(notes={"node": ray.get_runtime_context().get_node_id()})


def placed(pool: RayPool, folder: str, model: bool) -> list[str]:
    """Labels of the machines that did something."""
    keys = [{"n": n} for n in range(6)]
    plan, entries = make_plan("placed", 1, {"model": model, "folder": folder}, [], {"see": keys}), list[dict[str, Any]]()
    run = RunDir(folder)
    run.start({})
    pool.run(Step("see", keys, Placed, model=model), [(u, 1) for u in plan.units], run.files, "parquet", entries.append)
    labels = {node["NodeID"]: node["Labels"][POOL] for node in ray.nodes()}
    return sorted({labels[entry["notes"]["node"]] for entry in entries})


def main() -> None:
    ray_constants.ENABLE_RAY_CLUSTER = False
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "labels": {POOL: "head"}}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=3, num_gpus=2, object_store_memory=STORE, labels={POOL: "gpu"})
    found = {}
    for name in ("alone", "beside"):
        if name == "beside":
            nodes.add_node(num_cpus=3, object_store_memory=STORE, labels={POOL: "cpu"})
        pool = RayPool(nodes.address, 2)
        found[name] = {"model": placed(pool, f"{sys.argv[1]}/a", True), "none": placed(pool, f"{sys.argv[1]}/b", False)}
        pool.close()
    print(json.dumps(found))
    nodes.shutdown()


if __name__ == "__main__":
    main()

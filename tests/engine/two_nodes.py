"""Runs a configuration on a Ray cluster of two nodes of one CPU each: `python -m tests.engine.two_nodes CONFIG.json`.

Prints, as JSON, the nodes, the workers and the most bytes that the object stores held. A process of its own: a cluster and
a test's own Ray do not fit into one. A worker takes a whole CPU, so that two workers are on two nodes.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

STORE = 100_000_000


def main() -> None:
    """See the module."""
    from raylabel.config import RunConfig
    from raylabel.engine.pipeline import run_pipeline

    config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=1, object_store_memory=STORE)
    held, busy, ended = [0.0], [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            if ray.is_initialized():
                free = ray.available_resources()
                held.append(2 * STORE - free.get("object_store_memory", 0.0))
                busy.append(2 - free.get("CPU", 0.0))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    run_pipeline(config.model_copy(update={"run": config.run.model_copy(update={"address": nodes.address})}))
    ended.set()
    watcher.join()
    print(json.dumps({"nodes": len(nodes.list_all_nodes()), "busy": max(busy), "held": max(held)}))
    ray.shutdown()
    nodes.shutdown()


if __name__ == "__main__":
    main()

"""A machine of its own, as far as one machine can play several: `python -m tests.engine.far_node SPEC.json`.

A Ray node on loopback, of one CPU or as the head of none, with a working directory, a host name and, where the kernel allows
it, a disk of its own: what `source` holds is copied to `disk`, which other nodes see empty or filled with their own. Without
`address` it is the head. Prints one line, the cluster's address, when it is up. Each line it reads is a command line for
`raylabel`, whose progress comes on stderr and whose exit code is printed; it ends with its input.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

NEW_MOUNTS, NEW_NAME, PRIVATE = 0x00020000, 0x04000000, 0x4000 | 0x40000
STORE = 100_000_000


def part(name: str, disk: Path) -> bool:
    """Gives this process and those below it a disk and a host name of their own; False where it may not."""
    kernel = ctypes.CDLL(None, use_errno=True)
    if kernel.unshare(NEW_MOUNTS | NEW_NAME) or kernel.mount(b"none", b"/", None, PRIVATE, None):
        return False
    with suppress(OSError):
        socket.sethostname(name)
    return not kernel.mount(b"tmpfs", str(disk).encode(), b"tmpfs", 0, b"size=64m")


def start(address: str | None) -> Any:
    """The node, and the address of its cluster."""
    from ray._private import node, parameter, ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False
    settings = parameter.RayParams(
        num_cpus=1 if address else 0, num_gpus=0, object_store_memory=STORE, include_dashboard=False, gcs_address=address,
        redis_address=address, node_manager_port=0, include_log_monitor=False, min_worker_port=0, max_worker_port=0,
        dashboard_agent_listen_port=None if address else 0,
    )  # fmt: skip
    return node.Node(settings, head=address is None, shutdown_at_exit=True, spawn_reaper=True)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    disk = Path(spec["disk"])
    disk.mkdir(exist_ok=True)
    if part(spec["name"], disk) or not any(disk.iterdir()):
        shutil.copytree(spec["source"], disk, dirs_exist_ok=True)
    Path(spec["cwd"]).mkdir()
    os.chdir(spec["cwd"])
    node = start(spec["address"])
    print(node.gcs_address, flush=True)
    from raylabel.cli import run_command

    for line in sys.stdin:
        print(run_command([*json.loads(line), "--address", node.gcs_address]), flush=True)
    node.kill_all_processes(check_alive=False, allow_graceful=False)


if __name__ == "__main__":
    main()

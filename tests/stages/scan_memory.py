"""One figure of a process of its own: `python -m tests.stages.scan_memory WHAT CONFIG.json [BYTES]`.

WHAT is `check`, the peak that `raylabel check` expects; `scan`, the peak of a process that runs the stage; or `tight`, the
notes of a scan in batches of 512 whose first lease has only BYTES more memory than the process holds when its worker is
ready.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from raylabel.config import RunConfig


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    config = RunConfig.model_validate_json(Path(sys.argv[2]).read_text(encoding="utf-8"))
    if sys.argv[1] == "check":
        from raylabel.stages.check import estimate

        found = estimate(config)
        print(json.dumps({"peak": found["peak bytes"], "state": found["state bytes"]}))
    elif sys.argv[1] == "scan":
        from raylabel.engine.pipeline import run_pipeline
        from raylabel.stages.memory import peak_bytes

        run_pipeline(config.model_copy(update={"run": config.run.model_copy(update={"stages": ["scan"]})}))
        print(json.dumps({"peak": peak_bytes("cpu")}))
    else:
        from raylabel.stages.accumulate import AccumulateWorker
        from raylabel.stages.samples import load_samples
        from raylabel.store.rundir import RunDir

        run = RunDir(config.run.out)
        plan = run.plan("scan")
        assert plan is not None
        worker = AccumulateWorker(config.run.out)
        unit = next(u for u in plan.units if u.step == "accumulate")
        samples = load_samples(worker.run, unit.key["first"], unit.key["last"])
        notes: dict[str, Any] = {}
        # What is compiled and loaded at the first batch is not what the limit is for.
        worker._accumulate(load_samples(worker.run, 0, 32), 0, worker.layers, worker.random[:0], notes)
        worker.batch = 512
        limit = psutil.Process().memory_info().vms + int(sys.argv[3])
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        states = worker._accumulate(samples, unit.key["first"], worker.layers, worker.random[:0], notes)
        print(json.dumps({"notes": notes, "tokens": int(states[worker.layers[0]].tokens)}))


if __name__ == "__main__":
    main()

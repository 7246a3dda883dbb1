"""The whole pipeline as a job of a Ray cluster.

    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}' -- \
        python jobs/run.py CONFIG.yaml --out s3://BUCKET/RUN

Takes what `raylabel run` takes, and runs on the cluster that the job is submitted to. The driver needs no GPU and hardly
any memory: it may run on the head, or elsewhere with `--entrypoint-num-cpus`. Submit the same again to go on where a job
ended. `ray job stop` sends SIGTERM: work in flight is abandoned, everything finished so far is committed and the lock is
let go, well within a grace of RAY_JOB_STOP_WAIT_TIME_S seconds (Ray's own default is 3). Exit codes are those of
`raylabel run`; Ray calls a job FAILED that ends with 3, which is done with rows in `failures`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The package that came along with the job: Ray lets the workers find the same one first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raylabel.cli import run_command


def main(arguments: list[str]) -> int:
    """Runs the job and gives its exit code."""
    own = any(argument.partition("=")[0] == "--address" for argument in arguments)
    return run_command(["run", *arguments, *([] if own else ["--address", "auto"])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

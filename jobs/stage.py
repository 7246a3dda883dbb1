"""One stage, or a few of them separated by commas, as a job of a Ray cluster.

    ray job submit --working-dir . -- python jobs/stage.py scan CONFIG.yaml --out s3://BUCKET/RUN

Otherwise as `jobs/run.py`. A stage whose inputs are not complete is refused, as with `raylabel run --stages`.
"""

from __future__ import annotations

import sys

from run import main

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1].startswith("-") or sys.argv[1].endswith((".yaml", ".yml")):
        print("usage: python jobs/stage.py STAGE CONFIG.yaml [options of `raylabel run`]", file=sys.stderr)
        sys.exit(2)
    sys.exit(main([*sys.argv[2:], "--stages", sys.argv[1]]))

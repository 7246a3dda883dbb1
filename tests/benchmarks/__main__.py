"""`python -m tests.benchmarks [--only NAME …] [--write] [--quick] [--json PATH]`: everything that is promised about speed.

Each benchmark runs in a process of its own and gives rows; one that fails is named with its reason, the others go on,
and the exit code is 1. The figures of --quick are not to be published: its sizes are only there to see that it works.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import ROOT, Settings, environment, in_words, machine
from tests.benchmarks.report import NoMarkers, Row, place_of_table, row_from_json, write_table

BENCHMARKS = {
    "scan": "scan:scan",
    "whole-scan": "scan:whole_scan",
    "scan-memory": "scan:memory",
    "delphi": "delphi:delphi",
    "ray": "ray_cost:throughput",
    "ray-fixed": "ray_cost:fixed",
    "verify": "verify:verify",
    "identify": "identify:identify",
    "neighbours": "neighbours:neighbours",
    "controls": "controls:controls",
    "scrape": "scrape:scrape",
    "scores": "scores:tokens",
    "labels": "scores:labels",
    "concepts": "concepts:concepts",
    "report": "report_pages:report_pages",
    "driver": "simulate:driver",
    "planner": "simulate:foretold",
}
ONE_THREAD = ("ray", "concepts", "planner")
"""Those whose process has one thread, as a worker on Ray has."""
README = ROOT / "README.md"


def main() -> int:
    """The command."""
    options = parse()
    settings = settings_of(options)
    # An end by SIGTERM takes the processes and the folder along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.inner:
        return inner(options.inner, settings, Path(options.json))
    if options.write and options.quick:
        print("--write is refused with --quick: its figures are not to be published", file=sys.stderr)
        return 2
    if options.write:
        try:
            place_of_table(README.read_text(encoding="utf-8"), README)
        except NoMarkers as error:
            print(error, file=sys.stderr)
            return 2
    names = list(dict.fromkeys(options.only or BENCHMARKS))
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="raylabel-benchmarks-") as folder:
        for name in names:
            found, why = outer(name, options, Path(folder))
            rows += found
            if why:
                failed[name] = why
                print(f"FAILED {name}: {why}", flush=True)
    date = datetime.date.today().isoformat()
    here = machine(settings.threads)
    print(in_words(here, date))
    if options.quick:
        print("--quick: these figures show that it works and are not to be published")
    if options.json:
        tree = {"date": date, "machine": here, "quick": options.quick, "rows": [r.to_json() for r in rows], "failed": failed}
        Path(options.json).write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.write:
        write_table(README, rows, in_words(here, date))
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--write", action="store_true", help="refresh the table in README.md")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", metavar="PATH", help="also write the rows as JSON")
    parser.add_argument("--threads", type=int, help="of every side; default: the cores there are")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what models run on")
    peers = Path.home() / ".cache" / "raylabel-peers"
    parser.add_argument("--peers", type=Path, default=peers, help="where other systems are installed; default: %(default)s")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inner", choices=list(BENCHMARKS), help=argparse.SUPPRESS)
    return parser.parse_args()


def settings_of(options: argparse.Namespace) -> Settings:
    """What the benchmarks are told."""
    import torch

    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    threads = options.threads or machine(0)["cores"]
    torch.set_num_threads(threads)
    folder = options.folder or Path(tempfile.gettempdir())
    return Settings(options.quick, threads, device, folder, options.peers.absolute())


def outer(name: str, options: argparse.Namespace, folder: Path) -> tuple[list[Row], str]:
    """Rows of a benchmark, printed as they come, and why it failed."""
    settings = settings_of(options)
    threads = 1 if name in ONE_THREAD else settings.threads
    results = folder / f"{name}.jsonl"
    arguments = ["--inner", name, "--json", str(results), "--folder", str(folder), "--threads", str(threads)]
    arguments += ["--device", settings.device, "--peers", str(settings.peers), *(["--quick"] if options.quick else [])]
    print(f"{name} …", file=sys.stderr, flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks", *arguments], cwd=ROOT, env=environment(threads),
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        status = process.wait()
    finally:
        process.terminate()
        process.wait()
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    why = next((line["failed"] for line in found if "failed" in line), "")
    if status and not why:
        why = f"its process ended with status {status}"
    return [row_from_json(line) for line in found if "failed" not in line], why


def inner(name: str, settings: Settings, results: Path) -> int:
    """Runs a benchmark in this process; rows go to a file one by one, so that what was measured is not lost."""
    module, _, function = BENCHMARKS[name].partition(":")

    def put(tree: dict[str, Any]) -> None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(tree) + "\n")

    try:
        for row in getattr(importlib.import_module(f"tests.benchmarks.{module}"), function)(settings):
            print(" | ".join(cell or "–" for cell in row.cells("")[:-1]), flush=True)
            put(row.to_json())
    except Exception as error:
        traceback.print_exc()
        put({"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

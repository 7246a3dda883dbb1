"""The commands, thin: results go to stdout, progress and complaints to stderr.

Exit codes: 0 done; 1 the run failed; 2 bad input, in one line; 3 done, with rows in `failures`; 130 and 143 stopped by
a signal with everything finished so far committed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from raylabel.config import RunConfig, load_config
from raylabel.errors import BadInput, RunFailed

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
INTERRUPTED = 130
"""Typer's own code for an interrupt; no command gives it otherwise."""
STOPPED = "stopped; run the same command again to go on"
DEMO = Path(__file__).parent / "demo" / "demo.yaml"

Out = Annotated[str | None, typer.Option("--out", help="Run directory: a path or an fsspec URL.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: key.path=value.")]
Address = Annotated[str | None, typer.Option("--address", help="inline, local, auto or HOST:PORT.")]
Stages = Annotated[str | None, typer.Option("--stages", help="Stages to run, separated by commas.")]
Folder = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]
Config = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The configuration.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def main() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        code = int(app(arguments or ["--help"], standalone_mode=False) or 0)
        return code if code != INTERRUPTED else _complain(STOPPED, INTERRUPTED)
    except BadInput as error:
        return _complain(str(error), 2)
    except RunFailed as error:
        return _complain(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        return _complain(STOPPED, INTERRUPTED)
    except _Terminated:
        return _complain(STOPPED, 143)
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _complain(f"cannot be read or written: {error}", 1)
    except Exception as error:
        if isinstance(error.__cause__, _Terminated | KeyboardInterrupt):
            # A signal that arrives inside Ray's compiled code comes out as a SystemError.
            return _complain(STOPPED, 143 if isinstance(error.__cause__, _Terminated) else INTERRUPTED)
        # Typer's own usage errors carry an exit code and a one-line message.
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):
            return _complain(error.format_message(), 2)
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _terminated(_signal: int, _frame: Any) -> None:
    raise _Terminated


def _complain(text: str, code: int) -> int:
    # Names of files and keys are foreign text: nothing in them may act on the terminal.
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))
    print(f"raylabel: {line}", file=sys.stderr, flush=True)
    return code


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command()
def demo(out: Out = None, overrides: Set = None, address: Address = None) -> int:
    """The whole pipeline on the built-in model and corpus; no network, no key, no GPU."""
    return _run(_configure(str(DEMO), overrides, out, None, address))


@app.command()
def run(config: Config, out: Out = None, overrides: Set = None, stages: Stages = None, address: Address = None) -> int:
    """Runs a configuration, or goes on where it was stopped."""
    return _run(_configure(config, overrides, out, stages, address))


def _configure(
    path: str, overrides: list[str] | None, out: str | None, stages: str | None, address: str | None
) -> RunConfig:
    given = list(overrides or [])
    given += [f"run.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in
              (("out", out), ("stages", stages), ("address", address)) if value is not None]  # fmt: skip
    return load_config(path, given)


def _run(config: RunConfig) -> int:
    from raylabel.engine.pipeline import run_pipeline
    from raylabel.report import terminal
    from raylabel.store.rundir import RunDir

    started = time.time()
    report = run_pipeline(config, _say)
    directory = RunDir(config.run.out)
    if directory.complete("results"):
        console = terminal.console()
        console.print(terminal.units_table(*top_units(directory, 10)))
        _print_controls(directory, console)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report.stages.items())
    print(f"{config.run.out}: done in {time.time() - started:.0f} s ({seconds})")
    print(f"look closer: raylabel show {config.run.out}")
    if report.failures:
        print(f"{report.failures} failures are listed in the table `failures`")
        return 3
    return 0


def _print_controls(directory: Any, console: Any) -> None:
    """Units beside decoys; nulls and planted units, and what other thresholds would do, where the run has any."""
    from raylabel.report import calibration, summary, terminal

    console.print(terminal.shares_table(summary.shares(directory)))
    told = summary.concepts(directory)
    if told is not None:
        console.print(terminal.concepts_line(told), markup=False, highlight=False)
    found = calibration.recall(directory)
    if set(found) - {"decoy"}:
        console.print(terminal.calibration_table(found, calibration.recovery(directory)))
        console.print(terminal.sweep_table(calibration.sweep(directory)))


def top_units(directory: Any, limit: int, layer: int | None = None, find: str | None = None) -> tuple[Any, Any]:
    """The most convincing units' rows of `results`, and their top exemplars by (layer, neuron, polarity)."""
    import pyarrow.compute as pc

    rows = directory.table("results", layer).to_pylist()
    if find is not None:
        wanted = find.casefold()
        names = ("mats", "phrases", "concept_words")
        texts = [[r["label"] or "", r["description"] or "", *(t for n in names for t in r[n] or [])] for r in rows]
        # A match may not run from the end of one text into the beginning of the next.
        rows = [r for r, found in zip(rows, texts, strict=True) if wanted in "\x1f".join(found).casefold()]

    def worth(row: dict[str, Any]) -> tuple[Any, ...]:
        evidence = {"concept": 0, "token": 1, "context": 1}.get(row["evidence"] or "", 2)
        similarity = row["family_similarity"] if row["family_similarity"] is not None else -1.0
        place = (row["layer"], row["neuron"], -row["polarity"])
        return (not row["verified"], row["kind"] != "meaning", evidence, -similarity, *place)

    rows = sorted(rows, key=worth)[:limit]
    found: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for at in sorted({row["layer"] for row in rows}):
        neurons = [row["neuron"] for row in rows if row["layer"] == at]
        condition = (
            pc.field("neuron").isin(neurons) & (pc.field("sampling") == "top") & (pc.field("split") == "explain")
            & (pc.field("rank") < 3)
        )  # fmt: skip
        columns = ["layer", "neuron", "polarity", "rank", "tokens", "position"]
        for row in directory.table("exemplars", at, filter=condition, columns=columns).to_pylist():
            found.setdefault((row["layer"], row["neuron"], row["polarity"]), []).append(row)
    return rows, found


@app.command()
def check(config: Config, overrides: Set = None, out: Out = None, as_json: Json = False) -> int:
    """What would run: units, tokens, memory, time, calls and their cost. Runs nothing."""
    from raylabel.stages.check import estimate

    settings = _configure(config, overrides, out, None, None)
    found = estimate(settings)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        for name, value in found.items():
            print(f"{name:>24}  {value:,}" if isinstance(value, int | float) else f"{name:>24}  {value}")
    return 0


@app.command()
def status(
    folder: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Print again until everything is done.")] = False,
    as_json: Json = False,
) -> int:
    """Per stage: done, pending, failed, rows, seconds, tokens and money of an LLM."""
    from raylabel.report.status import broken_files, stage_rows
    from raylabel.store.rundir import RunDir

    while True:
        directory = RunDir(folder)
        rows = stage_rows(directory)
        if as_json:
            print(json.dumps(rows, indent=1))
        else:
            print(f"{'stage':<9}{'done':>6}{'pending':>9}{'failed':>8}{'rows':>12}{'seconds':>9}{'tokens':>9}{'money':>9}  state")
            for r in rows:
                print(f"{r['stage']:<9}{r['done']:>6}{r['pending']:>9}{r['failed']:>8}{r['rows']:>12,}"
                      f"{r['seconds']:>9.1f}{r['tokens']:>9,}{r['money']:>9.4f}  {r['state']}")  # fmt: skip
        if not watch or all(r["state"] == "done" for r in rows):
            break
        time.sleep(2)
    if verify:
        wrong = broken_files(directory)
        for name in wrong:
            print(f"broken: {name}", file=sys.stderr)
        if wrong:
            raise RunFailed(f"{len(wrong)} files are not what was committed; delete them and run the same command again")
        _say("every file is what was committed")
    return 0


@app.command()
def show(
    folder: Folder,
    layer: Annotated[int | None, typer.Option(help="Only this layer.")] = None,
    neuron: Annotated[int | None, typer.Option(help="One unit: its exemplars and what each swap did.")] = None,
    polarity: Annotated[int, typer.Option(help="Which end of the unit: 1 or -1; 2 or -2 where the gate is not above 0.")] = 1,
    find: Annotated[str | None, typer.Option(help="Only units whose label, description, word or phrase contains this.")] = None,
    limit: Annotated[int, typer.Option(help="Units shown at most.")] = 20,
    as_json: Json = False,
) -> int:
    """The units of a run, most convincing first, or everything about one."""
    from raylabel.api import Run
    from raylabel.report import terminal
    from raylabel.store.rundir import RunDir

    directory = RunDir(folder)
    if neuron is not None:
        if layer is None:
            raise BadInput("--neuron: give --layer too")
        unit = Run(directory).unit(layer, neuron, polarity)
        print(json.dumps(unit.to_dict())) if as_json else terminal.console().print(terminal.unit_card(unit))
        return 0
    if not directory.complete("results"):
        directory.info  # noqa: B018  (a folder that is no run is the likelier mistake)
        raise BadInput(f"{folder}: no results yet; run `raylabel run` again to finish it")
    if layer is not None and layer not in set(directory.table("results", columns=["layer"]).column(0).to_pylist()):
        raise BadInput(f"--layer {layer}: no such layer in {folder}")
    rows, exemplars = top_units(directory, limit, layer, find)
    if as_json:
        print(json.dumps(rows))
        return 0
    console = terminal.console()
    console.print(terminal.units_table(rows, exemplars))
    _print_controls(directory, console)
    return 0


@app.command()
def report(
    folder: Folder,
    out: Annotated[str | None, typer.Option("--out", help="Folder of the pages; default: RUN/report.")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
) -> int:
    """A self-contained HTML report: overview, a table of all units, a page for each; opens from disk."""
    from raylabel.report.page import write_report
    from raylabel.store.rundir import RunDir

    if out is None and "://" in folder:
        raise BadInput(f"--out: give a folder on this machine for the report of {folder}")
    place = Path(out) if out is not None else Path(folder) / "report"
    first = write_report(RunDir(folder), place, workers=os.cpu_count() or 1)
    print(first)
    if open_:
        import webbrowser

        webbrowser.open(first.resolve().as_uri())
    return 0


@app.command()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", help="csv, jsonl, parquet, arrow, neuronpedia or card.")],
    out: Annotated[str, typer.Option("--out", help="The file to write; for neuronpedia, a new folder.")],
) -> int:
    """Writes the results to one file, the run in Neuronpedia's bulk layout, or a dataset card of the run."""
    from raylabel.report.export import export as write
    from raylabel.store.rundir import RunDir

    directory = RunDir(folder)
    if not directory.complete("results"):
        directory.info  # noqa: B018  (a folder that is no run is the likelier mistake)
        raise BadInput(f"{folder}: no results yet; run `raylabel run` again to finish it")
    if to == "neuronpedia":
        from raylabel.report.neuronpedia import export_neuronpedia

        print(f"{out}: {export_neuronpedia(directory, Path(out))} units")
    elif to == "card":
        from raylabel.report.card import write_card

        write_card(directory, out)
        print(out)
    else:
        table = directory.table("results")
        write(table, to, out)
        print(f"{out}: {table.num_rows} units")
    return 0


@app.command()
def audit(
    folder: Folder,
    labels: Annotated[str, typer.Option("--labels", help="JSON lines, or explanations of Neuronpedia, delphi or OpenAI.")],
    out: Annotated[str | None, typer.Option("--out", help="Also write the rows: .csv, .jsonl, .parquet or .arrow.")] = None,
    scorers: Annotated[str | None, typer.Option("--scorers", help="In place of the run's, separated by commas.")] = None,
    limit: Annotated[int, typer.Option(help="Rows shown at most.")] = 20,
    as_json: Json = False,
) -> int:
    """Scores someone else's labels on what the run held back, beside its own; worst first."""
    import pyarrow as pa

    from raylabel.report import terminal
    from raylabel.report.export import export as write
    from raylabel.sources.labels import read_labels
    from raylabel.stages.audit import audit as score
    from raylabel.stages.audit import chosen
    from raylabel.store.rundir import RunDir

    directory = RunDir(folder)
    given, wrong = read_labels(labels)
    rows, failed = score(directory, given, chosen(scorers))
    wrong += failed
    if out is not None:
        write(pa.Table.from_pylist(rows), out.rpartition(".")[2], out)
    if as_json:
        print(json.dumps({"rows": rows, "failures": [one._asdict() for one in wrong]}))
    else:
        terminal.console().print(terminal.audit_table(rows[:limit]))
    for one in wrong:
        _complain(f"{one.place}: {one.reason}", 3)
    return 3 if wrong else 0


if __name__ == "__main__":
    main()

"""The command ``python -m benchmarks``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import environment, limits, machine, pictures
from benchmarks.process import adopt_orphans
from benchmarks.rendering import markdown, quantity
from benchmarks.results import Report, RowResult
from benchmarks.rows import ROWS, Row, among, choose, quick_rows
from benchmarks.runner import Runner
from benchmarks.work import BEST_RAW, HIVEMIND

EXIT_INTERRUPTED = 130
OUTPUT = Path("build/bench")
REPEATS = 3
NOT_MADE = "a quick run does not make its environment; `make bench` does, or give --hivemind-python"

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small work, few repetitions: under 3 minutes.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measure this row; may be repeated.")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="How often each side has its turn; else 3 times, 1 if quick.")
    ] = None,
    hivemind_python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Interpreter of an environment that has hivemind.")
    ] = None,
    side: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Have only shoal, hivemind, gloo or raw take part; may be repeated."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = OUTPUT,
    list_rows: Annotated[
        bool, typer.Option("--list", help="Say which rows there are, and measure none.")
    ] = False,
) -> None:
    """Measure Shoal beside hivemind, Gloo and raw TCP, in turn.

    Rows over long links need Linux and root. Ctrl+C ends the run, and writes what was measured.
    """
    rows = chosen_rows(quick, only or [], side or [])
    if list_rows:
        for row in rows:
            typer.echo(f"{row.name:16} {row.title}")
        return
    if not sys.platform.startswith("linux"):
        raise typer.BadParameter("benchmarks need Linux")
    console = Console()
    try:
        python, absence = find_hivemind(console, rows, hivemind_python, quick=quick)
    except environment.CannotInstall as error:
        raise typer.BadParameter(str(error), param_hint="--hivemind-python") from None
    results = [RowResult(row) for row in rows]
    facts, repeats = machine.describe(python) | limits.measure(), repeat or (1 if quick else REPEATS)
    finished = measure(console, results, python, absence, repeats)
    write(console, Report(facts, results, quick, interrupted=not finished), output)
    if not finished:
        raise typer.Exit(EXIT_INTERRUPTED)


def chosen_rows(quick: bool, names: list[str], libraries: list[str]) -> tuple[Row, ...]:
    try:
        rows = choose(quick_rows() if quick else ROWS, names)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from None
    try:
        return among(rows, libraries)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--side") from None


def find_hivemind(
    console: Console, rows: Sequence[Row], given: str | None, *, quick: bool
) -> tuple[str | None, str]:
    """The interpreter that has hivemind; or None, and why there is none.

    :raises CannotInstall: the interpreter that the user gave has no hivemind
    """
    if given is not None:
        return environment.check(given), ""
    if not any(HIVEMIND in row.sides for row in rows):
        return None, "no row needs it"
    made = environment.existing()
    if made is not None or quick:
        return made, NOT_MADE
    try:
        return environment.make(lambda line: console.print(line, markup=False, highlight=False)), ""
    except environment.CannotInstall as error:
        return None, f"it could not be installed: {error}"


def measure(
    console: Console, results: Sequence[RowResult], hivemind: str | None, absence: str, repeats: int
) -> bool:
    """Run all rows, and show how far it is; whether it came to the end."""
    pythons = dict.fromkeys(("shoal", "gloo", "raw"), sys.executable)
    if hivemind is not None:
        pythons["hivemind"] = hivemind
    absent = {} if hivemind is not None else {"hivemind": absence}
    adopt_orphans()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
        ) as bar:
            task = bar.add_task("")
            for number, result in enumerate(results, 1):
                place = f"{number} of {len(results)}: {result.row.name}"

                def tell(line: str, place: str = place) -> None:
                    bar.update(task, description=escape(f"{place}: {line}"))
                    if not console.is_terminal:
                        console.print(f"{place}: {line}", markup=False, highlight=False)

                Runner(pythons, absent, repeats, tell).run(result)
                bar.console.print(f"{place}: {summary(result)}", markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print("Interrupted: writes what was measured")
        return False
    return True


def interrupt(*_: object) -> NoReturn:
    """A polite request to end is like Ctrl+C."""
    raise KeyboardInterrupt


def summary(result: RowResult) -> str:
    """The row's first figure, for the terminal."""
    if result.skipped is not None:
        return f"left out: {result.skipped}"
    main = result.row.figures[0]
    told = [
        f"{side} {quantity(main, one[main])}"
        for side, one in result.medians.items()
        if main in one and side != BEST_RAW
    ]
    notes = [f"({note})" for note in result.notes]
    return "; ".join(told + notes) or "nothing measured"


def write(console: Console, report: Report, output: Path) -> None:
    """Markdown, JSON and pictures."""
    output.mkdir(parents=True, exist_ok=True)
    reason = pictures.why_not()
    drawn = pictures.draw(report, output) if reason is None else []
    (output / "results.json").write_text(json.dumps(report.as_json(), indent=1) + "\n")
    (output / "results.md").write_text(markdown(report, drawn))
    if reason is not None:
        console.print(f"No pictures: {reason}", markup=False)
    console.print(f"Results: {output / 'results.md'}, and beside it JSON and pictures", markup=False)

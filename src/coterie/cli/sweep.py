"""`coterie sweep`: a config at every combination of some values, and one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli.progress import emit, numbers

if TYPE_CHECKING:
    from coterie.experiment.sweep import SweepProgress, SweepResult

Watch = Callable[["SweepProgress"], None]


def sweep(
    config: Annotated[Path, typer.Argument(help="The experiment's TOML file.")],
    *,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="A.B=1,2", help="Values of one key; repeat it for every combination."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Repeat each with N seeds, from the config's own up.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key in all runs.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The sweep's folder (default: sweeps/<name>).")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", metavar="N", help="Runs at a time (default: by the cores).")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of data sets (default: COTERIE_DATA).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a row of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the table.")] = False,
) -> None:
    """Run every combination of some values, several at a time; again, it finishes what is missing."""
    from coterie import experiment  # noqa: PLC0415
    from coterie.errors import RunError  # noqa: PLC0415

    with _display(as_json or quiet) as watch:
        result = experiment.sweep(
            config,
            grid or (),
            seeds=seeds,
            out=out,
            jobs=jobs,
            overrides=overrides or (),
            data_dir=data_dir,
            watch=watch,
        )
    if as_json:
        for row in result.rows:
            emit(row)
    else:
        _print(result)
        typer.echo(f"report: {result.folder / 'sweep.html'}")
    if result.failed:
        raise RunError(
            f"{result.failed} of {len(result.cells)} cells failed: {_first_error(result)}",
            f"the same command tries them again; {result.folder / 'cells.csv'} says what went wrong in each",
        )


def _print(result: SweepResult) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from coterie.experiment.sweep_page import table  # noqa: PLC0415

    axes = {path: values for path, values in result.axes.items() if path != "seed"}
    columns, lines = table(result.rows, axes, result.metric)
    shown = Table(box=None)
    for index, title in enumerate((*columns, "")):
        left = index < len(axes) or not title
        shown.add_column(Text(title), justify="left" if left else "right", no_wrap=True)
    for row, line in zip(result.rows, lines, strict=True):
        last = "best" if row["best"] else "".join(row["errors"][:1])
        shown.add_row(*map(Text, [*line, last]), style="bold" if row["best"] else None)
    width = sum(max(len(line[i]) for line in [columns, *lines]) + 3 for i in range(len(columns))) + 100
    console = Console()
    Console(width=max(width, console.width)).print(shown)


def _first_error(result: SweepResult) -> str:
    return next((cell["error"] for cell in result.cells if cell.get("error")), "")


@contextmanager
def _display(hidden: bool) -> Iterator[Watch]:
    """Yield the function that shows each moment: live bars on a terminal, else a line for each cell."""
    if hidden:
        yield lambda moment: None
    elif sys.stdout.isatty():
        with _live() as watch:
            yield watch
    else:
        yield _plain


def _plain(moment: SweepProgress) -> None:
    if moment.status == "checking":
        typer.echo(f"{moment.cells} cells, {moment.jobs} at a time")
    elif moment.status != "running":
        typer.echo(line(moment))


def line(moment: SweepProgress) -> str:
    """How a cell ended, in one line: "3/12  lr=0.1,seed=7  accuracy 93.1 %, loss 0.21  12.3 s"."""
    if moment.status == "failed":
        said = f"failed: {moment.error}"
    elif moment.status == "found":
        said = "finished before"
    else:
        said = numbers({"accuracy": moment.accuracy, "loss": moment.loss})
    parts = [f"{moment.done}/{moment.cells}", moment.cell, said]
    return "  ".join(parts if moment.seconds is None else [*parts, f"{moment.seconds:.1f} s"])


@contextmanager
def _live() -> Iterator[Watch]:
    """A bar for the sweep and one for each cell that runs; a line for each that has ended, above them."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[details]}", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(highlight=False), refresh_per_second=4) as bar:
        whole = bar.add_task("checking", total=None, details="")
        cells: dict[str, Any] = {}
        parts: dict[str, float] = {}  # how much of each running cell is done

        def watch(moment: SweepProgress) -> None:
            if moment.status == "running":
                if moment.cell not in cells:
                    cells[moment.cell] = bar.add_task(moment.cell, total=moment.rounds, details="")
                completed = min(moment.round + moment.within, moment.rounds)
                parts[moment.cell] = completed / max(moment.rounds, 1)
                details = numbers({"accuracy": moment.accuracy, "loss": moment.loss})
                said = f"round {moment.round}/{moment.rounds}  {details}"
                bar.update(cells[moment.cell], completed=completed, details=said)
            elif moment.status != "checking":
                if moment.cell in cells:
                    bar.remove_task(cells.pop(moment.cell))
                    parts.pop(moment.cell)
                bar.console.print(line(moment), markup=False)
            said = f"{moment.done}/{moment.cells} cells, {moment.jobs} at a time"
            bar.update(
                whole,
                description="sweep" if moment.status != "checking" else "checking",
                total=moment.cells if moment.status != "checking" else None,
                completed=moment.done + sum(parts.values()),
                details=said,
            )

        yield watch

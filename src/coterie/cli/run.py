"""`coterie run`: run an experiment, show how it goes, stop cleanly, say where the results are."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.progress import display, emit, numbers

if TYPE_CHECKING:
    from coterie.experiment.records import Progress, Result

STOPPING = b"\x1b[?25h\nfinishing the current client, then stopping; press Ctrl-C again to kill\n"


def run(
    config: Annotated[Path, typer.Argument(help="The experiment's TOML file.")],
    *,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder (default: runs/<name>-<n>).")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of data sets (default: COTERIE_DATA).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a round, the result last.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say only how it ended.")] = False,
) -> None:
    """Run an experiment."""
    from coterie import experiment  # noqa: PLC0415
    from coterie.errors import CoterieError, Interrupted, RunError  # noqa: PLC0415
    from coterie.experiment.config import load  # noqa: PLC0415

    settings = load(config, overrides or ())
    folder = out
    try:
        with stoppable() as stop, display(as_json, quiet) as show:

            def watch(progress: Progress) -> None:
                nonlocal folder
                folder = progress.folder
                show(progress)

            result = experiment.run(
                settings, out=out, data_dir=data_dir, resume=resume, watch=watch, stop=stop
            )
        folder = result.folder
        if result.status == "interrupted":
            raise Interrupted("interrupted")
    except CoterieError as error:
        if isinstance(error, Interrupted) and folder:
            error.hint = f"resume with: {_resume(config, overrides or [], folder, data_dir)}"
        if as_json:
            status = "interrupted" if isinstance(error, Interrupted) else "failed"
            place = str(folder) if folder else None
            emit({"status": status, "error": str(error.args[0]), "hint": error.hint, "folder": place})
        raise
    if as_json:
        emit(result.to_json())
    if result.status == "failed":
        raise RunError(result.error or "the run failed", f"its log and last checkpoint are in {folder}")
    if not as_json:
        typer.echo(summary(result))


def summary(result: Result) -> str:
    """How the run ended: the final numbers, the baselines' beside them, and where the report is."""
    lines = [f"{result.status}: {numbers(result.final)}"]
    lines += [f"  {name.replace('_', ' ')}: {numbers(final)}" for name, final in result.baselines.items()]
    if result.clients:
        lines.append(f"  clients: {numbers(result.clients)}")
    return "\n".join([*lines, f"report: {result.folder / 'report.html'}"])


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; pressed again, it kills the process."""
    pressed = False

    def ask(_signum: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, STOPPING)  # a handler may interrupt a print, so it must not print itself

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _resume(config: Path, overrides: list[str], folder: Path, data_dir: Path | None) -> str:
    words = ["coterie", "run", str(config)]
    for override in overrides:
        words += ["--set", override]
    if data_dir:
        words += ["--data-dir", str(data_dir)]
    return shlex.join([*words, "--out", str(folder), "--resume"])

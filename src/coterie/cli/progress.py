"""How a run goes, on the screen: a live bar on a terminal, else a line a round, or JSON for programs."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from coterie.experiment.records import Progress as Moment

Watch = Callable[["Moment"], None]


@contextmanager
def display(as_json: bool, quiet: bool) -> Iterator[Watch]:
    """Yield the function that shows each Progress of a run on stdout.

    `Progress.round` counts the rounds that are committed; within a round `done` of `total` clients are.
    """
    if quiet:
        yield _nothing
    elif as_json:
        yield _each_round(lambda progress: emit(asdict(progress)), _nothing)
    elif sys.stdout.isatty():
        with _live() as watch:
            yield watch
    else:
        yield _each_round(lambda progress: typer.echo(line(progress)), typer.echo)


def emit(value: Mapping[str, Any]) -> None:
    """Print one JSON object on a line of its own; what is not finite becomes null, as JSON has it not."""
    typer.echo(json.dumps(_json(value)))


def columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of which nothing is cut off, however narrow the terminal."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def line(progress: Moment) -> str:
    """A round in one line of text."""
    return "  ".join([f"round {progress.round}/{progress.rounds}", *_details(progress)])


def numbers(values: Mapping[str, Any]) -> str:
    """The accuracies and losses in one line: "accuracy 97.0 %, loss 0.1032"."""
    return ", ".join(
        f"{name.replace('_', ' ')} {_number(name, value)}"
        for name, value in sorted(values.items())
        if isinstance(value, int | float) and ("accuracy" in name or "loss" in name)
    )


def size(count: float) -> str:
    """Bytes in decimal units: "1.5 MB"."""
    from rich.filesize import decimal  # noqa: PLC0415

    return decimal(int(count))


def _nothing(_: Any) -> None:
    pass


def _details(progress: Moment) -> list[str]:
    parts = [
        f"{name.replace('_', ' ')} {_number(name, value)}"
        for name in ("loss", "accuracy")
        if (value := getattr(progress, name)) is not None
    ]
    if not parts and progress.train_loss is not None:
        parts = [f"train loss {_number('train_loss', progress.train_loss)}"]
    if progress.asked:
        lost = f", {progress.lost} lost so far" if progress.lost else ""
        parts.append(f"clients {progress.answered}/{progress.asked}{lost}")
        parts.append(f"up {size(progress.bytes_up)}, down {size(progress.bytes_down)}")
    if progress.eta is not None:
        parts.append(f"{_duration(progress.eta)} left")
    return parts


def _each_round(show: Watch, note: Callable[[str], None]) -> Watch:
    """Call `show` once for each round, and `note` once for notes that differ in a count only."""
    shown, noted = 0, {""}

    def watch(progress: Moment) -> None:
        nonlocal shown
        kind = re.sub(r"\d+", "", progress.note)
        if kind not in noted:
            noted.add(kind)
            note(progress.note)
        if progress.round > shown:
            shown = progress.round
            show(progress)

    return watch


@contextmanager
def _live() -> Iterator[Watch]:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[details]}")
    with Progress(*columns, console=Console(highlight=False), refresh_per_second=4) as bar:
        task = bar.add_task("starting", total=None, details="")

        def watch(progress: Moment) -> None:
            description = f"round {progress.round}/{progress.rounds}"
            if progress.note and progress.round >= progress.rounds:
                description = progress.note  # of the baselines, which follow the last round
            elif progress.note:
                bar.console.print(progress.note, markup=False)
            within = progress.done / progress.total if progress.total else 0.0
            bar.update(
                task,
                description=description,
                total=progress.rounds,
                completed=min(progress.round + within, progress.rounds),
                details="  ".join(_details(progress)),
            )

        yield watch


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _number(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if "accuracy" in name else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )

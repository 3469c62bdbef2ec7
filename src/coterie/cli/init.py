"""`coterie init`: a starter project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to write it.")] = Path(),
) -> None:
    """Write a commented starter project: experiment.toml and model.py."""
    from coterie.experiment import starter  # noqa: PLC0415

    for path in starter.write(folder):
        typer.echo(f"written: {path}")
    typer.echo(f"run it with: coterie run {folder / 'experiment.toml'}")

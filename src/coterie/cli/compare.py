"""`coterie compare`: several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.progress import emit


def check_picture(out: Path | None) -> None:
    """Refuse a picture that could not be written, before the work for it is done. Raises ConfigError."""
    from coterie.errors import ConfigError  # noqa: PLC0415

    if out and out.suffix not in (".html", ".png"):
        raise ConfigError(f"--out {out}: the file must end in .html or .png")
    if out and not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="Write the comparison to FILE.html or FILE.png.")] = None,
    reach: Annotated[
        list[float] | None,
        typer.Option(help="When was this accuracy first reached? 0.9 is 90 %; may be given several times."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a run.")] = False,
) -> None:
    """Set several runs side by side."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    from coterie.errors import ConfigError  # noqa: PLC0415
    from coterie.experiment import numbers, plots, report  # noqa: PLC0415

    check_picture(out)
    reach = reach or []
    for level in reach:
        if not 0 < level <= 1:
            raise ConfigError(f"--reach {level:g}: must be in (0, 1]", "0.9 is an accuracy of 90 %")
    rows, figure = report.compare(runs, reach)
    if as_json:
        for row in rows:
            emit(row)
    else:
        table = Table("run", "algorithm", box=None)
        for title in ("rounds", "accuracy", "loss", "worst tenth", "bytes", "time"):
            table.add_column(title, justify="right")
        for level in reach:
            table.add_column(f"to {numbers.show(level, 'accuracy')}", justify="right")
        for row in rows:
            measured = (("accuracy", "accuracy"), ("loss", "loss"), ("worst_decile", row["metric"]))
            table.add_row(
                row["name"],
                row["algorithm"],
                str(row["rounds"]),
                *("" if row[name] is None else numbers.show(row[name], metric) for name, metric in measured),
                numbers.show_bytes(row["bytes"]),
                "" if row["seconds"] is None else f"{row['seconds']:.1f} s",
                *map(report.said, row.get("reached", ())),
            )
        Console().print(table)
    if out:
        if out.suffix == ".html":
            report.write_compare_html(out, runs, reach)
        else:
            plots.to_png(figure, out)
        typer.echo(f"written: {out}", err=True)

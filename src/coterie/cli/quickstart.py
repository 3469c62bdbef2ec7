"""`coterie quickstart`: a whole federation on this machine, for a trial."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.progress import display


def quickstart(
    config: Annotated[Path, typer.Argument(help="The experiment's TOML file.")],
    *,
    out: Annotated[Path, typer.Option(help="The run folder; keys and logs are in its deployment/.")],
    sites: Annotated[int, typer.Option(min=1, help="How many sites; clients are dealt out to them.")] = 2,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of data sets (default: COTERIE_DATA).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a round.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say only how it ended.")] = False,
) -> None:
    """Try a deployment: a server and sites as processes of this machine, with certificates for a day."""
    import json  # noqa: PLC0415

    from coterie.cli.progress import emit, numbers  # noqa: PLC0415
    from coterie.experiment.config import load  # noqa: PLC0415
    from coterie.experiment.quickstart import quickstart as start  # noqa: PLC0415

    with display(as_json, quiet) as show:
        start(load(config, overrides or ()), sites=sites, out=out, data_dir=data_dir, watch=show)
    result = json.loads((out / "result.json").read_text())
    if as_json:
        emit(result)
    else:
        typer.echo(f"{result['status']}: {numbers(result['final'])}\nreport: {out / 'report.html'}")

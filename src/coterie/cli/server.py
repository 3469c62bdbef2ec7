"""`coterie server`: the coordinator of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.site import Insecure, Keys, LogText, Metrics


def server(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder: keys, state, runs.")],
    *,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where sites and operators connect; port 0: a free one.")
    ] = "127.0.0.1:7443",
    enrol: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where sites with a token get certificates.")
    ] = None,
    authority: Annotated[
        Path | None, typer.Option("--ca", help="The authority's folder (default: DIR/ca, where it is).")
    ] = None,
    keys: Keys = None,
    database: Annotated[
        str | None, typer.Option(metavar="URL", help="postgresql://... (default: SQLite in DIR).")
    ] = None,
    blobs: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where committed models are kept too, for a standby (fsspec)."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of data sets (default: COTERIE_DATA).")
    ] = None,
    code: Annotated[
        Path, typer.Option(help="Folder of Python files that configs may name, as DIR/policy.toml allows.")
    ] = Path(),
    at_once: Annotated[int, typer.Option(min=1, help="Runs at the same time; others wait.")] = 2,
    silence: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a sign of life after which a site is lost.")
    ] = 120.0,
    most_rounds: Annotated[int | None, typer.Option(min=1, help="Quota of a run: rounds.")] = None,
    most_bytes: Annotated[int | None, typer.Option(min=1, help="Quota of a run: bytes, up and down.")] = None,
    most_seconds: Annotated[float | None, typer.Option(min=1, help="Quota of a run: wall time.")] = None,
    metrics: Metrics = None,
    insecure: Insecure = False,
    log_text: LogText = False,
    tied: Annotated[bool, typer.Option("--tied", hidden=True)] = False,
) -> None:
    """Coordinate a federation: sites connect here, operators submit runs."""
    from coterie.cli.running import serve_until_told  # noqa: PLC0415
    from coterie.experiment.office import Options  # noqa: PLC0415
    from coterie.experiment.queue import Quotas  # noqa: PLC0415
    from coterie.experiment.server import serve  # noqa: PLC0415

    options = Options(
        home=folder,
        listen=listen,
        enrol=enrol,
        keys=keys,
        authority=authority,
        database=database,
        blobs=blobs,
        metrics=metrics,
        at_once=at_once,
        silence=silence,
        quotas=Quotas(most_rounds, most_bytes, most_seconds),
        data_dir=data_dir,
        code=code,
        insecure=insecure,
    )
    serve_until_told(serve(options, typer.echo), text=log_text, tied=tied)

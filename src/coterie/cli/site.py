"""`coterie site` and `coterie enrol`: take part in a federation, and get the certificate for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Metrics = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Serve Prometheus metrics and health there.")
]
Keys = Annotated[Path | None, typer.Option(help="Folder of the keys, if not DIR.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="No certificates, no encryption: for trials on one machine only.")
]
LogText = Annotated[bool, typer.Option("--log-text", help="Log as text, not as JSON lines.")]


def site(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder: keys, policy, state.")],
    *,
    servers: Annotated[
        str,
        typer.Option(
            "--server", metavar="HOST:PORT,...", envvar="COTERIE_SERVER", help="The server and its standbys."
        ),
    ],
    settings: Annotated[
        Path | None, typer.Option(help="Folder of site.toml and policy.toml, if not DIR.")
    ] = None,
    keys: Keys = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of data sets (default: COTERIE_DATA).")
    ] = None,
    metrics: Metrics = None,
    insecure: Insecure = False,
    name: Annotated[str | None, typer.Option(help="The site's name, with --insecure.")] = None,
    log_text: LogText = False,
    tied: Annotated[bool, typer.Option("--tied", hidden=True)] = False,
) -> None:
    """Take part in a federation: train on the data here, send updates only."""
    from coterie.cli.running import serve_until_told, split_addresses  # noqa: PLC0415
    from coterie.errors import ConfigError  # noqa: PLC0415
    from coterie.experiment import host  # noqa: PLC0415

    if insecure != (name is not None):
        raise ConfigError("--insecure and --name go together", "with certificates, the name is in the site's")
    serve_until_told(
        host.serve(
            folder,
            split_addresses(servers),
            insecure_as=name,
            keys=keys,
            config=settings,
            data_dir=data_dir,
            metrics=metrics,
            ready=typer.echo,
            started=host.stop_at_signals,
        ),
        text=log_text,
        tied=tied,
    )


def enrol(
    token: Annotated[Path, typer.Argument(metavar="TOKEN", help="The file that the operator sent.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder; keys are made there.")],
) -> None:
    """Get a site's certificate with a one-time token; the private keys stay here."""
    import grpc  # noqa: PLC0415

    from coterie.backends.network import operators as desk  # noqa: PLC0415
    from coterie.errors import CoterieError  # noqa: PLC0415
    from coterie.security import Token, install, new_key, request_of  # noqa: PLC0415

    given = Token.load(token)
    begun = (folder / "tls.key").exists() and not (folder / "tls.crt").exists()
    request = (
        request_of(folder, given.site, "site") if begun else new_key(folder, given.site, "site")
    ).decode()
    failure: CoterieError | None = None
    for address in given.servers:
        with desk.channel(address, grpc.ssl_channel_credentials(given.ca.encode())) as channel:
            try:
                call = desk.Enrol(id=given.id, secret=given.secret, request=request)
                pem = desk.ask(channel, "Enrol", call, service=desk.ENROLMENT)
            except CoterieError as error:
                failure = error
                continue
        who = install(folder, pem.encode(), given.ca.encode())
        typer.echo(f"{folder}: {who}, serial {who.serial:x}; now: coterie site {folder} --server HOST:PORT")
        return
    assert failure is not None
    raise failure

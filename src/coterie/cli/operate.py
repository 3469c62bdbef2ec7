"""What an operator asks of a server: submit, watch, and `coterie runs`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli.progress import display, emit

Server = Annotated[
    str, typer.Option("--server", metavar="HOST:PORT,...", envvar="COTERIE_SERVER", help="The server.")
]
Identity = Annotated[
    Path | None,
    typer.Option("--identity", envvar="COTERIE_IDENTITY", help="Folder of your keys (operator)."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="No certificates, no encryption: for trials on one machine only.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="As `coterie runs list` names it.")]
runs = typer.Typer(no_args_is_help=True, help="List, stop, resume, delete and fetch a server's runs.")


def submit(
    config: Annotated[Path, typer.Argument(help="The experiment's TOML file.")],
    *,
    server: Server,
    identity: Identity = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key; may be repeated.")
    ] = None,
    quotas: Annotated[
        list[str] | None,
        typer.Option("--quota", metavar="KIND=N", help="At most so many rounds, bytes or seconds."),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Code that travels with it: a wheel, a .zip, a folder, or 'auto': the files that it names.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch it, and end as it ends.")] = False,
    as_json: AsJson = False,
    insecure: Insecure = False,
) -> None:
    """Give a server an experiment to run on its sites."""
    from coterie.backends.network import operators as desk  # noqa: PLC0415
    from coterie.experiment.config import load, to_toml  # noqa: PLC0415

    loaded = load(config, overrides or ())
    text, package = to_toml(loaded), _package(code, loaded) if code else b""
    digest = hashlib.sha256(package).hexdigest()
    with connected(server, identity, insecure) as (channel, mine):
        run = desk.submit(channel, text, mine, _quotas(quotas or []), package)
        if not as_json:
            typer.echo(f"{run}: queued" + (f", with code {digest}" if code else ""))
        elif not wait:
            emit(
                {"run": run, "config": hashlib.sha256(text.encode()).hexdigest()}
                | ({"code": digest} if code else {})
            )
        if wait:
            _watch(channel, run, as_json)


def watch(
    run: Run,
    *,
    server: Server,
    identity: Identity = None,
    as_json: AsJson = False,
    insecure: Insecure = False,
) -> None:
    """Show how a run goes, and end as it ends."""
    with connected(server, identity, insecure) as (channel, _):
        _watch(channel, run, as_json)


@runs.command("list")
def list_runs(
    *, server: Server, identity: Identity = None, as_json: AsJson = False, insecure: Insecure = False
) -> None:
    """What the server runs, ran and will run."""
    _table("Runs", ("run", "status", "round", "signer", "error"), server, identity, as_json, insecure)


@runs.command()
def sites(
    *, server: Server, identity: Identity = None, as_json: AsJson = False, insecure: Insecure = False
) -> None:
    """Which sites are connected."""
    _table("Sites", ("site", "connected", "seen", "tasks"), server, identity, as_json, insecure)


@runs.command()
def stop(run: Run, *, server: Server, identity: Identity = None, insecure: Insecure = False) -> None:
    """Stop a run; `resume` goes on from its last round."""
    _tell("Stop", run, server, identity, insecure)


@runs.command()
def resume(run: Run, *, server: Server, identity: Identity = None, insecure: Insecure = False) -> None:
    """Queue a run again that was stopped or failed."""
    _tell("Resume", run, server, identity, insecure)


@runs.command()
def delete(run: Run, *, server: Server, identity: Identity = None, insecure: Insecure = False) -> None:
    """Remove a run that has ended, and all that it left on the server."""
    _tell("Delete", run, server, identity, insecure)


@runs.command()
def fetch(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Folder for its files: a run folder.")],
    *,
    server: Server,
    identity: Identity = None,
    insecure: Insecure = False,
) -> None:
    """Copy a run's folder here: result.json, report.html, metrics.jsonl, the model."""
    from coterie.backends.network import operators as desk  # noqa: PLC0415
    from coterie.errors import ConfigError  # noqa: PLC0415
    from coterie.storage.files import make_folder, write_atomic  # noqa: PLC0415

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: not an empty folder", "name another")
    with connected(server, identity, insecure) as (channel, _):
        found = _one(channel, run)
        make_folder(out)
        for name in found["files"]:
            pieces = desk.stream(channel, "Fetch", desk.Wanted(run=run, file=name))
            write_atomic(out / name, lambda file, pieces=pieces: file.writelines(pieces))  # type: ignore[misc]
    typer.echo(f"{out}: {', '.join(found['files'])}")


def _one(channel: Any, run: str) -> dict[str, Any]:
    from coterie.backends.network import operators as desk  # noqa: PLC0415
    from coterie.errors import ConfigError  # noqa: PLC0415

    for each in desk.ask(channel, "Runs"):
        if each["run"] == run:
            return dict(each)
    raise ConfigError(f"run {run!r}: the server has no such run", "coterie runs list shows them")


def _watch(channel: Any, run: str, as_json: bool) -> None:
    """Show the run until it ends; raise what it ended with."""
    from coterie.backends.network import operators as desk  # noqa: PLC0415
    from coterie.errors import Interrupted, RunError  # noqa: PLC0415
    from coterie.experiment.records import Progress  # noqa: PLC0415

    ended: dict[str, Any] = {}
    with display(as_json, False) as show:
        for told in desk.stream(channel, "Watch", desk.Which(run=run)):
            if "status" in told:
                ended = told
            else:
                show(Progress(**{**told, "folder": Path(told["folder"])}))
    status, error = ended.get("status", "lost sight of"), ended.get("error", "")
    if as_json:
        emit(ended)
    if status == "finished":
        if not as_json:
            typer.echo(f"{run}: finished; coterie runs fetch {run} DIR copies its report")
    elif status in ("stopped", "interrupted"):
        raise Interrupted(f"{run} was stopped", f"go on with: coterie runs resume {run}")
    else:
        raise RunError(f"{run} {status}: {error}", "its log is in the server's run folder")


def _table(
    title: str, columns: tuple[str, ...], server: str, identity: Path | None, as_json: bool, insecure: bool
) -> None:
    from coterie.backends.network import operators as desk  # noqa: PLC0415

    with connected(server, identity, insecure) as (channel, _):
        rows = desk.ask(channel, title)
    if as_json:
        for row in rows:
            emit(row)
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(*columns, title=title if rows else f"no {title.lower()}")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(highlight=False).print(table)


def _tell(method: str, run: str, server: str, identity: Path | None, insecure: bool) -> None:
    from coterie.backends.network import operators as desk  # noqa: PLC0415

    with connected(server, identity, insecure) as (channel, _):
        desk.ask(channel, method, desk.Which(run=run))
    typer.echo(f"{run}: {method.lower()} asked for" if method == "Stop" else f"{run}: {method.lower()}d")


@contextmanager
def connected(server: str, identity: Path | None, insecure: bool) -> Iterator[tuple[Any, Any]]:
    """A channel to the first server that answers, and the operator's credentials."""
    from coterie.backends.network import operators as desk  # noqa: PLC0415
    from coterie.cli.running import split_addresses  # noqa: PLC0415
    from coterie.errors import ConfigError  # noqa: PLC0415

    addresses = split_addresses(server)
    if insecure == (identity is not None):
        raise ConfigError(
            "--identity DIR: missing" if not insecure else "--identity and --insecure exclude each other",
            "coterie pki issue operator NAME makes the folder; or set COTERIE_IDENTITY",
        )
    from coterie.security import credentials  # noqa: PLC0415

    mine = None if identity is None else credentials(identity)
    with desk.reached(addresses, None if mine is None else desk.credentials(mine)) as channel:
        yield channel, mine


def _package(code: str, config: Any) -> bytes:
    """The package that travels."""
    from coterie.errors import ConfigError  # noqa: PLC0415
    from coterie.experiment.code import gathered  # noqa: PLC0415
    from coterie.security import package  # noqa: PLC0415

    if code != "auto":
        return package(Path(code))
    if (made := gathered(config)) is None:
        raise ConfigError(
            "--code auto: the config names no file beside it", 'model.kind = "model.py:Net", for one'
        )
    return made


def _quotas(texts: list[str]) -> dict[str, float]:
    from coterie.errors import ConfigError  # noqa: PLC0415

    found: dict[str, float] = {}
    for text in texts:
        kind, _, number = text.partition("=")
        try:
            found[kind] = float(number)
        except ValueError:
            found[kind] = -1
        if kind not in ("rounds", "bytes", "seconds") or not found[kind] > 0:
            raise ConfigError(f"--quota {text}: must be rounds=N, bytes=N or seconds=N, N > 0")
    return found

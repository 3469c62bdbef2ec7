"""`coterie pki`: a certificate authority, and the keys and certificates of its parties."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.progress import columns, emit

if TYPE_CHECKING:
    from coterie.security.pki import Authority

pki = typer.Typer(no_args_is_help=True, help="Make and use a certificate authority.")
Ca = Annotated[Path, typer.Option("--ca", help="The authority's folder.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="A server's DNS name or IP address; may be given several times."),
]
Shared = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", help="The servers' database, which all of them know at once."),
]
Days = Annotated[float, typer.Option(help="How long the certificate is valid.")]
RoleName = Annotated[str, typer.Argument(metavar="ROLE", help="server, site or operator.")]
Name = Annotated[str, typer.Argument(help="The party's name.")]
HERE = Path("pki")


@contextmanager
def _authority(ca: Path, database: str | None) -> Iterator[Authority]:
    """The authority in a folder, or what the servers' database knows of it."""
    from coterie.security.pki import Authority  # noqa: PLC0415

    if database is None:
        yield Authority.open(ca)
        return
    from coterie.storage.database import Database  # noqa: PLC0415
    from coterie.storage.register import Register  # noqa: PLC0415

    with closing(Database(database)) as opened:
        shared = Register(opened)
        yield Authority.open(ca, shared) if (ca / "ca.crt").exists() else Authority.elsewhere(shared)


@pki.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to make it.")] = HERE,
    name: Annotated[str, typer.Option(help="What the authority is called.")] = "Coterie",
    external: Annotated[
        Path | None, typer.Option(help="Certificates (PEM) of an external authority to trust instead.")
    ] = None,
) -> None:
    """Make a certificate authority, or adopt an external one."""
    from coterie.security.files import read_bytes  # noqa: PLC0415
    from coterie.security.pki import Authority  # noqa: PLC0415

    if external is not None:
        Authority.adopt(folder, read_bytes(external))
        typer.echo(f"{folder}: trusts {external}; its key is elsewhere")
    else:
        Authority.create(folder, name)
        typer.echo(f"{folder}: ca.crt (give it to everyone), ca.key (keep it, and a copy, safe)")


@pki.command()
def issue(
    role: RoleName,
    name: Name,
    ca: Ca = HERE,
    out: Annotated[Path | None, typer.Option(help="The party's folder (default: NAME).")] = None,
    hosts: Hosts = None,
    days: Days = 90,
) -> None:
    """Make a party's keys and certificate in one folder, for parties that you set up yourself."""
    from coterie.security.pki import Authority  # noqa: PLC0415

    folder = out or Path(name)
    who = Authority.open(ca).equip(folder, role, name, hosts=hosts or (), days=days)
    typer.echo(f"{folder}: {who}, serial {who.serial:x}")


@pki.command()
def request(
    role: RoleName,
    name: Name,
    out: Annotated[Path | None, typer.Option(help="The party's folder (default: NAME).")] = None,
) -> None:
    """Make a party's keys and a request for its certificate, to be signed elsewhere; the keys stay here."""
    from coterie.security.certificates import check_role  # noqa: PLC0415
    from coterie.security.files import write_over  # noqa: PLC0415
    from coterie.security.pki import new_key  # noqa: PLC0415

    folder = out or Path(name)
    csr = new_key(folder, name, check_role(role))
    write_over(folder / "request.csr", csr, mode=0o644)
    typer.echo(f"{folder / 'request.csr'}: have it signed, then: coterie pki install {folder} CERTIFICATE CA")


@pki.command()
def sign(
    csr: Annotated[Path, typer.Argument(metavar="CSR", help="A request, as `pki request` makes it.")],
    role: RoleName,
    name: Name,
    ca: Ca = HERE,
    out: Annotated[Path | None, typer.Option(help="The certificate (default: CSR with .crt).")] = None,
    hosts: Hosts = None,
    days: Days = 90,
) -> None:
    """Sign somebody's request, once you have made sure who sent it."""
    from coterie.security.certificates import identity_of  # noqa: PLC0415
    from coterie.security.files import read_bytes, write_new  # noqa: PLC0415
    from coterie.security.pki import Authority  # noqa: PLC0415

    path = out or csr.with_suffix(".crt")
    pem = Authority.open(ca).issue(read_bytes(csr), role, name, hosts=hosts or (), days=days)
    write_new(path, pem, mode=0o644)
    typer.echo(f"{path}: {identity_of(pem)}, serial {identity_of(pem).serial:x}")


@pki.command()
def install(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The party's folder, with its keys.")],
    certificate: Annotated[Path, typer.Argument(help="Its certificate; any intermediate ones after it.")],
    ca: Annotated[Path | None, typer.Argument(help="The authority's certificate.")] = None,
) -> None:
    """Put a certificate that was signed elsewhere into a party's folder, after checking it."""
    from coterie.security import pki as parties  # noqa: PLC0415
    from coterie.security.files import read_bytes  # noqa: PLC0415

    who = parties.install(folder, read_bytes(certificate), read_bytes(ca) if ca else None)
    typer.echo(f"{folder}: {who}, serial {who.serial:x}")


@pki.command()
def token(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    servers: Annotated[
        list[str], typer.Option("--server", metavar="HOST:PORT", help="Where the site enrols.")
    ],
    hours: Annotated[float, typer.Option(help="How long the token may be used.")] = 24,
    ca: Ca = HERE,
    database: Shared = None,
    out: Annotated[Path | None, typer.Option(help="The token's file (default: NAME.token).")] = None,
) -> None:
    """Make a one-time token, with which a site gets its certificate from the server."""
    from coterie.security.files import write_new  # noqa: PLC0415

    path = out or Path(f"{name}.token")
    with _authority(ca, database) as authority:
        made = authority.token(name, servers, hours=hours)
    write_new(path, made.model_dump_json(indent=1).encode())
    typer.echo(f"{path}: for site {name}, once, within {hours:g} h; it is a secret")


@pki.command()
def rotate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The party's folder.")],
    ca: Ca = HERE,
    days: Days = 90,
) -> None:
    """Give a party a new TLS key and certificate; the old certificate stays valid until it expires."""
    from coterie.security import pki as parties  # noqa: PLC0415
    from coterie.security.files import read_bytes  # noqa: PLC0415

    authority = parties.Authority.open(ca)
    pem = authority.renew(parties.renewal(folder), read_bytes(folder / "tls.crt"), days=days)
    who = parties.install(folder, pem)
    typer.echo(f"{folder}: {who}, serial {who.serial:x}")


@pki.command()
def revoke(
    which: Annotated[str, typer.Argument(metavar="NAME|SERIAL", help="NAME, ROLE/NAME or a serial number.")],
    ca: Ca = HERE,
    database: Shared = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT,...", help="Also tell this server, which closes open connections."),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(envvar="COTERIE_IDENTITY", help="Folder of your keys (operator), with --server."),
    ] = None,
) -> None:
    """Trust a party's certificates, or one of them, no more: at once and for good."""
    with _authority(ca, database) as authority:
        serials = authority.find(which)
        for serial in serials:
            authority.revoke(serial)
            typer.echo(f"revoked: serial {serial:x}")
    if server is not None:
        from coterie.backends.network import operators  # noqa: PLC0415
        from coterie.cli.operate import connected  # noqa: PLC0415

        with connected(server, identity, insecure=False) as (channel, _):
            operators.ask(channel, "Revoke", operators.Revoked(serials=[f"{each:x}" for each in serials]))


@pki.command("list")
def list_issued(
    ca: Ca = HERE,
    database: Shared = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
) -> None:
    """List the certificates that the authority has signed."""
    from datetime import UTC, datetime  # noqa: PLC0415

    titles = "role", "name", "serial", "expires", "status"
    rows, now = [], datetime.now(UTC)
    with _authority(ca, database) as authority:
        issued = list(authority.issued())
    for each in issued:
        status = "revoked" if each.revoked else "expired" if each.expires <= now else "valid"
        who = each.identity
        rows.append((who.role, who.name, f"{who.serial:x}", each.expires.strftime("%Y-%m-%d"), status))
    if not as_json:
        columns(titles, rows)
    for row in rows if as_json else ():
        emit(dict(zip(titles, row, strict=True)))

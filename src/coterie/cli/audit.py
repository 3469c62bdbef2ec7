"""`coterie audit`: what left, from a ledger that shows whether anybody changed it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coterie.cli.progress import columns, emit, size

if TYPE_CHECKING:
    from coterie.storage import Entry, Head

SHOWN = ("run", "task", "client", "to", "digest", "bytes", "code", "size", "clipping", "noise", "epsilon")
audit = typer.Typer(no_args_is_help=True, help="Check ledgers, and show what left.")
Certificate = Annotated[
    Path | None, typer.Option(help="The writer's certificate (default: tls.crt beside the ledger).")
]
Ledger = Annotated[Path, typer.Argument(metavar="PATH", help="A ledger, or a folder with ledger.jsonl.")]


@audit.command()
def verify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Ledgers, or folders with ledger.jsonl.")
    ],
    certificate: Certificate = None,
    witness: Annotated[
        Path | None, typer.Option(help="The server's ledger, which keeps heads of the sites' ledgers.")
    ] = None,
    witness_certificate: Annotated[
        Path | None, typer.Option(help="The server's certificate (default: tls.crt beside its ledger).")
    ] = None,
) -> None:
    """Find any edit, cut, swap or insertion in ledgers; exit code 1 if there is one."""
    seen = _entries(witness, witness_certificate) if witness else []
    for path in paths:
        entries = _entries(path, certificate, seen)
        end = f", to {entries[-1].time}, SHA-256 {entries[-1].digest}" if entries else ""
        typer.echo(f"{path}: {len(entries):,} entries, all as written{end}")


@audit.command()
def show(
    path: Ledger,
    run: Annotated[str | None, typer.Option(help="Only this run.")] = None,
    certificate: Certificate = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object an entry, and one of totals.")
    ] = False,
) -> None:
    """Show what was sent, to whom, how large and how private, with totals for each run."""
    entries = [each for each in _entries(path, certificate) if run is None or each.facts.get("run") == run]
    totals = totals_of(entries)
    if as_json:
        for each in entries:
            emit({"n": each.n, "time": each.time, "kind": each.kind, **each.facts})
        emit({"totals": totals})
        return
    names = [name for name in SHOWN if any(name in each.facts for each in entries)]
    rows = [
        [each.time, each.kind, *(_cell(name, each.facts.get(name)) for name in names)] for each in entries
    ]
    columns(["time", "kind", *names], rows)
    for name, total in totals.items():
        spent = "" if total["epsilon"] is None else f", epsilon {total['epsilon']:g}"
        typer.echo(f"{name}: {total['entries']:,} entries, {size(total['bytes'])}{spent}")


def totals_of(entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """For each run: how many entries, their bytes, and the most epsilon that any of them had spent."""
    totals: dict[str, dict[str, Any]] = {}
    for each in entries:
        if "run" in each.facts:
            total = totals.setdefault(str(each.facts["run"]), {"entries": 0, "bytes": 0, "epsilon": None})
            total["entries"] += 1
            total["bytes"] += _number(each.facts.get("bytes")) or 0
            spent = [x for x in (total["epsilon"], _number(each.facts.get("epsilon"))) if x is not None]
            total["epsilon"] = max(spent, default=None)
    return totals


def _entries(path: Path, certificate: Path | None, seen: Iterable[Entry] = ()) -> list[Entry]:
    from coterie.errors import ConfigError  # noqa: PLC0415
    from coterie.security.certificates import identity_of  # noqa: PLC0415
    from coterie.security.files import read_bytes  # noqa: PLC0415
    from coterie.storage import ledger  # noqa: PLC0415

    place = path / "ledger.jsonl" if path.is_dir() else path
    known = certificate or place.parent / "tls.crt"
    if not known.is_file():
        raise ConfigError(f"{place}: whose ledger is it? {known} is missing", "give --certificate FILE")
    who = identity_of(read_bytes(known))
    if not who.signing_key:
        raise ConfigError(f"{known}: this certificate holds no signing key", "give one that does")
    return ledger.verify(place, who.signing_key, _heads(seen, who.signing_key.hex()))


def _heads(entries: Iterable[Entry], key: str) -> list[Head]:
    """The heads of one party's ledger that a server has witnessed."""
    from coterie.storage import Head  # noqa: PLC0415

    facts: list[Mapping[str, Any]] = [each.facts for each in entries if each.kind == "witness"]
    return [Head(each["n"], each["digest"]) for each in facts if each.get("key") == key]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in ("bytes", "size") and _number(value) is not None:
        return size(value)
    return (
        str(value)[:12]
        if name in ("digest", "code")
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )

"""`coterie privacy audit`: attacks on a finished run, or on a run with canaries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli.progress import columns, display, emit


def audit(
    run: Annotated[Path, typer.Argument(help="A finished run's folder; a config too, with --canaries.")],
    canaries: Annotated[
        int, typer.Option(help="Train again with so many mislabelled rows, each in by a coin.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="With --canaries: the new run's folder.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write what was found to this file, with pictures.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of data sets (default: COTERIE_DATA).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object an audit.")] = False,
) -> None:
    """Attack a run; exit code 1 if what it promised is found to be broken."""
    from coterie.experiment import audits as attacks  # noqa: PLC0415

    found, pictures = attacks.audit_run(run, data_dir=data_dir) if run.is_dir() else ([], {})
    if canaries or not run.is_dir():
        with display(as_json=False, quiet=as_json) as watch:
            found.append(attacks.audit_canaries(run, canaries, out=out, data_dir=data_dir, watch=watch))
    if html:
        attacks.write_html(html, found, pictures)
    for each in found if as_json else ():
        emit(each.to_json())
    if not as_json:
        columns(["audit", "of", "at least", "promised", "verdict", "measured"], [_row(x) for x in found])
    raise typer.Exit(int(any(each.violated for each in found)))


def _row(audit: Any) -> list[str]:
    bounds = ("" if value is None else f"{value:.2f}" for value in (audit.lower_bound, audit.promised))
    measured = ", ".join(
        f"{name} {value:.3g}"
        for name, value in audit.measures.items()
        if not name.endswith((", low", ", high"))
    )
    return [audit.kind, audit.unit, *bounds, audit.verdict, measured]

"""The `coterie` command: its options, its commands, and how it says what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from coterie.cli.audit import audit
from coterie.cli.compare import compare
from coterie.cli.data import data
from coterie.cli.doctor import doctor
from coterie.cli.init import init
from coterie.cli.operate import runs, submit, watch
from coterie.cli.pki import pki
from coterie.cli.privacy import privacy
from coterie.cli.quickstart import quickstart
from coterie.cli.run import run
from coterie.cli.server import server
from coterie.cli.site import enrol, site
from coterie.cli.sweep import sweep
from coterie.errors import ConfigError, CoterieError, DataError, Interrupted


class Commands(TyperGroup):
    """Says every error in one way, and turns it into the exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command that the arguments name."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as error:
            code = _explain(error)
        if not standalone_mode:
            return code
        sys.exit(code)


app = typer.Typer(
    cls=Commands, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
for command in (run, sweep, compare, quickstart, server, site, enrol, submit, watch, init, doctor):
    app.command()(command)
for name, group in (("data", data), ("runs", runs), ("pki", pki), ("audit", audit), ("privacy", privacy)):
    app.add_typer(group, name=name)


def main() -> None:
    """Run `coterie` with the process's arguments."""
    app(prog_name="coterie")


@app.callback(invoke_without_command=True)
def coterie(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="COTERIE_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Train together, keep data apart: federated learning and distributed training of PyTorch models."""
    if debug:
        os.environ["COTERIE_DEBUG"] = "1"
    if version:
        from importlib.metadata import version as installed  # noqa: PLC0415

        typer.echo(f"coterie {installed('coterie')}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _explain(error: Exception) -> int:
    """Print the error and its hint on stderr; return the exit code."""
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    message, hint, code = f"{type(error).__name__}: {error}", "COTERIE_DEBUG=1 shows where it came from", 1
    if isinstance(error, CoterieError):
        message, hint = str(error.args[0]), error.hint
        code = (
            130 if isinstance(error, Interrupted) else 2 if isinstance(error, ConfigError | DataError) else 1
        )
    elif isinstance(error, typer.Abort):
        message, hint, code = "interrupted", "", 130
    elif hasattr(error, "format_message"):  # a usage error; typer's own class has no public name
        ctx = getattr(error, "ctx", None)
        message, hint = error.format_message(), f"see {ctx.command_path if ctx else 'coterie'} --help"
        code = 2
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if os.environ.get("COTERIE_DEBUG", "0") not in ("", "0"):
        console.print_exception()
    for label, style, text in (("error", "bold red", message), ("hint", "bold cyan", hint)):
        if message and text:  # no message: typer has printed the help
            console.print(Text.assemble((f"{label}:", style), f" {text}"))
    return code

"""The command line: thin commands over `experiment`, one file each.

Importing this room imports no torch: each command imports what it needs, so that `--help` answers at once.
Read `commands` first, then `run`. What the commands do lives in `experiment`.
Exit codes: 0 finished, 1 the run failed, 2 bad usage or config, 130 interrupted (and resumable).
"""

from coterie.cli.commands import app, main

__all__ = ["app", "main"]

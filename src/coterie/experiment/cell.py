"""One run in a process of its own, which ends when the process that asked for it does.

    python -m coterie.experiment.cell FOLDER

stdin brings the order as one JSON line and then stays open: its end, however it comes, ends this process
and all that it started, at once. A run may be killed at any moment (law 3), so nothing is lost but time.
stdout carries one JSON object for each Progress, and the error if there is one; what the run prints goes to
stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from coterie.core.errors import CoterieError
from coterie.experiment.config import load
from coterie.experiment.records import Progress
from coterie.experiment.run import run

OFTEN = 0.2  # seconds between two messages within a round


def main() -> int:
    """Run what stdin orders in the folder that the argument names; resume what is there."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sys.path[:] = order["path"]  # "package.module:Class" is found here as it is there
    channel = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):
            channel.write(json.dumps(message) + "\n")

    try:
        config = replace(load(tomllib.loads(order["config"])), folder=Path(order["folder"]))
        run(config, out=Path(sys.argv[1]), data_dir=order["data_dir"], resume=True, watch=_sparsely(tell))
    except CoterieError as error:
        tell({"error": str(error.args[0]), "hint": error.hint})
        return 1
    except Exception as error:  # the parent shows one line, run.log the rest
        traceback.print_exc()
        tell({"error": f"{type(error).__name__}: {error}", "hint": "run.log shows where it came from"})
        return 1
    return 0


def _sparsely(tell: Callable[[dict[str, Any]], None]) -> Callable[[Progress], None]:
    """Pass each round on, and of what happens within one only a little."""
    last, when = -1, 0.0

    def watch(progress: Progress) -> None:
        nonlocal last, when
        now = time.monotonic()
        if progress.round == last and now - when < OFTEN:
            return
        last, when = progress.round, now
        fields = ("round", "rounds", "done", "total", "loss", "accuracy")
        tell({name: getattr(progress, name) for name in fields})

    return watch


def _end_with_the_parent() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGTERM)  # the parent made this process the leader of a group of its own
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())

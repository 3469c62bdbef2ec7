"""What a run has spent that no checkpoint tells: the ledger in its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from coterie.core import ConfigError
from coterie.experiment.assemble import Parts
from coterie.experiment.promise import Promise
from coterie.storage import write_atomic

LEDGER = "privacy.json"  # of a run folder


def reopened(made: Parts, folder: Path, *, begun: bool) -> Parts:
    """The parts of a run that goes on, with what was spent before, and its ledger marked as open.

    begun: the run has one, written before all else. One that is open is of a run that crashed, and may have
    released one round more than it kept. Raises ConfigError when the ledger is missing, or not the config's.
    """
    promised = made.promise
    if promised is None:
        return made
    path, mine = folder / LEDGER, promised.ledger()
    if begun and not path.exists():
        raise ConfigError(
            f"{path}: the run has begun, and its privacy ledger is gone: what was spent is not known",
            "put the file back, or start a new run",
        )
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {**mine, "open": False, "lost": 0}
    wrong = next((name for name in mine if kept.get(name) != mine[name]), None)
    if wrong is not None:
        raise ConfigError(
            f"{path}: the privacy ledger of the run says {wrong} = {kept.get(wrong)!r}, the config gives "
            f"{mine[wrong]!r}: what was spent and what would be spent do not belong together",
            "resume with the config and the rounds it was started with, or start a new run",
        )
    # simulated noise is the same again when a round is repeated
    lost = kept["lost"] + (1 if kept["open"] and promised.noise["protected"] else 0)
    write_atomic(path, json.dumps({**mine, "open": True, "lost": lost}).encode())
    promised = replace(promised, lost=lost).afforded()
    return replace(made, promise=promised, schedule=replace(made.schedule, rounds=promised.rounds))


def closed(promise: Promise | None, folder: Path) -> None:
    """Write down that the run ended in order: no round is in flight."""
    if promise is not None:
        ended = {**promise.ledger(), "open": False, "lost": promise.lost}
        write_atomic(folder / LEDGER, json.dumps(ended).encode())

"""Time to accuracy: when a run first reached which accuracy, in rounds, virtual seconds and bytes.

From rows of metrics.jsonl alone. A level counts as reached in the first evaluated round that is not below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from coterie.experiment.numbers import number, series

Rows = Sequence[Mapping[str, Any]]

LADDER = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
SHOWN = 5


class Milestone(NamedTuple):
    """A level of accuracy and when it was first reached; None where it never was, or the rows do not say."""

    level: float
    round: int | None = None
    time: float | None = None  # virtual seconds since the start
    bytes_up: float | None = None  # sent by all clients until then


def milestones(rows: Rows, levels: Sequence[float]) -> list[Milestone]:
    """When each level was first reached."""
    found: dict[float, Milestone] = {}
    up = 0.0
    for row in rows:
        up += number((row.get("bytes") or {}).get("up")) or 0.0
        accuracy, round = number(row.get("accuracy")), number(row.get("round"))
        if accuracy is not None and round is not None:
            for level in levels:
                if accuracy >= level and level not in found:
                    found[level] = Milestone(level, int(round), number(row.get("time")), up)
    return [found.get(level, Milestone(level)) for level in levels]


def levels(rows: Rows) -> tuple[float, ...]:
    """The levels worth a table: the last few that the run reached."""
    best = max((value for _, value in series(rows, "accuracy")), default=0.0)
    return tuple(level for level in LADDER if level <= best)[-SHOWN:]


def timed(rows: Rows) -> bool:
    """Does the virtual clock say anything that the number of the round does not?"""
    return any(time != round for round, time in series(rows, "time"))


def uneven(rows: Rows) -> bool:
    """Do some rounds take longer than others?"""
    points = [(0.0, 0.0), *series(rows, "time")]
    paces = [(t - s) / (r - q) for (q, s), (r, t) in pairwise(points) if r > q]
    return any(not math.isclose(pace, paces[0], rel_tol=1e-6) for pace in paces)

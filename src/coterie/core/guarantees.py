"""What a schedule promises about who takes part in what: all that privacy may be credited for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Sampling = Literal["poisson", "fixed", "none"]


@dataclass(frozen=True, kw_only=True)
class Guarantees:
    """What is certain about participation, whatever the clients, their devices and the network do.

    sampling: "poisson", each client is in each round with probability `rate`, independently of all else;
    "fixed", each round's cohort is drawn anew, uniformly among all sets of `cohort` clients; "none",
    neither, for the reason in `why`. cohort: expected clients in a release, of `population`. rounds: releases
    in all. separation: rounds from one part in them to the next, at least; 1 where a client may be in all.
    repeats: how often one client may be in one release. Drop-outs may lessen all of these.
    """

    sampling: Sampling
    population: int
    cohort: int
    rounds: int
    separation: int = 1
    repeats: int = 1
    why: str = ""

    @property
    def rate(self) -> float:
        """The sampling rate that may be credited: 1 without sampling."""
        return 1.0 if self.sampling == "none" else self.cohort / self.population

    def participations(self, rounds: int | None = None) -> int:
        """Of so many rounds (None: all), in how many one client may be."""
        return math.ceil((self.rounds if rounds is None else rounds) / self.separation)

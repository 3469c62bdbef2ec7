"""Configs whose privacy would not hold, refused with the way out."""

from __future__ import annotations

import math
from typing import Any

from coterie.core import Algorithm, ConfigError
from coterie.experiment.chain import cohort_of
from coterie.experiment.config import Config, Section

SERVERS = ("synchronous", "hierarchical")  # schedules whose rounds are sums over one cohort


def refuse_parts(config: Config, noise: Section, algorithm: Algorithm, initial: Any) -> None:
    """Refuse what client-level privacy cannot hold together with."""
    weighting = algorithm.local(0).get("weighting")
    if weighting != "uniform":
        raise ConfigError(
            f"algorithm.weighting = {weighting!r}: under client-level privacy no client may count for more",
            'set algorithm.weighting = "uniform"',
        )
    if initial["buffers"]:
        raise ConfigError(
            f"the model has buffers ({', '.join(sorted(initial['buffers'])[:3])}): averages over clients' "
            "data that clipping would tear apart",
            "use a model without: GroupNorm instead of BatchNorm",
        )
    if noise["protected"] and config.compare:
        raise ConfigError(
            f"compare = {config.compare}: baselines train on the clients' data without any noise, and the "
            "run's folder would publish what they reach",
            "leave compare out; or protected = false, for research on data that may be seen",
        )
    if noise["protected"] and config.run["checkpoint_every"] != 1:
        raise ConfigError(
            f"run.checkpoint_every = {config.run['checkpoint_every']}: after a crash, rounds that were "
            "released would be noised and released a second time",
            "leave run.checkpoint_every at 1",
        )


def refuse_chain(chain: list[tuple[str, Section]], place: int) -> None:
    """Refuse a chain whose noise, at this place, does not do what is accounted for."""
    kinds = [kind for kind, _ in chain]
    if "clip" not in kinds[:place]:
        late = "clip" in kinds
        raise ConfigError(
            f"transforms[{place}]: noise {'before the clip' if late else 'without a clip'} protects nobody: "
            "one client's update may be as large as it likes",
            "put the clip first" if late else 'add { kind = "clip", norm = 1.0 } before it',
        )
    if place + 1 < len(chain):
        raise ConfigError(
            f"transforms[{place + 1}]: {kinds[place + 1]} after the noise voids what is accounted for",
            "make the noise the last transform, and the only noise",
        )
    told, before = chain[place][1], chain[place - 1][1]
    if told["mechanism"] == "laplace" and before["order"] != 1:
        raise ConfigError(
            f"transforms[{place}]: laplace noise is accounted for in L1, the clip is in L{before['order']}",
            "set order = 1 in the clip, or use gaussian noise",
        )
    if before["adaptive"] and told["at"] == "client":
        raise ConfigError(
            f"transforms[{place}]: a norm that adapts to all clients cannot be had from each one's noise",
            'use a clip with a norm, or at = "server"',
        )


def refuse_schedule(config: Config, told: Section, schedule: Any, clients: int) -> None:
    """Refuse a schedule whose rounds are not sums that noise protects."""
    kind = config.schedule["kind"]
    if kind not in SERVERS:
        raise ConfigError(
            f"schedule.kind = {kind!r}: its updates do not meet in one sum a round, which the noise is for",
            f"use {' or '.join(map(repr, SERVERS))}",
        )
    if getattr(schedule, "sampling", "") == "weighted":
        raise ConfigError(
            "schedule.sampling = 'weighted': how often a client takes part would tell how much data it has",
            'use "uniform" or "poisson"',
        )
    if told["delta"] >= 1 / clients:
        raise ConfigError(
            f"delta = {told['delta']}: with {clients} clients it must be below {1 / clients:.3g}, else "
            "giving one client's data away would be allowed",
            f"{0.1 / clients:.0e} is a tenth of that",
        )
    if told["least"] is not None:
        if config.schedule.get("sampling", "uniform") != "uniform":
            raise ConfigError(
                f"schedule.sampling = {config.schedule['sampling']!r}: a round may have fewer clients than "
                "the noise has shares",
                'use "uniform"',
            )
        quorum = config.schedule.get("quorum", 1)
        cohort = cohort_of(config, clients)
        needed = math.ceil(quorum * cohort) if isinstance(quorum, float) else quorum
        if needed < told["least"]:
            raise ConfigError(
                f"schedule.quorum = {quorum}: below least = {told['least']} replies is too little noise",
                f"set schedule.quorum = {told['least']} or more",
            )

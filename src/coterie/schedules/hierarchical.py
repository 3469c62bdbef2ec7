"""Two levels of synchronous aggregation: clients below relays below the server.

The server draws the cohort as the flat schedule would and sends each relay its part in one "fold" Task;
a relay (`core.gather.fold_task`) answers with its unfinished accumulator. Because accumulators are exact
and merge, the run ends with the same bits as the flat one. Ids of the clients' tasks are allotted by the
server, so they stay unique in the whole tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from coterie.core.errors import ConfigError
from coterie.core.gather import Gathered, fold_request, gather
from coterie.core.guarantees import Guarantees
from coterie.core.types import Algorithm, ClientId, Plan, Task
from coterie.schedules.synchronous import Synchronous


@dataclass(frozen=True, kw_only=True)
class Hierarchical(Synchronous):
    """The synchronous schedule over `groups` relays, each with an equal, contiguous part of the clients."""

    groups: int = 2

    def __post_init__(self) -> None:
        """Refuse what relays cannot do."""
        super().__post_init__()
        if self.groups < 1:
            raise ConfigError(f"schedule.groups = {self.groups}: must be at least 1")
        if self.over_selection != 1:
            raise ConfigError(
                "schedule.over_selection: no relay knows the first replies of the whole cohort",
                "use a deadline, or the synchronous schedule",
            )

    @property
    def relays(self) -> tuple[ClientId, ...]:  # type: ignore[override]
        """The names of the relays."""
        return tuple(f"relay-{index}" for index in range(self.groups))

    def guarantees(self, population: int) -> Guarantees:
        """As of the flat schedule, but for the sampling."""
        told = super().guarantees(population)
        why = told.why or "relays know who of their part is in a round"
        return replace(told, sampling="none", why=why)

    def collect(
        self,
        algorithm: Algorithm,
        tasks: Sequence[Task],
        places: Sequence[int],
        among: int,
        cohort: int,  # noqa: ARG002  every relay waits for all of its part
        ids: Iterator[int],
    ) -> Plan[Gathered]:
        """How the replies come in: folded by the relays."""
        if self.groups > among:
            raise ConfigError(f"schedule.groups = {self.groups}: there are only {among} clients")
        parts: list[list[Task]] = [[] for _ in self.relays]
        for task, place in zip(tasks, places, strict=True):
            parts[place * self.groups // among].append(task)
        folds = []
        for relay, part in zip(self.relays, parts, strict=True):
            if part:
                timer = next(ids)
                folds.append(fold_request(next(ids), relay, part, timer=timer, deadline=self.deadline))
        return (yield from gather(algorithm.aggregator, folds, on_nan=self.on_nan))

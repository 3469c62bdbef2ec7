"""Asynchronous schedules: FedBuff (arXiv:2106.06639) and, with a buffer of one, FedAsync (arXiv:1903.03934).

`concurrency` clients are always at work. Each arrival joins the buffer with its weight discounted by its
staleness (versions of the state since its task was sent) and another client starts; a full buffer makes
a new version. On a virtual clock the whole run is a function of its seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from coterie.core import trees
from coterie.core.errors import ConfigError, QuorumLost
from coterie.core.gather import Gathered, OnNan, accept, empty
from coterie.core.guarantees import Guarantees
from coterie.core.seeds import Key, derive, rng
from coterie.core.types import Action, Algorithm, Cancel, ClientId, Commit, Lost, Plan, Reply, Task, Tree
from coterie.schedules.synchronous import FROM_START, generations, remembered, share, summary

Staleness = Callable[[int], float]


def polynomial(*, a: float = 0.5) -> Staleness:
    """s(t) = (1 + t)^-a; a = 0.5 is FedBuff's and FedAsync's default."""
    return lambda t: float((1 + t) ** -a)


def hinge(*, a: float = 10.0, b: float = 4.0) -> Staleness:
    """s(t) = 1 while t <= b, then 1 / (a (t - b) + 1) (Xie et al. 2019, section 5.2)."""
    return lambda t: 1.0 if t <= b else 1.0 / (a * (t - b) + 1.0)


def constant() -> Staleness:
    """s(t) = 1."""
    return lambda t: 1.0


STALENESS: Mapping[str, Callable[..., Staleness]] = {
    "constant": constant,
    "hinge": hinge,
    "polynomial": polynomial,
}


SQUARE_ROOT = polynomial()


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """Take a step whenever `buffer` updates have arrived.

    rounds: how many versions to make. concurrency: clients at work at any time, or a fraction of all.
    staleness: discount of the weight. max_staleness: drop what is older. on_nan: as in Synchronous.
    Raises QuorumLost when ten times `concurrency` clients in a row are lost.
    """

    rounds: int
    concurrency: int | float
    buffer: int = 10
    staleness: Staleness = SQUARE_ROOT
    max_staleness: int | None = None
    on_nan: OnNan = "stop"
    key: Key
    relays: ClassVar[tuple[ClientId, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse empty buffers and runs."""
        for name in ("rounds", "buffer"):
            if getattr(self, name) < 1:
                raise ConfigError(f"schedule.{name} = {getattr(self, name)}: must be at least 1")

    def __call__(
        self, algorithm: Algorithm, state: Tree, clients: Sequence[ClientId], resume: Tree = None
    ) -> Plan[Tree]:
        """Return the plan; one Commit a full buffer."""
        concurrency = share(self.concurrency, len(clients), "schedule.concurrency", "clients")
        resume = resume or FROM_START
        version, ids, memory = resume["version"], itertools.count(resume["next"]), generations(resume)
        busy: dict[ClientId, Task] = {task.client: task for task in resume["flying"]}
        down = algorithm.broadcast(state)

        def dispatch() -> Task:
            id = next(ids)
            client = self._idle(clients, busy, id)
            busy[client] = task = Task(
                id, client, version, id, down, config=algorithm.local(version), memory=memory.get(client)
            )
            return task

        actions: list[Action] = [*busy.values()]
        actions += [dispatch() for _ in range(concurrency - len(busy))]
        got, asked, lost_in_a_row = Gathered(empty(algorithm.aggregator)), 0, 0
        while version < self.rounds:
            event = yield actions
            actions = []
            sent = busy.get(event.task.client) if isinstance(event, Reply | Lost) else None
            if sent is None or sent.id != event.task.id:
                continue
            del busy[event.task.client]
            asked += 1
            reason = self._fold(algorithm, got, event, version)
            lost_in_a_row = lost_in_a_row + 1 if reason else 0
            if lost_in_a_row >= 10 * concurrency:
                raise QuorumLost(
                    f"version {version}: {lost_in_a_row} clients in a row were lost, the last one: {reason}",
                    "see run.log for each client's error; then mend it and go on with --resume",
                )
            if got.fold.replies == self.buffer:
                state = algorithm.finalize(state, *got.finish(algorithm.aggregator))
                version, down = version + 1, algorithm.broadcast(state)
                accepted = remembered(algorithm, got)
                memory.update(accepted)
                resume = {"version": version, "next": next(ids) + 1, "flying": tuple(busy.values())}
                told = summary(got, asked, asked * trees.nbytes(down))
                yield [Commit(version, state, resume, told, accepted)]
                got, asked = Gathered(empty(algorithm.aggregator)), 0
            if version < self.rounds:
                actions = [dispatch()]
        if busy:
            yield [Cancel(task.id) for task in busy.values()]
        return state

    def guarantees(self, population: int) -> Guarantees:
        """Nothing about who takes part: a quick client may fill a whole buffer by itself."""
        return Guarantees(
            sampling="none",
            population=population,
            cohort=self.buffer,
            rounds=self.rounds,
            repeats=self.buffer,
            why="who is in a step depends on how quick the clients are",
        )

    def _fold(self, algorithm: Algorithm, got: Gathered, event: Reply | Lost, version: int) -> str:
        """Fold a reply in, or say why it is lost."""
        age = version - event.task.version
        if isinstance(event, Reply) and self.max_staleness is not None and age > self.max_staleness:
            event = Lost(event.task, f"{age} versions old")
        return accept(got, algorithm.aggregator, event, self.on_nan, self.staleness(age))

    def _idle(self, clients: Sequence[ClientId], busy: Mapping[ClientId, Any], id: int) -> ClientId:
        """A uniformly drawn client that is not at work; cost does not grow with the population."""
        generator = rng(derive(self.key, "pick", id))
        while True:
            client = clients[int(generator.integers(len(clients)))]
            if client not in busy:
                return client


def asynchronous(
    *,
    rounds: int,
    concurrency: int | float,
    staleness: Staleness = SQUARE_ROOT,
    max_staleness: int | None = None,
    on_nan: OnNan = "stop",
    key: Key,
) -> Buffered:
    """FedAsync's schedule: a step on every arrival."""
    return Buffered(
        rounds=rounds,
        concurrency=concurrency,
        buffer=1,
        staleness=staleness,
        max_staleness=max_staleness,
        on_nan=on_nan,
        key=key,
    )

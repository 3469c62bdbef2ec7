"""The synchronous schedule: draw a cohort, wait for its replies, take a step, repeat.

A straggler is somebody who misses the deadline; over-selection asks more clients than it waits for
(Bonawitz et al. 2019, arXiv:1902.01046, section 2.2). Below the quorum the run stops: a state made of too
few replies is worse than none.

What privacy is credited for is in `guarantees`. Drop-outs do not void it: whether a client's update arrives
is up to that client alone, so that a round stays a function of those who were drawn, in which one of them
counts for an update or for nothing. A deadline and over-selection do: who is in time, or first, depends on
who else was drawn. And whoever knows the key knows the cohorts: amplification is against all others.
"""

from __future__ import annotations

import itertools
import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coterie.core import trees
from coterie.core.errors import ConfigError, QuorumLost
from coterie.core.gather import Gathered, OnNan, empty, fold_request, gather
from coterie.core.guarantees import Guarantees
from coterie.core.seeds import Key, derive, permutation, rng
from coterie.core.types import Algorithm, ClientId, Commit, Plan, Task, Tree
from coterie.schedules.reasons import why

FEW = 10_000  # clients that a weighted draw may cost something each
POOL = "pool"  # whom a pooled schedule asks
FROM_START: Tree = {"version": 0, "next": 0, "flying": ()}


class Odds(NamedTuple):
    """Of each client to be drawn, [clients]."""

    chances: NDArray[np.float64]
    cumulated: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Synchronous:
    """Rounds of one cohort each.

    cohort: clients a round, or a fraction of all when it is a float in (0, 1]. sampling: "uniform" or
    "weighted" (by `size`, asked of every client once, at the start), without replacement; "poisson", each
    client with probability cohort / clients, independently, so that a round may have more clients, fewer or
    none; or "cyclic", all clients in one shuffled order, cut into parts of at most `cohort` that take turns.
    over_selection: ask ceil(factor * cohort) clients and take the first `cohort` replies. deadline: seconds
    (virtual in simulation). quorum: replies that a round needs, or a fraction of those asked when it is a
    float; never more than were asked. on_nan: "drop" counts a client with a non-finite update or loss as
    lost, "stop" ends the run at that round.
    pooled: ask the backend for the fold of the whole cohort instead of every reply, which costs it less and
    comes to the same bits.
    """

    rounds: int
    cohort: int | float
    sampling: Literal["uniform", "weighted", "poisson", "cyclic"] = "uniform"
    over_selection: float = 1.0
    deadline: float | None = None
    quorum: int | float = 1
    on_nan: OnNan = "stop"
    key: Key
    size: Callable[[ClientId], float] = lambda client: 1.0
    pooled: bool = False
    relays: ClassVar[tuple[ClientId, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse what no population can satisfy."""
        if self.rounds < 1:
            raise ConfigError(f"schedule.rounds = {self.rounds}: must be at least 1")
        if self.over_selection < 1:
            raise ConfigError(
                f"schedule.over_selection = {self.over_selection}: must be at least 1", "1.3 is usual"
            )
        if self.over_selection > 1 and self.sampling in ("poisson", "cyclic"):
            raise ConfigError(
                f"schedule.over_selection = {self.over_selection}: with {self.sampling} sampling nobody is "
                "asked instead of somebody else",
                "leave it out and set cohort higher",
            )
        if self.deadline is not None and self.deadline <= 0:
            raise ConfigError(f"schedule.deadline = {self.deadline}: must be > 0 seconds")

    def __call__(
        self, algorithm: Algorithm, state: Tree, clients: Sequence[ClientId], resume: Tree = None
    ) -> Plan[Tree]:
        """Return the plan; one Commit a round."""
        cohort = share(self.cohort, len(clients), "schedule.cohort", "clients")
        share(self.quorum, cohort, "schedule.quorum", "clients in a cohort")
        asked = min(math.ceil(cohort * self.over_selection), len(clients))
        resume = resume or FROM_START
        ids, memory = itertools.count(resume["next"]), generations(resume)
        odds = self.odds(clients)
        for round in range(resume["version"], self.rounds):
            down, config = algorithm.broadcast(state), algorithm.local(round)
            places = self.draw(len(clients), asked, round, odds)
            tasks = [
                Task(next(ids), client, round, round, down, config=config, memory=memory.get(client))
                for client in map(clients.__getitem__, places)
            ]
            wanted = cohort if self.over_selection > 1 else len(tasks)
            quorum = math.ceil(self.quorum * wanted - 1e-9) if isinstance(self.quorum, float) else self.quorum
            quorum = min(quorum, wanted)
            got = Gathered(empty(algorithm.aggregator))
            if tasks:
                got = yield from self.collect(algorithm, tasks, places, len(clients), wanted, ids)
            if len(got.accepted) < quorum:
                raise QuorumLost(
                    f"round {round + 1}: {len(got.accepted)} of {len(tasks)} clients replied, "
                    f"the quorum is {quorum}\n"
                    + "\n".join(f"  {reason.strip().splitlines()[0]}" for reason in got.fold.lost[:5]),
                    "see run.log for each client's error; then mend it and go on with --resume, "
                    "or lower schedule.quorum",
                )
            private = any(each.cohort for each in algorithm.transforms)
            if tasks or private:  # noise hides that nobody was drawn
                state = algorithm.finalize(state, *got.finish(algorithm.aggregator))
            accepted = remembered(algorithm, got)
            memory.update(accepted)
            resume = {"version": round + 1, "next": next(ids) + 1}
            told = summary(got, len(tasks), len(tasks) * trees.nbytes(down))
            yield [Commit(round + 1, state, resume, told, accepted)]
        return state

    def guarantees(self, population: int) -> Guarantees:
        """Who takes part how often, among so many clients."""
        cohort = share(self.cohort, population, "schedule.cohort", "clients")
        told = Guarantees(sampling="none", population=population, cohort=cohort, rounds=self.rounds)
        if self.sampling == "cyclic":
            why = "clients take turns in an order that is the same again and again"
            turns = math.ceil(population / cohort)
            return replace(told, cohort=math.ceil(population / turns), separation=turns, why=why)
        why = ""
        if self.sampling == "weighted":
            why = "clients with more data are drawn more often"
        elif self.over_selection > 1:
            why = "over-selection takes the first replies: who counts depends on who else was asked"
        elif self.deadline is not None:
            why = "with a deadline, who counts may depend on who else was asked"
        elif cohort == population:
            why = "all clients are in every round"
        if why:
            return replace(told, why=why)
        return replace(told, sampling="poisson" if self.sampling == "poisson" else "fixed")

    def odds(self, clients: Sequence[ClientId]) -> Odds | None:
        """How likely each client is to be drawn; None when all are equally."""
        if self.sampling != "weighted":
            return None
        sizes = np.fromiter(map(self.size, clients), dtype=np.float64, count=len(clients))
        cumulated = sizes.cumsum()
        return Odds(sizes / sizes.sum(), cumulated / cumulated[-1])

    def draw(self, among: int, count: int, round: int, odds: Odds | None = None) -> list[int]:
        """The cohort of a round, as places among all clients: a function of the key and the round alone.

        count: as many; at most, if "cyclic"; on average, if "poisson" (a binomial number of clients, drawn
        uniformly, is each client with a coin of its own). Without replacement: each next one in proportion
        to the odds of those that are left. The cost grows with the count; only where the count is more than
        a fiftieth, it grows with all there are.
        """
        if self.sampling == "cyclic":
            turns = math.ceil(among / count)
            turn = round % turns
            part = slice(turn * among // turns, (turn + 1) * among // turns)
            return shuffled(self.key, among)[part].tolist()  # type: ignore[no-any-return]
        generator = rng(derive(self.key, "cohort", round))
        if self.sampling == "poisson":
            count = int(generator.binomial(among, count / among))
        if odds is None or among <= FEW or count * 50 > among:
            p = None if odds is None else odds.chances
            return generator.choice(among, count, replace=False, p=p).tolist()  # type: ignore[no-any-return]
        drawn: dict[int, None] = {}
        while len(drawn) < count:  # to draw again whoever was drawn before comes to the same odds
            at = generator.random(count - len(drawn))
            drawn |= dict.fromkeys(odds.cumulated.searchsorted(at, side="right").tolist())
        return list(drawn)

    def collect(
        self,
        algorithm: Algorithm,
        tasks: Sequence[Task],
        places: Sequence[int],  # noqa: ARG002  the tasks' clients among ...
        among: int,  # noqa: ARG002  ... so many, for schedules that group them
        cohort: int,
        ids: Iterator[int],
    ) -> Plan[Gathered]:
        """How the replies come in: straight from the clients, or folded by the backend."""
        timer, enough = next(ids), cohort if len(tasks) > cohort else None
        deadline, on_nan = self.deadline, self.on_nan
        if self.pooled:
            fold = fold_request(next(ids), POOL, tasks, timer=timer, enough=enough, deadline=deadline)
            return (yield from gather(algorithm.aggregator, [fold], on_nan=on_nan))
        return (
            yield from gather(
                algorithm.aggregator, tasks, timer=timer, enough=enough, deadline=deadline, on_nan=on_nan
            )
        )


@lru_cache(maxsize=4)
def shuffled(key: Key, count: int) -> NDArray[np.int64]:
    """The order in which clients take turns."""
    return permutation(derive(key, "turns"), count)


def share(value: int | float, whole: int, name: str, what: str) -> int:
    """An int is a count, a float in (0, 1] a fraction of the whole, rounded up. Raises ConfigError."""
    count = math.ceil(value * whole - 1e-9) if isinstance(value, float) and 0 < value <= 1 else value
    if count != int(count) or count < 1:
        raise ConfigError(f"{name} = {value}: must be a whole number >= 1 or a fraction in (0, 1]")
    if count > whole:
        raise ConfigError(
            f"{name} = {value}: there are only {whole} {what}", f"use at most {whole}, or 1.0 for all"
        )
    return int(count)


def generations(resume: Tree) -> ChainMap[ClientId, Any]:
    """The task that each client's memory is of: what is known at the start, below what changes since."""
    return ChainMap({}, resume.get("memory", {}))


def remembered(algorithm: Algorithm, got: Gathered) -> dict[ClientId, int]:
    """Whose memory is of which task now; nobody's, when the algorithm's clients keep none."""
    return got.accepted if algorithm.client_work.remember is not None else {}


def summary(got: Gathered, asked: int, down: int) -> dict[str, object]:
    """What a commit reports of a gathering. down: bytes sent to the clients."""
    lost = {"lost_why": why(got.fold.lost)} if got.fold.lost else {}
    return {
        **{f"train_{name}": value for name, value in got.metrics().items()},
        "samples": got.fold.samples,
        "clients": {"asked": asked, "answered": got.fold.replies, "lost": len(got.fold.lost)},
        **lost,
        "bytes": {"up": got.fold.bytes_up, "down": down},
    }

"""Gossip: no server state at all; every node holds its own and mixes it with its neighbours'.

D-PSGD (Lian et al. 2017, arXiv:1705.09056, Algorithm 1) with W_ij = 1 / (1 + degree) on a regular graph:
all nodes work from their own x_i, then x_i <- mean over i and its neighbours of x_j, minus i's own update.
This plan simulates all nodes; `state["model"]` of its commits is their average, `state["nodes"]` the truth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from coterie.core import exact, trees
from coterie.core.errors import ConfigError, QuorumLost
from coterie.core.gather import Gathered, OnNan, accept, ask, empty
from coterie.core.guarantees import Guarantees
from coterie.core.types import Aggregator, Algorithm, ClientId, Commit, Lost, Plan, Task, Tree
from coterie.schedules.synchronous import FROM_START, generations, remembered, summary


def ring(node: int, count: int) -> set[int]:
    """The two neighbours on a ring, and the node itself."""
    return {(node - 1) % count, node, (node + 1) % count}


def complete(node: int, count: int) -> set[int]:
    """Everybody."""
    del node
    return set(range(count))


TOPOLOGIES: Mapping[str, Callable[[int, int], set[int]]] = {"complete": complete, "ring": ring}
UNFOLDED = Aggregator(
    lambda: None, lambda acc, up, weight: None, lambda a, b: None, lambda acc: (None, 0, 0), True
)


@dataclass(frozen=True, kw_only=True)
class Gossip:
    """Every client is a node and works in every round. A node that is lost in a round mixes all the same."""

    rounds: int
    topology: Literal["complete", "ring"] = "ring"
    on_nan: OnNan = "stop"
    relays: ClassVar[tuple[ClientId, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse empty runs."""
        if self.rounds < 1:
            raise ConfigError(f"schedule.rounds = {self.rounds}: must be at least 1")

    def guarantees(self, population: int) -> Guarantees:
        """Every node is in every round."""
        why = "every node is in every round, and its neighbours see its model"
        return Guarantees(
            sampling="none", population=population, cohort=population, rounds=self.rounds, why=why
        )

    def __call__(
        self, algorithm: Algorithm, state: Tree, clients: Sequence[ClientId], resume: Tree = None
    ) -> Plan[Tree]:
        """Return the plan; one Commit a round."""
        resume = resume or FROM_START
        ids, memory = itertools.count(resume["next"]), generations(resume)
        nodes = state["nodes"] if "nodes" in state else [algorithm.init(state["model"]) for _ in clients]
        near = [sorted(TOPOLOGIES[self.topology](i, len(clients))) for i in range(len(clients))]
        for round in range(resume["version"], self.rounds):
            config = algorithm.local(round)
            tasks = [
                Task(
                    next(ids),
                    client,
                    round,
                    round,
                    algorithm.broadcast(node),
                    config=config,
                    memory=memory.get(client),
                )
                for client, node in zip(clients, nodes, strict=True)
            ]
            replies = yield from ask(tasks)
            got = Gathered(empty(UNFOLDED))
            for task in tasks:
                accept(got, UNFOLDED, replies.get(task.client) or Lost(task, "no reply"), self.on_nan)
            ups = {i: replies[client].up for i, client in enumerate(clients) if client in got.accepted}
            if not ups:
                raise QuorumLost(
                    f"round {round + 1}: no node finished its work", "see run.log for each node's error"
                )
            models = [node["model"] for node in nodes]
            mixed = [{**node, "model": average([models[j] for j in near[i]])} for i, node in enumerate(nodes)]
            for i, up in ups.items():
                # buffers mix as parameters do: the neighbours' mean, moved by the node's own change
                moved = trees.subtract(up["buffers"], models[i]["buffers"])
                buffers = trees.add(mixed[i]["model"]["buffers"], moved)
                mixed[i] = algorithm.finalize(mixed[i], {**up, "buffers": buffers}, 1.0, 1)
            nodes = mixed
            accepted = remembered(algorithm, got)
            memory.update(accepted)
            state = {"model": average([node["model"] for node in nodes]), "nodes": nodes}
            resume = {"version": round + 1, "next": next(ids) + 1}
            down = sum(trees.nbytes(task.down) for task in tasks)
            yield [Commit(round + 1, state, resume, summary(got, len(clients), down), accepted)]
        return state


def average(models: Sequence[Tree]) -> Tree:
    """The exact unweighted mean of some models."""
    acc = None
    for model in models:
        acc = exact.add(acc, model, 1.0)
    return exact.mean(acc)[0]

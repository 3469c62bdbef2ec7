"""Small federated worlds that tests drive in this process, and the NumPy half of their oracles.

The default world is least squares in float64: client k holds A_k = [x 1] and y_k, and the model is
theta = (weights, bias). Oracles take from the library which clients were drawn and which rows went into
which batch; everything else they compute by themselves.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from coterie.backends import InProcess, Site
from coterie.backends.system import device
from coterie.core import Commit, Event, Task, derive, drive, fold_task, interleave, rng, seeded
from coterie.data import ClientData
from coterie.storage import Memories
from coterie.trainers import Loop, Problem, rows_of, task_key

KEY = derive(2024, "schedule")
FULL = MappingProxyType({"epochs": 1, "batch_size": None, "steps": None})


class Outcome(NamedTuple):
    """What a plan did."""

    state: Any
    commits: list[Commit]
    events: list[tuple[float, Event]]
    sent: list[Task]  # by the root plan, in order
    trained: list[Task]  # in the order in which the clients were at work
    memories: Memories


@dataclass(frozen=True)
class World:
    """A problem, the clients' data, and the seed of the clients' draws."""

    problem: Problem
    people: Mapping[str, ClientData]
    seed: int = 11

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(self.people)

    def play(
        self,
        algorithm,
        schedule,
        *,
        trainer=None,
        data=None,
        plan=None,
        relays=None,
        memories=None,
        **backend,
    ) -> Outcome:
        """Drive the schedule's plan to its end. trainer: Loop unless told. backend: duration, dropped."""
        trainer, memories = trainer or Loop(self.problem, self.seed), memories or Memories()
        sent, trained, events, commits = [], [], [], []
        site = Site(algorithm, trainer, lambda model, data: {}, data or self.people.__getitem__, memories)

        answer, fold = site.answer, site.fold

        def answering(tasks):
            trained.extend(tasks)
            return answer(tasks)

        def folding(tasks, *rest):
            trained.extend(tasks)
            return fold(tasks, *rest)

        site.answer, site.fold = answering, folding

        if relays is None:
            relay = partial(fold_task, aggregator=algorithm.aggregator, on_nan=schedule.on_nan)
            relays = {name: partial(interleave, relay) for name in schedule.relays}
        backend = InProcess(site, relays=relays, device=device(**backend))
        take = backend.send

        def send(actions):
            sent.extend(action for action in actions if isinstance(action, Task))
            take(actions)

        backend.send = send

        def on_commit(commit):
            flying = {task.id for task in commit.resume.get("flying", ())}
            # and never prune: tests look at all generations
            memories.commit(commit.version, commit.accepted, flying)
            commits.append(commit)

        plan = plan or schedule(algorithm, algorithm.init(self.problem.model()), self.clients)
        state = asyncio.run(
            drive(plan, backend, on_commit=on_commit, on_event=lambda now, event: events.append((now, event)))
        )
        return Outcome(state, commits, events, sent, trained, memories)

    def arrays(self, client: str) -> tuple[np.ndarray, np.ndarray]:
        """The client's A [n, features + 1] and y [n]."""
        x, y = (part.numpy() for part in self.people[client].train)
        return np.column_stack([x, np.ones(len(x))]), y

    def rows(self, client: str, round: int, **config: Any) -> list[np.ndarray]:
        """The client's index batches in a round."""
        key = derive(task_key(self.seed, Task(0, client, 0, round, None)), "batches")
        return list(rows_of(len(self.people[client].train[1]), {**FULL, **config}, key))

    def theta(self) -> np.ndarray:
        """Where training starts."""
        return theta(self.problem.model())


def linear_world(sizes=(3, 14, 5, 9, 2, 7), features=3) -> World:
    """Unequal clients whose least squares solutions differ. Client k weighs k + 0.5 if weights count."""
    people = {}
    for index, n in enumerate(sizes):
        draw = rng(derive(5, "world", index))
        x, truth = draw.normal(size=(n, features)), draw.normal(size=features + 1)
        y = x @ truth[:-1] + truth[-1] + 0.1 * draw.normal(size=n)
        rows = torch.from_numpy(x), torch.from_numpy(y)
        people[f"client-{index}"] = ClientData(rows, rows, weight=index + 0.5)
    with seeded(derive(5, "model")):
        module = nn.Linear(features, 1).double()
    return World(Problem(module, "regression"), people)


def theta(model: Mapping[str, Any]) -> np.ndarray:
    """(weights, bias) of a linear model or of anything shaped like its parameters, as one copied vector."""
    params = model.get("params", model)
    return np.concatenate([params["weight"].numpy().reshape(-1), params["bias"].numpy()])


def slope(a: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Gradient of the mean squared error."""
    return 2 * a.T @ (a @ at - y) / len(y)


def descended(a, y, rows, at, lr, correction=lambda at: 0.0) -> np.ndarray:
    """Plain SGD over the index batches; `correction(at)` is added to each gradient."""
    for batch in rows:
        at = at - lr * (slope(a[batch], y[batch], at) + correction(at))
    return at


def first_task(algorithm, model, client="client-1", round=0) -> Task:
    """The task a client gets from a server that holds `model`."""
    return Task(
        0, client, round, round, algorithm.broadcast(algorithm.init(model)), config=algorithm.local(round)
    )

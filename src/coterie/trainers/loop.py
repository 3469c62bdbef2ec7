"""The loop trainer: one client after the other, one step after the other. The reference for all others."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coterie.core import trees
from coterie.core.seeds import Key, derive, rng, seeded
from coterie.core.types import Algorithm, ClientWork, Params, Reply, Task, Tree
from coterie.data import ClientData, Held, batches
from coterie.data.types import Rows
from coterie.trainers.problem import Problem

ABSENT = -1  # a place in a batch that no row has taken
GOLDEN = 0x1E3779B97F4A7C15  # seeds of successive steps lie this far apart


def task_key(seed: int | Key, task: Task) -> Key:
    """The key of all draws of a task (law 5)."""
    return derive(seed, task.kind, task.round, task.client)


def step_seed(key: Key, step: int) -> Tensor:
    """The seed (int64) of what a task draws in a step: the same in every trainer."""
    first = int.from_bytes(derive(key, "dropout")[:8], "little") >> 1
    return torch.tensor(first) + step * GOLDEN % 2**63


def rows_of(count: int, config: Mapping[str, Any], key: Key, *, least: int = 1) -> Iterator[Rows]:
    """The index batches of a task over `count` rows: `steps` of them, or `epochs` passes.

    least: a last batch of fewer rows joins the one before (BatchNorm cannot train on a single row).
    With "sampling" = "poisson" in config each row is in each batch with probability batch_size / count.
    "secret": by the system's randomness, so that who knows the run's seed does not know the batches.
    """
    if config.get("sampling") == "poisson":
        return poisson(count, config, Key(os.urandom(32)) if config["secret"] else key)
    epochs, size, steps = config["epochs"], config["batch_size"], config["steps"]
    if steps is not None:
        epochs = -(-steps * (size or count) // count) + least - 1  # at least `steps` batches
    least = least if count >= least else 1  # a client with a single row is left to fail
    drawn = batches(count, epochs=epochs, batch_size=size, key=key)
    return islice(joined(drawn, least) if least > 1 else drawn, steps)


def poisson(count: int, config: Mapping[str, Any], key: Key) -> Iterator[Rows]:
    """Batches of independent coin flips, each followed by ABSENT up to `room_for` places.

    A batch that is larger is longer: no row is left out.
    """
    size = min(config["batch_size"], count)
    room = min(room_for(size), count)
    for step in range(config["steps"] or config["epochs"] * -(-count // size)):
        rows = np.flatnonzero(rng(derive(key, "poisson", step)).random(count) * count < size)
        yield np.concatenate([rows, np.full(max(room - len(rows), 0), ABSENT)])


def room_for(size: int) -> int:
    """Places that a Poisson-sampled batch of `size` expected rows outgrows with probability < 1e-6.

    Bennett's inequality for a sum of coin flips: exp(-size * h(more / size)), h(u) = (1 + u) log(1 + u) - u.
    The next multiple of 8.
    """
    room = size
    while (room + 1) * math.log((room + 1) / size) - (room + 1 - size) < math.log(1e6):
        room += 1
    return -(-room // 8) * 8


def joined(drawn: Iterator[Rows], least: int) -> Iterator[Rows]:
    """Append every batch of fewer than `least` rows to the batch before it."""
    held: Rows | None = None
    for rows in drawn:
        if held is not None and len(rows) < least:
            held = np.concatenate([held, rows])
            continue
        if held is not None:
            yield held
        held = rows
    if held is not None:
        yield held


class Step(NamedTuple):
    """Where local training stands after a step."""

    params: Params
    carry: Tree
    examples: int


def descend(
    problem: Problem,
    work: ClientWork,
    params: Params,
    carry: Tree,
    data: tuple[Tensor, Tensor],
    rows: Iterator[Rows],
    key: Key,
) -> Iterator[Step]:
    """Local steps, one for each index batch, as the ClientWork says. data: inputs [n, ...], targets [n]."""
    inputs, targets = data
    optimizer = work.optimizer(carry)
    slots = optimizer.init(params)

    def objective(params: Params, batch: tuple[Tensor, Tensor], carry: Tree) -> tuple[Tensor, Tree]:
        return work.objective(problem.loss, params, batch, carry)

    for step, drawn in enumerate(rows):
        index = torch.from_numpy(drawn)
        mask = None if drawn.min() >= 0 else (index != ABSENT).float()
        batch = (inputs[index.clamp(min=0)], targets[index.clamp(min=0)])
        grads, carry = work.gradient(objective, params, batch, mask, carry, step_seed(key, step))
        updates, slots = optimizer.update(grads, slots, params)
        params = trees.add(params, updates)
        yield Step(params, carry, len(drawn))


class Loop:
    """fit(): local steps as the algorithm's ClientWork says."""

    name = "loop"
    width = 1

    def __init__(self, problem: Problem, seed: int | Key) -> None:
        self.problem = problem
        self.seed = seed

    def fit(
        self, algorithm: Algorithm, task: Task, memory: Tree, data: ClientData | Held
    ) -> tuple[Reply, Tree]:
        """Train on one client's data; return its reply and its new memory.

        memory: of the generation that the task names; None for a new client.
        """
        work, key = algorithm.client_work, task_key(self.seed, task)
        if memory is None and work.remember is not None:
            memory = work.remember(task.down)
        params, carry = work.start(task.down, memory, task.config)
        steps, seen, loss = 0, 0, torch.zeros((), dtype=torch.float64)
        train, least = data.train, self.problem.least_rows
        rows = rows_of(len(train[1]), task.config, derive(key, "batches"), least=least)
        with seeded(derive(key, "torch")):
            for step in descend(self.problem, work, params, carry, train, rows, key):
                steps, seen = steps + 1, seen + step.examples
                loss += step.carry["loss"].double() * step.examples
        up, memory = work.finish(step.params, task.down, step.carry, steps)
        return Reply(task, up, weight_of(task, data), {"loss": float(loss) / seen}, samples=seen), memory


def count_of(data: ClientData | Held) -> int:
    """How many training rows a client has."""
    return len(data.rows) if isinstance(data, Held) else len(data.train[1])


def weight_of(task: Task, data: ClientData | Held) -> float:
    """What the client's update weighs: its samples, 1, or the weight that its data names."""
    weighting = task.config["weighting"]
    if weighting == "uniform":
        return 1.0
    if weighting == "client":
        if data.weight is None:
            raise ValueError(f"client {task.client} names no weight")
        return data.weight
    return float(count_of(data))

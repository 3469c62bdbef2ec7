"""The custom trainer: the user's own `fit(model, data, context)`, for what is no functional loop.

def fit(model, data, context):            # model: nn.Module holding the server's parameters
    x, y = data.train                     # the client's own tensors
    for epoch in range(context.config["epochs"]):
        ...                               # any loop, Lightning, Hugging Face Trainer, ...
    return {"loss": 0.3}                  # optional: metrics, or a Fit with a weight
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from coterie.core.seeds import Key, derive, seeded
from coterie.core.types import Algorithm, ClientId, Reply, Task, Tree
from coterie.data import ClientData, Held
from coterie.trainers.loop import task_key, weight_of
from coterie.trainers.problem import Problem, load_into, read_from


@dataclass(frozen=True, slots=True)
class Context:
    """What a user's fit() may want to know. key: of this task's own draws (`ct.rng(context.key)`)."""

    client: ClientId
    round: int
    config: Mapping[str, Any]  # epochs, batch_size, lr, ...
    key: Key


@dataclass(frozen=True, slots=True)
class Fit:
    """What a user's fit() may return. weight: None for the configured weighting."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    weight: float | None = None
    samples: int | None = None  # examples seen; None: epochs times the client's own


class Custom:
    """Runs the user's function on a fresh copy of the module for every task."""

    name = "custom"
    width = 1

    def __init__(
        self, problem: Problem, seed: int | Key, fit: Callable[[nn.Module, ClientData, Context], Any]
    ) -> None:
        self.problem, self.seed, self.user = problem, seed, fit

    def fit(
        self, algorithm: Algorithm, task: Task, memory: Tree, data: ClientData | Held
    ) -> tuple[Reply, Tree]:
        """Load the server's model, call the user's function, send what it made of it."""
        if isinstance(data, Held):
            data = ClientData(data.train, data.test, data.weight)
        work, key = algorithm.client_work, task_key(self.seed, task)
        module = copy.deepcopy(self.problem.training)
        load_into(module, task.down["model"])
        context = Context(task.client, task.round, dict(task.config), derive(key, "user"))
        with seeded(derive(key, "torch")):
            returned = self.user(module, data, context)
        told = returned if isinstance(returned, Fit) else Fit(metrics=returned or {})
        after = _fitting(read_from(module), task.down["model"])
        _, carry = work.start(task.down, memory, task.config)
        up, memory = work.finish(after["params"], task.down, {**carry, "buffers": after["buffers"]}, 1)
        weight = weight_of(task, data) if told.weight is None else float(told.weight)
        metrics = {name: float(value) for name, value in told.metrics.items()}
        samples = len(data.train[1]) * task.config["epochs"] if told.samples is None else told.samples
        return Reply(task, up, weight, metrics, samples=samples), memory


def _fitting(model: Tree, like: Tree) -> Tree:
    """The model in the dtypes of `like`. Raises ValueError when the user's function changed a shape."""
    for part in ("params", "buffers"):
        for name, value in like[part].items():
            found = model[part].get(name)
            if found is None or found.shape != value.shape:
                shape = None if found is None else tuple(found.shape)
                raise ValueError(f"fit() changed {name}: it was {tuple(value.shape)}, now {shape}")
    return {
        part: {name: model[part][name].to(value.dtype) for name, value in like[part].items()}
        for part in ("params", "buffers")
    }

"""The client's half that most algorithms share: some local steps of an optimiser, then send the delta."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from coterie.algorithms.optimizers import sgd
from coterie.core import trees
from coterie.core.errors import ConfigError
from coterie.core.seeds import Key
from coterie.core.types import Batch, ClientWork, Optimizer, Params, Tree

Weighting = Literal["samples", "uniform", "client"]


@dataclass(frozen=True, slots=True)
class Local:
    """What a client does between two exchanges.

    optimizer: learning rate -> Optimizer; its state starts anew in every task. lr: at version 0;
    multiplied by `lr_decay` with each version. epochs: passes over the client's data; batch_size: None
    for all of it in one batch. steps: this many steps instead of whole epochs.
    """

    optimizer: Callable[[Any], Optimizer] = sgd
    lr: float = 0.1
    lr_decay: float = 1.0
    epochs: int = 1
    batch_size: int | None = 32
    steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        for name, value, good in (
            ("lr", self.lr, self.lr > 0),
            ("lr_decay", self.lr_decay, self.lr_decay > 0),
            ("epochs", self.epochs, self.epochs >= 1),
            ("batch_size", self.batch_size, self.batch_size is None or self.batch_size >= 1),
            ("steps", self.steps, self.steps is None or self.steps >= 1),
        ):
            if not good:
                raise ConfigError(f"client {name} = {value}: must be positive")

    def config(self, weighting: Weighting) -> Callable[[int], Mapping[str, Any]]:
        """version -> Task.config."""
        fixed = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "weighting": weighting,
        }
        return lambda version: {**fixed, "lr": self.lr * self.lr_decay**version}


def delta_work(optimizer: Callable[[Any], Optimizer]) -> ClientWork:
    """Start from the server's model, descend, send {"delta": x - y, "buffers": buffers}."""
    return ClientWork(
        start=start,
        objective=objective,
        gradient=gradient,
        optimizer=lambda carry: optimizer(carry["lr"]),
        finish=finish,
        remember=None,
    )


def start(down: Tree, memory: Tree, config: Mapping[str, Any]) -> tuple[Params, Tree]:
    """Params of the server; buffers and learning rate ride in the carry, which holds tensors only."""
    del memory
    carry = {"buffers": down["model"]["buffers"], "lr": torch.tensor(config["lr"], dtype=torch.float64)}
    return down["model"]["params"], carry


def objective(loss: Callable[..., Any], params: Params, batch: Batch, carry: Tree) -> tuple[Any, Tree]:
    """Per-example losses [B]; BatchNorm's new buffers go back into the carry."""
    losses, buffers = loss(params, carry["buffers"], batch)
    return losses, {**carry, "buffers": buffers}


def gradient(
    objective: Callable[..., Any], params: Params, batch: Batch, mask: Any, carry: Tree, key: Key | None
) -> tuple[Params, Tree]:
    """Gradient of the mean loss over the examples that the mask keeps (None: all); the loss goes in carry."""
    del key

    def mean_loss(params: Params) -> tuple[Any, Tree]:
        losses, after = objective(params, batch, carry)
        mean = losses.mean() if mask is None else (losses * mask).sum() / mask.sum()
        return mean, {**after, "loss": mean.detach()}

    return torch.func.grad(mean_loss, has_aux=True)(params)  # type: ignore[no-any-return]


def finish(params: Params, down: Tree, carry: Tree, steps: int) -> tuple[Tree, Tree]:
    """The update of FedAvg and its kin, and no memory."""
    del steps
    return {"delta": trees.subtract(down["model"]["params"], params), "buffers": carry["buffers"]}, None

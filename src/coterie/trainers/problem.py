"""What is learned: a model and its loss, as pure functions of (params, buffers, batch)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from coterie.core.errors import ConfigError
from coterie.core.types import Batch, Params, Tree

TaskKind = Literal["classification", "regression"]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """outputs [B, classes, ...], targets [B, ...] -> losses [B] (mean over further dimensions)."""
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """outputs [B] or [B, 1] or [B, d], targets likewise -> losses [B] (mean over further dimensions)."""
    losses = (outputs.reshape(targets.shape) - targets) ** 2
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


LOSSES: Mapping[TaskKind, Callable[[Tensor, Tensor], Tensor]] = {
    "classification": cross_entropy,
    "regression": squared_error,
}


class Problem:
    """A model and a loss. It keeps private copies of the module, one in training and one in evaluation mode.

    The copies share their parameters, which are never changed: every call names its params and buffers, so
    nothing leaks from one client to the next. Threads must not share a Problem (law 8), because
    `functional_call` swaps the module's tensors while it runs: a second thread gets a RuntimeError.
    """

    def __init__(self, module: nn.Module, task: TaskKind = "classification") -> None:
        self.task = task
        self.training = copy.deepcopy(module).train()
        own = (*self.training.parameters(), *self.training.buffers())
        self.evaluation = copy.deepcopy(self.training, {id(tensor): tensor for tensor in own}).eval()
        self.per_example = LOSSES[task]
        norms = (module for module in self.training.modules() if isinstance(module, _BatchNorm))
        self._busy = threading.Lock()
        self.least_rows = 2 if any(norms) else 1  # that a training batch must have

    def model(self) -> Tree:
        """The module's initial {"params", "buffers"}, as fresh tensors."""
        return read_from(self.training)

    def forget(self) -> None:
        """Let go of the initial model, for who keeps it elsewhere: `model` may not be called afterwards."""
        empty: dict[Tensor, Tensor] = {}
        for module in (*self.training.modules(), *self.evaluation.modules()):
            for name, value in (
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False, remove_duplicate=False),
            ):
                if not isinstance(value, nn.Parameter):
                    empty.setdefault(value, value.to("meta"))
                elif value.requires_grad:
                    empty.setdefault(value, nn.Parameter(value.detach().to("meta")))
                setattr(module, name, empty.get(value, value))

    def loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """Per-example losses [B] in training mode, and the buffers after the pass (BatchNorm)."""
        inputs, targets = batch
        after = {name: value.clone() for name, value in buffers.items()}  # modules update buffers in place
        with self._alone():
            outputs = functional_call(self.training, (dict(params), after), (inputs,))
        return self.per_example(outputs, targets), after

    def measure(
        self, model: Tree, inputs: Tensor, targets: Tensor, *, batch_size: int = 512
    ) -> dict[str, float]:
        """{"loss", "count"} and for classification {"accuracy"}: means over all examples, evaluation mode.

        Sums are taken in float64 over fixed batches, so the result depends on the data alone.
        """
        total, correct = 0.0, 0.0
        with torch.no_grad(), self._alone():
            for start in range(0, len(targets), batch_size):
                part = targets[start : start + batch_size]
                outputs = functional_call(
                    self.evaluation,
                    (model["params"], model["buffers"]),
                    (inputs[start : start + batch_size],),
                )
                total += float(self.per_example(outputs, part).double().sum())
                if self.task == "classification":
                    hits = outputs.argmax(1) == part
                    correct += float(hits.double().flatten(1).mean(1).sum() if hits.dim() > 1 else hits.sum())
        count = len(targets)
        measured = {"loss": total / count, "count": float(count)}
        return {**measured, "accuracy": correct / count} if self.task == "classification" else measured

    def check(self, inputs: Tensor, targets: Tensor, classes: int | None) -> None:
        """Raise ConfigError when the model's output does not fit the labels, or it does not run at all.

        inputs [>= 2, ...], targets likewise: a few examples. classes: how many labels there are.
        """
        buffers = {name: value.clone() for name, value in self.evaluation.named_buffers()}
        try:
            with torch.no_grad():
                outputs = functional_call(self.evaluation, buffers, (inputs,))
        except Exception as error:
            raise ConfigError(
                f"the model does not run on this data: {error}",
                f"it gets inputs of shape {tuple(inputs.shape)} (batch first), dtype {inputs.dtype}",
            ) from error
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if self.task == "classification":
            wanted = (len(targets), classes, *targets.shape[1:])
            if found == wanted:
                return
            raise ConfigError(
                f"the model gives {found} for inputs {tuple(inputs.shape)}; the data has {classes} labels",
                f"the last layer must give [{', '.join(map(str, ('batch', *wanted[1:])))}] scores",
            )
        if not (isinstance(outputs, Tensor) and outputs.numel() == targets.numel()):
            raise ConfigError(
                f"the model's output is {found}; the targets are {tuple(targets.shape)}",
                "a regression model gives one number for each target",
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("two threads use one Problem at the same time; give each thread its own")
        try:
            yield
        finally:
            self._busy.release()

    def parameters(self) -> int:
        """How many trainable numbers the model has."""
        return sum(value.numel() for value in self.training.parameters() if value.requires_grad)


def load_into(module: nn.Module, model: Tree) -> None:
    """Copy params and buffers into a module, in place."""
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    with torch.no_grad():
        for name, value in model["params"].items():
            params[name].copy_(value)
        for name, value in model["buffers"].items():
            buffers[name].copy_(value)


def read_from(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """{"params", "buffers"} of a module, as fresh tensors; without frozen parameters, which nobody learns."""
    return {
        "params": {
            n: value.detach().clone() for n, value in module.named_parameters() if value.requires_grad
        },
        "buffers": {n: value.detach().clone() for n, value in module.named_buffers()},
    }

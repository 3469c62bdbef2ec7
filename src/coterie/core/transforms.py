"""A chain of transforms joined to an algorithm: `transformed` for the server's half, `encoded` the client's.

The client's half runs after the trainer and never inside it: a recorded graph or a `vmap` would freeze what
must be drawn anew. No trainer, gathering or schedule knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coterie.core import exact, trees
from coterie.core.errors import ConfigError
from coterie.core.types import Aggregator, Algorithm, Lost, Replies, Reply, Task, Transform, Tree

OWN = "transforms"  # of the server's state: what each transform keeps there, in the order of the chain


def total() -> Aggregator:
    """The exact sum, unweighted: integers in int64, floats in float64, in any order the same bits."""

    def add(acc: Tree, ups: Tree, weights: float | Sequence[float]) -> Tree:
        return exact.add(acc, ups, 1.0 if isinstance(weights, float | int) else [1.0] * len(weights))

    return Aggregator(lambda: None, add, exact.merge, exact.total, linear=True)


def transformed(algorithm: Algorithm, transforms: Sequence[Transform]) -> Algorithm:
    """The algorithm with the chain between its clients and its server; itself, when the chain is empty.

    `state["transforms"]` holds what the transforms keep, `down["hints"]` what clients must know of it. With
    client-level privacy (`cohort`) updates are summed exactly and `finalize` is told of `cohort` replies,
    however many came. Raises ConfigError when the aggregator would have to see each update.
    """
    if not transforms:
        return algorithm
    cohort = next((each.cohort for each in transforms if each.cohort), None)
    if cohort and not algorithm.aggregator.linear:
        raise ConfigError(
            "noise protects a sum, and this aggregator must see each update by itself",
            'use algorithm.aggregator.kind = "mean", or leave the noise out',
        )

    def broadcast(state: Tree) -> Tree:
        hints = {
            str(place): each.hint(own)
            for place, (each, own) in enumerate(zip(transforms, state[OWN], strict=True))
            if each.hint is not None
        }
        return {**algorithm.broadcast(state), **({"hints": hints} if hints else {})}

    def finalize(state: Tree, aggregate: Tree, weight: float, count: int) -> Tree:
        like = update_like(algorithm, state) if cohort else None  # as large as the model, so only if needed
        if aggregate is None:  # nobody replied: a sum of nothing is noised like any other
            task = Task(0, "", 0, 0, broadcast(state))
            stacked = encode(transforms, trees.map_tree(lambda leaf: leaf.unsqueeze(0), like), [task])
            aggregate = trees.map_tree(lambda leaf: torch.zeros_like(leaf[0]), stacked)
        kept = list(state[OWN])
        for place in reversed(range(len(transforms))):
            aggregate, kept[place] = transforms[place].close(aggregate, kept[place])
        if cohort:
            weight, count = float(cohort), cohort
            aggregate = trees.map_tree(lambda leaf, old: leaf.to(old.dtype), aggregate, like)
        return {**algorithm.finalize(state, aggregate, weight, count), OWN: tuple(kept)}

    return replace(
        algorithm,
        init=lambda model: {**algorithm.init(model), OWN: tuple(each.init() for each in transforms)},
        broadcast=broadcast,
        aggregator=total() if cohort else algorithm.aggregator,
        finalize=finalize,
        transforms=tuple(transforms),
    )


def update_like(algorithm: Algorithm, state: Tree) -> Tree:
    """An update as a client's training makes it, before any transform: its names, shapes and dtypes."""
    work, down = algorithm.client_work, algorithm.broadcast(state)
    memory = work.remember(down) if work.remember else None
    params, carry = work.start(down, memory, algorithm.local(0))
    return work.finish(params, down, carry, 1)[0]


def encode(transforms: Sequence[Transform], ups: Tree, tasks: Sequence[Task]) -> Tree:
    """The client's half of the chain, on updates stacked [tasks, ...] of tasks of one version."""
    hints = tasks[0].down.get("hints", {})
    for place, each in enumerate(transforms):
        ups = each.encode(ups, hints.get(str(place)), tasks)
    return ups


def encoded_block(algorithm: Algorithm, block: Replies) -> Iterator[Replies | Lost]:
    """A block of replies as it leaves the clients.

    With client-level privacy an update that is not finite is lost here: no integer stands for it.
    """
    if not algorithm.transforms:
        yield block
        return
    tasks, ups = block.tasks, block.ups
    if not any(each.cohort for each in algorithm.transforms):
        yield block._replace(ups=encode(algorithm.transforms, ups, tasks))
        return
    fine = torch.ones(len(tasks), dtype=torch.bool)
    for leaf in trees.leaves(ups):
        if leaf.is_floating_point() and leaf[0].numel():
            fine &= trees.largest(leaf).isfinite()
    for row in (~fine).nonzero().flatten().tolist():
        yield Lost(tasks[row], "its update holds NaN or infinity")
    if not fine.any():
        return
    if not fine.all():
        tasks = [task for task, good in zip(tasks, fine.tolist(), strict=True) if good]
        ups = trees.map_tree(lambda leaf: leaf[fine], ups)
    count = len(tasks)
    yield Replies(tasks, encode(algorithm.transforms, ups, tasks), [1.0] * count, {}, [0] * count)


def encoded(algorithm: Algorithm, reply: Reply) -> Reply | Lost:
    """One reply as it leaves the client."""
    if not algorithm.transforms:
        return reply
    metrics = {name: [value] for name, value in reply.metrics.items()}
    ups = trees.map_tree(lambda leaf: leaf.unsqueeze(0), reply.up)
    (made,) = encoded_block(algorithm, Replies([reply.task], ups, [reply.weight], metrics, [reply.samples]))
    if isinstance(made, Lost):
        return made
    told = {name: values[0] for name, values in made.metrics.items()}
    up = trees.map_tree(_only, made.ups)
    return Reply(reply.task, up, made.weights[0], told, made.samples[0])


def _only(leaf: Tensor) -> Tensor:
    return leaf[0]

"""Packing: which tasks are worked on together, so that little is wasted on padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise

from coterie.core.types import ClientId, Task

FEW = 8  # clients whose blocks need not be even in number


def pack(tasks: Sequence[Task], size: Callable[[ClientId], int], width: int) -> list[list[Task]]:
    """Cut tasks into blocks of up to `width` of one version and config, the largest clients first.

    Neighbours in size share a block; blocks are equally long, and even in number where there are several.
    A function of the tasks alone: the same blocks whoever works on them.
    """
    blocks: list[list[Task]] = []
    sizes = {task.client: size(task.client) for task in tasks}
    configs: list[object] = []  # few; those of one version usually are one object

    def kind(task: Task) -> tuple[int, int]:
        if task.config not in configs:
            configs.append(task.config)
        return task.version, configs.index(task.config)

    order = sorted(tasks, key=lambda task: (kind(task), -sizes[task.client]))
    for _, group in groupby(order, key=kind):
        alike = list(group)
        count = -(-len(alike) // width)
        if count > 1 and width > 1 and len(alike) >= FEW:
            count += count % 2  # for a second core
        ends = [len(alike) * index // count for index in range(count + 1)]
        blocks += [alike[start:end] for start, end in pairwise(ends)]
    return sorted(blocks, key=lambda block: -len(block) * max(sizes[task.client] for task in block))

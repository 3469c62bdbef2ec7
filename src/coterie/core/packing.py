"""Packing: which tasks are worked on together, so that little is wasted on padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coterie.core.types import ClientId, Task


def pack(tasks: Sequence[Task], size: Callable[[ClientId], int], width: int) -> list[list[Task]]:
    """Cut tasks into blocks of up to `width` of one version and config, the largest clients first.

    Neighbours in size share a block. A function of the tasks alone: the same blocks on every machine.
    """
    order = sorted(tasks, key=lambda task: (task.version, -size(task.client)))
    blocks: list[list[Task]] = []
    for task in order:
        last = blocks[-1] if blocks else []
        if last and len(last) < width and task.version == last[0].version and task.config == last[0].config:
            last.append(task)
        else:
            blocks.append([task])
    return blocks

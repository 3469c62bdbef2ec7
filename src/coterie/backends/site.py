"""What a participant does with tasks, in every backend: find the memory, train or evaluate, answer."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from coterie.core.errors import CoterieError
from coterie.core.gather import Gathered, OnNan, accept, accept_block, empty
from coterie.core.packing import pack
from coterie.core.transforms import encoded, encoded_block
from coterie.core.trees import map_tree
from coterie.core.types import Algorithm, ClientId, Lost, Replies, Reply, Task, Tree

log = logging.getLogger("coterie")


class Trainer(Protocol):
    """Trains clients one by one, or in blocks of up to `width`.

    A trainer with a width above 1 also has `fit_block(algorithm, tasks, memories, datas) -> [(Replies,
    memories), ...]`, where all tasks are of one version and have one config, and `least`: how many rows a
    client of a block must have.
    """

    width: int

    def fit(self, algorithm: Algorithm, task: Task, memory: Tree, data: Any) -> tuple[Reply, Tree]:
        """Train on one client's data; return its reply and its new memory."""


class Store(Protocol):
    """Where clients' memories are: a generation for each task."""

    def get(self, client: ClientId, generation: int | None) -> Tree | None:
        """The memory that this task left; None for a new client."""

    def put(self, client: ClientId, generation: int, tree: Tree) -> None:
        """Keep what this task leaves."""


class Pool(Protocol):
    """Whoever answers tasks for a backend: a `Site` in this process, worker processes, a cluster."""

    appetite: int  # how many tasks are best asked for at a time
    progress: Callable[[int], None]  # called with how many more tasks are done; may raise to stop

    def answer(self, tasks: Sequence[Task]) -> list[Reply | Lost]:
        """Answer each task."""

    def fold(self, tasks: Sequence[Task], on_nan: OnNan, got: Gathered | None = None) -> Gathered:
        """Answer all of them at once and fold the replies into `got`."""

    def close(self) -> None:
        """Let go of what it holds."""


class Site:
    """Answers the tasks of the clients it hosts; their memory stays here, a generation for each task.

    evaluate: (model, client's data) -> metrics with a "count". data: client -> its data. size: client ->
    rows it trains on, by which blocks are packed.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        trainer: Trainer,
        evaluate: Callable[[Tree, Any], dict[str, float]],
        data: Callable[[ClientId], Any],
        memories: Store,
        size: Callable[[ClientId], int] = lambda client: 1,
    ) -> None:
        self.algorithm, self.trainer, self.evaluate = algorithm, trainer, evaluate
        self.data, self.memories, self.size = data, memories, size
        self.appetite = trainer.width
        self.progress: Callable[[int], None] = lambda done: None

    def __call__(self, task: Task) -> Reply | Lost:
        """Answer a task. What the client raises becomes a Lost; its traceback goes to the log."""
        try:
            if task.kind == "evaluate":
                metrics = self.evaluate(task.down["model"], self.data(task.client))
                return Reply(task, {}, metrics.pop("count"), metrics)
            memory = self.memories.get(task.client, task.memory)
            reply, after = self.trainer.fit(self.algorithm, task, memory, self.data(task.client))
            if after is not None:
                self.memories.put(task.client, task.id, after)
            return encoded(self.algorithm, reply)
        except CoterieError:
            raise  # a mistake in the experiment, not in the client
        except Exception as error:
            return _failed(task, error)

    def answer(self, tasks: Sequence[Task]) -> list[Reply | Lost]:
        """Answer each task, in blocks where the trainer can."""
        found: dict[int, Reply | Lost] = {}
        for part in self._answers(tasks):
            for reply in [part] if isinstance(part, Reply | Lost) else unstacked(part):
                found[reply.task.id] = reply
        return [found[task.id] for task in tasks]

    def fold(self, tasks: Sequence[Task], on_nan: OnNan, got: Gathered | None = None) -> Gathered:
        """Answer all of them and fold the replies into `got`."""
        aggregator = self.algorithm.aggregator
        got = got or Gathered(empty(aggregator))
        for part in self._answers(tasks):
            if isinstance(part, Replies):
                accept_block(got, aggregator, part, on_nan)
            else:
                accept(got, aggregator, part, on_nan)
        return got

    def close(self) -> None:
        """Nothing to let go of."""

    def _answers(self, tasks: Sequence[Task]) -> Iterator[Reply | Lost | Replies]:
        alone, blocks = self.packed(tasks)
        for task in alone:
            yield self(task)
            self.progress(1)
        for block in blocks:
            yield from self._block(block)
            self.progress(len(block))

    def packed(self, tasks: Sequence[Task]) -> tuple[list[Task], list[list[Task]]]:
        """Which tasks are worked on one by one, and the blocks of the others; the same for every pool."""
        width, least = self.trainer.width, getattr(self.trainer, "least", 1)
        alone: list[Task] = []
        together: list[Task] = []
        for task in tasks:
            blocked = width > 1 and task.kind == "train" and (least <= 1 or self.size(task.client) >= least)
            (together if blocked else alone).append(task)
        return alone, pack(together, self.size, width)

    def _block(self, tasks: Sequence[Task]) -> Iterator[Reply | Lost | Replies]:
        """Train a block; if it cannot be trained together, each client alone, so that the guilty is found."""
        ready, datas, memories = [], [], []
        for task in tasks:
            try:
                data, memory = self.data(task.client), self.memories.get(task.client, task.memory)
            except CoterieError:
                raise
            except Exception as error:
                yield _failed(task, error)
                continue
            ready.append(task)
            datas.append(data)
            memories.append(memory)
        if not ready:
            return
        try:
            made = self.trainer.fit_block(self.algorithm, ready, memories, datas)  # type: ignore[attr-defined]
        except CoterieError:
            raise
        except Exception as error:
            log.warning("a block of %d clients failed (%s): each of them alone", len(ready), error)
            yield from (self(task) for task in ready)
            return
        for replies, after in made:
            if after is not None:
                for row, task in enumerate(replies.tasks):
                    self.memories.put(
                        task.client, task.id, map_tree(lambda leaf, row=row: leaf[row].clone(), after)
                    )
            yield from encoded_block(self.algorithm, replies)


def unstacked(block: Replies) -> Iterator[Reply]:
    """The replies of a block one by one; their tensors are copies, so the block can be let go."""
    for row, task in enumerate(block.tasks):
        yield Reply(
            task,
            map_tree(lambda leaf, row=row: leaf[row].clone(), block.ups),
            block.weights[row],
            {name: values[row] for name, values in block.metrics.items()},
            block.samples[row],
        )


def _failed(task: Task, error: Exception) -> Lost:
    log.warning(
        "client %s failed in round %d:\n%s",
        task.client,
        task.round + 1,
        "".join(traceback.format_exception(error)).rstrip(),
    )
    return Lost(task, f"{type(error).__name__}: {error}")

"""What a participant does with a Task, in every backend: find its memory, train or evaluate, answer."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from coterie.core.errors import CoterieError
from coterie.core.types import Algorithm, ClientId, Lost, Reply, Task, Tree
from coterie.storage import Memories

log = logging.getLogger("coterie")


class Fit(Protocol):
    """A trainer's fit: algorithm, task, memory, data -> reply, new memory."""

    def __call__(self, algorithm: Algorithm, task: Task, memory: Tree, data: Any) -> tuple[Reply, Tree]:
        """Train on one client's data."""


class Site:
    """Answers the tasks of the clients it hosts; their memory stays here, a generation for each task.

    fit: trains. evaluate: (model, client's data) -> metrics with a "count". data: client -> its data.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        fit: Fit,
        evaluate: Callable[[Tree, Any], dict[str, float]],
        data: Callable[[ClientId], Any],
        memories: Memories,
    ) -> None:
        self.algorithm, self.fit, self.evaluate = algorithm, fit, evaluate
        self.data, self.memories = data, memories

    def __call__(self, task: Task) -> Reply | Lost:
        """Answer a task. What the client raises becomes a Lost; its traceback goes to the log."""
        try:
            if task.kind == "evaluate":
                metrics = self.evaluate(task.down["model"], self.data(task.client))
                return Reply(task, {}, metrics.pop("count"), metrics)
            memory = self.memories.get(task.client, task.memory)
            reply, after = self.fit(self.algorithm, task, memory, self.data(task.client))
            if after is not None:
                self.memories.put(task.client, task.id, after)
            return reply
        except CoterieError:
            raise  # a mistake in the experiment, not in the client
        except Exception as error:
            log.warning(
                "client %s failed in round %d:\n%s",
                task.client,
                task.round + 1,
                traceback.format_exc().rstrip(),
            )
            return Lost(task, f"{type(error).__name__}: {error}")

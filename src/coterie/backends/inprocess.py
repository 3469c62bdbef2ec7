"""The in-process backend: a deterministic discrete-event simulation on a virtual clock.

A task's reply arrives after the time its device takes; work is done when the event is read, so what is
cancelled is never computed. Events at the same instant come in the order of their ids. Relays are plans,
run here between the root plan and the clients.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from coterie.core.gather import awaits
from coterie.core.types import Action, Cancel, ClientId, Event, Lost, Plan, Reply, Task, Tick, Timer


class Due(NamedTuple):
    """Something that happens at a virtual time."""

    at: float
    id: int  # of the task or timer: unique, so that ties are broken the same way in every run
    node: ClientId  # whose plan is told; "" is the root
    what: Task | Timer | Reply


class InProcess:
    """Runs tasks one after the other, in the order in which they finish on the virtual clock.

    answer: task -> Reply or Lost. duration: task -> seconds. dropped: task -> does the client drop out?
    relays: name -> a relay's plan. clock: what `clock()` returned at the commit that is resumed from.
    """

    def __init__(
        self,
        answer: Callable[[Task], Reply | Lost],
        *,
        duration: Callable[[Task], float] = lambda task: 1.0,
        dropped: Callable[[Task], bool] = lambda task: False,
        relays: Mapping[ClientId, Callable[[], Plan[None]]] | None = None,
        clock: Mapping[str, Any] | None = None,
    ) -> None:
        self.answer, self.duration, self.dropped = answer, duration, dropped
        self.now: float = clock["now"] if clock else 0.0
        self.was_due: dict[int, float] = dict(clock["due"]) if clock else {}
        self.queue: list[Due] = []
        self.cancelled: set[int] = set()
        self.open: set[int] = set()
        self.plans = {name: make() for name, make in (relays or {}).items()}
        self.above: dict[int, ClientId] = {}  # task sent to a relay -> who sent it
        for plan in self.plans.values():
            next(plan)

    def send(self, actions: Sequence[Action]) -> None:
        """Take the root plan's actions."""
        self._take("", actions)

    async def event(self) -> tuple[float, Event]:
        """Advance the clock to the next event of the root plan."""
        await asyncio.sleep(0)  # where Ctrl-C takes effect
        while True:
            if not self.queue:
                raise RuntimeError("the plan waits, but nothing is outstanding")
            due = heapq.heappop(self.queue)
            self.open.discard(due.id)
            if due.id in self.cancelled:
                self.cancelled.discard(due.id)
                continue
            self.now = due.at
            event = self._happen(due)
            if due.node == "":
                return self.now, event
            self._tell(due.node, event)

    def clock(self) -> dict[str, Any]:
        """What a checkpoint must hold of the simulation: the time, and when the tasks in flight are due."""
        return {
            "now": self.now,
            "due": {due.id: due.at for due in self.queue if due.id not in self.cancelled},
        }

    def _happen(self, due: Due) -> Event:
        if isinstance(due.what, Timer):
            return Tick(due.id, self.now)
        if isinstance(due.what, Reply):
            return due.what
        return Lost(due.what, "dropped out") if self.dropped(due.what) else self.answer(due.what)

    def _take(self, node: ClientId, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Cancel):
                if action.id in self.open:
                    self.cancelled.add(action.id)
            elif isinstance(action, Reply):
                self._push(Due(self.now, action.task.id, self.above.pop(action.task.id), action))
            elif isinstance(action, Timer):
                self._push(Due(self.was_due.pop(action.id, self.now + action.after), action.id, node, action))
            elif isinstance(action, Task) and action.client in self.plans:
                self.above[action.id] = node
                self._tell(action.client, action)
            elif isinstance(action, Task):
                at = self.was_due.pop(action.id, None)
                self._push(
                    Due(self.now + self.duration(action) if at is None else at, action.id, node, action)
                )

    def _push(self, due: Due) -> None:
        self.open.add(due.id)
        heapq.heappush(self.queue, due)

    def _tell(self, node: ClientId, event: Event | None) -> None:
        actions = self.plans[node].send(event)
        self._take(node, actions)
        if not awaits(actions):
            self._tell(node, None)

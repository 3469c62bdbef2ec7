"""The in-process backend: a deterministic discrete-event simulation on a virtual clock.

A task's reply arrives after the time its device takes; work is done when the event is read, so what is
cancelled is never computed. Events at the same instant come in the order of their ids. Work is handed to
a pool in blocks; a "fold" task is gathered here at once, for the price of its clients' work. Relays that
are plans are run here too, between the root plan and the clients.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from coterie.backends.site import Pool
from coterie.backends.system import Arrival, Device
from coterie.core.gather import OnNan, awaits, below, folded, lose
from coterie.core.types import Action, Cancel, ClientId, Event, Lost, Plan, Reply, Task, Tick, Timer


class Due(NamedTuple):
    """Something that happens at a virtual time."""

    at: float
    id: int  # of the task or timer: unique, so that ties are broken the same way in every run
    node: ClientId  # whose plan is told; "" is the root
    what: Task | Timer | Reply
    lost: str = ""  # why the task gets no reply


class InProcess:
    """Answers tasks in the order in which they finish on the virtual clock.

    pool: who works. device: when the reply to a task arrives, or why none does. relays: name -> a relay's
    plan. clock: what `clock()` returned at the commit that is resumed from. on_nan: as in a schedule.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        device: Device = lambda task, now: Arrival(1.0),
        relays: Mapping[ClientId, Callable[[], Plan[None]]] | None = None,
        clock: Mapping[str, Any] | None = None,
        on_nan: OnNan = "stop",
    ) -> None:
        self.pool, self.device, self.on_nan = pool, device, on_nan
        self.now: float = clock["now"] if clock else 0.0
        self.was_due: dict[int, Arrival] = (
            {id: Arrival(*due) for id, due in clock["due"].items()} if clock else {}
        )
        self.mates: dict[int, tuple[Task, ...]] = {}  # task -> the block it was answered in
        for block in clock["blocks"] if clock else ():
            self.mates |= {task.id: block for task in block}
        self.asked = 0  # clients, in the round that is worked on
        self.busy = 0.0  # seconds that the pool has worked
        self.queue: list[Due] = []
        self.cancelled: set[int] = set()
        self.open: set[int] = set()
        self.ready: dict[int, Reply | Lost] = {}  # answered with its block, not due yet
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
                self._done(due.id)
                continue
            self.now = due.at
            if isinstance(due.what, Task) and due.what.kind == "fold":
                at, reply = self._fold(due.what)
                self._push(Due(at, due.id, due.node, reply))
                continue
            event = self._happen(due)
            if due.node == "":
                return self.now, event
            self._tell(due.node, event)

    def clock(self) -> dict[str, Any]:
        """What a checkpoint must hold of the simulation: the time, and what is known of tasks in flight."""
        waiting = [due for due in self.queue if due.id not in self.cancelled]
        blocks = {id(block): block for due in waiting if (block := self.mates.get(due.id))}
        return {
            "now": self.now,
            "due": {due.id: (due.at, due.lost) for due in waiting},
            "blocks": tuple(blocks.values()),
        }

    def _happen(self, due: Due) -> Event:
        if isinstance(due.what, Timer):
            return Tick(due.id, self.now)
        if isinstance(due.what, Reply):
            return due.what
        if due.lost:
            return Lost(due.what, due.lost)
        if due.id not in self.ready:
            block = self.mates.get(due.id) or self._block(due)
            start = time.perf_counter()
            answers = self.pool.answer(block)
            self.busy += time.perf_counter() - start
            for answer in answers:
                if answer.task.id == due.id or answer.task.id in self.open:
                    self.ready[answer.task.id] = answer
                    self.mates[answer.task.id] = block
        answer = self.ready[due.id]
        self._done(due.id)
        return answer

    def _block(self, due: Due) -> tuple[Task, ...]:
        """The task that is due, and others of its version that can be answered with it."""
        first = due.what
        assert isinstance(first, Task)
        if self.pool.appetite == 1:
            return (first,)
        others = sorted(
            other
            for other in self.queue
            if isinstance(other.what, Task)
            and (other.what.kind, other.what.version) == (first.kind, first.version)
            and not other.lost
            and other.id not in self.cancelled
            and other.id not in self.mates
        )
        return (first, *(other.what for other in others[: self.pool.appetite - 1]))  # type: ignore[arg-type]

    def _done(self, id: int) -> None:
        self.ready.pop(id, None)
        self.mates.pop(id, None)

    def _fold(self, task: Task) -> tuple[float, Reply]:
        """Gather what a "fold" task asks for; return when it is complete, and the answer.

        As `core.fold_task` would, run here: who is in time is known before anybody works.
        """
        enough, deadline = task.config.get("enough"), task.config.get("deadline")
        end = math.inf if deadline is None else self.now + deadline
        heard = deque(sorted((self._due(each, "") for each in below(task)), key=lambda due: due[:2]))
        self.asked = len(heard)
        at, got = self.now, self.pool.fold((), self.on_nan)
        while heard and (enough is None or len(got.accepted) < enough):
            chosen: list[Task] = []
            while heard and (enough is None or len(got.accepted) + len(chosen) < enough):
                if heard[0].at > end:
                    break
                due = heard.popleft()
                at = due.at
                assert isinstance(due.what, Task)
                if due.lost:
                    got.fold = lose(got.fold, f"{due.what.client}: {due.lost}")
                else:
                    chosen.append(due.what)
            if chosen:
                start = time.perf_counter()
                got = self.pool.fold(chosen, self.on_nan, got)
                self.busy += time.perf_counter() - start
            elif heard:  # all that are left are late
                at = end
                got.fold = lose(
                    got.fold,
                    *(f"{late.what.client}: no reply after {deadline} s" for late in heard),  # type: ignore[union-attr]
                )
                break
        return at, folded(task, got)

    def _due(self, task: Task, node: ClientId) -> Due:
        """When the task is answered: as its device says, or as it was known before a resumption."""
        known = self.was_due.pop(task.id, None)
        if known is not None:
            return Due(known.after, task.id, node, task, known.lost)
        after, lost = self.device(task, self.now)
        return Due(self.now + after, task.id, node, task, lost)

    def _take(self, node: ClientId, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Cancel):
                if action.id in self.open:
                    self.cancelled.add(action.id)
            elif isinstance(action, Reply):
                self._push(Due(self.now, action.task.id, self.above.pop(action.task.id), action))
            elif isinstance(action, Timer):
                known = self.was_due.pop(action.id, None)
                at = self.now + action.after if known is None else known.after
                self._push(Due(at, action.id, node, action))
            elif isinstance(action, Task) and action.client in self.plans:
                self.above[action.id] = node
                self._tell(action.client, action)
            elif isinstance(action, Task) and action.kind == "fold":
                self._push(Due(self.now, action.id, node, action))
            elif isinstance(action, Task):
                self._push(self._due(action, node))

    def _push(self, due: Due) -> None:
        self.open.add(due.id)
        heapq.heappush(self.queue, due)

    def _tell(self, node: ClientId, event: Event | None) -> None:
        actions = self.plans[node].send(event)
        self._take(node, actions)
        if not awaits(actions):
            self._tell(node, None)

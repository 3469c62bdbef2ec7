"""A run's backend over a hub: tasks go out to sites, and their replies are read when the plan takes them.

It lives in the thread and event loop of its plan and talks to the hub's. What the plan was told is a
`Record`, durable words of which any run can be continued: `replay` takes them back in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

from coterie.backends import spans
from coterie.backends.network.hub import Hub
from coterie.backends.network.messages import ROWS, Answered, Assign, Failed, Rang, line, parse
from coterie.core import trees
from coterie.core.errors import RunError
from coterie.core.types import Action, Cancel, ClientId, Event, Lost, Reply, Task, Tick, Timer, Tree
from coterie.storage import Blob


class Record(NamedTuple):
    """An event as it is logged. head: the message it came as. blob: what holds the reply's update."""

    kind: str  # "reply", "lost" or "tick"
    now: float
    head: str
    blob: Blob | None


class NetworkBackend:
    """A `core.types.Backend` for a run that is open in the hub.

    place_of: client -> its site. replay: (now, head) of the records since the commit that the plan goes on
    from, in order. expected: task -> a tree with the names, shapes and dtypes that its reply must have (on
    the meta device, say), None for any. clock: when the plan was or had been at its start, in seconds.
    """

    def __init__(
        self,
        hub: Hub,
        run: str,
        place_of: Callable[[ClientId], str],
        *,
        replay: Iterable[tuple[float, str]] = (),
        expected: Callable[[Task], Tree | None] = lambda task: None,
        clock: float | None = None,
    ) -> None:
        self.hub, self.run, self.place_of, self.expected = hub, run, place_of, expected
        self.now = time.time() if clock is None else clock
        self.trace = spans.RunTrace(run)  # for who made this to end
        self.last: Record  # what the last event is logged as
        self._replay = iter(replay)
        self._next = next(self._replay, None)
        self._waiting: dict[int, Task] = {}
        self._unsent: list[Task] = []
        self._timers: dict[int, float | asyncio.TimerHandle] = {}  # a time while nothing is sent
        self._down: tuple[Tree, Blob] | None = None  # the newest
        self._ups: list[str] = []  # read since the last commit
        self._arrived: asyncio.Queue[Answered | Failed | Rang] = asyncio.Queue()
        self._loop: asyncio.AbstractEventLoop | None = None

    def send(self, actions: Sequence[Action]) -> None:
        """Take the plan's actions; the models among them are on disk when this returns."""
        if self._loop is not (loop := asyncio.get_running_loop()):  # one plan after the other
            self._loop, self._arrived = loop, asyncio.Queue()
        cancelled = []
        for action in actions:
            if isinstance(action, Task):
                self._waiting[action.id] = action
                self._unsent.append(action)
            elif isinstance(action, Timer):
                self._timers[action.id] = self.now + action.after
            elif isinstance(action, Cancel):
                timer = self._timers.pop(action.id, None)
                if isinstance(timer, asyncio.TimerHandle):
                    timer.cancel()
                if self._waiting.pop(action.id, None):
                    self.trace.came(action.id, "cancelled")
                    cancelled.append(action.id)
        if cancelled:
            self._tell(self.hub.drop, self.run, cancelled)

    async def event(self) -> tuple[float, Event]:
        """Wait for the next event, stamped with the real clock; those of `replay` come first."""
        while True:
            replayed = self._next
            if replayed is not None:
                self.now, message = replayed[0], parse(replayed[1].encode())
                if isinstance(message, Answered):
                    self.hub.shelf.hold(self.run, message.up.digest)
                self._next = next(self._replay, None)
            else:
                self._flush()
                message = await self._arrived.get()
                self.now = max(self.now, time.time())  # a clock that is set back stands still
            event = self._event(message, sure=replayed is not None)
            if event is not None:
                return self.now, event

    def taken(self, event: Event) -> None:
        """The event is durable: its site may forget the reply."""
        if isinstance(event, Reply):
            self._tell(self.hub.taken, self.run, event.task.id)

    def accepted(self, version: int, accepted: Mapping[ClientId, int], flying: Sequence[int]) -> None:
        """The commit is durable: the sites are told, and the replies in it are let go of."""
        self._tell(self.hub.accepted, self.run, version, dict(accepted), list(flying))
        self.trace.committed()
        for digest in self._ups:
            self.hub.shelf.release(self.run, digest)
        self._ups.clear()

    def _flush(self) -> None:
        """Set the timers and send the tasks that are new; those of one site and one model in one message."""
        assert self._loop is not None
        for timer, due in self._timers.items():
            if not isinstance(due, asyncio.TimerHandle):
                after = max(due - time.time(), 0.0)
                self._timers[timer] = self._loop.call_later(after, self._arrived.put_nowait, Rang(id=timer))
        groups: dict[Any, list[Task]] = {}
        for task in self._unsent:
            if task.id in self._waiting:
                alike = (id(task.down), task.kind, task.version, task.round, id(task.config))
                groups.setdefault((self.place_of(task.client), *alike), []).append(task)
        self._unsent.clear()
        for (site, *_), tasks in groups.items():
            for start in range(0, len(tasks), ROWS):
                self._tell(
                    self.hub.assign, site, self._assign(site, tasks[start : start + ROWS]), self._heard
                )

    def _assign(self, site: str, tasks: Sequence[Task]) -> Assign:
        first, down = tasks[0], self._blob(tasks[0].down)
        clients = {task.id: task.client for task in tasks}
        return Assign(
            run=self.run, kind=first.kind, version=first.version, round=first.round,
            config=dict(first.config), down=down,
            tasks=[(task.id, task.client, task.memory, task.thread) for task in tasks],
            trace=self.trace.sent(first.round, clients, site=site, kind=first.kind, bytes_down=down.size),
        )  # fmt: skip

    def _blob(self, down: Tree) -> Blob:
        """Write a model once for all tasks that share it; the newest is kept, for more may come."""
        if self._down is None or self._down[0] is not down:
            older, self._down = self._down, (down, self.hub.shelf.write(self.run, down))
            if older:
                self._tell(self.hub.shelf.release, self.run, older[1].digest)
        return self._down[1]

    def _heard(self, message: Answered | Failed) -> None:
        """From the hub's thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the plan has ended, and its loop
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, message)

    def _tell(self, what: Callable[..., Any], *args: Any) -> None:
        self.hub.loop.call_soon_threadsafe(what, *args)

    def _event(self, message: Any, *, sure: bool) -> Event | None:
        """What a message tells the plan; None when it waits for it no more. sure: it was checked before."""
        if isinstance(message, Rang):
            timer = self._timers.pop(message.id, None)
            if timer is None:
                return None
            if isinstance(timer, asyncio.TimerHandle):
                timer.cancel()
            self.last = Record("tick", self.now, _text(message), None)
            return Tick(message.id, self.now)
        if isinstance(message, Answered):
            self._ups.append(message.up.digest)
        task = self._waiting.pop(message.id, None)
        if task is None:
            return None
        if isinstance(message, Answered):
            try:
                up = self.hub.blobs.read(message.up.digest)
                if not sure and (wrong := misfit(self.expected(task), up)):
                    raise RunError(wrong)
            except RunError as error:
                if sure:
                    raise
                why = f"its update is refused: {error.args[0]}"
                message = Failed(run=self.run, id=task.id, reason=line(why))
            else:
                self.last = Record("reply", self.now, _text(message), message.up)
                self.trace.came(task.id, bytes_up=message.up.size)
                return Reply(
                    task, up, message.weight, message.metrics, message.samples, tuple(message.answers)
                )
        self.last = Record("lost", self.now, _text(message), None)
        self.trace.came(task.id, message.reason)
        return Lost(task, message.reason)


def misfit(expected: Tree | None, found: Tree) -> str:
    """What of a tree has another name, shape or dtype than expected; "" when all fits."""
    if expected is None:
        return ""
    theirs, ours = dict(trees.named_leaves(found)), dict(trees.named_leaves(expected))
    for name, leaf in theirs.items():
        if name not in ours:
            return f"{name[:200]} is unknown"
        if _form(leaf) != _form(ours[name]):
            return f"{name} is {_form(leaf)}, not {_form(ours[name])}"
    return "".join(f"{name} is missing" for name in list(ours.keys() - theirs.keys())[:1])


def _form(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
    return f"a {type(leaf).__name__}"


def _text(message: Answered | Failed | Rang) -> str:
    return bytes(message).decode()

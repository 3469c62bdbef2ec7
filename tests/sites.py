"""A network that is none: sites in this process which answer late, in any order, twice, and drop out.

What they remember is on disk, each memory under its task, for the process that holds them gets killed too.
"""

import asyncio
import random
import time
from pathlib import Path

from coterie.core import Cancel, Lost, Reply, Task, Tick, Timer
from coterie.storage import Blobs, load_tree, save_tree


class OnDisk:
    """Every generation of every client's memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, client, generation):
        return None if generation is None else load_tree(self.folder / f"{client}-{generation}")[0]

    def put(self, client, generation, tree):
        save_tree(self.folder / f"{client}-{generation}", tree, {})


class Sites:
    """A carrier. drop: also lose clients as the config's [system] says. order: of the events, None: any."""

    def __init__(self, parts, folder, replay=(), *, drop=True, silent=False, order=None):
        self.site, self.device = parts.site(OnDisk(folder / "memories")), parts.device()
        self.hub = Blobs(folder / "hub")
        self.replay, self.drop, self.silent = iter(replay), drop, silent
        self.order = order if order is None else iter(order)
        self.tasks, self.timers, self.again = {}, set(), None
        self.chance = random.Random()  # another one in each life of the process
        self.told = []  # what was durable
        self.sent = 0

    def send(self, actions):
        for action in actions:
            match action:
                case Task():
                    assert action.id not in self.tasks
                    self.tasks[action.id] = action
                    self.sent += 1
                case Timer():
                    self.timers.add(action.id)
                case Cancel():
                    self.tasks.pop(action.id, None)
                    self.timers.discard(action.id)

    async def event(self):
        for now, event in self.replay:
            self._gone(event)
            return now, event
        if self.silent:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.again is not None and self.order is None:
            event, self.again = self.again, None
            return time.time(), event
        id = next(self.order) if self.order is not None else self._any()
        if id in self.timers:
            event = Tick(id, time.time())
        else:
            event = self._answer(self.tasks[id])
            self.again = event if self.chance.random() < 0.1 else None
        self._gone(event)
        return time.time(), event

    def _any(self):
        late = self.timers if self.chance.random() < 0.05 else ()
        return self.chance.choice([*self.tasks, *late] or [*self.timers])

    def _answer(self, task):
        lost = self.device(task, 0.0).lost if self.drop and task.kind == "train" else ""
        return Lost(task, lost) if lost else self.site(task)

    def _gone(self, event):
        id = event.id if isinstance(event, Tick) else event.task.id
        self.tasks.pop(id, None)
        self.timers.discard(id)

    def file(self, reply: Reply):
        return self.hub.path(self.hub.write(reply.up).digest) if self.chance.random() < 0.5 else None

    def taken(self, event):
        self.told.append(event)
        self.hub.keep(())

    def accepted(self, version, accepted, flying):
        self.told.append((version, dict(accepted), list(flying)))

    def close(self):
        self.told.append("closed")

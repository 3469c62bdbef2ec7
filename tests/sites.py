"""A network that is none: sites in this process which answer late, in any order, twice, and drop out.

What they remember is on disk, each memory under its task, for the process that holds them gets killed too.
"""

import asyncio
import json
import random
import time
from pathlib import Path

from coterie.core import Cancel, Lost, Reply, Task, Tick, Timer
from coterie.storage import Blobs, load_tree, save_tree
from coterie.storage.database import Logged


class OnDisk:
    """Every generation of every client's memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, client, generation):
        return None if generation is None else load_tree(self.folder / f"{client}-{generation}")[0]

    def put(self, client, generation, tree):
        save_tree(self.folder / f"{client}-{generation}", tree, {})


def hub(folder: Path) -> Blobs:
    """Where updates arrive."""
    return Blobs(folder / "hub")


class Sites:
    """A carrier. drop: also lose clients as the config's [system] says. order: of the events, None: any."""

    def __init__(self, parts, folder, replay=(), *, drop=True, silent=False, order=None):
        self.site, self.device = parts.site(OnDisk(folder / "memories")), parts.device()
        self.hub = hub(folder)
        self.replay, self.drop, self.silent = iter(replay), drop, silent
        self.order = order if order is None else iter(order)
        self.tasks, self.done, self.timers, self.again = {}, {}, set(), None
        self.chance = random.Random()  # another one in each life of the process
        self.told = []  # what was durable
        self.forgets, self.heard = True, 0

    def send(self, actions):
        for action in actions:
            match action:
                case Task():
                    assert action.id not in self.tasks
                    self.tasks[action.id] = action
                case Timer():
                    self.timers.add(action.id)
                case Cancel():
                    self.tasks.pop(action.id, None)
                    self.timers.discard(action.id)

    async def event(self):
        for now, head in self.replay:
            return now, self._again(**json.loads(head))
        if self.silent:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if self.again is not None and self.order is None:
            (self.last, event), self.again = self.again, None
            if isinstance(event, Reply):
                self.hub.write(event.up)
            return time.time(), event
        id = next(self.order) if self.order is not None else self._any()
        now, blob = time.time(), None
        if id in self.timers:
            kind, event, head = "tick", Tick(id, now), {"id": id, "now": now}
        elif isinstance(event := self._answer(self.tasks[id]), Lost):
            kind, head = "lost", {"id": id, "why": event.reason}
        else:
            kind, blob = "reply", self.hub.write(event.up)
            head = {"id": id, "rest": [event.weight, dict(event.metrics), event.samples], "up": blob.digest}
        self.last = Logged(kind, now, json.dumps(head), blob)
        self.again = (self.last, event) if kind != "tick" and self.chance.random() < 0.1 else None
        self._gone(id)
        return now, event

    def _again(self, id, now=None, why=None, rest=None, up=None):
        task = self.tasks.get(id) or self.done.get(id)
        self._gone(id)
        if rest:
            return Reply(task, self.hub.read(up), *rest)
        return Tick(id, now) if why is None else Lost(task, why)

    def _any(self):
        late = self.timers if self.heard and self.chance.random() < 0.05 else ()  # there is a quorum
        return self.chance.choice([*self.tasks, *late] or [*self.timers])

    def _answer(self, task):
        lost = self.device(task, 0.0).lost if self.drop and task.kind == "train" else ""
        return Lost(task, lost) if lost else self.site(task)

    def _gone(self, id):
        if id in self.tasks:
            self.done[id] = self.tasks.pop(id)
        self.timers.discard(id)

    def taken(self, event):
        self.told.append(event)
        self.heard += isinstance(event, Reply)
        if self.forgets:
            self.hub.keep(())  # what is durable is durable elsewhere

    def accepted(self, version, accepted, flying):
        self.told.append((version, dict(accepted), list(flying)))
        self.again, self.heard = None, 0

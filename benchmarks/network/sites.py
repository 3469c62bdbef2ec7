"""Many sites in one process: real ones, with links, keys, policies and ledgers, that answer at once.

    python benchmarks/network/sites.py FILE

FILE (JSON): keys (folder), names, update (a blob's digest), port. A site answers each task with the update
that it was given at the start, in which one number is its own; all wait until the last one has the model
("held") and a line comes in. Says lines of JSON: {"what": "connected" (all) | "joined" (one, again) |
"held" | "accepted" | "closed", "at": time.monotonic()}. Ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from coterie.core import Task, trees
from coterie.experiment import host
from coterie.experiment.hosting import Done, Job
from coterie.storage import Blob, Blobs


def say(what: str, **facts: Any) -> None:
    print(json.dumps({"what": what, "at": time.monotonic(), **facts}), flush=True)


class Gate:
    """Opens when all sites have the model of the round and it is told to."""

    def __init__(self, sites: int) -> None:
        self.sites, self.waiting, self.version = sites, list[Callable[[], None]](), 0

    def wait(self, go: Callable[[], None]) -> None:
        self.waiting.append(go)
        if len(self.waiting) == self.sites:
            say("held")

    def open(self) -> None:
        ready, self.waiting = self.waiting, []
        for each in ready:
            asyncio.get_running_loop().call_soon(each)

    def accepted(self, version: int) -> None:
        if version > self.version:
            self.version = version
            say("accepted", version=version)


class ReadyMade:
    """`hosting.Training` without the training."""

    def __init__(
        self, gate: Gate, update: Callable[[], Blob], job: Job, heard: Callable[[Done], None]
    ) -> None:
        self.gate, self.update, self.heard, self.blobs = gate, update, heard, job.blobs
        self.doing: dict[int, Task] = {}

    def give(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if task.kind != "train":
                self.heard(Done(task, None, reason="trains only"))
            elif task.id not in self.doing:
                self.doing[task.id] = task
                (self.blobs / task.down).unlink(missing_ok=True)  # it was received, which is all
                self.gate.wait(lambda task=task: self._answer(task))  # type: ignore[misc]

    def drop(self, ids: Sequence[int]) -> None:
        for id in ids:
            self.doing.pop(id, None)

    def accepted(self, version: int, accepted: Mapping[str, int], flying: Sequence[int]) -> None:
        del accepted, flying
        self.gate.accepted(version)

    def progress(self) -> int:
        return time.monotonic_ns()  # all of them wait for the slowest, and are not silent

    def close(self) -> None:
        say("closed")

    def _answer(self, task: Task) -> None:
        if self.doing.pop(task.id, None):
            self.heard(Done(task, self.update(), 1.0, {}, 1))


def of_its_own(keys: Path, name: str, number: int, tree: Any) -> Blob:
    """The update of one site, among its blobs."""
    leaf = max(trees.leaves(tree), key=torch.Tensor.numel)
    leaf.view(-1)[0] = number
    return Blobs(keys / name / "blobs").write(tree, lasting=False)


async def main(keys: Path, names: list[str], update: str, port: int) -> None:
    tree = Blobs(keys / "updates").read(update) if update else None
    gate, here, links = Gate(len(names)), set[str](), list[Any]()
    threading.Thread(target=listen, args=(asyncio.get_running_loop(), gate), daemon=True).start()
    ready = {name: of_its_own(keys, name, number, tree) for number, name in enumerate(names) if update}

    def connected(name: str) -> None:
        if len(here) == len(names):
            say("joined")
            return
        here.add(name)
        if len(here) == len(names):
            say("connected")

    def site(name: str) -> Any:
        return host.serve(
            keys / name,
            [f"127.0.0.1:{port}"],
            begin=lambda job, heard, broken: ReadyMade(gate, lambda: ready[name], job, heard),
            ready=lambda said: connected(name),
            started=links.append,
        )

    await asyncio.gather(*map(site, names))


def listen(loop: asyncio.AbstractEventLoop, gate: Gate) -> None:
    for _ in sys.stdin:
        loop.call_soon_threadsafe(gate.open)
    os._exit(0)


if __name__ == "__main__":
    told = json.loads(Path(sys.argv[1]).read_text())
    asyncio.run(main(Path(told["keys"]), told["names"], told["update"], told["port"]))

"""Where a run keeps what a crash must not lose, and who answers its tasks.

`Here` is this process and the run's folder. `served.Served` is a server's database and its sites.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from coterie.backends import InProcess
from coterie.core import ClientId, Commit, Event, Plan, Reply, Task, Tree, ask, drive
from coterie.experiment.assemble import Parts
from coterie.storage import RunFolder

OnCommit = Callable[[Commit], None]
OnEvent = Callable[[float, Event], None]
Row = Mapping[str, Any]


class Kept(NamedTuple):
    """What a run goes on from."""

    version: int
    state: Tree
    resume: Tree  # with "memory"; None: from the start
    seconds: Mapping[str, float]  # "total" and "train", so far


class Place(Protocol):
    """One stretch of a run: `open`, `drive` with a `commit` a version, `ask`, `close`."""

    @property
    def asked(self) -> int:
        """Clients, in the round that is worked on."""

    @property
    def busy(self) -> float:
        """Seconds of training."""

    def open(self, progress: Callable[[int], None]) -> Kept | None:
        """Read the last commit and put the folder's metrics right; None: there is none.

        progress: told how many more tasks are done, where the events do not tell.
        """

    def drive(self, plan: Plan[Tree], on_commit: OnCommit, on_event: OnEvent) -> Tree:
        """Run the plan to its end."""

    def commit(
        self,
        commit: Commit,
        row: Row,
        append: Callable[[Row], None],
        seconds: Callable[[], Mapping[str, float]],
    ) -> None:
        """Make a version durable; `append` writes its row into the folder. A kill may come at any moment."""

    def ask(self, tasks: Sequence[Task], on_event: OnEvent) -> dict[ClientId, Reply]:
        """Ask the clients something outside the plan; the lost are absent."""

    def close(self) -> None:
        """Let go of what it holds."""


class Here:
    """The run's folder, and a pool of this process on a virtual clock."""

    def __init__(self, parts: Parts, folder: RunFolder) -> None:
        self.parts, self.folder = parts, folder
        self.checkpoints = folder.checkpoints(parts.config.run["keep_checkpoints"])
        self.memories = folder.memories()
        self.pool = parts.pool(self.memories)
        self.backend: InProcess = parts.backend(self.pool, None)

    @property
    def asked(self) -> int:
        """Clients, in the round that is worked on."""
        return self.backend.asked

    @property
    def busy(self) -> float:
        """Seconds that the pool has worked."""
        return self.backend.busy

    def open(self, progress: Callable[[int], None]) -> Kept | None:
        """Read the newest checkpoint."""
        self.pool.progress = progress
        version, kept, meta = self.checkpoints.latest() or (0, None, {})
        self.memories.back_to(version, kept["memories"] if kept else 0)
        self.folder.truncate(version)
        if kept is None:
            return None
        self.backend = self.parts.backend(self.pool, kept["clock"])
        resume = {**kept["resume"], "memory": self.memories.at(version)}
        return Kept(version, kept["state"], resume, meta["seconds"])

    def drive(self, plan: Plan[Tree], on_commit: OnCommit, on_event: OnEvent) -> Tree:
        """Run the plan to its end."""
        return asyncio.run(drive(plan, self.backend, on_commit=on_commit, on_event=on_event))

    def commit(
        self,
        commit: Commit,
        row: Row,
        append: Callable[[Row], None],
        seconds: Callable[[], Mapping[str, float]],
    ) -> None:
        """Write memories, row and, when it is time, a checkpoint: in an order that allows a kill."""
        settings = self.parts.config.run
        flying = {task.id for task in commit.resume.get("flying", ())}
        self.memories.commit(commit.version, commit.accepted, flying)
        append(row)
        last = commit.version >= self.parts.schedule.rounds
        if last or commit.version % settings["checkpoint_every"] == 0:
            kept = {
                "state": commit.state,
                "resume": commit.resume,
                "clock": self.backend.clock(),
                "memories": self.memories.newest(),
            }
            self.memories.prune(self.checkpoints.save(commit.version, kept, {"seconds": seconds()}))

    def ask(self, tasks: Sequence[Task], on_event: OnEvent) -> dict[ClientId, Reply]:
        """Ask the pool; no simulated device is late."""
        return asyncio.run(drive(ask(tasks), InProcess(self.pool), on_event=on_event))

    def close(self) -> None:
        """Let go of the pool and the memories."""
        self.pool.close()
        self.memories.close()

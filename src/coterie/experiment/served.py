"""A run's place on a server: a database and blobs hold what a crash must not lose, sites answer its tasks.

Law 3. An event is durable before the plan is told; a commit is one transaction, which prunes the log; then
the run's folder is written, which holds nothing that the database does not. After a kill anywhere the plan
starts from the last commit and is told the same events again, so it asks for the same tasks, same ids.
Clients' memories stay at the sites; the server knows of which task each is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from coterie.core import (
    Action,
    ClientId,
    Commit,
    CoterieError,
    Event,
    Plan,
    Reply,
    RunError,
    Task,
    Tree,
    ask,
    drive,
    fold_task,
    unfolded,
)
from coterie.experiment.assemble import Parts
from coterie.experiment.away import Away
from coterie.experiment.place import Kept, OnCommit, OnEvent, Row
from coterie.storage import Blobs, RunFolder
from coterie.storage.archive import Archive
from coterie.storage.database import Database, Logged
from coterie.storage.runs import row_text

T = TypeVar("T")
log = logging.getLogger("coterie")


class Carrier(Protocol):
    """A backend whose peers survive its own death: it is told what is durable, so that they can forget.

    Made with the log of what the plan was told, (now, head) each: `event` gives these first, in their order,
    and what the plan sends meanwhile is sent only if they do not answer it.
    """

    last: Any  # how the last event is logged: (kind, now, head, the blob of its tensors or None)

    def send(self, actions: Sequence[Action]) -> None:
        """Take actions. Never blocks."""

    async def event(self) -> tuple[float, Event]:
        """Wait for the next event."""

    def taken(self, event: Event) -> None:
        """The event is durable: its sender, and the carrier's own files, need not keep it."""

    def accepted(self, version: int, accepted: Mapping[ClientId, int], flying: Sequence[int]) -> None:
        """A commit is durable: these are the clients' memories now, and only these tasks go on."""


class Served:
    """The place of one run of the database's; for one thread, but for `end`.

    archive: what its rows name. updates: the folder in which the carrier finds replies' tensors. carrier:
    makes it, from the log. code: digest of the package that the archive keeps for the run, too.
    """

    def __init__(
        self,
        parts: Parts,
        folder: RunFolder,
        database: Database,
        run: str,
        archive: Archive,
        updates: Blobs,
        carrier: Callable[[Iterator[tuple[float, str]]], Carrier],
        code: str = "",
    ) -> None:
        self.parts, self.folder, self.database, self.run = parts, folder, database, run
        self.archive, self.updates, self.make = archive, updates, carrier
        self.code = code
        self.carrier: Carrier
        self.replayed = 0  # events still to come that are in the log already
        self.asked, self.busy = 0, 0.0
        self.ending: CoterieError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: asyncio.Task[Any] | None = None

    def open(self, progress: Callable[[int], None]) -> Kept | None:  # noqa: ARG002  the events tell
        """Read the newest commit whose blob is whole, and write the metrics up to there into the folder."""
        kept = self._newest()
        logged = self.database.events(self.run)
        self.replayed = len(logged)
        self.folder.write_rows(self.database.rows(self.run))
        self.tidy()
        self.carrier = self.make(self._replay(logged))
        if kept is not None:
            self.carrier.accepted(kept.version, kept.resume["memory"], _flying(kept.resume))
        return kept

    def drive(self, plan: Plan[Tree], on_commit: OnCommit, on_event: OnEvent) -> Tree:
        """Run the plan to its end; a "fold" is done here, of the replies of the sites."""
        algorithm, on_nan = self.parts.algorithm, self.parts.config.run["on_nan"]
        job = partial(fold_task, aggregator=algorithm.aggregator, on_nan=on_nan)
        return self._run(drive(unfolded(plan, job), self, on_commit=on_commit, on_event=self._log(on_event)))

    def ask(self, tasks: Sequence[Task], on_event: OnEvent) -> dict[ClientId, Reply]:
        """Ask the sites something outside the plan."""
        return self._run(drive(ask(tasks), self, on_event=self._log(on_event)))

    def commit(
        self,
        commit: Commit,
        row: Row,
        append: Callable[[Row], None],
        seconds: Callable[[], Mapping[str, float]],
    ) -> None:
        """Write the state, then all that refers to it in one transaction, then the folder."""
        assert not self.replayed, "a plan that commits before it was told all that its log holds"
        kept = {"state": commit.state, "resume": commit.resume, "seconds": dict(seconds())}
        blob, keep = self.archive.write(kept), self.parts.config.run["keep_checkpoints"]
        self.database.commit(self.run, commit.version, blob, row_text(row), commit.accepted, keep)
        append(row)
        self.carrier.accepted(commit.version, commit.accepted, _flying(commit.resume))
        self.tidy()
        self.asked = 0

    def close(self) -> None:
        """Nothing to let go of: whoever opened the database and the network closes them."""

    def end(self, error: CoterieError) -> None:
        """Make the run end with this error, wherever it waits. From any thread; the first one counts."""
        self.ending = self.ending or error
        if isinstance(self.parts.problem, Away):
            self.parts.problem.end(self.ending)
        loop, work = self._loop, self._work
        if loop is not None and work is not None:
            with suppress(RuntimeError):  # it has ended just now
                loop.call_soon_threadsafe(work.cancel)

    def stopped(self) -> bool:
        """Raise what the run is to end with, if it is."""
        if self.ending is not None:
            raise self.ending
        return False

    # the backend that the plan sees

    def send(self, actions: Sequence[Action]) -> None:
        """Pass actions on."""
        self.asked += sum(isinstance(action, Task) for action in actions)
        self.carrier.send(actions)

    async def event(self) -> tuple[float, Event]:
        """Wait for the next event."""
        return await self.carrier.event()

    def _log(self, on_event: OnEvent) -> OnEvent:
        def durable(now: float, event: Event) -> None:
            if self.replayed:
                self.replayed -= 1
            else:
                logged = Logged(*self.carrier.last)
                if logged.blob is not None:
                    self.archive.adopt(self.updates.path(logged.blob.digest))
                self.database.append_event(self.run, logged)
            self.carrier.taken(event)
            on_event(now, event)

        return durable

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        async def interruptible() -> T:
            self._loop, self._work = asyncio.get_running_loop(), asyncio.current_task()
            try:
                self.stopped()
                return await work
            except asyncio.CancelledError:
                self.stopped()
                raise
            finally:
                self._loop = self._work = None
                work.close()

        return asyncio.run(interruptible())

    def _newest(self) -> Kept | None:
        found = self.database.commits(self.run)
        for version, blob in found:
            try:
                kept = self.archive.read(blob.digest)
            except RunError as error:
                log.warning("version %d is lost: %s", version, error.args[0])
                continue
            if version < found[0][0]:
                self.database.back_to(self.run, version)
            memory = self.database.generations(self.run, version)
            return Kept(version, kept["state"], {**kept["resume"], "memory": memory}, kept["seconds"])
        if found:
            raise RunError(
                f"run {self.run}: the states of versions {[version for version, _ in found]} are all lost",
                f"restore {self.archive.blobs.folder}, or submit the run again",
            )
        return None

    def _replay(self, logged: Sequence[Logged]) -> Iterator[tuple[float, str]]:
        for each in logged:
            if each.blob is not None:
                self.archive.lend(each.blob.digest, self.updates)
            yield each.now, each.head

    def tidy(self) -> None:
        """Drop the blobs that no row names any more."""
        named = {blob.digest for _, blob in self.database.commits(self.run)}
        logged = self.database.events(self.run)
        self.archive.keep(named.union((self.code,), (each.blob.digest for each in logged if each.blob)))


def _flying(resume: Tree) -> list[int]:
    return [task.id for task in resume.get("flying", ())]

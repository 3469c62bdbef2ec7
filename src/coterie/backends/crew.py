"""Many workers as one pool: blocks go to whoever is free, one partial fold comes back from each.

Who the workers are is the business of a `Staff`: processes of this machine, actors of a Ray cluster. The
blocks are those that one process would make, and sums are exact: so the result has the same bits, whoever
did what, in whatever order, and even when workers died on the way and others did their blocks again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from coterie.backends.shards import Failed, Parcel, Part, Slot, as_answer, as_gathered, opened
from coterie.backends.site import Site
from coterie.core.errors import CoterieError, RunError
from coterie.core.gather import Fold, Gathered, OnNan, accept, empty, merge
from coterie.core.trees import map_tree
from coterie.core.types import Lost, Reply, Task, Tree

DEATHS = 3  # of its workers, after which a block's clients are lost, or a crew gives up starting new ones
STRETCH = 0.1  # seconds of work that a worker is given at a time, where clients are worked on one by one
AHEAD = 4  # clients a worker that are asked for at a time, where the order is not known beforehand
log = logging.getLogger("coterie")


class Died(Exception):
    """A worker is gone; it says how."""


class Hand(Protocol):
    """One worker, as the driver sees it. It is ready when it has given its first answer, None."""

    def brief(self, on_nan: OnNan | None, downs: Any) -> None:
        """Tell it of a new call; `downs` is what `Staff.spread` returned. It does not answer."""

    def ask(self, what: str, tree: Tree = None) -> None:
        """Ask for something of a `Shard`. One request at a time."""

    def answer(self) -> Parcel | Failed | None:
        """What it answers, once `Staff.wait` has named it. Raises Died."""

    def end(self, *, at_once: bool) -> None:
        """Let it go; at_once: though it works, or is dead already."""


class Staff(Protocol):
    """Starts workers and waits for them."""

    count: int  # how many workers there should be

    def hire(self) -> Hand:
        """Start a worker; does not wait until it is ready."""

    def spread(self, downs: Tree) -> Any:
        """Put a tree where every worker can read it, until the next one."""

    def wait(self, hands: Sequence[Hand]) -> Sequence[Hand]:
        """Those of them, at least one, that have answered or died."""

    def close(self) -> None:
        """Wait until all workers have ended, and let go of what it holds."""


@dataclass(eq=False)
class Block:
    """Tasks that are worked on together."""

    place: int  # in the order of one process
    tasks: Sequence[Task]
    load: int  # rows
    loose: bool  # its clients are worked on one by one, so a worker may be given several blocks
    deaths: int = 0


@dataclass(eq=False)
class Member:
    """A worker, and what it holds."""

    hand: Hand
    ready: bool = False
    briefed: bool = False
    doing: list[Block] = field(default_factory=list)
    folded: list[Block] = field(default_factory=list)  # into the partial result that is still with it
    asked: str = "start"  # what it has not answered yet
    since: float = 0.0


class Crew:
    """A Pool of many workers; one call at a time.

    site: what a single process would be; its memories are kept here, and travel with the tasks.
    """

    def __init__(self, site: Site, staff: Staff) -> None:
        self.site, self.staff = site, staff
        width = site.trainer.width
        # a wider trainer's bits depend on who shares a block, which must not depend on the workers
        self.appetite = width if width > 1 else AHEAD * staff.count
        self.progress: Callable[[int], None] = lambda done: None
        self.members: list[Member] = []
        self.pace: dict[str, float] = {}  # kind of task -> rows a second
        self.stillborn = 0
        self._hire()

    def answer(self, tasks: Sequence[Task]) -> list[Reply | Lost]:
        """Answer each task."""
        call = _Call(self, tasks, None)
        call.run()
        found = {
            task.id: as_answer(task, bare)
            for block in call.blocks
            for task, bare in zip(block.tasks, call.parts[block.place].replies, strict=True)
        }
        return [found[task.id] for task in tasks]

    def fold(self, tasks: Sequence[Task], on_nan: OnNan, got: Gathered | None = None) -> Gathered:
        """Answer all of them and fold the replies into `got`."""
        aggregator = self.site.algorithm.aggregator
        got = got or Gathered(empty(aggregator))
        if not tasks:
            return got
        call = _Call(self, tasks, on_nan)
        call.run()
        for part in call.partials:
            got.fold = merge(got.fold, aggregator, part.fold)
        accepted = {client: id for part in call.partials for client, id in part.accepted.items()}
        for block in call.blocks:  # in the order of one process, so that nothing tells the difference
            got.fold = got.fold._replace(lost=(*got.fold.lost, *call.parts[block.place].lost))
            got.accepted.update((t.client, t.id) for t in block.tasks if accepted.get(t.client) == t.id)
        return got

    def close(self) -> None:
        """End all workers."""
        self._dismiss(self.members)
        self.staff.close()

    def _hire(self) -> None:
        while len(self.members) < self.staff.count and self.stillborn < DEATHS:
            self.members.append(Member(self.staff.hire()))

    def _dismiss(self, members: Iterable[Member]) -> None:
        for member in list(members):
            self.members.remove(member)
            member.hand.end(at_once=bool(member.asked))


class _Call:
    """One `answer` or `fold`."""

    def __init__(self, crew: Crew, tasks: Sequence[Task], on_nan: OnNan | None) -> None:
        self.crew, self.on_nan = crew, on_nan
        self.blocks = list(_blocks(crew.site, tasks))
        self.queue = deque(sorted(self.blocks, key=lambda block: -block.load))  # the longest first
        self.turn = {block.place: turn for turn, block in enumerate(self.queue)}
        self.left = sum(block.load for block in self.queue)
        self.parts: dict[int, Part] = {}  # place -> what came of the block
        self.counted: set[int] = set()  # places whose tasks were reported as progress
        self.partials: list[Gathered] = []
        self.failed: list[tuple[int, Exception]] = []  # turn -> what ends the call
        self.downs = {id(task.down): task.down for task in tasks}
        self.index = {key: index for index, key in enumerate(self.downs)}

    def run(self) -> None:
        """Share the blocks out until all are done. Raises what the earliest block raised in a worker."""
        crew = self.crew
        crew.stillborn = 0
        spread = crew.staff.spread(list(self.downs.values()))
        for member in crew.members:
            member.briefed = False
            member.folded.clear()
        try:
            while True:
                crew._hire()
                for member in crew.members:
                    if member.ready and not member.asked:
                        self._employ(member, spread)
                if not self.queue and not any(member.asked and member.ready for member in crew.members):
                    break
                self._hear()
        except BaseException:
            crew._dismiss([member for member in crew.members if member.asked])
            raise
        if self.failed:
            raise min(self.failed, key=lambda each: each[0])[1]

    def _employ(self, member: Member, spread: Any) -> None:
        """Give a free worker something to do, if there is anything."""
        if self.queue:
            if not member.briefed:
                member.hand.brief(self.on_nan, spread)
                member.briefed = True
            member.doing = self._portion()
            member.asked, member.since = "work", time.perf_counter()
            lists = [
                [replace(task, down=self.index[id(task.down)]) for task in block.tasks]
                for block in member.doing
            ]
            member.hand.ask("work", (lists, self._memories(member.doing)))
        elif member.folded and not self.failed:
            member.asked = "partial"
            member.hand.ask("partial")

    def _portion(self) -> list[Block]:
        """The next block; of clients who need not share one, as many as take a while, but a fair share."""
        portion = [self.queue.popleft()]
        first, load = portion[0], portion[0].load
        stretch = STRETCH * self.crew.pace.get(first.tasks[0].kind, 0.0)
        enough = min(stretch, self.left / (2 * self.crew.staff.count))
        while self.queue and not any(block.deaths or not block.loose for block in (first, self.queue[0])):
            load += self.queue[0].load
            if load > enough:
                break
            portion.append(self.queue.popleft())
        self.left -= sum(block.load for block in portion)
        return portion

    def _memories(self, blocks: Sequence[Block]) -> dict[Slot, Any]:
        """What the clients left at their last tasks; for the worker to raise, what went wrong instead."""
        found: dict[Slot, Any] = {}
        for task in (task for block in blocks for task in block.tasks):
            if task.memory is not None:
                try:
                    found[task.client, task.memory] = self.crew.site.memories.get(task.client, task.memory)
                except CoterieError:
                    raise
                except Exception as error:
                    found[task.client, task.memory] = error
        return found

    def _hear(self) -> None:
        """Wait until somebody answers or dies."""
        members = {id(member.hand): member for member in self.crew.members if member.asked}
        if not members:
            raise _deserted("those there were have died")
        for hand in self.crew.staff.wait([member.hand for member in members.values()]):
            member = members[id(hand)]
            try:
                answer = hand.answer()
            except Died as died:
                self._bury(member, died)
                continue
            asked, member.asked = member.asked, ""
            if isinstance(answer, Failed):
                if not member.ready:
                    self.crew._dismiss([member])
                    raise answer.error
                self.failed.append((min(self.turn[block.place] for block in member.doing), answer.error))
                self.queue.clear()
                member.doing = []
            elif asked == "start":
                member.ready, self.crew.stillborn = True, 0
            elif asked == "partial":
                assert answer is not None
                self.partials.append(as_gathered(opened(answer)))
                member.folded = []
            else:
                assert answer is not None
                self._done(member, answer)

    def _done(self, member: Member, answer: Parcel) -> None:
        parts, memories, said = opened(answer)
        for client, generation, tree in memories:  # copies, for the answer's one buffer would stay with any
            self.crew.site.memories.put(client, generation, map_tree(lambda leaf: leaf.clone(), tree))
        for level, text in said:
            log.log(level, "%s", text)
        load = sum(block.load for block in member.doing)
        kind = member.doing[0].tasks[0].kind
        self.crew.pace[kind] = load / max(time.perf_counter() - member.since, 1e-6)
        done, member.doing = member.doing, []
        if self.on_nan is not None:
            member.folded += done
        for block, part in zip(done, parts, strict=True):
            self.parts[block.place] = Part(*part)
        self._count(done)

    def _count(self, blocks: Sequence[Block]) -> None:
        fresh = [block for block in blocks if block.place not in self.counted]
        self.counted.update(block.place for block in fresh)
        if fresh:
            self.crew.progress(sum(len(block.tasks) for block in fresh))

    def _bury(self, member: Member, died: Died) -> None:
        """What a dead worker had not given back is done again; what kills its workers is given up."""
        crew = self.crew
        crew._dismiss([member])
        if not member.ready:
            crew.stillborn += 1
            if crew.stillborn >= DEATHS and not any(each.ready for each in crew.members):
                raise _deserted(f"new ones end while they start: {died}")
            return
        again = [] if self.failed else [*member.folded, *member.doing]
        clients = sum(len(block.tasks) for block in again)
        log.warning("a worker died (%s); %d clients are worked on again", died, clients)
        lost = []
        for block in member.doing:
            block.deaths += 1
            if block.deaths >= DEATHS:
                again.remove(block)
                lost.append(block)
        self.queue.extendleft(again)
        self.left += sum(block.load for block in again)
        for block in lost:
            self.parts[block.place] = self._given_up(block)
        self._count(lost)

    def _given_up(self, block: Block) -> Part:
        reason = f"its worker died {DEATHS} times"
        if self.on_nan is None:
            return Part((), (reason,) * len(block.tasks))
        got = Gathered(Fold(None, {}, 0, 0, 0, ()))
        for task in block.tasks:
            accept(got, self.crew.site.algorithm.aggregator, Lost(task, reason), self.on_nan)
        return Part(got.fold.lost, ())


def _deserted(why: str) -> RunError:
    return RunError(
        f"no worker is left: {why}",
        "see what they said above, if anything; a script that runs an experiment must do so under "
        'if __name__ == "__main__":',
    )


def _blocks(site: Site, tasks: Sequence[Task]) -> Iterator[Block]:
    """The blocks that `site` would make of these tasks, in its order."""
    alone, blocks = site.packed(tasks)
    loads = [site.size(task.client) if task.kind == "train" else 1 for task in alone]
    place = 0
    for task, load in zip(alone, loads, strict=True):
        yield Block(place, [task], load, loose=True)
        place += 1
    for block in blocks:
        yield Block(place, block, len(block) * max(site.size(task.client) for task in block), loose=False)
        place += 1

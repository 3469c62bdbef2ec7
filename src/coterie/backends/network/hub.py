"""What the server knows of its sites: who is here, what each was given, and what came back.

A hub lives in one event loop and never waits: what a site must be told lies in its outbox, and what was not
told when a connection broke follows from the rest when the site rejoins. Tasks that a site does not answer
are lost once it has been silent for too long. How messages travel is the `server`'s affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from coterie.backends.network.messages import (
    ROWS,
    Accepted,
    Answered,
    Assign,
    BadMessage,
    Beat,
    Declined,
    Dropped,
    Failed,
    Message,
    Opened,
    RunClosed,
    RunOpened,
    Taken,
    line,
)
from coterie.backends.network.transfer import Shelf
from coterie.core.types import ClientId
from coterie.storage import Blobs

SILENCE = 120.0  # seconds


class Identity(Protocol):
    """Whom a certificate belongs to."""

    @property
    def name(self) -> str:
        """Of the site."""

    @property
    def serial(self) -> int:
        """Of the certificate."""


@dataclass
class Seat:
    """A site that is or was connected."""

    seen: float  # when it last gave a sign of life
    identity: Identity | None = None
    features: frozenset[str] = frozenset()
    outbox: asyncio.Queue[Message] | None = None  # None: not connected
    end: asyncio.Future[str] | None = None  # set, with the reason, to close the connection
    progress: Mapping[str, int] = field(default_factory=dict)
    attempt: tuple[str, int] = ("", 0)  # the process that is or was connected, and its how many-th
    tasks: int = 0  # that it was given and has not answered
    waiting: int = 0  # uploads that the server has not let begin
    alarm: asyncio.TimerHandle | None = None


class Given(NamedTuple):
    """A task that a site was given. header: an Assign without tasks, shared by those that came together."""

    site: str
    header: Assign
    row: tuple[int, str, int | None, int | None]


@dataclass
class Course:
    """A run that is open. limit: bytes of the largest update."""

    opening: RunOpened
    hosts: Mapping[str, Collection[ClientId]]
    limit: int
    heard: Callable[[Answered | Failed], None] = lambda message: None
    tasks: dict[int, Given] = field(default_factory=dict)
    answered: dict[int, str] = field(default_factory=dict)  # not yet taken -> whose
    declined: dict[str, str] = field(default_factory=dict)  # site -> why
    version: int = -1  # of the newest commit
    accepted: dict[ClientId, int] = field(default_factory=dict)  # up to it
    flying: list[int] = field(default_factory=list)

    def of(self, site: str) -> list[int]:
        """The tasks that a site has."""
        return [id for id, given in self.tasks.items() if given.site == site]


class Hub:
    """Connects the runs of a server with the sites. Made in its event loop; called there, too.

    blobs: a folder of the hub's own: what no run holds is deleted. silence: seconds. verify: (identity,
    bytes, signature) -> is it the site's? None: replies need no signature. ended: run -> how it ended, ""
    when it did not. tell: called as tell(what, **facts) with all that happens, for logs, metrics, the ledger.
    """

    def __init__(
        self,
        blobs: Blobs,
        *,
        silence: float = SILENCE,
        verify: Callable[[Identity, bytes, str], bool] | None = None,
        ended: Callable[[str], str] = lambda run: "",
        tell: Callable[..., None] = lambda what, **facts: None,
    ) -> None:
        self.blobs, self.shelf, self.silence = blobs, Shelf(blobs), silence
        self.verify, self.ended, self.tell = verify, ended, tell
        self.loop = asyncio.get_running_loop()
        self.seats: dict[str, Seat] = {}
        self.runs: dict[str, Course] = {}
        self.revoked: set[int] = set()

    def open(
        self, opening: RunOpened, hosts: Mapping[str, Iterable[ClientId]], *, limit: int = 1 << 50
    ) -> None:
        """Begin a run. hosts: site -> the clients there. limit: bytes of the largest update."""
        kept = {site: dict.fromkeys(clients) for site, clients in hosts.items()}
        course = self.runs[opening.run] = Course(opening, kept, limit)
        for site in hosts:
            self._say(site, _opening(course, site))

    def close(self, run: str, status: str) -> None:
        """End a run; whatever was held for it is let go."""
        course = self.runs.pop(run)
        for given in course.tasks.values():
            self.seat(given.site).tasks -= 1
        for site in course.hosts:
            self._say(site, RunClosed(run=run, status=line(status)))
        self.shelf.release_all(run)

    def assign(self, site: str, assign: Assign, heard: Callable[[Answered | Failed], None]) -> None:
        """Give tasks to a site; they reach it now or when it joins. heard: told what each comes to."""
        if (course := self.runs.get(assign.run)) is None:
            return
        seat, header = self.seat(site), assign.model_copy(update={"tasks": []})
        course.heard = heard
        if not seat.tasks:
            seat.seen = self.loop.time()
        for row in assign.tasks:
            course.tasks[row[0]] = Given(site, header, row)
            self.shelf.hold(assign.run, assign.down.digest)
            seat.tasks += 1
        if why := course.declined.get(site):
            self.lose(course, [row[0] for row in assign.tasks], why)
            return
        self.tell("assigned", site=site, run=assign.run, tasks=len(assign.tasks), **assign.down._asdict())
        self._say(site, assign)
        self._watch(site, seat)

    def drop(self, run: str, ids: Iterable[int]) -> None:
        """Nobody waits for these tasks any more."""
        if (course := self.runs.get(run)) is None:
            return
        at: dict[str, list[int]] = {}
        for id in ids:
            if given := self._pop(course, id):
                at.setdefault(given.site, []).append(id)
        for site, dropped in at.items():
            self._say(site, Dropped(run=run, ids=dropped))

    def accepted(
        self, run: str, version: int, accepted: Mapping[ClientId, int], flying: Sequence[int]
    ) -> None:
        """Tell the sites of a commit."""
        if (course := self.runs.get(run)) is None:
            return
        course.version, course.flying = version, list(flying)
        course.accepted.update(accepted)
        for site, clients in course.hosts.items():
            self._say(site, _commit(course, accepted, clients))

    def taken(self, run: str, id: int) -> None:
        """The reply to this task is durable."""
        course = self.runs.get(run)
        if course and (site := course.answered.pop(id, None)) is not None:
            self._say(site, Taken(run=run, id=id))

    def revoke(self, serial: int) -> None:
        """Close what was opened with this certificate, and let nothing be opened with it any more."""
        self.revoked.add(serial)
        for name, seat in self.seats.items():
            if seat.identity is not None and seat.identity.serial == serial:
                _end(seat, f"the certificate of site {name} (serial {serial}) is revoked")

    def join(
        self,
        site: str,
        identity: Identity,
        features: frozenset[str],
        welcome: Message,
        attempt: tuple[str, int] = ("", 0),
    ) -> Seat | None:
        """A site is here; whoever was here in its name must go. Its outbox begins with the welcome.

        attempt: which process of the site, and its how many-th. None: a later one has joined already.
        """
        seat = self.seat(site)
        before, seat.attempt = seat.attempt, attempt
        if seat.outbox is not None and before[0] == attempt[0] and before[1] > attempt[1]:
            seat.attempt = before
            return None
        same = before[0] == attempt[0] != ""
        _end(seat, "" if same else f"another process has joined as site {site}")
        seat.identity, seat.features, seat.progress = identity, features, {}
        seat.seen, seat.outbox, seat.end = self.loop.time(), asyncio.Queue(), self.loop.create_future()
        self._say(site, welcome)
        return seat

    def brief(self, site: str, open_there: Iterable[str]) -> None:
        """Say all that a site must know when it joins. open_there: runs that it knows of."""
        for run in open_there:
            if run not in self.runs and (status := self.ended(run)):
                self._say(site, RunClosed(run=run, status=line(status)))
        for course in self.runs.values():
            if site in course.hosts:
                course.declined.pop(site, None)
                self._say(site, _opening(course, site))
                if course.version >= 0:
                    self._say(site, _commit(course, course.accepted, course.hosts[site]))
                for assign in _together(course.tasks[id] for id in course.of(site)):
                    self._say(site, assign)

    def take(self, site: str, seat: Seat, message: Message) -> None:
        """What a site says. Raises BadMessage for what it may not say."""
        moves = not isinstance(message, Beat) or message.progress != seat.progress
        if moves or seat.waiting or not seat.tasks:
            seat.seen = self.loop.time()
        if isinstance(message, Beat):
            seat.progress = message.progress
        elif isinstance(message, Answered | Failed):
            self._hear(site, seat, message)
        elif isinstance(message, Declined | Opened):
            if course := self.hosted(site, message.run):
                course.declined.pop(site, None)
                if isinstance(message, Declined):
                    self.tell("declined", site=site, run=message.run, reason=message.reason)
                    course.declined[site] = message.reason
                    self.lose(course, course.of(site), message.reason)
        else:
            raise BadMessage(f"a site may not say {message.message!r}")

    def seat(self, site: str) -> Seat:
        """The seat of a site, whether or not it was ever here."""
        if site not in self.seats:
            self.seats[site] = Seat(self.loop.time())
        return self.seats[site]

    def hosted(self, site: str, run: str) -> Course | None:
        """The run, if it is open and the site takes part."""
        course = self.runs.get(run)
        return course if course and site in course.hosts else None

    def given(self, site: str, run: str, id: int) -> Given | None:
        """The task, if it is this site's to answer."""
        course = self.runs.get(run)
        given = course.tasks.get(id) if course else None
        return given if given and given.site == site else None

    def lose(self, course: Course, ids: Iterable[int], reason: str) -> None:
        """These tasks will never be answered."""
        for id in ids:
            if self._pop(course, id):
                course.heard(Failed(run=course.opening.run, id=id, reason=line(reason)))

    def _hear(self, site: str, seat: Seat, message: Answered | Failed) -> None:
        """What a task came to. Tasks that were cancelled, answered before or given to others are ignored."""
        given = self.given(site, message.run, message.id)
        if given is None:
            self.tell("ignored", site=site, run=message.run, id=message.id)
            return
        course = self.runs[message.run]
        if isinstance(message, Answered):
            assert seat.identity is not None
            if self.verify and not self.verify(seat.identity, message.signed(), message.signature):
                self.lose(course, [message.id], f"site {site}: its signature does not fit the reply")
                return
            if not self.shelf.hold(message.run, message.up.digest):  # another's same bytes were let go of
                self._say(site, given.header.model_copy(update={"tasks": [given.row]}))
                return
            course.answered[message.id] = site
        self._pop(course, message.id)
        self.tell(message.message, site=site, **message.model_dump(exclude={"message"}))
        course.heard(message)

    def _say(self, site: str, message: Message) -> None:
        if (seat := self.seats.get(site)) and seat.outbox is not None:
            if isinstance(message, Assign) and message.trace and "trace" not in seat.features:
                message = message.model_copy(update={"trace": ""})
            seat.outbox.put_nowait(message)

    def _pop(self, course: Course, id: int) -> Given | None:
        if given := course.tasks.pop(id, None):
            self.seat(given.site).tasks -= 1
            self.shelf.release(course.opening.run, given.header.down.digest)
        return given

    def _watch(self, site: str, seat: Seat) -> None:
        """Set the alarm, if the site has tasks and none is set."""
        if seat.tasks and seat.alarm is None:
            seat.alarm = self.loop.call_at(seat.seen + self.silence, self._silent, site, seat)

    def _silent(self, site: str, seat: Seat) -> None:
        seat.alarm = None
        if seat.tasks and self.loop.time() - seat.seen >= self.silence:
            self.tell("silent", site=site)
            for course in list(self.runs.values()):
                self.lose(course, course.of(site), f"site {site}: silent for {self.silence:g} s")
        self._watch(site, seat)


def _end(seat: Seat, why: str) -> None:
    if seat.end is not None and not seat.end.done():
        seat.end.set_result(why)


def _opening(course: Course, site: str) -> RunOpened:
    return course.opening.model_copy(update={"clients": list(course.hosts[site])})


def _commit(course: Course, accepted: Mapping[ClientId, int], clients: Collection[ClientId]) -> Accepted:
    some, others = (accepted, clients) if len(accepted) < len(clients) else (clients, accepted)
    here = {client: accepted[client] for client in some if client in others}
    return Accepted(run=course.opening.run, version=course.version, accepted=here, flying=course.flying)


def _together(given: Iterable[Given]) -> Iterator[Assign]:
    """The fewest messages that assign these again."""
    groups: dict[int, list[Given]] = {}
    for each in given:
        groups.setdefault(id(each.header), []).append(each)
    for group in groups.values():
        for start in range(0, len(group), ROWS):
            rows = [each.row for each in group[start : start + ROWS]]
            yield group[0].header.model_copy(update={"tasks": rows})

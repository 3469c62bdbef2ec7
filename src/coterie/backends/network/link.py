"""The site's side: one connection outwards, kept up whatever happens, and answers that survive a crash.

A link knows tasks and files, no tensors. What it is given it hands to a handler as soon as the model is
here; what the handler answers it keeps on disk until the server says that it has it too. An answer is
computed once: a task that comes again is answered from the disk.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import grpc

from coterie.backends import spans
from coterie.backends.network.carrier import Carrier
from coterie.backends.network.desk import Desk, Key
from coterie.backends.network.messages import (
    PROTOCOL,
    Accepted,
    Answered,
    Assign,
    Away,
    BadMessage,
    Beat,
    Declined,
    Dropped,
    Failed,
    Hello,
    Message,
    Opened,
    RunClosed,
    RunOpened,
    Taken,
    Welcome,
    line,
    parse,
)
from coterie.backends.network.mismatch import mismatch
from coterie.backends.network.server import FEATURES, SERVICE, options
from coterie.backends.network.transfer import uncut
from coterie.core.errors import CoterieError, RunError
from coterie.core.types import ClientId, Task
from coterie.storage import Blob, Blobs

FIRST, LONGEST = 0.1, 15.0  # seconds between attempts to connect
_PERMANENT = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED}


class Refused(RunError):
    """The server does not want this site, and says why."""


class Handler(Protocol):
    """Who trains. Called in the link's event loop; tasks are answered by `Link.answer` and `Link.fail`."""

    async def opened(self, run: RunOpened) -> str:
        """A run begins, or goes on in a new process; return why the site takes no part, "" if it does."""

    def work(self, run: str, tasks: Sequence[Task]) -> None:
        """Answer these; each `down` is the digest of a blob that is here."""

    def dropped(self, run: str, ids: Sequence[int]) -> None:
        """Nobody waits for these any more."""

    def accepted(
        self, run: str, version: int, accepted: Mapping[ClientId, int], flying: Sequence[int]
    ) -> None:
        """A commit: these tasks' memories are the clients' from now on. The newest comes again at joining."""

    def closed(self, run: str, status: str) -> None:
        """The run has ended."""

    def progress(self, run: str) -> int:
        """A number that grows while there is work going on for the run; without it a busy site is lost."""


class Link:
    """A site's connection to its server.

    addresses: of the server and its standbys, "host:port". credentials: called before each attempt, so that
    certificates may be replaced; None for no encryption. blobs: a folder for the link and its handler alone.
    answers: folder for what is answered and not confirmed. sign: bytes -> signature. rate: bytes a second in
    each direction, None: no limit. room: bytes of blobs that are kept though nothing needs them now.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        credentials: Callable[[], grpc.ChannelCredentials] | None,
        blobs: Blobs,
        handler: Handler,
        *,
        site: str,
        answers: Path,
        sign: Callable[[bytes], str] | None = None,
        compress: bool = False,
        rate: float | None = None,
        room: int = 2 << 30,
        tell: Callable[..., None] = lambda what, **facts: None,
        software: str = "coterie",
        protocol: tuple[int, int] = PROTOCOL,
    ) -> None:
        if not addresses:
            raise ValueError("link: no server address")
        self.addresses, self.credentials, self.blobs, self.handler = addresses, credentials, blobs, handler
        self.site, self.sign, self.tell, self.software, self.protocol = site, sign, tell, software, protocol
        able = {"zstd": compress, "trace": spans.on()}
        self.features = [each for each in FEATURES if able[each]]
        self.desk = Desk(answers, blobs, room)
        self.runs: dict[str, tuple[str, asyncio.Future[str]]] = {}  # open here -> config digest, why not
        self.coming: set[Key] = set()  # tasks whose model is on its way
        self.doing: dict[Key, tuple[Task, Blob, str]] = {}  # that the handler has; and the trace, if any
        self._jobs: set[asyncio.Task[None]] = set()  # of this connection, which ends when one of them fails
        self._outbox: asyncio.Queue[Message] | None = None  # None: not connected
        self._compress = False
        self._carrier = Carrier(blobs, site, rate, tell)
        self._here, self._stopped = asyncio.Event(), asyncio.Event()
        self._process, self._attempts = secrets.token_hex(8), itertools.count(1)

    async def run(self) -> None:
        """Stay connected until `stop`. Raises Refused."""
        delay, known = FIRST, False
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            for address in itertools.cycle(self.addresses):
                session = asyncio.ensure_future(self._session(address))
                await asyncio.wait([session, stopped], return_when=asyncio.FIRST_COMPLETED)
                if stopped.done():
                    return
                joined, why = session.result()
                known = known or joined
                encrypted = self.credentials is not None
                if not known and (wrong := await asyncio.to_thread(mismatch, address, encrypted=encrypted)):
                    raise Refused(wrong)
                self.tell("disconnected", server=address, why=why)
                delay = FIRST if joined else min(delay * 2, LONGEST)
                await asyncio.wait([stopped], timeout=delay * random.uniform(0.5, 1.0))  # noqa: S311
        finally:
            stopped.cancel()
            session.cancel()
            await asyncio.wait([session])

    def stop(self) -> None:
        """Disconnect and end `run`."""
        self._stopped.set()

    def answer(
        self,
        run: str,
        id: int,
        up: Blob,
        weight: float,
        metrics: Mapping[str, float] | None = None,
        samples: int = 0,
        answers: Sequence[tuple[ClientId, int]] = (),
    ) -> None:
        """Answer a task with a blob that is in `blobs`; what was dropped meanwhile is ignored.

        Raises RunError when the disk is full, BadMessage when it says more than a message may hold.
        """
        if (doing := self.doing.get((run, id))) is None:
            return
        if up.digest not in self.blobs:  # older ones with the same bytes were let go of since it was written
            self.handler.work(run, [doing[0]])
            return
        message = Answered(
            run=run, id=id, version=doing[0].version, up=up, weight=float(weight),
            metrics=dict(metrics or {}), samples=samples, answers=list(answers),
        )  # fmt: skip
        if self.sign:
            message = message.model_copy(update={"signature": self.sign(message.signed())})
        self.desk.keep(message)
        self._done((run, id))
        self.tell("answered", **message.model_dump(exclude={"message"}))
        if self._outbox is not None:
            self._spawn(self._deliver(message, doing[2]))

    def fail(self, run: str, id: int, reason: str, detail: str = "") -> None:
        """Give a task up; what was dropped meanwhile is ignored."""
        if self._done((run, id)):
            self._say(Failed(run=run, id=id, reason=line(reason), detail=line(detail, 200_000)))
            self.tell("failed", run=run, id=id, reason=reason)

    def trace(self, run: str, id: int) -> str:
        """The parent of the spans of a task that the handler has (`spans`); "" where there are no traces."""
        doing = self.doing.get((run, id))
        return doing[2] if doing else ""

    async def renew(self, request: bytes) -> bytes:
        """Have a certificate issued for a signing request, once the site is connected. Raises Refused."""
        await self._here.wait()
        try:
            return bytes(
                await self._control.unary_unary(f"/{SERVICE}/Renew")(request, metadata=self._carrier.who)
            )
        except grpc.aio.AioRpcError as error:
            raise Refused(str(error.details())) from None
        except asyncio.CancelledError:
            if (me := asyncio.current_task()) is None or me.cancelling():
                raise
            raise Refused("the connection broke") from None  # which cancels its calls

    def reconnect(self, why: str) -> None:
        """Begin the connection anew, with the credentials that there are now; what is open comes again."""
        if self._outbox is not None and not self._broken.done():
            self._broken.set_result(why)

    async def _session(self, address: str) -> tuple[bool, str]:
        """Connect and work until it breaks; return whether all was well until then, and why it broke."""
        self._joined, self._broken = False, asyncio.get_running_loop().create_future()
        async with self._channel(address) as self._control, self._channel(address) as self._bulk:
            call = self._control.stream_stream(f"/{SERVICE}/Join")(metadata=self._carrier.who)
            listen = asyncio.ensure_future(self._listen(call, address))
            try:
                await asyncio.wait([listen, self._broken], return_when=asyncio.FIRST_COMPLETED)
                if self._broken.done():
                    return False, self._broken.result()
                listen.result()
                code, details = await call.code(), await call.details()
            except grpc.aio.AioRpcError as error:
                code, details = error.code(), error.details()
            except BadMessage as error:
                code, details = grpc.StatusCode.UNKNOWN, str(error)
            finally:
                self._outbox = None
                self._here.clear()
                jobs = [listen, *self._jobs]
                for job in jobs:
                    job.cancel()
                await asyncio.gather(*jobs, return_exceptions=True)
                call.cancel()
                self.coming.clear()
        if code in _PERMANENT:
            raise Refused(f"server {address} refuses site {self.site}: {details}")
        return self._joined, f"{code.name}: {details}"

    async def _listen(self, call: Any, address: str) -> None:
        hello = Hello(
            protocol=self.protocol, software=self.software, features=self.features, site=self.site,
            process=self._process, attempt=next(self._attempts),
            runs=sorted({*self.runs, *(run for run, _ in self.desk.answered)}),
        )  # fmt: skip
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it has ended; reading says why
            await uncut(call.write(bytes(hello)))
        while (data := await uncut(call.read())) is not grpc.aio.EOF:
            message = parse(data)
            if isinstance(message, Away):
                raise Refused(f"server {address} refuses site {self.site}: {message.reason}")
            if self._joined:
                self._take(message)
            elif isinstance(message, Welcome):
                self._joined, self._outbox = True, asyncio.Queue()
                self._here.set()
                self._compress = "zstd" in message.features
                self._spawn(self._speak(call, self._outbox))
                self._spawn(self._beat(message.silence / 4))
                self.tell("connected", server=address, software=message.software)
            else:
                raise BadMessage(f"the server begins with {message.message!r}")

    async def _speak(self, call: Any, outbox: asyncio.Queue[Message]) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it has ended; reading says why
            while True:
                await uncut(call.write(bytes(await outbox.get())))

    async def _beat(self, every: float) -> None:
        while True:
            self._say(
                Beat(progress={run: self.handler.progress(run) + self._carrier.moved for run in self.runs})
            )
            await asyncio.sleep(every)

    def _take(self, message: Message) -> None:
        if isinstance(message, RunOpened):
            self._open(message)
        elif isinstance(message, Assign):
            self._given(message)
        elif isinstance(message, Taken):
            self.desk.forget([(message.run, message.id)])
        elif isinstance(message, Dropped):
            self._drop(message.run, message.ids)
        elif isinstance(message, Accepted):
            self.desk.forget(
                key
                for key, each in list(self.desk.answered.items())
                if key[0] == message.run and each.version < message.version and key[1] not in message.flying
            )
            self._spawn(self._committed(message))
        elif isinstance(message, RunClosed):
            here = {*self.coming, *self.doing, *self.desk.answered}
            self._drop(message.run, [id for run, id in here if run == message.run])
            if self.runs.pop(message.run, None):
                self.handler.closed(message.run, message.status)
        else:
            raise BadMessage(f"a server may not say {message.message!r}")

    def _open(self, message: RunOpened) -> None:
        async def ask() -> str:
            try:
                return await self.handler.opened(message)
            except Exception as error:  # a run that cannot begin here is declined, the others go on
                return f"{type(error).__name__}: {error}"

        async def report() -> None:
            reason = await asyncio.shield(answer)
            self._say(Declined(run=message.run, reason=line(reason)) if reason else Opened(run=message.run))

        known = self.runs.get(message.run)
        if known and known[0] == message.config_digest and not (known[1].done() and known[1].result()):
            answer = known[1]
        else:
            answer = asyncio.ensure_future(ask())
            self.runs[message.run] = (message.config_digest, answer)
        self._spawn(report())

    def _given(self, message: Assign) -> None:
        """Answer from the disk what is answered, and get ready for what is new."""
        fresh: list[Task] = []
        for id, client, memory, thread in message.tasks:
            key = (message.run, id)
            if key in self.desk.answered:
                self._spawn(self._deliver(self.desk.answered[key], message.trace))
            elif key not in self.doing and key not in self.coming:
                self.coming.add(key)
                fresh.append(
                    Task(
                        id, client, message.version, message.round, message.down.digest, message.kind,
                        message.config, memory, thread,
                    )
                )  # fmt: skip
        if fresh:
            self._spawn(self._prepare(message.run, message.down, fresh, message.trace))

    async def _committed(self, message: Accepted) -> None:
        if await self._takes_part(message.run):
            self.handler.accepted(message.run, message.version, message.accepted, message.flying)

    async def _takes_part(self, run: str) -> bool:
        """Wait until the run is open here, or is not going to be."""
        return run in self.runs and not await asyncio.shield(self.runs[run][1])

    async def _prepare(self, run: str, down: Blob, tasks: list[Task], trace: str) -> None:
        """Hand tasks over once the run is open and the model is here."""
        self.desk.need(down)
        try:
            if await self._takes_part(run):
                with spans.span("download", trace, run=run, site=self.site, bytes=down.size):
                    await self.fetch(run, down)
                ready = [task for task in tasks if (run, task.id) in self.coming]
                for task in ready:
                    self.desk.need(down)
                    self.doing[run, task.id] = (task, down, trace)
                if ready:
                    self.handler.work(run, ready)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:  # else nobody needs it any more
                raise
        except CoterieError as error:  # the disk is full, say
            for task in tasks:
                self._done((run, task.id))
                self._say(Failed(run=run, id=task.id, reason=line(f"site {self.site}: {error}")))
                self.tell("failed", run=run, id=task.id, reason=str(error))
        finally:
            self.coming.difference_update((run, task.id) for task in tasks)
            self.desk.rest(down)

    def _drop(self, run: str, ids: Sequence[int]) -> None:
        for id in ids:
            self.coming.discard((run, id))
            self._done((run, id))
        self.desk.forget([(run, id) for id in ids])
        if ids:
            self.handler.dropped(run, ids)

    def _done(self, key: Key) -> bool:
        if doing := self.doing.pop(key, None):
            self.desk.rest(doing[1])
        return doing is not None

    async def fetch(self, run: str, blob: Blob) -> None:
        """Have a blob of a run here, sent once whoever asks. Raises AioRpcError, Corrupt, RunError."""
        await self._carrier.fetch(self._bulk, run, blob)

    async def _deliver(self, message: Answered, trace: str) -> None:
        """Bring an answer to the server: the blob first, then what it belongs to."""
        run, id, size = message.run, message.id, message.up.size
        try:
            with spans.span("upload", trace, run=run, site=self.site, task=id, bytes=size):
                await self._carrier.bring(self._bulk, message, compress=self._compress)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            self.tell("unwanted", run=run, id=id, why=error.details())
        else:
            self._say(message)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self.credentials is None:
            return grpc.aio.insecure_channel(address, options(120))
        return grpc.aio.secure_channel(address, self.credentials(), options(120))

    def _say(self, message: Message) -> None:
        if self._outbox is not None:
            self._outbox.put_nowait(message)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        job = asyncio.ensure_future(work)
        self._jobs.add(job)
        job.add_done_callback(self._over)

    def _over(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        if not job.cancelled() and (error := job.exception()) and not self._broken.done():
            self._broken.set_result(
                f"{type(error).__name__}: {error}"
            )  # begin anew: all that is open comes again

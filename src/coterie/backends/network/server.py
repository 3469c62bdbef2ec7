"""The server's end of the connections: gRPC with certificates on both sides, in front of a hub.

`Join` is a site's one long stream of messages; `Get` and `Put` carry blobs, from the byte where they broke
off; `Renew` exchanges a certificate. A refusal is a gRPC status whose details say why.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc

from coterie.backends.network import transfer
from coterie.backends.network.hub import Course, Hub, Identity, Seat
from coterie.backends.network.messages import (
    FRAME,
    LETTER,
    PROTOCOL,
    Away,
    BadMessage,
    Have,
    Hello,
    Message,
    Offer,
    Said,
    Want,
    Welcome,
    line,
    parse,
)
from coterie.backends.network.transfer import uncut
from coterie.core.errors import CoterieError, RunError
from coterie.storage import Blobs, Corrupt

SERVICE = "coterie.v1.Federation"
FEATURES = ("zstd", "trace")
FAREWELL = 5.0  # seconds in which a site that must go may close the connection itself
AT_ONCE = 8  # uploads: what is on its way is in memory, and who is served first is answered first
SLOW = 2.0  # seconds without a chunk after which an upload is no longer one of these, and goes on beside them
M = TypeVar("M", bound=Said)


def options(silence: float, *, server: bool = False) -> list[tuple[str, int]]:
    """What either end tells gRPC: how large a message may be, and to find connections that are half open."""
    ping = max(int(silence * 250), 1000)  # milliseconds
    ours = [
        ("grpc.max_receive_message_length", FRAME if server else LETTER),
        ("grpc.max_send_message_length", LETTER if server else FRAME),
        ("grpc.keepalive_time_ms", ping),
        ("grpc.keepalive_timeout_ms", 2 * ping),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if server:
        return [*ours, ("grpc.http2.min_recv_ping_interval_without_data_ms", 500), ("grpc.so_reuseport", 0)]
    return [*ours, ("grpc.use_local_subchannel_pool", 1)]  # a connection for each channel


@dataclass
class Anyone:
    """Who a peer without a certificate says it is."""

    name: str
    serial: int = 0


class Turn:
    """A place among the few uploads at a time, which who is slow gives up."""

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self.slots, self._held = slots, True
        self._timer = asyncio.get_running_loop().call_later(SLOW, self.end)

    def renew(self) -> None:
        """Something has arrived."""
        self._timer.cancel()
        if self._held:
            self._timer = asyncio.get_running_loop().call_later(SLOW, self.end)

    def end(self) -> None:
        """The next one's turn."""
        self._timer.cancel()
        if self._held:
            self._held = False
            self.slots.release()


class Server:
    """Lets sites in.

    authorise: certificate (PEM) -> Identity; what it raises is the reason for a refusal. None: peers have no
    certificates and are who they say they are. renew: (identity, signing request) -> certificate.
    revoked: serial numbers that are not to be trusted, asked for at each message. more: services beside the
    sites'.
    """

    def __init__(
        self,
        hub: Hub,
        *,
        authorise: Callable[[bytes], Identity] | None,
        renew: Callable[[Identity, bytes], bytes] | None = None,
        revoked: Callable[[], Collection[int]] = tuple,
        more: Sequence[grpc.GenericRpcHandler] = (),
        software: str = "coterie",
        protocol: tuple[int, int] = PROTOCOL,
    ) -> None:
        self.hub, self.authorise, self.renew = hub, authorise, renew
        self.revoked, self.more = revoked, more
        self.software, self.protocol = software, protocol
        self._joined: set[asyncio.Task[Any]] = set()
        self._uploads: dict[tuple[str, str], asyncio.Task[int]] = {}  # site, digest -> what receives it
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def start(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Listen; return the port. credentials: None exactly when there is no `authorise`."""
        if (credentials is None) != (self.authorise is None):
            raise ValueError("server: credentials and authorise belong together; give both, or None for both")
        self.server = grpc.aio.server(options=options(self.hub.silence, server=True))
        methods = {
            "Join": grpc.stream_stream_rpc_method_handler(self._join),
            "Get": grpc.unary_stream_rpc_method_handler(self._get),
            "Put": grpc.stream_stream_rpc_method_handler(self._put),
            "Renew": grpc.unary_unary_rpc_method_handler(self._renew),
        }
        self.server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, methods), *self.more]
        )
        if credentials is None:
            port = self.server.add_insecure_port(address)
        else:
            port = self.server.add_secure_port(address, credentials)
        await self.server.start()
        return int(port)

    async def stop(self) -> None:
        """Close all connections."""
        await self.server.stop(None)
        if self._joined:  # gRPC does not wait for them
            await asyncio.wait(self._joined)

    async def _join(self, _: Any, context: Any) -> None:
        hello = await _first(Hello, context)
        site, ours, theirs = hello.site, self.protocol, hello.protocol
        identity = await self._admit(context)
        if identity.name != site:
            await _refuse(context, f"the certificate is of {identity.name}, not of {site}")
        if theirs[0] != ours[0] or abs(theirs[1] - ours[1]) > 1:
            await _refuse(
                context,
                f"site {site} speaks protocol {theirs[0]}.{theirs[1]} ({hello.software}), the server "
                f"{ours[0]}.{ours[1]} ({self.software}): one of them must be updated",
            )
        both = frozenset(hello.features) & frozenset(FEATURES)
        welcome = Welcome(
            protocol=ours, software=self.software, features=sorted(both), silence=self.hub.silence
        )
        seat = self.hub.join(site, identity, both, welcome, (hello.process, hello.attempt))
        if seat is None:  # it broke on its way here, and the site has come again since
            await context.abort(grpc.StatusCode.UNAVAILABLE, "a later connection of this site is here")
            raise AssertionError("abort raises")
        self.hub.brief(site, hello.runs)
        self.hub.tell("joined", site=site, peer=context.peer(), software=hello.software)
        outbox, end = seat.outbox, seat.end
        assert outbox is not None
        assert end is not None
        me = asyncio.current_task()
        assert me is not None
        self._joined.add(me)
        me.add_done_callback(self._joined.discard)
        listen = asyncio.ensure_future(self._listen(site, seat, context))
        speak = asyncio.ensure_future(_speak(outbox, context))
        why = ""
        try:
            ways: list[asyncio.Future[Any]] = [listen, speak, end]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            why = end.result() if end.done() else ""
        finally:
            if seat.outbox is outbox:
                seat.outbox = seat.end = None
            self.hub.tell("left", site=site, why=why)
            try:
                if why:  # a status that meets a message from the site would be lost, so it is told first
                    outbox.put_nowait(Away(reason=line(why)))
                    await asyncio.wait([listen], timeout=FAREWELL)
            finally:
                listen.cancel()
                speak.cancel()
                await asyncio.gather(listen, speak, return_exceptions=True)
        if why:
            await _refuse(context, why)

    async def _listen(self, site: str, seat: Seat, context: Any) -> None:
        outbox, end = seat.outbox, seat.end
        assert end is not None
        while (data := await uncut(context.read())) is not grpc.aio.EOF:
            if seat.outbox is outbox and not end.done():
                if seat.identity is not None and seat.identity.serial in self.revoked():
                    self.hub.revoke(seat.identity.serial)
                    continue
                try:
                    self.hub.take(site, seat, parse(data))
                except BadMessage as error:
                    end.set_result(str(error))

    async def _get(self, request: bytes, context: Any) -> None:
        identity = await self._admit(context)
        want = await _first(Want, context, request)
        course, seat = self.hub.hosted(identity.name, want.run), self.hub.seat(identity.name)
        if course is None or not _wanted(course, identity.name, want.digest):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no blob {want.digest[:12]} for {identity.name}")
        path = self.hub.blobs.path(want.digest)
        with suppress(FileNotFoundError):  # nobody needs it any more, as the next attempt will hear
            async for frame in transfer.chunks(path, want.start, compress="zstd" in seat.features):
                await self._check(context, identity)
                await uncut(context.write(frame))
                seat.seen = self.hub.loop.time()

    async def _put(self, _: Any, context: Any) -> None:
        """Offer -> Have, then frames -> Have: less than the whole when a frame was damaged."""
        identity = await self._admit(context)
        offer = await _first(Offer, context)
        site, up = identity.name, offer.up
        if self.hub.given(site, offer.run, offer.id) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"nobody waits for task {offer.id}")
        if up.size > (course := self.hub.runs[offer.run]).limit:
            why = f"site {site}: its update of {up.size} bytes is larger than {course.limit}"
            self.hub.lose(course, [offer.id], why)
            await context.abort(grpc.StatusCode.NOT_FOUND, why)

        seat = self.hub.seat(site)
        seat.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            seat.waiting -= 1
        turn = Turn(self._slots)
        try:
            await self._receive(context, identity, offer, turn)
        finally:
            turn.end()

    async def _receive(self, context: Any, identity: Identity, offer: Offer, turn: Turn) -> None:
        """Say what is here already, then take the rest."""
        site, up, blobs = identity.name, offer.up, self.hub.blobs

        async def frames() -> AsyncIterator[bytes]:
            while (frame := await uncut(context.read())) is not grpc.aio.EOF:
                await self._check(context, identity)
                self.hub.seat(site).seen = self.hub.loop.time()
                turn.renew()
                yield frame

        key = (site, up.digest)
        while older := self._uploads.pop(key, None):  # of a connection that is dead: the site has come again
            older.cancel()
            await asyncio.wait([older])
        held = up.size
        if up.digest not in blobs:
            inbox = Blobs(blobs.folder / "arriving" / site)  # parts that nobody else can spoil
            if (held := inbox.held(up.digest)) < up.size:
                await uncut(context.write(bytes(Have(held=held))))
            job = asyncio.ensure_future(transfer.receive(frames(), inbox, up, into=blobs))
            self._uploads[key] = job
            try:
                held = await job
            except Corrupt as error:
                await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
            except RunError as error:
                self.hub.tell("unwritable", site=site, run=offer.run, id=offer.id, error=error)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server cannot write")
            finally:
                if self._uploads.get(key) is job:
                    del self._uploads[key]
        turn.end()
        await uncut(context.write(bytes(Have(held=held))))
        with suppress(
            TimeoutError
        ):  # until the site has heard it: a status that meets a frame hides the message
            async with asyncio.timeout(FAREWELL):
                async for _ in frames():
                    pass

    async def _renew(self, request: bytes, context: Any) -> bytes:
        identity = await self._admit(context)
        if self.renew is None:
            await _refuse(context, "this server renews no certificates")
        try:
            return self.renew(identity, request)
        except (CoterieError, ValueError) as error:
            await _refuse(context, str(error))

    async def _admit(self, context: Any) -> Identity:
        """Whose call this is."""
        if self.authorise is None:
            return Anyone(str(dict(context.invocation_metadata()).get("site", "")))
        try:
            (pem,) = context.auth_context()["x509_pem_cert"]
            identity = self.authorise(pem)
        except Exception as error:  # whatever is wrong with the certificate is why it is refused
            await _refuse(context, str(error) or type(error).__name__)
        await self._check(context, identity)
        return identity

    async def _check(self, context: Any, identity: Identity) -> None:
        if identity.serial in self.hub.revoked or identity.serial in self.revoked():
            await _refuse(
                context, f"the certificate of {identity.name} (serial {identity.serial}) is revoked"
            )


async def _first(kind: type[M], context: Any, data: Any = None) -> M:
    """The message that a call begins with."""
    try:
        message: Message = parse(data or await uncut(context.read()) or b"")
        if not isinstance(message, kind):
            raise BadMessage(f"{message.message!r} where {kind.__name__} should be")
    except BadMessage as error:
        await _refuse(context, str(error))
    return message


async def _refuse(context: Any, why: str) -> NoReturn:
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, line(why, 1000))
    raise AssertionError("abort raises")


async def _speak(outbox: asyncio.Queue[Message], context: Any) -> None:
    while True:
        await uncut(context.write(bytes(await outbox.get())))


def _wanted(course: Course, site: str, digest: str) -> bool:
    code = course.opening.code
    return bool(code and code.digest == digest) or any(
        given.site == site and given.header.down.digest == digest for given in course.tasks.values()
    )

"""A site's transfers: each blob once, a few at a time, at a pace, and in as many attempts as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any
from weakref import WeakValueDictionary

import grpc

from coterie.backends.network import transfer
from coterie.backends.network.messages import Answered, BadMessage, Have, Offer, Want, parse
from coterie.backends.network.server import SERVICE
from coterie.backends.network.transfer import uncut
from coterie.storage import Blob, Blobs, Corrupt

AT_ONCE = 4  # transfers
ATTEMPTS = 5  # of a transfer that does not get on


class Carrier:
    """Carries blobs over the channels that it is given. rate: bytes a second in each direction."""

    def __init__(self, blobs: Blobs, site: str, rate: float | None, tell: Callable[..., None]) -> None:
        self.blobs, self.tell = blobs, tell
        self.who = [("site", site)]  # believed only where there are no certificates
        self.moved = 0  # chunks that arrived, which are signs of life
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # one for each digest
        self._up, self._down = transfer.Pace(rate), transfer.Pace(rate)

    async def fetch(self, channel: Any, run: str, blob: Blob) -> None:
        """Have a blob here. Raises AioRpcError, Corrupt, and RunError when the disk is full."""

        async def once() -> int:
            want = Want(run=run, digest=blob.digest, start=self.blobs.held(blob.digest))
            call = channel.unary_stream(f"/{SERVICE}/Get")(bytes(want), metadata=self.who)

            async def frames() -> AsyncIterator[bytes]:
                while (frame := await uncut(call.read())) is not grpc.aio.EOF:
                    await self._down.spend(len(frame))
                    self.moved += 1
                    yield frame

            try:
                return await transfer.receive(frames(), self.blobs, blob)
            finally:
                call.cancel()

        async with self._locks.setdefault(blob.digest, asyncio.Lock()):
            if blob.digest not in self.blobs:
                await self._insist(once, blob)

    async def bring(self, channel: Any, message: Answered, *, compress: bool) -> None:
        """Have the update of an answer there. Raises AioRpcError, Corrupt."""

        async def once() -> int:
            call = channel.stream_stream(f"/{SERVICE}/Put")(metadata=self.who)
            try:
                await uncut(call.write(bytes(Offer(run=message.run, id=message.id, up=message.up))))
                if (held := await _have(call)) == message.up.size:
                    return held
                end = asyncio.ensure_future(_have(call))  # comes early when a chunk is damaged
                end.add_done_callback(
                    lambda end: end.cancelled() or end.exception()
                )  # if nobody waits for it
                async for frame in transfer.chunks(
                    self.blobs.path(message.up.digest), held, compress=compress
                ):
                    await self._up.spend(len(frame))
                    if end.done():
                        break
                    await uncut(call.write(frame))
                await uncut(call.done_writing())
                return await end
            finally:
                call.cancel()

        async with self._locks.setdefault(message.up.digest, asyncio.Lock()):
            await self._insist(once, message.up)

    async def _insist(self, once: Callable[[], Coroutine[Any, Any, int]], blob: Blob) -> None:
        """Try until it is done, while each attempt brings it further."""
        furthest, left = 0, ATTEMPTS
        async with self._slots:
            while left:
                try:
                    held = await once()
                except Corrupt:
                    held = 0
                if held == blob.size:
                    return
                furthest, left = (held, ATTEMPTS) if held > furthest else (furthest, left - 1)
                self.tell("again", digest=blob.digest, held=held)
        raise Corrupt(
            f"blob {blob.digest[:12]} arrives damaged {ATTEMPTS} times in a row, at byte {furthest}"
        )


async def _have(call: Any) -> int:
    """What the server says it holds. Raises AioRpcError, BadMessage."""
    if (data := await uncut(call.read())) is grpc.aio.EOF:
        raise BadMessage("the call ends where the server should say what it has")
    message = parse(data)
    if not isinstance(message, Have):
        raise BadMessage(f"{message.message!r} where Have should be")
    return message.held

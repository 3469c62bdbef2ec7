"""Blobs on their way: chunks with a digest each, from any byte on. Knows files and bytes; no connection.

A frame is the chunk's place, its length, the SHA-256 of all that the blob holds up to its end, and the bytes,
which are compressed when that was agreed on and helps. So each side hashes a byte once, for its chunk and for
the whole. A chunk that arrives damaged is not kept: the receiver says how much it has, and the sender goes on
from there.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import zstandard

from coterie.backends.network.messages import BadMessage
from coterie.core.types import Tree
from coterie.storage import Blob, Blobs

T = TypeVar("T")
CHUNK = 1 << 20  # bytes
_PLACE = struct.Struct(">BQI")  # compressed, offset, bytes before compression
_HEAD = _PLACE.size + 32


def packed(offset: int, data: bytes, known: hashlib._Hash, *, compress: bool = False) -> bytes:
    """A frame. data: at most CHUNK bytes. known: a running SHA-256 of what is before them; it goes on."""
    known.update(data)
    body = zstandard.ZstdCompressor(level=1).compress(data) if compress else data
    squeezed = len(body) < len(data)
    if not squeezed:
        body = data
    return b"".join((_PLACE.pack(squeezed, offset, len(data)), known.digest(), body))


def opened(frame: bytes, held: int, known: hashlib._Hash) -> tuple[bytes | memoryview, hashlib._Hash]:
    """The bytes of a frame, at most CHUNK, and the running SHA-256 with them. Raises BadMessage for damage.

    held: how many bytes are before it; known: their SHA-256, which is left as it is.
    """
    view = memoryview(frame)
    if len(frame) < _HEAD:
        raise BadMessage("a chunk that is cut short")
    body: bytes | memoryview = view[_HEAD:]
    squeezed, offset, size = _PLACE.unpack(view[: _PLACE.size])
    if offset != held:
        raise BadMessage(f"a chunk from byte {offset} on, where {held} are here")
    if squeezed > 1 or size > CHUNK:
        raise BadMessage(f"a chunk of {size} bytes; at most {CHUNK} may come")
    if squeezed:
        try:  # bounded by what is read and by the window, whatever the frame claims
            reader = zstandard.ZstdDecompressor(max_window_size=2 * CHUNK).stream_reader(body)
            body = reader.read(size + 1)
        except zstandard.ZstdError as error:
            raise BadMessage(f"a chunk at byte {offset} that does not unpack: {error}") from None
    if len(body) != size:
        raise BadMessage(f"a chunk of {len(body)} bytes that claims {size}")
    seen = known.copy()
    seen.update(body)
    if view[_PLACE.size : _HEAD] != seen.digest():
        raise BadMessage(f"a chunk at byte {offset} that is damaged")
    return body, seen


async def uncut(operation: Awaitable[T]) -> T:
    """Wait for an operation of gRPC, which goes on when the waiting is cancelled.

    Its asyncio frees the memory of an operation that is cancelled, to which the core then writes.
    """
    job = asyncio.ensure_future(operation)
    job.add_done_callback(lambda job: job.cancelled() or job.exception())  # whether or not anybody waits
    return await asyncio.shield(job)


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Run in a thread, to the end even when cancelled: the next to work on the file must find it at rest."""
    job = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise


async def chunks(path: Path, start: int, *, compress: bool = False) -> AsyncIterator[bytes]:
    """The frames of a file from a byte on, each made while the last one travels."""
    known = hashlib.sha256()

    def read(offset: int, before: int) -> bytes:
        with path.open("rb") as file:
            file.seek(before)
            while before < offset and (data := file.read(min(CHUNK, offset - before))):
                known.update(data)
                before += len(data)
            data = file.read(CHUNK)
        return packed(offset, data, known, compress=compress) if data else b""

    ahead = asyncio.ensure_future(asyncio.to_thread(read, start, 0))
    while frame := await ahead:
        start += CHUNK
        ahead = asyncio.ensure_future(asyncio.to_thread(read, start, start))
        yield frame


async def receive(
    frames: AsyncIterator[bytes], blobs: Blobs, blob: Blob, *, into: Blobs | None = None
) -> int:
    """Add frames to a blob until it is whole, they end, or one is damaged; return how many bytes are here.

    into: where the whole shall lie. Raises Corrupt when the whole is not what its name says, RunError when
    the disk is full.
    """
    held, seen = blobs.held(blob.digest), await in_thread(blobs.begun, blob.digest)

    def keep(frame: bytes) -> int:
        nonlocal seen
        data, with_it = opened(frame, held, seen)
        if held + len(data) > blob.size:
            raise BadMessage(f"bytes {held} to {held + len(data)} of {blob.size}")
        there = blobs.receive(blob.digest, held, data)
        seen = with_it
        return there

    ahead = asyncio.ensure_future(anext(frames, b""))  # one is kept while the next arrives
    try:
        while held < blob.size:
            if not (frame := await ahead):
                return held
            if held + CHUNK < blob.size:
                ahead = asyncio.ensure_future(anext(frames, b""))
            try:
                held = await in_thread(keep, frame)
            except BadMessage:
                await asyncio.wait([ahead])  # whoever reads on must not meet it
                return held
    finally:
        ahead.cancel()
        await asyncio.gather(ahead, return_exceptions=True)
    found = seen.hexdigest()
    await in_thread(partial(blobs.finish, blob.digest, blob.size, found=found, into=into))
    return held


class Pace:
    """A token bucket: at most so many bytes a second, on average. None: no limit."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._free = 0.0  # when the bytes that were granted have passed

    async def spend(self, size: int) -> None:
        """Wait until these bytes may pass."""
        if self.rate is None:
            return
        now = asyncio.get_running_loop().time()
        start = max(self._free, now)
        self._free = start + size / self.rate
        await asyncio.sleep(start - now)


class Shelf:
    """Blobs that are deleted when nobody holds them any more. Safe to call from any thread."""

    def __init__(self, blobs: Blobs) -> None:
        self.blobs = blobs
        self._holders: dict[str, Counter[str]] = {}  # digest -> who holds it how often
        self._lock = threading.Lock()

    def write(self, who: str, tree: Tree) -> Blob:
        """Keep a tree, held once. Raises what Blobs.write does."""
        while True:
            blob = self.blobs.write(tree, lasting=False)
            with self._lock:  # the same bytes may have been let go of since they were written
                if blob.digest in self.blobs:
                    self._hold(who, blob.digest)
                    return blob

    def hold(self, who: str, digest: str) -> bool:
        """Hold it once more; False when it is not here."""
        with self._lock:
            if here := digest in self.blobs:
                self._hold(who, digest)
            return here

    def release(self, who: str, digest: str) -> None:
        """Hold it once less."""
        with self._lock:
            holders = self._holders.get(digest, Counter())
            holders[who] -= 1
            self._settle(digest, +holders)

    def release_all(self, who: str) -> None:
        """Let go of all that somebody holds."""
        with self._lock:
            for digest, holders in list(self._holders.items()):
                if holders.pop(who, 0):
                    self._settle(digest, holders)

    def _hold(self, who: str, digest: str) -> None:
        self._holders.setdefault(digest, Counter())[who] += 1

    def _settle(self, digest: str, holders: Counter[str]) -> None:
        if holders:
            self._holders[digest] = holders
        else:
            self._holders.pop(digest, None)
            self.blobs.path(digest).unlink(missing_ok=True)

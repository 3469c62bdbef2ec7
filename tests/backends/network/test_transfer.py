"""Chunks: any damage is noticed, any part is gone on from, nothing unpacks to more than it may."""

import asyncio
import hashlib
import os
import threading
import time

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from coterie.backends.network import BadMessage, transfer
from coterie.storage import Blob, Blobs, Corrupt


def frames_of(path, start=0, compress=False):
    async def go():
        return [frame async for frame in transfer.chunks(path, start, compress=compress)]

    return asyncio.run(go())


def packed(offset, data, before=b"", compress=False):
    return transfer.packed(offset, data, hashlib.sha256(before), compress=compress)


def receive(frames, blobs, blob, **more):
    async def each():
        for frame in frames:
            yield frame

    return asyncio.run(transfer.receive(each(), blobs, blob, **more))


@pytest.fixture
def source(tmp_path):
    """3.5 chunks of bytes, their path and name."""
    data = os.urandom(transfer.CHUNK) + bytes(transfer.CHUNK * 2) + b"end" * 1000
    path = tmp_path / "source"
    path.write_bytes(data)
    return data, path, Blob(hashlib.sha256(data).hexdigest(), len(data))


@given(
    data=st.binary(min_size=1, max_size=300),
    bit=st.integers(0, 10**6),
    offset=st.integers(0, 2**60),
    squeeze=st.booleans(),
)
def test_every_flipped_bit_is_noticed_or_changes_nothing(data, bit, offset, squeeze):
    frame = packed(offset, data * 5, b"before", squeeze)
    known = hashlib.sha256(b"before")
    out, seen = transfer.opened(frame, offset, known)
    assert bytes(out) == data * 5
    assert seen.digest() == hashlib.sha256(b"before" + data * 5).digest()
    harmed = bytearray(frame)
    harmed[bit // 8 % len(frame)] ^= 1 << bit % 8
    try:
        out, _ = transfer.opened(bytes(harmed), offset, known)
    except BadMessage:
        return
    assert squeeze  # zstd has bits that mean nothing
    assert bytes(out) == data * 5


@pytest.mark.parametrize("claims", [True, False])
def test_a_bomb_does_not_unpack(claims):
    """64 MiB of zeros in 2 KiB, with and without saying so in the frame's head."""
    packer = zstandard.ZstdCompressor(write_content_size=claims)
    body = packer.compress(bytes(64 << 20))
    place = transfer._PLACE.pack(True, 0, 100)
    with pytest.raises(BadMessage):
        transfer.opened(place + hashlib.sha256(bytes(64 << 20)).digest() + body, 0, hashlib.sha256())


@pytest.mark.parametrize("compress", [True, False])
def test_a_blob_goes_on_from_any_byte(tmp_path, source, compress):
    data, path, blob = source
    blobs = Blobs(tmp_path / "there")
    frames = frames_of(path, compress=compress)
    assert sum(map(len, frames)) < (1.01 if not compress else 0.4) * len(data) + 1000
    assert receive(frames[:1], blobs, blob) == transfer.CHUNK
    blobs.receive(
        blob.digest, transfer.CHUNK, data[transfer.CHUNK : transfer.CHUNK + 77]
    )  # as if killed in between
    held = blobs.held(blob.digest)
    assert receive(
        frames_of(path, held, compress), Blobs(blobs.folder), blob, into=Blobs(tmp_path / "into")
    ) == len(data)
    assert (tmp_path / "into" / blob.digest).read_bytes() == data
    assert list(blobs) == []


def test_a_damaged_chunk_is_not_kept_and_may_come_again(tmp_path, source):
    data, path, blob = source
    blobs = Blobs(tmp_path / "there")
    frames = frames_of(path)
    harmed = frames[1][:-1] + bytes([frames[1][-1] ^ 1])
    assert receive([frames[0], harmed, *frames[2:]], blobs, blob) == transfer.CHUNK
    assert receive(frames[1:], blobs, blob) == len(data)
    assert blobs.path(blob.digest).read_bytes() == data


def test_chunks_out_of_place_and_behind_the_end_are_not_kept(tmp_path, source):
    _, path, blob = source
    blobs = Blobs(tmp_path / "there")
    frames = frames_of(path)
    assert receive([frames[1]], blobs, blob) == 0
    assert receive([frames[0], frames[0]], blobs, blob) == transfer.CHUNK
    zeros, first = bytes(transfer.CHUNK), path.read_bytes()[: transfer.CHUNK]
    stranger = packed(transfer.CHUNK, zeros, b"another file")
    assert receive([stranger], blobs, blob) == transfer.CHUNK
    second = packed(transfer.CHUNK, zeros, first)
    assert receive([second] * 9, blobs, blob) == 2 * transfer.CHUNK
    noise = os.urandom(transfer.CHUNK)
    third = packed(2 * transfer.CHUNK, noise, first + zeros)
    assert receive([third], blobs, blob) == 3 * transfer.CHUNK
    long, short = (packed(3 * transfer.CHUNK, bytes(size), first + zeros + noise) for size in (3001, 3000))
    assert receive([long], blobs, blob) == 3 * transfer.CHUNK
    with pytest.raises(Corrupt, match="damaged"):  # every chunk was right, the whole is not
        receive([short], blobs, blob)
    assert blobs.held(blob.digest) == 0


def test_a_pace_is_kept_by_all_together():
    async def go():
        pace = transfer.Pace(1e6)
        start = time.monotonic()
        await asyncio.gather(*(pace.spend(100_000) for _ in range(4)))
        return time.monotonic() - start

    assert asyncio.run(go()) >= 0.3  # the fourth waits for three to pass


def test_a_shelf_keeps_what_anybody_holds(tmp_path):
    shelf = transfer.Shelf(Blobs(tmp_path))
    blob = shelf.write("a", {"x": 1})
    assert shelf.hold("b", blob.digest)
    shelf.release("a", blob.digest)
    assert blob.digest in shelf.blobs
    shelf.release_all("b")
    assert blob.digest not in shelf.blobs
    assert not shelf.hold("a", blob.digest)


def test_a_shelf_never_loses_what_was_just_written(tmp_path):
    """One thread lets go of the bytes that another writes again and again."""
    shelf, stop = transfer.Shelf(Blobs(tmp_path)), threading.Event()

    def other():
        while not stop.is_set():
            shelf.release_all("other")
            shelf.write("other", {"x": 1})

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(200):
            blob = shelf.write("mine", {"x": 1})
            assert blob.digest in shelf.blobs
            shelf.release("mine", blob.digest)
    finally:
        stop.set()
        thread.join()

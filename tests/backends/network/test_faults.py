"""One server, sites that fail in every way, and peers that lie."""

import asyncio
import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
import torch

from coterie.backends.network import NetworkBackend, Refused, messages, parse
from coterie.backends.network import transfer as chunks
from coterie.backends.network.messages import (
    Answered,
    Failed,
    Have,
    Hello,
    Offer,
    RunClosed,
    Taken,
    Welcome,
)
from coterie.backends.network.server import SERVICE
from coterie.core import Lost, Reply, Task, Tick
from coterie.core.types import Cancel, Timer
from coterie.storage import Blobs
from wires import Proxy, Trains, Waits, link_of, linked, opening, papers, serving

MB = 1 << 20


class Doubles(Trains):
    """Answers with twice what it was given."""

    def train(self, run, tasks):
        for task in tasks:
            self.count += 1
            down = self.link.blobs.read(task.down)
            self.link.answer(run, task.id, self.link.blobs.write({"w": down["w"] * 2}), 1.0)


class Idles(Waits):
    def progress(self, run):
        return 0


def task(id, client="c", size=10, **more):
    return Task(id, client, 0, 0, {"w": torch.ones(size)}, **more)


def backend_of(hub, site="a", **more):
    return NetworkBackend(hub, "run-1", lambda client: site, **more)


async def soon(what):
    """Wait for an event, not for ever."""
    return (await asyncio.wait_for(what.event(), 20))[1]


def peer(port, name="a", ca="ca", **more):
    """A bare channel of somebody with a certificate."""
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", papers(name, ca, **more).client())


async def join(channel, site="a", **more):
    call = channel.stream_stream(f"/{SERVICE}/Join")()
    await call.write(
        bytes(Hello(**{"protocol": (1, 0), "software": "x", "features": [], "site": site, **more}))
    )
    return call


async def heard(call, kind):
    """The next message of a kind."""
    while True:
        message = parse(await asyncio.wait_for(call.read(), 20))
        if isinstance(message, kind):
            return message


async def put(channel, offer, frames):
    call = channel.stream_stream(f"/{SERVICE}/Put")()
    await call.write(bytes(offer))
    first = parse(await call.read())
    for frame in frames:
        await call.write(frame)
    await call.done_writing()
    return first.held, parse(await call.read()).held


async def why(call):
    """Why the server ended a call."""
    try:
        while await asyncio.wait_for(call.read(), 20) is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return await call.code(), await call.details()


def run(go):
    asyncio.run(asyncio.wait_for(go, 60))


# Transfers


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_transfer_that_is_cut_again_and_again_sends_only_what_is_missing(tmp_path, way):
    class Big(Trains):
        def train(self, run, tasks):
            size = 8 * MB if way == "up" else 10
            self.link.answer(run, tasks[0].id, self.link.blobs.write({"w": torch.rand(size // 4)}), 1.0)

    async def go():
        async with serving(tmp_path / "hub") as (hub, port), Proxy(port) as proxy:
            hub.open(opening(), {"a": ["c"]})
            link = link_of("a", proxy.address, tmp_path / "a", Big())
            async with linked(link):
                await hub.diary.until("joined")
                backend = backend_of(hub)
                backend.send([task(0, size=8 * MB // 4 if way == "down" else 10)])
                waits = asyncio.ensure_future(soon(backend))
                there = link.blobs if way == "down" else Blobs(tmp_path / "hub" / "arriving" / "a")
                for cut in range(3):
                    proxy.budget = proxy.bytes.total() + int(2.5 * MB)
                    await hub.diary.until("left", cut + 1)
                before, held = (
                    proxy.bytes[way],
                    sum(path.stat().st_size for path in there.folder.glob("*.part")),
                )
                assert isinstance(await waits, Reply)
                assert held >= MB
                assert proxy.bytes[way] - before < 8 * MB - held + 200_000

    run(go())


@pytest.mark.parametrize("compress", [True, False])
def test_a_blob_is_sent_once_to_each_site_and_freed_when_nothing_needs_it(tmp_path, compress):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port), Proxy(port) as proxy:
            hub.open(opening(), {"a": [f"c{i}" for i in range(6)]})
            handler = Doubles()
            async with linked(
                link_of("a", proxy.address, tmp_path / "a", handler, compress=compress, room=0)
            ) as link:
                await hub.diary.until("joined")
                backend, down, config = backend_of(hub), {"w": torch.ones(MB // 4)}, {}
                for round in range(2):
                    backend.send([Task(6 * round + i, f"c{i}", 0, 0, down, config=config) for i in range(6)])
                    for _ in range(6):
                        backend.taken(await soon(backend))
                while link.desk.answered:
                    await asyncio.sleep(0.01)
            assert handler.count == 12
            assert len(handler.of("work")) == 2  # all that came together is handed over together
            assert list(link.blobs) == []  # no room
            assert len(list(hub.blobs)) == 2  # the newest model, and the update until its commit
            backend.accepted(1, {}, [])
            await asyncio.sleep(0)
            assert len(list(hub.blobs)) == 1
            bytes_down = 2 if not compress else 0  # the second time it was not there any more
            assert bytes_down * MB <= proxy.bytes["down"] < (bytes_down + 0.2) * MB

    run(go())


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_corrupt_chunk_is_refused_and_sent_again(tmp_path, monkeypatch, caplog, way):
    packed, harm = chunks.packed, [2 * MB]

    def harmed(offset, data, known, **more):
        frame = packed(offset, data, known, **more)
        if offset in harm:
            harm.remove(offset)
            return frame[:-1] + bytes([frame[-1] ^ 1])
        return frame

    monkeypatch.setattr(chunks, "packed", harmed)
    big = torch.rand(MB)

    class Answers(Trains):
        def train(self, run, tasks):
            self.found = self.link.blobs.read(tasks[0].down)["w"]
            up = big if way == "up" else torch.ones(1)
            self.link.answer(run, tasks[0].id, self.link.blobs.write({"w": up}), 1.0)

    async def go():
        async with serving(tmp_path / "hub") as (hub, port):
            hub.open(opening(), {"a": ["c"]})
            async with linked(link_of("a", port, tmp_path / "a", Answers())) as link:
                backend = backend_of(hub)
                backend.send([Task(0, "c", 0, 0, {"w": big if way == "down" else torch.ones(1)})])
                reply = await soon(backend)
                assert torch.equal(reply.up["w"] if way == "up" else link.handler.found, big)
                assert [facts["held"] for facts in link.tell.of("again")] == [2 * MB]
                assert not harm

    run(go())
    assert "raised by servicer method" not in caplog.text


def test_small_messages_are_not_kept_waiting_by_transfers(tmp_path):
    """A link with a pace of 4 MB/s uploads 8 MB; a small task of another run is answered meanwhile."""

    class Sized(Trains):
        def train(self, run, tasks):
            size = 2 * MB if run == "run-1" else 10
            self.link.answer(run, tasks[0].id, self.link.blobs.write({"w": torch.rand(size)}), 1.0)

    async def go():
        async with serving(tmp_path / "hub") as (hub, port):
            for name in ("run-1", "run-2"):
                hub.open(opening(name), {"a": ["c"]})
            async with linked(link_of("a", port, tmp_path / "a", Sized(), rate=4e6)):
                big, small = backend_of(hub), NetworkBackend(hub, "run-2", lambda client: "a")
                big.send([task(0)])
                waits = asyncio.ensure_future(soon(big))
                await asyncio.sleep(0.3)
                small.send([task(0)])
                await soon(small)
                assert not waits.done()
                await waits

    run(go())


# Sites that come and go

SITE = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
import torch, wires
from coterie.backends.network import Link
folder, address, name = sys.argv[2:5]
class Works(wires.Trains):
    def train(self, run, tasks):
        print("works", flush=True)
        self.link.answer(run, tasks[0].id, self.link.blobs.write({"w": torch.full((2 << 20,), 3.0)}), 1.0)
link = wires.link_of(name, address, folder, Works(), tls=False, rate=20e6, tell=lambda what, **facts: print(what, flush=True))
asyncio.run(link.run())
"""


def test_a_site_that_is_killed_in_the_middle_of_an_upload_goes_on_with_it(tmp_path):
    tests = Path(__file__).parents[2]

    async def go():
        async with serving(tmp_path / "hub", tls=False) as (hub, port), Proxy(port) as proxy:
            hub.open(opening(), {"a": ["c"]})
            args = [sys.executable, "-c", SITE, tests, tmp_path / "a", proxy.address, "a"]
            said = []
            backend = backend_of(hub)
            backend.send([task(0)])
            waits = asyncio.ensure_future(soon(backend))
            for again in range(2):
                site = await asyncio.create_subprocess_exec(*map(str, args), stdout=subprocess.PIPE)
                try:
                    while b"answered" not in said and (word := (await site.stdout.readline()).strip()):
                        said.append(word)
                    if not again:
                        while proxy.bytes["up"] < 3 * MB:
                            await asyncio.sleep(0.01)
                        site.send_signal(signal.SIGKILL)
                    else:
                        assert float((await waits).up["w"][0]) == 3.0
                        site.send_signal(signal.SIGKILL)
                finally:
                    await site.wait()
            assert said.count(b"works") == 1
            assert proxy.bytes["up"] < 11 * MB  # of 8

    run(go())


def test_a_server_that_is_gone_is_waited_for_and_the_standby_found(tmp_path):
    async def go():
        async with serving(tmp_path / "one") as (hub, port):
            link = link_of("a", port, tmp_path / "a", Doubles())
            link.addresses = [f"127.0.0.1:{port}", "127.0.0.1:1"]
            hub.open(opening(), {"a": ["c"]})
            job = asyncio.ensure_future(link.run())
            await hub.diary.until("joined")
            while not link.handler.of("opened"):
                await asyncio.sleep(0.01)
        await link.tell.until("disconnected", 3)
        async with serving(tmp_path / "two", port=port) as (hub, _):
            hub.open(opening(), {"a": ["c"]})
            await hub.diary.until("joined")
            assert len(link.handler.of("opened")) == 1  # it knows the run
            link.stop()
            await job

    run(go())


def test_a_new_stream_replaces_the_old_one_that_hangs(tmp_path):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port), Proxy(port) as proxy, peer(port) as channel:
            hub.open(opening(), {"a": ["c"]})
            backend = backend_of(hub)
            link = link_of("a", proxy.address, tmp_path / "a", Waits())
            async with linked(link):
                await hub.diary.until("joined")
                proxy.clear.clear()  # half open: nobody hears anything any more
                backend.send([task(0)])
                waits = asyncio.ensure_future(soon(backend))
                call = await join(channel)
                await heard(call, messages.Assign)
                await call.write(bytes(Failed(run="run-1", id=0, reason="new")))
                assert (await waits).reason == "new"
                proxy.clear.set()
                with pytest.raises(Refused, match="another process has joined as site a"):
                    await link.job
                assert hub.seats["a"].outbox is not None

    run(go())


def test_a_silent_site_loses_its_tasks_and_a_busy_one_does_not(tmp_path):
    async def go():
        async with serving(tmp_path / "hub", silence=0.6) as (hub, port):
            hub.open(opening(), {"a": ["c"], "b": ["d"]})
            place = {"c": "a", "d": "b", "e": "gone"}
            backend = NetworkBackend(hub, "run-1", place.__getitem__)
            busy = Waits()
            busy.progress = lambda run: int(time.monotonic() * 1000)
            async with (
                linked(link_of("a", port, tmp_path / "a", Idles())),
                linked(link_of("b", port, tmp_path / "b", busy)),
            ):
                await hub.diary.until("joined", 2)
                start = time.monotonic()
                backend.send([task(0), task(1, "d"), task(2, "e")])
                lost = [await soon(backend), await soon(backend)]
                assert {each.reason for each in lost} == {
                    "site a: silent for 0.6 s",
                    "site gone: silent for 0.6 s",
                }
                assert 0.6 <= time.monotonic() - start < 5
                await asyncio.sleep(1)
                assert hub.seats["b"].tasks == 1
                assert hub.seats["a"].alarm is None  # without tasks nobody is watched
                busy.link.fail("run-1", 1, "enough")
                assert (await soon(backend)).reason == "enough"

    run(go())


def test_a_slow_upload_is_a_sign_of_life(tmp_path):
    async def go():
        async with serving(tmp_path / "hub", silence=0.8) as (hub, port):
            hub.open(opening(), {"a": ["c"]})
            handler = Doubles()
            handler.progress = lambda run: 0
            async with linked(link_of("a", port, tmp_path / "a", handler, rate=4e6)):
                backend = backend_of(hub)
                backend.send([task(0, size=2 * MB)])
                start = time.monotonic()
                assert isinstance(await soon(backend), Reply)
                assert time.monotonic() - start > 2

    run(go())


# What runs do


def test_cancelled_tasks_timers_and_the_end_of_a_run(tmp_path):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port):
            hub.open(opening(), {"a": ["c"]})
            handler = Waits()
            async with linked(link_of("a", port, tmp_path / "a", handler)) as link:
                backend = backend_of(hub)
                backend.send([task(0), task(1), Timer(9, 0.2), Timer(8, 0.1)])
                waits = asyncio.ensure_future(soon(backend))
                while not handler.of("work"):
                    await asyncio.sleep(0.01)
                backend.send([Cancel(0), Cancel(8), Cancel(77)])
                assert (await waits).id == 9
                assert backend.last.kind == "tick"
                while not handler.of("dropped"):
                    await asyncio.sleep(0.01)
                assert handler.of("dropped") == [("run-1", [0])]
                link.answer("run-1", 0, link.blobs.write({}), 1.0)  # too late
                backend.accepted(1, {"c": 1, "elsewhere": 5}, [])
                await asyncio.sleep(0)
                hub.close("run-1", "stopped")
                while not handler.of("closed"):
                    await asyncio.sleep(0.01)
                assert handler.of("accepted") == [("run-1", 1, {"c": 1})]
                assert (link.doing, link.desk.answered) == ({}, {})
                assert list(hub.blobs) == []
                backend.send([task(2)])  # of a run that has ended: nothing happens

    run(go())


def test_a_site_learns_at_joining_of_runs_that_ended_meanwhile(tmp_path):
    async def go():
        async with (
            serving(tmp_path / "hub", ended=lambda run: "failed" if run == "old" else "") as (_, port),
            peer(port) as channel,
        ):
            call = await join(channel, runs=["old", "queued"])
            await heard(call, Welcome)
            assert await heard(call, RunClosed) == RunClosed(run="old", status="failed")

    run(go())


def test_a_site_that_declines_says_why_each_time(tmp_path):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port):
            hub.open(opening(), {"a": ["c"]})
            handler = Waits()
            handler.declines = "policy.toml: no run of this signer"
            async with linked(link_of("a", port, tmp_path / "a", handler)):
                backend = backend_of(hub)
                for id in range(2):
                    backend.send([task(id)])
                    assert (await soon(backend)).reason == handler.declines
                assert handler.of("work") == []

    run(go())


def test_a_run_that_cannot_begin_at_a_site_is_declined_and_one_that_begins_slowly_is_waited_for(tmp_path):
    class Slow(Waits):
        async def opened(self, run):
            await asyncio.sleep(0.2)
            if run.run == "run-2":
                raise OSError("no data")
            return await super().opened(run)

    async def go():
        async with serving(tmp_path / "hub") as (hub, port):
            for name in ("run-1", "run-2"):
                hub.open(opening(name), {"a": ["c"]})
            hub.accepted("run-1", 3, {"c": 7}, [])
            handler = Slow()
            backend, other = backend_of(hub), NetworkBackend(hub, "run-2", lambda client: "a")
            backend.send([task(8)])
            other.send([task(8)])
            waits = asyncio.ensure_future(backend.event())
            async with linked(link_of("a", port, tmp_path / "a", handler)):
                assert (await soon(other)).reason == "OSError: no data"
                while not handler.of("work"):
                    await asyncio.sleep(0.01)
                assert [line[0] for line in handler.log] == ["opened", "accepted", "work"]
            waits.cancel()

    run(go())


def test_timers_go_on_where_they_were_and_the_log_is_replayed_first(tmp_path):
    async def go():
        async with serving(tmp_path / "hub") as (hub, _):
            hub.open(opening(), {"a": ["c"]})
            now = time.time()
            log = [(now - 5, bytes(Failed(run="run-1", id=0, reason="x")).decode())]
            backend = backend_of(hub, replay=log, clock=now - 9)
            backend.send([task(0), task(1), Timer(5, 8.5), Timer(6, 100.0)])
            assert (await backend.event())[0] == now - 5
            assert not hub.runs["run-1"].tasks  # nothing is sent yet
            backend.send([Cancel(6)])
            event = await soon(backend)  # due half a second ago
            assert isinstance(event, Tick)
            assert event.id == 5
            assert event.now >= now
            assert list(hub.runs["run-1"].tasks) == [1]

    run(go())


# Peers that lie


@pytest.mark.parametrize(
    ("up", "said"),
    [
        ({"w": torch.ones(3)}, r"w is float32 \[3\], not float32 \[10\]"),
        ({"w": torch.ones(10).double()}, r"w is float64 \[10\], not float32 \[10\]"),
        ({"w": torch.ones(10), "v": torch.ones(1)}, "v is unknown"),
        ({}, "w is missing"),
        ({"w": "text"}, "w is a str"),
        (None, "damaged"),
    ],
)
def test_updates_that_do_not_fit_are_refused_and_named(tmp_path, up, said):
    class Lies(Trains):
        def train(self, run, tasks):
            blobs = self.link.blobs
            if up is None:
                import hashlib

                digest = hashlib.sha256(b"no tree").hexdigest()
                blobs.receive(digest, 0, b"no tree")
                blobs.finish(digest, 7)
                self.link.answer(run, tasks[0].id, messages.Blob(digest, 7), 1.0)
            else:
                self.link.answer(run, tasks[0].id, blobs.write(up), 1.0)

    async def go():
        async with serving(tmp_path / "hub") as (hub, port):
            hub.open(opening(), {"a": ["c"]})
            async with linked(link_of("a", port, tmp_path / "a", Lies())):
                backend = backend_of(hub, expected=lambda task: {"w": torch.empty(10, device="meta")})
                backend.send([task(0)])
                event = await soon(backend)
                assert isinstance(event, Lost)
                with pytest.raises(AssertionError, match=said):
                    raise AssertionError(event.reason)
                assert parse(backend.last.head.encode()).reason == event.reason

    run(go())


def test_an_update_that_is_too_large_is_refused_before_it_is_sent(tmp_path):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port):
            hub.open(opening(), {"a": ["c"]}, limit=1000)
            async with linked(link_of("a", port, tmp_path / "a", Doubles())):
                backend = backend_of(hub)
                backend.send([task(0, size=1000)])
                assert "larger than 1000" in (await soon(backend)).reason

    run(go())


def test_answers_that_are_replayed_of_others_or_of_nothing_change_nothing(tmp_path):
    async def go():
        async with (
            serving(tmp_path / "hub") as (hub, port),
            peer(port, "a") as mine,
            peer(port, "b") as theirs,
        ):
            hub.open(opening(), {"a": ["c"], "b": ["d"]})
            backend = NetworkBackend(hub, "run-1", {"c": "a", "d": "b"}.__getitem__)
            mallory, bob = await join(mine, "a"), await join(theirs, "b")
            backend.send([task(0, "c"), task(1, "d")])
            waits = asyncio.ensure_future(soon(backend))
            await heard(mallory, messages.Assign)
            (tmp_path / "x").mkdir()
            blob = Blobs(tmp_path / "x").write({"w": torch.ones(3)})
            frames = [chunks.packed(0, (tmp_path / "x" / blob.digest).read_bytes(), hashlib.sha256())]
            with pytest.raises(grpc.aio.AioRpcError, match="nobody waits for task 1"):
                await put(mine, Offer(run="run-1", id=1, up=blob), [])
            assert await put(mine, Offer(run="run-1", id=0, up=blob), frames) == (0, blob.size)
            answer = Answered(run="run-1", id=0, version=0, up=blob, weight=2.0)
            for lie in ({"id": 1}, {"id": 99}, {"run": "other"}, {}, {}, {"weight": 9.0}):
                await mallory.write(bytes(answer.model_copy(update=lie)))
            event = await waits
            assert (event.task.id, event.weight) == (0, 2.0)
            await hub.diary.until("ignored", 5)
            assert list(hub.runs["run-1"].tasks) == [1]
            backend.taken(event)
            assert (await heard(mallory, Taken)).id == 0
            await mallory.write(bytes(Answered(run="run-1", id=1, version=0, up=blob, weight=2.0)))
            await bob.write(
                bytes(Answered(run="run-1", id=1, version=0, up=messages.Blob("f" * 64, 9), weight=1.0))
            )
            await heard(bob, messages.Assign)
            assert (await heard(bob, messages.Assign)).tasks == [
                (1, "d", None, None)
            ]  # asked for again: nothing came

    run(go())


def test_a_signature_that_does_not_fit_loses_the_task(tmp_path):
    def verify(identity, data, signature):
        return signature == f"{identity.name} {len(data)}"

    async def go():
        async with serving(tmp_path / "hub", verify=verify) as (hub, port):
            hub.open(opening(), {"a": ["c"]})
            async with linked(
                link_of("a", port, tmp_path / "a", Doubles(), sign=lambda data: f"a {len(data)}")
            ) as link:
                backend = backend_of(hub)
                backend.send([task(0)])
                assert isinstance(await soon(backend), Reply)
                link.sign = lambda data: "b"
                backend.send([task(1)])
                assert "signature" in (await soon(backend)).reason

    run(go())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"rubbish", "Invalid JSON"),
        (
            bytes(Welcome(protocol=(1, 0), software="", features=[], silence=1.0)),
            "a site may not say 'welcome'",
        ),
        (bytes(Have(held=1)), "a site may not say 'have'"),
    ],
)
def test_what_may_not_be_said_ends_the_connection_with_the_reason(tmp_path, data, said):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port), peer(port) as channel:
            call = await join(channel)
            await heard(call, Welcome)
            await call.write(data)
            assert said in (await heard(call, messages.Away)).reason
            call.cancel()
            await hub.diary.until("left")
            call = channel.stream_stream(f"/{SERVICE}/Join")()
            await call.write(data)
            assert (await why(call))[0] is grpc.StatusCode.PERMISSION_DENIED

    run(go())


def test_a_frame_that_is_too_large_is_refused_by_the_transport(tmp_path):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port), peer(port) as channel:
            call = await join(channel)
            await heard(call, Welcome)
            await call.write(bytes(2 * MB))
            assert (await why(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            await hub.diary.until("left")
            await heard(await join(channel), Welcome)  # nothing else is harmed

    run(go())


def test_blobs_are_only_for_whom_they_were_made(tmp_path):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port), peer(port, "b") as channel:
            hub.open(opening(), {"a": ["c"], "b": []})
            backend = backend_of(hub)
            backend.send([task(0)])
            waits = asyncio.ensure_future(soon(backend))
            while not hub.runs["run-1"].tasks:
                await asyncio.sleep(0.01)
            (digest,) = hub.blobs
            call = channel.unary_stream(f"/{SERVICE}/Get")(
                bytes(messages.Want(run="run-1", digest=digest, start=0))
            )
            assert (await why(call))[0] is grpc.StatusCode.NOT_FOUND
            waits.cancel()

    run(go())


# Who may come in


@pytest.mark.parametrize(
    ("theirs", "fits"),
    [((1, 1), True), ((1, 3), True), ((1, 2), True), ((1, 4), False), ((1, 0), False), ((2, 2), False)],
)
def test_one_minor_version_apart_works_and_more_is_refused_with_both_named(tmp_path, theirs, fits):
    async def go():
        server = {"protocol": (1, 2), "software": "coterie 0.9"}
        async with serving(tmp_path / "hub", server=server) as (hub, port):
            hub.open(opening(), {"a": ["c"]})
            link = link_of("a", port, tmp_path / "a", Doubles(), protocol=theirs, software="coterie 0.7")
            if fits:
                async with linked(link):
                    backend = backend_of(hub)
                    backend.send([task(0)])
                    assert isinstance(await soon(backend), Reply)
            else:
                says = (
                    rf"protocol {theirs[0]}\.{theirs[1]} \(coterie 0\.7\), the server 1\.2 \(coterie 0\.9\)"
                )
                with pytest.raises(Refused, match=says):
                    await link.run()

    run(go())


@pytest.mark.parametrize(("name", "ca", "days"), [("a", "elsewhere", 1), ("a", "ca", -1)])
def test_strangers_and_expired_certificates_do_not_get_in(tmp_path, name, ca, days):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port), peer(port, name, ca, days=days) as channel:
            call = channel.stream_stream(f"/{SERVICE}/Join")()
            assert (await why(call))[0] is grpc.StatusCode.UNAVAILABLE
            assert not hub.seats

    run(go())


def test_a_site_cannot_come_in_anothers_name(tmp_path):
    async def go():
        async with serving(tmp_path / "hub") as (hub, port):
            link = link_of("b", port, tmp_path / "b", Doubles())
            link.site = "a"
            with pytest.raises(Refused, match="the certificate is of b, not of a"):
                await link.run()
            assert not hub.seats

    run(go())


def test_a_revoked_certificate_ends_what_it_opened_at_once(tmp_path):
    async def go():
        from wires import person

        async with serving(tmp_path / "hub") as (hub, port):
            link = link_of("a", port, tmp_path / "a", Waits())
            job = asyncio.ensure_future(link.run())
            await hub.diary.until("joined")
            hub.revoke(person(papers("a").cert).serial)
            with pytest.raises(Refused, match="is revoked"):
                await asyncio.wait_for(job, 5)
            with pytest.raises(Refused, match="is revoked"):
                await link.run()

    run(go())


def test_a_certificate_is_renewed_over_the_connection(tmp_path):
    async def go():
        def renew(identity, request):
            if request == b"bad":
                raise ValueError("no signing request")
            return identity.name.encode() + b": " + request

        async with serving(tmp_path / "hub", server={"renew": renew}) as (_, port):
            link = link_of("a", port, tmp_path / "a", Waits())
            early = asyncio.ensure_future(link.renew(b"csr"))  # waits until there is a connection
            async with linked(link):
                assert await early == b"a: csr"
                link.reconnect("a new certificate")
                await link.tell.until("connected", 2)
                assert await link.renew(b"csr") == b"a: csr"
                with pytest.raises(Refused, match="no signing request"):
                    await link.renew(b"bad")

    run(go())


def test_encryption_is_left_out_only_explicitly(tmp_path):
    async def go():
        from coterie.backends.network import Hub, Server

        with pytest.raises(ValueError, match="belong together"):
            await Server(Hub(Blobs(tmp_path)), authorise=None).start("127.0.0.1:0", papers("server").server())

    run(go())

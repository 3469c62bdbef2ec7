"""All cores: processes of this machine, spawned once.

What the server sends lies in memory that every worker maps; it is written once a call, whatever the number
of workers. A partial fold comes back in shared memory too. Tensors among what the site is built from (a data
set) are shared, not copied. Nothing has a name in a file system, so nothing is left behind by a kill.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle
from multiprocessing.util import Finalize
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from coterie.backends.crew import Crew, Died, Hand
from coterie.backends.shards import Failed, Make, Parcel, Shard, listen, owned, packed, portable, space
from coterie.backends.site import Site
from coterie.core.errors import ConfigError
from coterie.core.gather import OnNan
from coterie.core.types import Tree

SHARED_FROM = 1 << 18  # bytes; less goes through the pipe
Pipe = connection.Connection
GRACE = 5.0  # seconds in which a worker that is told to end must do so


def workers(site: Site, make: Make, count: int, *, threads: int = 1) -> Crew:
    """A Pool of `count` processes. make: builds each worker's site; it is sent to them, so it must pickle.

    site: what a single process would be. Raises ConfigError when `make` cannot be sent.
    """
    if count < 1:
        raise ConfigError(f"backend.workers = {count}: must be at least 1", "one worker a core is usual")
    return Crew(site, Processes(make, count, threads))


class Processes:
    """A Staff of spawned processes; they end with this one, however it ends."""

    def __init__(self, make: Make, count: int, threads: int) -> None:
        self.make, self.count, self.threads = Sealed(make), count, threads
        self.sheet: Sheet | None = None
        self.alive: list[Hired] = []
        Finalize(self, _end, (self.alive,), exitpriority=10)

    def hire(self) -> Hand:
        """Spawn a process. Raises ConfigError when what it is built from cannot be sent."""
        context = torch.multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.make, self.threads))
        with theirs, _interrupts_blocked():
            try:
                process.start()
            except Exception as error:
                ours.close()
                raise ConfigError(
                    f"backend.workers: the experiment cannot be sent to another process: {error}",
                    "define models, data sets and functions at the top of a module that can be imported, "
                    "not in a notebook, in a function or as a lambda; or leave backend.workers out",
                ) from error
        hand = Hired(process, ours, self)
        self.alive.append(hand)
        return hand

    def spread(self, downs: Tree) -> Parcel:
        """Write it to memory that all workers map."""

        def sheet(size: int) -> Tensor:
            if self.sheet is None or self.sheet.flat.nbytes < size:
                self._let_go()
                self.sheet = Sheet(max(size, SHARED_FROM))
            return self.sheet.flat

        return packed(downs, sheet)

    def wait(self, hands: Sequence[Hand]) -> Sequence[Hand]:
        """Those that have answered or died."""
        hired = [hand for hand in hands if isinstance(hand, Hired)]
        by_sign: dict[Any, Hired] = {hand.pipe: hand for hand in hired}
        by_sign |= {hand.process.sentinel: hand for hand in hired}
        return list({by_sign[sign]: None for sign in connection.wait(list(by_sign))})

    def close(self) -> None:
        """Let the shared memory go, and wait until all have ended."""
        while self.alive:
            self.alive.pop().bury()
        self._let_go()

    def _let_go(self) -> None:
        if self.sheet is not None:
            self.sheet.close()
            self.sheet = None


class Hired:
    """A process, and the pipe to it."""

    def __init__(self, process: BaseProcess, pipe: Pipe, staff: Processes) -> None:
        self.process, self.pipe, self.staff = process, pipe, staff
        self.sheet: Sheet | None = None  # the one that it has mapped

    def brief(self, on_nan: OnNan | None, downs: Parcel) -> None:
        """Name the new call, and hand over the memory that it reads from, unless it has that already."""
        sheet = self.staff.sheet
        with suppress(OSError):  # it is dead, as `answer` will find
            if sheet is not None and sheet.handle is not None:
                given = None if sheet is self.sheet else sheet
                _send(self.pipe, self.process.pid, ("brief", on_nan, downs.tree), given)
                self.sheet = sheet
            else:
                _send(self.pipe, self.process.pid, ("brief", on_nan, downs.tree), downs.flat)

    def ask(self, what: str, tree: Tree = None) -> None:
        """Send a request."""
        outbox = Outbox()
        parcel = packed(tree, outbox.space)
        with suppress(OSError):
            _send(self.pipe, self.process.pid, (what, parcel.tree), outbox.sheet or parcel.flat)
        outbox.close()

    def answer(self) -> Parcel | Failed | None:
        """Receive what it answers. Raises Died."""
        try:
            if self.pipe.poll():
                head, flat = _receive(self.pipe)
                return head if head is None or isinstance(head, Failed) else Parcel(head[0], flat)
        except (OSError, EOFError):
            pass
        self.process.join(GRACE)
        code = self.process.exitcode
        raise Died(f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}")

    def end(self, *, at_once: bool) -> None:
        """Kill it, or tell it to end; `Processes.close` waits until it has."""
        self.leave(at_once=at_once)
        if at_once:
            self.staff.alive.remove(self)
            self.bury()

    def leave(self, *, at_once: bool) -> None:
        """End it, without waiting for it."""
        if at_once:
            self.process.kill()
        self.pipe.close()

    def bury(self) -> None:
        """Wait until it has ended; kill it if that takes long."""
        self.process.join(GRACE)
        if self.process.exitcode is None:
            self.process.kill()
        self.process.join()
        self.process.close()


class Sheet:
    """Memory that other processes can map by its handle, where the system has such a thing (Linux)."""

    def __init__(self, size: int) -> None:
        self.handle: int | None = None
        if hasattr(os, "memfd_create"):
            self.handle = os.memfd_create("coterie")
            os.ftruncate(self.handle, size)
            self.flat = _mapped(self.handle, size)
        else:
            self.flat = space(size)

    def close(self) -> None:
        """Give the handle up; who has mapped the memory keeps it."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


class Outbox:
    """Room for one message: large ones are written straight into shared memory."""

    def __init__(self) -> None:
        self.sheet: Sheet | None = None

    def space(self, size: int) -> Tensor:
        """Memory of `size` bytes."""
        if size < SHARED_FROM or not hasattr(os, "memfd_create"):
            return space(size)
        self.sheet = Sheet(size)
        return self.sheet.flat

    def close(self) -> None:
        """Once the message is sent."""
        if self.sheet is not None:
            self.sheet.close()
            self.sheet = None


class Sealed:
    """An object on its way to a new process, which is opened where an error can be told."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __reduce__(self) -> tuple[Any, ...]:
        """Turn it into bytes at the moment when a process is spawned: tensors share their memory with it."""
        return Sealed, (bytes(ForkingPickler.dumps(self.held)),)

    def open(self) -> Any:
        """The object, in the new process."""
        return ForkingPickler.loads(self.held)


def _serve(pipe: Pipe, make: Sealed, threads: int) -> None:
    """A worker's life: get ready, then answer until told to end or alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        shard = Shard(make.open(), listen())
    except Exception as error:
        with suppress(OSError):
            _send(pipe, None, Failed(portable(error)))
        return
    with suppress(OSError, EOFError):  # the driver is gone, or needs this worker no more
        _send(pipe, None, None)
        _answer(pipe, shard)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking torch down in good order takes a second, for nothing


def _answer(pipe: Pipe, shard: Shard) -> None:
    mapped: Any = None
    while True:
        (what, *given), flat = _receive(pipe)
        if what == "brief":
            mapped = flat if flat is not None else mapped
            shard.brief(given[0], Parcel(given[1], mapped))
            continue
        outbox = Outbox()
        answer = shard.answer(what, Parcel(given[0], flat), into=outbox.space)
        if isinstance(answer, Failed):
            _send(pipe, None, answer)
        else:
            _send(pipe, None, (answer.tree,), outbox.sheet or answer.flat)
        outbox.close()


def end_with_parent() -> None:
    """A driver that is killed leaves no orphans: its end is noticed even in the middle of a block."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _send(pipe: Pipe, pid: int | None, head: Any, flat: Sheet | Tensor | None = None) -> None:
    """Send a message and a buffer: by its handle, as bytes, or none."""
    if isinstance(flat, Sheet):
        assert flat.handle is not None
        pipe.send((head, flat.flat.nbytes))
        send_handle(pipe, flat.handle, pid or 0)
    else:
        pipe.send((head, None if flat is None else flat.numpy()))


def _receive(pipe: Pipe) -> tuple[Any, Tensor | None]:
    head, flat = pipe.recv()
    if isinstance(flat, int):
        handle = recv_handle(pipe)
        try:
            return head, _mapped(handle, flat)
        finally:
            os.close(handle)
    return head, None if flat is None else owned(flat)


def _mapped(handle: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(handle, size), dtype=torch.uint8)


def _end(hands: list[Hired]) -> None:
    """Kill all that are left."""
    for hand in hands:
        hand.leave(at_once=True)
    while hands:
        hands.pop().bury()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal; those that are spawned in here never see it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # the first process starts it, and that unblocks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

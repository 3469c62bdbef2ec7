"""One server at a time: a lease in the database, with an epoch that fences whoever held it before.

A lease ends when it is released or runs out; and at once when its holder dies, for every holder also locks
something named by its epoch that falls open with its process: an advisory lock of PostgreSQL's, a file beside
SQLite's. Who waits sleeps on that lock until the expiry it read. Nobody has to trust a clock or a lock for
more than that: every write checks the epoch in its own transaction (`Database.write`).
"""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, Engine, func, select, text, update
from sqlalchemy.exc import DBAPIError

from coterie.storage.tables import lease

KEY = 0x0C07E41E  # of Coterie's advisory locks
LOCK_NOT_AVAILABLE = "55P03"
# A holder that stops in the middle of a transaction must not keep the row that a successor needs.
SESSION = "-c idle_in_transaction_session_timeout=10000 -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2"


class FileGuard:
    """The lock that falls open with its holder: a file beside the database, one for each epoch."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine, self.path = engine, path
        self.held: IO[str] | None = None

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """The one in which a lease is taken."""
        with self.engine.begin() as connection:
            yield connection

    def now(self) -> Any:
        """The clock by which leases run out."""
        return time.time()

    def lock(self, connection: Connection, epoch: int) -> None:  # noqa: ARG002
        """Lock an epoch that nobody has held."""
        self.close()
        self.held = self._file(epoch).open("a")
        fcntl.flock(self.held, fcntl.LOCK_EX)
        for old in self.path.parent.glob(f"{self.path.name}.lease-*"):
            if old != self._file(epoch):
                old.unlink(missing_ok=True)

    def wait(self, epoch: int, seconds: float) -> bool:
        """Wait until the holder of the epoch is gone; False after so many seconds."""
        gone = threading.Event()

        def listen() -> None:
            with self._file(epoch).open("a") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                gone.set()

        threading.Thread(target=listen, daemon=True).start()  # no flock ends by itself
        return gone.wait(seconds)

    def close(self) -> None:
        """Let go of the lock."""
        if self.held is not None:
            self.held.close()
            self.held = None

    def _file(self, epoch: int) -> Path:
        return self.path.with_name(f"{self.path.name}.lease-{epoch}")


class AdvisoryGuard:
    """The lock that falls open with its holder: PostgreSQL's, held by a connection of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.connection: Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """The one in which a lease is taken."""
        self.connection = self.connection or self.engine.connect()
        try:
            with self.connection.begin():
                yield self.connection
        except DBAPIError:
            self.close()
            raise

    def now(self) -> Any:
        """The clock by which leases run out: the database's, which all servers share."""
        return func.extract("epoch", func.clock_timestamp())

    def lock(self, connection: Connection, epoch: int) -> None:
        """Lock an epoch that nobody has held."""
        connection.execute(select(func.pg_advisory_lock(KEY, epoch)))

    def wait(self, epoch: int, seconds: float) -> bool:
        """Wait until the holder of the epoch is gone; False after so many seconds."""
        try:
            with self.transaction() as connection:
                connection.execute(text(f"set local lock_timeout = {max(1, round(seconds * 1000))}"))
                connection.execute(select(func.pg_advisory_xact_lock_shared(KEY, epoch)))
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", "") != LOCK_NOT_AVAILABLE:
                raise
            return False
        return True

    def close(self) -> None:
        """Let go of the lock."""
        if self.connection is not None:
            self.connection.invalidate()  # closed for good: a pool would keep its locks
            self.connection.close()
            self.connection = None


def acquire(
    guard: FileGuard | AdvisoryGuard, holder: str, seconds: float, timeout: float | None
) -> int | None:
    """Wait for the lease and take it for so many seconds; its epoch, or None after `timeout` seconds."""
    end = None if timeout is None else time.monotonic() + timeout
    dead = None
    while True:
        with guard.transaction() as connection:
            row = connection.execute(select(lease, guard_now(guard)).with_for_update()).one()
            left = row.expires - float(row.now)
            if row.holder is None or left <= 0 or row.epoch == dead:
                epoch = int(row.epoch) + 1
                guard.lock(connection, epoch)
                connection.execute(
                    update(lease).values(epoch=epoch, holder=holder, expires=float(row.now) + seconds)
                )
                return epoch
        if end is not None:
            left = min(left, end - time.monotonic())
            if left <= 0:
                return None
        dead = row.epoch if guard.wait(row.epoch, left) else None


def guard_now(guard: FileGuard | AdvisoryGuard) -> Any:
    """The guard's clock as a column."""
    now = guard.now()
    return text(f"{now!r} as now") if isinstance(now, float) else now.label("now")

"""The server's state: runs, their event logs and commits, in SQLite or PostgreSQL; one process writes.

A commit is one transaction. It survives SIGKILL, and a power cut as far as fsync holds: SQLite runs in WAL
mode with `synchronous = full`, which flushes the log at every commit; PostgreSQL's default does the same.
Tensors are not in here: rows name blobs (`storage.blobs`), which are durable before a row names them.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError

from coterie.core.errors import ConfigError, Fenced, RunError
from coterie.core.types import ClientId
from coterie.storage.blobs import Blob
from coterie.storage.files import make_folder, sync_folder
from coterie.storage.lease import KEY, SESSION, AdvisoryGuard, FileGuard, acquire, guard_now
from coterie.storage.tables import commits, events, generations, lease, runs

STATUSES = ("queued", "running", "stopped", "finished", "failed", "interrupted")
MIGRATIONS = Path(__file__).with_name("migrations")
FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE}
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Run(NamedTuple):
    """A run as the server knows it; `config` is TOML, `quotas` what `experiment.queue` made of them."""

    id: str
    name: str
    config: str
    digest: str
    signer: str | None
    status: str
    error: str
    created: float
    folder: str
    quotas: dict[str, Any]
    sites: tuple[str, ...] = ()
    code: str = ""  # digest of a package


class Logged(NamedTuple):
    """An event in a run's log: `head` is for who replays it, `blob` names its tensors."""

    kind: str
    now: float
    head: str
    blob: Blob | None = None


class Database:
    """A server's database, its tables brought up to date.

    url: "sqlite:///folder/server.db" or "postgresql://user@host/name". Raises ConfigError when it is none of
    these, RunError when it is damaged, out of reach, or of a newer Coterie. Writing needs the lease.
    """

    def __init__(self, url: str) -> None:
        self.epoch: int | None = None
        try:
            where = make_url(url)
        except ArgumentError:
            raise ConfigError(f"database {url!r}: no database URL", _URLS) from None
        self.name = where.render_as_string(hide_password=True)
        self._turn = threading.Lock()  # of SQLite's one writer
        self.guard: FileGuard | AdvisoryGuard
        with self._named():
            if where.get_backend_name() == "sqlite" and where.database not in (None, "", ":memory:"):
                path = Path(str(where.database))
                _create(path)
                self.engine = _sqlite(where)
                self.guard = FileGuard(_writing(self.engine), path)
            elif where.get_backend_name() == "postgresql":
                self.engine = create_engine(
                    where.set(drivername="postgresql+psycopg"),
                    pool_pre_ping=True,
                    connect_args={"connect_timeout": 10, "options": SESSION},
                )
                self.guard = AdvisoryGuard(self.engine)
            else:
                raise ConfigError(f"database {self.name!r}: neither a file nor a server", _URLS)
            try:
                self._migrate()
            except BaseException:
                self.engine.dispose()
                raise

    def close(self) -> None:
        """Let go of all connections, and of the lease's lock: another server may take over."""
        self.guard.close()
        self.engine.dispose()

    # the lease

    def acquire(self, holder: str, seconds: float = 15.0, timeout: float | None = None) -> bool:
        """Become the one who writes, for so many seconds from now; False after `timeout` seconds.

        Sleeps until the one who holds the lease releases it, dies, or does not renew it.
        """
        with self._named():
            self.epoch = acquire(self.guard, holder, seconds, timeout)
        return self.epoch is not None

    def renew(self, seconds: float = 15.0) -> None:
        """Hold the lease for so many seconds from now. Raises Fenced when another has taken it."""
        with self.write() as connection:
            now = connection.execute(select(guard_now(self.guard))).scalar_one()
            connection.execute(update(lease).values(expires=float(now) + seconds))

    def release(self) -> None:
        """Give the lease up: who waits for it takes it at once."""
        with self.write() as connection:
            connection.execute(update(lease).values(holder=None, expires=0.0))
        self.epoch = None
        self.guard.close()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction of the lease's holder; all of it is durable afterwards, or nothing.

        Raises Fenced when another holds the lease, RunError when the disk is full or the database fails.
        """
        with self._named(), self._writer() as connection:
            epoch = connection.scalar(select(lease.c.epoch).with_for_update(read=True))
            if self.epoch is None or epoch != self.epoch:
                raise Fenced(
                    f"{self.name}: this server does not hold the lease (epoch {self.epoch}, now {epoch})",
                    "another server has taken over; this one writes nothing more",
                )
            yield connection

    @contextmanager
    def shared(self) -> Iterator[Connection]:
        """A transaction of anybody's, on what needs no lease (`register`). Raises RunError."""
        with self._named(), self._writer() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads. Raises RunError."""
        with self._named(), self.engine.connect() as connection:
            yield connection

    # runs

    def runs(self, *statuses: str) -> list[Run]:
        """All runs, or those with one of these statuses, the oldest first."""
        query = select(runs).order_by(runs.c.created, runs.c.id)
        if statuses:
            query = query.where(runs.c.status.in_(statuses))
        with self.read() as connection:
            return [_run(row) for row in connection.execute(query)]

    def run(self, id: str) -> Run:
        """A run. Raises ConfigError when there is none with this id."""
        with self.read() as connection:
            row = connection.execute(select(runs).where(runs.c.id == id)).one_or_none()
        if row is None:
            raise ConfigError(f"run {id!r}: there is no such run", "list the runs to see their ids")
        return _run(row)

    def add_run(self, run: Run) -> None:
        """Add a run."""
        with self.write() as connection:
            connection.execute(insert(runs).values({**run._asdict(), **_texts(run)}))

    def set_status(self, id: str, status: str, error: str = "") -> None:
        """Say how far a run is; what a finished one has logged is dropped."""
        assert status in STATUSES
        with self.write() as connection:
            connection.execute(update(runs).where(runs.c.id == id).values(status=status, error=error))
            if status == "finished":
                connection.execute(delete(events).where(events.c.run == id))

    def delete_run(self, id: str) -> None:
        """Forget a run and all that it has logged and committed."""
        with self.write() as connection:
            connection.execute(delete(runs).where(runs.c.id == id))
            for table in (events, commits, generations):
                connection.execute(delete(table).where(table.c.run == id))

    # what a run must not lose

    def append_event(self, run: str, logged: Logged) -> None:
        """Log what the run's plan is about to be told."""
        kind, now, head, blob = logged
        digest, size = blob or (None, None)
        last = select(func.coalesce(func.max(events.c.seq), 0)).where(events.c.run == run).scalar_subquery()
        row = {"run": run, "kind": kind, "now": now, "head": head, "digest": digest, "size": size}
        with self.write() as connection:
            connection.execute(insert(events).values(**row, seq=last + 1))

    def events(self, run: str) -> list[Logged]:
        """What the run's plan was told since the last commit, in order."""
        with self.read() as connection:
            found = connection.execute(select(events).where(events.c.run == run).order_by(events.c.seq))
            return [Logged(row.kind, row.now, row.head, _blob(row)) for row in found]

    def commit(
        self, run: str, version: int, blob: Blob, row: str, accepted: Mapping[ClientId, int], keep: int = 2
    ) -> None:
        """Make a version the one to go on from, in one transaction: its state, its metrics' row, memories.

        The log up to here is pruned, and all but the newest `keep` versions can no longer be gone back to.
        """
        mine = generations.c.run == run
        with self.write() as connection:
            connection.execute(
                insert(commits).values(run=run, version=version, digest=blob.digest, size=blob.size, row=row)
            )
            connection.execute(delete(events).where(events.c.run == run))
            kept = select(commits.c.version).where(commits.c.run == run).order_by(commits.c.version.desc())
            oldest = min(connection.scalars(kept.limit(keep)))
            too_old = (commits.c.run == run) & (commits.c.version < oldest) & commits.c.digest.is_not(None)
            connection.execute(update(commits).where(too_old).values(digest=None, size=None))
            clients = list(accepted)
            for start in range(0, len(clients), 500):  # databases limit how many values a query has
                some = clients[start : start + 500]
                replaced = mine & generations.c.until.is_(None) & generations.c.client.in_(some)
                connection.execute(update(generations).where(replaced).values(until=version))
                rows = [
                    {"run": run, "client": c, "version": version, "generation": accepted[c]} for c in some
                ]
                connection.execute(insert(generations), rows)
            connection.execute(delete(generations).where(mine & (generations.c.until <= oldest)))

    def commits(self, run: str) -> list[tuple[int, Blob]]:
        """The versions that the run can go on from, the newest first."""
        query = select(commits).where((commits.c.run == run) & commits.c.digest.is_not(None))
        with self.read() as connection:
            found = connection.execute(query.order_by(commits.c.version.desc()))
            return [(row.version, Blob(row.digest, row.size)) for row in found]

    def rows(self, run: str) -> list[str]:
        """The metrics of all its versions, a JSON object each."""
        query = select(commits.c.row).where(commits.c.run == run).order_by(commits.c.version)
        with self.read() as connection:
            return list(connection.scalars(query))

    def generations(self, run: str, version: int) -> dict[ClientId, int]:
        """The task that each client's memory was of at a version that can be gone back to."""
        until, known = generations.c.until, (generations.c.run == run) & (generations.c.version <= version)
        query = select(generations.c.client, generations.c.generation).where(
            known & (until.is_(None) | (until > version))
        )
        with self.read() as connection:
            return {row.client: row.generation for row in connection.execute(query)}

    def back_to(self, run: str, version: int) -> None:
        """Forget later commits, whose state is lost, and what was logged after them."""
        with self.write() as connection:
            connection.execute(delete(events).where(events.c.run == run))
            for table in (commits, generations):
                connection.execute(delete(table).where((table.c.run == run) & (table.c.version > version)))
            undone = (generations.c.run == run) & (generations.c.until > version)
            connection.execute(update(generations).where(undone).values(until=None))

    def _migrate(self) -> None:
        """Bring the tables up to date. Raises RunError when they are newer than this code."""
        with self._writer() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(KEY, 0)))
            elif connection.scalar(text("pragma quick_check(1)")) != "ok":
                raise self._damaged("its pages do not fit together")
            known = {path.stem[1:5] for path in (MIGRATIONS / "versions").glob("v*.py")}
            has = set[str]()
            if inspect(connection).has_table("alembic_version"):
                has = set(connection.scalars(text("select version_num from alembic_version")))
            if newer := sorted(has - known):
                raise RunError(
                    f"{self.name}: its tables are of version {newer[0]}, this Coterie knows "
                    f"{', '.join(sorted(known))}",
                    "run the newer Coterie that wrote it, or a copy made before it did",
                )
            if has == {max(known)}:
                return
            from alembic import command  # noqa: PLC0415  a server that starts again needs none of it
            from alembic.config import Config  # noqa: PLC0415

            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def _writer(self) -> Iterator[Connection]:
        if self.engine.dialect.name == "postgresql":
            with self.engine.begin() as connection:
                yield connection
        else:
            with self._turn, _writing(self.engine).begin() as connection:
                yield connection

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say which database fails, and what to do."""
        try:
            yield
        except IntegrityError:
            raise  # the same thing added twice: a mistake of the caller's
        except DBAPIError as error:
            cause, said = error.orig, str(error.orig).strip()
            code = getattr(cause, "sqlite_errorcode", 0)
            if code in FULL or getattr(cause, "sqlstate", "") == "53100":
                raise RunError(
                    f"disk full: {self.name} could not be written ({said})",
                    "free some space, then resume the run",
                ) from error
            if code & 0xFF in DAMAGED:
                raise self._damaged(said) from error
            raise RunError(
                f"{self.name}: {said}", "is the database there, and may this user write?"
            ) from error

    def _damaged(self, reason: str) -> RunError:
        return RunError(f"{self.name} is damaged: {reason}", "put a copy of the database in its place")


_URLS = 'use "sqlite:///folder/server.db" or "postgresql://user@host/name"'


def _run(row: Any) -> Run:
    read = {"quotas": json.loads(row.quotas), "sites": tuple(json.loads(row.sites))}
    return Run(**{**row._mapping, **read})


def _texts(run: Run) -> dict[str, str]:
    return {"quotas": json.dumps(run.quotas), "sites": json.dumps(run.sites)}


def _blob(row: Any) -> Blob | None:
    return None if row.digest is None else Blob(row.digest, row.size)


def _create(path: Path) -> None:
    """Make an SQLite file with something in it, so that an empty one is known to be cut to nothing."""
    if path.exists():
        with path.open("rb") as head:
            page, size = int.from_bytes(head.read(18)[16:]), head.seek(0, os.SEEK_END)
        if size == 0 or size % (page if page > 1 else 65536):  # SQLite would read zeros, or start anew
            raise RunError(
                f"{path} is damaged: it was cut to {size} bytes", "put a copy of the database in its place"
            )
        return
    make_folder(path.parent)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    file = sqlite3.connect(fresh)
    file.execute("pragma user_version = 1")
    file.close()
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass  # another process was as quick
    finally:
        fresh.unlink()
    sync_folder(path.parent)


def _sqlite(where: URL) -> Engine:
    engine = create_engine(where, connect_args={"timeout": 60})

    @event.listens_for(engine, "connect")
    def connected(file: sqlite3.Connection, _: object) -> None:
        file.isolation_level = None  # SQLAlchemy's transactions are ours to begin
        file.execute("pragma journal_mode = wal")
        file.execute("pragma synchronous = full")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("begin immediate" if writes else "begin")

    return engine


def _writing(engine: Engine) -> Engine:
    return engine.execution_options(writes=True)

"""Client memory: what each client keeps from task to task, one generation for each of its tasks.

A generation is the id of the task that made it, and is never changed. So a run resumed from a checkpoint
finds every memory as that checkpoint knew it; memory changed in place would already be of a later round.

At a commit: `commit` the accepted generations, write the checkpoint, then `prune`. After a kill: `back_to`
the checkpoint's version. Memories are rows of an SQLite file, so millions of clients cost disk and no RAM.
"""

from __future__ import annotations

import json
import math
import sqlite3
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coterie.core.codec import decode, encode
from coterie.core.errors import RunError
from coterie.core.trees import nbytes, raw_bytes
from coterie.core.types import ClientId, Tree
from coterie.storage.files import _DTYPES, make_folder

NAME = "memories.sqlite3"
PAGE = 16_384  # bytes; larger costs more to delete, smaller more to write (measured with 31 kB memories)
SCHEMA = """
create table bodies (id integer primary key, head text not null, crc integer not null, data blob not null);
create table generations (
    client text not null, generation integer not null,
    version integer,  -- of the commit that accepted it; null: not accepted yet
    until integer,    -- the version that replaced it
    body integer not null, primary key (client, generation)
) without rowid;
create index by_version on generations (version);
create index replaced on generations (until) where until is not null;
"""
FIND = """
select head, crc, data from generations join bodies on id = body where client = ? and generation = ?"""
DELETE_BODY = """
delete from bodies where id = (select body from generations where client = ? and generation = ?)"""
AT = " from generations where version <= ?1 and (until is null or until > ?1) "
DTYPES = {name: dtype for dtype, name in _DTYPES.items()}
Slot = tuple[ClientId, int]  # a client and the generation of its memory


class Memories:
    """The memories of all clients: in RAM, or with a folder on disk. Trees are shared, so never change one.

    cache_bytes: with a folder, how much of what is safely on disk stays in RAM too, the longest unused going
    first; when more than that waits to be committed, it goes to the disk early. A commit survives a kill of
    the process at once, and a power cut as far as the disk keeps what fsync promised. Each call costs what
    the clients that changed cost, however large the population. Not for use by several threads at once.
    """

    def __init__(self, folder: Path | None = None, cache_bytes: int = 256 << 20) -> None:
        self._folder = folder
        self._cache_bytes = cache_bytes
        self._pending: dict[Slot, Tree] = {}  # put, not committed
        self._pending_bytes = 0
        self._spilled: set[Slot] = set()  # put, not committed, and already on disk to save RAM
        self._cache: OrderedDict[Slot, tuple[Tree, int]] = OrderedDict()  # committed, with their bytes
        self._cached_bytes = 0
        self._file: sqlite3.Connection | None = None

    def get(self, client: ClientId, generation: int | None) -> Tree | None:
        """The client's memory after task `generation`; None for a new client (generation None).

        Raises RunError when there is no such generation or it is damaged.
        """
        if generation is None:
            return None
        slot = client, generation
        if slot in self._pending:
            return self._pending[slot]
        if slot in self._cache:
            self._cache.move_to_end(slot)
            return self._cache[slot][0]
        found = self._rows(FIND, slot)
        if not found:
            raise RunError(f"{self._name()}: client {client!r} has no memory of generation {generation}")
        head, crc, data = found[0]
        if crc != _checksum(slot, head, data):
            raise self._damaged(
                f"client {client!r}'s memory of generation {generation} is not as it was written"
            )
        tree = _unpack(head, data)
        self._keep(slot, tree, len(data))
        return tree

    def put(self, client: ClientId, generation: int, tree: Tree) -> None:
        """Hold what task `generation` leaves behind until it is committed or forgotten."""
        if (client, generation) in self._spilled:
            return  # a task that is run again leaves the same
        self._pending[client, generation] = tree
        if self._folder is not None:
            self._pending_bytes += nbytes(tree)
            if self._pending_bytes > self._cache_bytes:
                self._spill()

    def forget(self, client: ClientId, generation: int) -> None:
        """Drop a memory that will never be accepted: its task was lost or cancelled. A commit does so too."""
        self._pending.pop((client, generation), None)

    def commit(self, version: int, accepted: Mapping[ClientId, int], flying: Collection[int] = ()) -> None:
        """Make the accepted generations durable, before the checkpoint that refers to them is written.

        version: the commit's, higher than all before. flying: tasks that may still be accepted; what other
        tasks left is dropped. Raises RunError when the disk is full; then all is as it was before.
        """
        held = [slot for slot in accepted.items() if slot in self._pending or slot in self._spilled]
        fresh = [slot for slot in held if slot in self._pending]
        dead = [(c, g) for c, g in self._spilled if g not in flying and accepted.get(c) != g]
        if held or dead:
            with self._transaction() as file:
                file.executemany(
                    "update generations set until = ? where client = ? and until is null and version < ?",
                    ((version, client, version) for client, _ in held),
                )
                file.executemany(
                    "update generations set version = ? where client = ? and generation = ?",
                    ((version, *slot) for slot in held if slot in self._spilled),
                )
                packed = self._insert(file, fresh, version)
                self._delete(file, dead)
            for slot, size in zip(fresh, packed, strict=True):
                self._keep(slot, self._pending[slot], size)
        self._spilled = {slot for slot in self._spilled if slot[1] in flying}.difference(held)
        self._pending = {slot: tree for slot, tree in self._pending.items() if slot[1] in flying}
        for slot in held:
            self._pending.pop(slot, None)
        self._pending_bytes = sum(map(nbytes, self._pending.values()))

    def at(self, version: int) -> Mapping[ClientId, int]:
        """Which generation each client's memory was of at a version that is not pruned yet; read as asked."""
        return _At(self, version)

    def newest(self) -> int:
        """The last version that accepted any memory; 0 when none did."""
        found = self._rows("select max(version) from generations", ())
        return (found[0][0] if found else None) or 0

    def back_to(self, version: int, newest: int | None = None) -> None:
        """Drop what later commits accepted and what none did: the run goes on from this version.

        newest: what `newest()` was at that version. Raises RunError when it is not now: memories are missing.
        """
        self._pending, self._pending_bytes, self._spilled = {}, 0, set()
        self._cache.clear()
        self._cached_bytes = 0
        if self._rows("select 1 from generations where version is null or version > ? limit 1", (version,)):
            with self._transaction() as file:
                query = "select client, generation from generations where version is null or version > ?"
                self._delete(file, file.execute(query, (version,)).fetchall())
                file.execute("update generations set until = null where until > ?", (version,))
        if newest is not None and newest != self.newest():
            raise RunError(
                f"{self._name()}: clients' memories of version {newest} are missing",
                "use a copy of the run folder",
            )

    def prune(self, oldest: int) -> None:
        """Drop what no version from `oldest` on needs, once the newest checkpoint is durable."""
        dead = self._rows("select client, generation from generations where until <= ?", (oldest,))
        if dead:
            with self._transaction() as file:
                self._delete(file, dead)
        for slot in dead:
            self._cached_bytes -= self._cache.pop(slot, (None, 0))[1]

    def regain(self) -> None:
        """Keep what was put on disk and not committed before this process began: its tasks were answered."""
        self._spilled = set(
            self._rows("select client, generation from generations where version is null", ())
        )

    def close(self) -> None:
        """Let go of the file; a later call opens it again."""
        if self._folder is not None and self._file is not None:
            self._file.close()
            self._file = None

    def _spill(self) -> None:
        here = "select 1 from generations where client = ? and generation = ?"  # accepted, and done once more
        fresh = [slot for slot in self._pending if not self._rows(here, slot)]
        with self._transaction() as file:
            self._insert(file, fresh, None)
        self._spilled.update(fresh)
        self._pending, self._pending_bytes = {}, 0

    def _insert(self, file: sqlite3.Connection, slots: list[Slot], version: int | None) -> list[int]:
        """Write pending memories; return the bytes of each."""
        (last,) = file.execute("select coalesce(max(id), 0) from bodies").fetchone()
        sizes = []

        def bodies() -> Iterator[tuple[int, str, int, bytes]]:
            for id, slot in enumerate(slots, start=last + 1):
                head, data = _pack(self._pending[slot])
                sizes.append(len(data))
                yield id, head, _checksum(slot, head, data), data

        file.executemany("insert into bodies values (?, ?, ?, ?)", bodies())
        rows = ((*slot, version, None, id) for id, slot in enumerate(slots, start=last + 1))
        file.executemany("insert into generations values (?, ?, ?, ?, ?)", rows)
        return sizes

    @staticmethod
    def _delete(file: sqlite3.Connection, slots: Iterable[Slot]) -> None:
        slots = list(slots)
        file.executemany(DELETE_BODY, slots)
        file.executemany("delete from generations where client = ? and generation = ?", slots)

    def _keep(self, slot: Slot, tree: Tree, size: int) -> None:
        if self._folder is None:
            return
        self._cached_bytes += size - self._cache.pop(slot, (None, 0))[1]
        self._cache[slot] = tree, size
        while self._cached_bytes > self._cache_bytes:
            _, (_, oldest) = self._cache.popitem(last=False)
            self._cached_bytes -= oldest

    def _rows(self, query: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        """What a query finds; nothing when nobody has ever kept anything."""
        if self._file is None and not (self._folder is not None and (self._folder / NAME).exists()):
            return []
        with self._named():
            return self._open().execute(query, values).fetchall()

    def _open(self) -> sqlite3.Connection:
        if self._file is None:
            if self._folder is not None:
                make_folder(self._folder)
            place = ":memory:" if self._folder is None else str(self._folder / NAME)
            file = sqlite3.connect(place, isolation_level=None, check_same_thread=False)
            # a rollback journal and not a WAL: what is new is written once, 3 times as fast for large rows
            file.execute(f"pragma page_size = {PAGE}")
            file.execute("pragma synchronous = extra")  # also flushes the journal's removal
            file.execute("pragma secure_delete = off")
            file.execute("pragma cache_size = -65536")
            if not file.execute("select 1 from sqlite_master").fetchone():
                file.executescript(f"begin; {SCHEMA} commit;")
            self._file = file
        return self._file

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._named():
            file = self._open()
            file.execute("begin immediate")
            try:
                yield file
                file.execute("commit")
            except BaseException:
                if file.in_transaction:
                    file.execute("rollback")
                raise

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say which file SQLite complains of, and what to do."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # a task's memory committed twice: a mistake of the caller's
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
                raise RunError(
                    f"disk full: {self._name()} could not be written ({error})",
                    "free some space, then resume the run from its last checkpoint",
                ) from error
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> RunError:
        return RunError(f"{self._name()} is damaged: {reason}", "use a copy of the run folder")

    def _name(self) -> str:
        return "RAM" if self._folder is None else str(self._folder / NAME)


class _At(Mapping[ClientId, int]):
    """Client -> generation at a version, looked up when asked."""

    def __init__(self, memories: Memories, version: int) -> None:
        self._memories, self._version = memories, version

    def __getitem__(self, client: ClientId) -> int:
        for (generation,) in self._found("select generation" + AT + "and client = ?2", client):
            return int(generation)
        raise KeyError(client)

    def __iter__(self) -> Iterator[ClientId]:
        return (client for (client,) in self._found("select client" + AT))

    def __len__(self) -> int:
        return sum(count for (count,) in self._found("select count(*)" + AT))

    def _found(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        return self._memories._rows(query, (self._version, *values))


def _pack(tree: Tree) -> tuple[str, bytes]:
    """A tree as text that says what it is made of, and its tensors' bytes one after the other."""
    structure, tensors = encode(tree)
    # the widest elements first, so that all are aligned
    items = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    kinds = [[name, _DTYPES[tensor.dtype], list(tensor.shape)] for name, tensor in items]
    head = json.dumps([structure, kinds], separators=(",", ":"), allow_nan=False)
    return head, b"".join(raw_bytes(tensor) for _, tensor in items)


def _unpack(head: str, data: bytes) -> Tree:
    structure, kinds = json.loads(head)
    raw, start = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0), 0
    tensors = {}
    for name, kind, shape in kinds:
        dtype = DTYPES[kind]
        end = start + math.prod(shape) * dtype.itemsize
        tensors[name] = (raw[start:end].view(dtype) if end > start else torch.empty(0, dtype=dtype)).reshape(
            shape
        )
        start = end
    return decode(structure, tensors)


def _checksum(slot: Slot, head: str, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(json.dumps([*slot, head]).encode()))

"""A ledger: what a party sent, and what was sent to it, in a file that cannot be changed unnoticed.

Each line is one JSON object, {"entry": {...}, "signature": "..."}. An entry holds its number, its time, the
SHA-256 of the line before it, and facts; the party's Ed25519 key signs it. Beside the ledger lies its head,
`<name>.head`: the number and SHA-256 of the last line, signed as well, so that lines cut off at the end are
missed. An edit, a cut, a swap, an insertion and another signer are found by `verify`.

What no file can show: whoever holds the key can write everything anew, and whoever has an older copy of the
head can put it back and cut off what came later. So let somebody else keep heads and give them to `verify`,
which then finds a ledger that is not a continuation of them. `coterie audit` takes them from the server's
ledger: entries of kind "witness" with `key` (the party's public key in hexadecimal), `n` and `digest`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from coterie.core.errors import ConfigError, RunError
from coterie.storage.files import make_folder, sync_folder, write_atomic, write_error

START = "0" * 64  # what stands for the line before the first
LIMIT = 1 << 20  # bytes of a line


class Tampered(RunError):
    """A ledger that is not as it was written. line: the number of the first wrong one; 0: its head."""

    def __init__(self, line: int, why: str, path: Path | None = None) -> None:
        where = f"{path}: " if path else ""
        super().__init__(f"{where}{f'line {line}' if line else 'the head'} {why}")
        self.line, self.why = line, why


class Head(NamedTuple):
    """The end of a ledger: the number of its last line, the line's SHA-256 and the byte it begins at."""

    n: int
    digest: str
    start: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a ledger. time: UTC, ISO 8601. digest: SHA-256 of the line."""

    n: int
    time: str
    kind: str
    facts: dict[str, Any]
    digest: str


class Ledger:
    """The ledger that this process writes; no other can at the same time. Not for several threads at once."""

    def __init__(
        self,
        path: Path,
        sign: Callable[[bytes], bytes],
        public: bytes,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open or begin a ledger. sign, public: of the party's Ed25519 key (32 bytes).

        A last line that a crash kept from becoming whole is dropped; one that was whole is not. Checks the
        end only: `verify` reads everything. Raises Tampered; RunError when another process writes it.
        """
        self.path, self._sign, self._clock = path, sign, clock
        make_folder(path.parent)
        fresh = not path.exists()
        try:
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as error:
            raise write_error(path, error, 0) from error
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"{path}: another process is writing this ledger", "stop it first") from error
            if fresh:
                sync_folder(path.parent)
            self.head = self._repaired(public)
        except BaseException:
            self._file.close()
            raise

    def append(self, kind: str, **facts: Any) -> Entry:
        """Add an entry, durably; do what it tells of afterwards.

        facts: JSON values. Raises ValueError for others, RunError when the disk is full; then none is added.
        """
        return self.extend([(kind, facts)])[0]

    def extend(self, entries: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Entry]:
        """Add several entries, each a kind and its facts, for the price of one. Raises as `append`."""
        now = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        end, head, added, lines = self._file.seek(0, os.SEEK_END), self.head, list[Entry](), list[bytes]()
        start = end
        for kind, facts in entries:
            entry = {"n": head.n + 1, "time": now, "kind": kind, "previous": head.digest, "facts": {**facts}}
            line = _line(entry, self._sign(_signed("ledger", _json(entry))))
            if len(line) > LIMIT or _parsed(line) is None:
                raise ValueError(f"an entry must be JSON that reads back as it was, of at most {LIMIT} bytes")
            head = Head(head.n + 1, hashlib.sha256(line).hexdigest(), start)
            start += len(line)
            lines.append(line)
            added.append(_entry(entry, head.digest))
        try:
            _write_all(self._file, b"".join(lines))
            os.fsync(self._file.fileno())
            self._keep_head(head)
        except BaseException as error:
            self._file.truncate(end)
            if isinstance(error, OSError):
                raise write_error(self.path, error, 0) from error
            raise
        self.head = head
        return added

    def close(self) -> None:
        """Let another process write it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep_head(self, head: Head) -> None:
        record = head._asdict()
        write_atomic(_head_path(self.path), _line(record, self._sign(_signed("head", _json(record)))))

    def _repaired(self, public: bytes) -> Head:
        """The head, once the end of the file is as a crash at any moment can have left it."""
        head = _read_head(self.path, public)
        if head is None:
            if self._file.seek(0, os.SEEK_END):
                raise Tampered(0, f"is missing: {_head_path(self.path).name}", self.path)
            head = Head(0, START)
            self._keep_head(head)
        known = head
        end = self._file.seek(head.start)
        for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", self._file.read())):
            if number == 0 and head.n:
                if hashlib.sha256(line).hexdigest() != head.digest:
                    raise Tampered(head.n, "is not the one that the head names", self.path)
            elif line.endswith(b"\n"):  # written whole, and killed before the head was
                entry = _checked(line, known, public, self.path)
                known = Head(entry.n, entry.digest, end)
            else:
                self._file.truncate(end)
                os.fsync(self._file.fileno())
                break
            end += len(line)
        if end <= head.start and head.n:
            raise Tampered(head.n, "is missing: the head names it", self.path)
        if known != head:
            self._keep_head(known)
        return known


def verify(path: Path, public: bytes, witnessed: Iterable[Head] = ()) -> list[Entry]:
    """The entries of a ledger, once every line and the head are found right; changes nothing.

    public: the writer's Ed25519 key, 32 bytes. witnessed: heads that others kept; it must continue them all.
    Raises Tampered at the first wrong line, ConfigError when there is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such ledger")
    # The head first: a writer may be at work, and lines that the head does not know yet are signed too.
    head = _read_head(path, public)
    last, entries, digests = Head(0, START), list[Entry](), [START]
    with path.open("rb") as file:
        while line := file.readline(LIMIT + 1):
            entry = _checked(line, last, public, path)
            last = Head(entry.n, entry.digest)
            entries.append(entry)
            digests.append(entry.digest)
    if head is None and entries:
        raise Tampered(0, f"is missing: {_head_path(path).name}", path)
    if head is not None and head.n > last.n:
        raise Tampered(last.n + 1, f"is missing: the head names {head.n} lines", path)
    if head is not None and digests[head.n] != head.digest:
        raise Tampered(0, f"is not that of these lines; it lies in {_head_path(path).name}", path)
    for seen in witnessed:
        if not 0 <= seen.n <= last.n or digests[seen.n] != seen.digest:
            raise Tampered(seen.n, "is not the one that a witness has seen", path)
    return entries


def _checked(line: bytes, before: Head, public: bytes, path: Path) -> Entry:
    """The entry of a line that must follow `before`."""
    n = before.n + 1
    if not line.endswith(b"\n"):
        why = "is not whole: a crash while writing it (the next start repairs that), or an addition"
        raise Tampered(n, why, path)
    record = _parsed(line)
    if record is None:
        raise Tampered(n, "is not a line of a ledger", path)
    entry, signature = record
    if entry.keys() != {"n", "time", "kind", "previous", "facts"} or not isinstance(entry["facts"], dict):
        raise Tampered(n, "has not the fields of an entry", path)
    if entry["n"] != n or entry["previous"] != before.digest:
        raise Tampered(n, "does not follow the line before it", path)
    if not _signed_by(public, _signed("ledger", _json(entry)), signature):
        raise Tampered(n, "was changed, or signed by another key", path)
    return _entry(entry, hashlib.sha256(line).hexdigest())


def _read_head(path: Path, public: bytes) -> Head | None:
    """The head; None when there is none."""
    place = _head_path(path)
    if not place.exists():
        return None
    with place.open("rb") as file:
        record = _parsed(file.read(LIMIT + 1))
    if record is None or record[0].keys() != set(Head._fields):
        raise Tampered(0, "is damaged", path)
    head, signature = record
    if not _signed_by(public, _signed("head", _json(head)), signature):
        raise Tampered(0, "was changed, or signed by another key", path)
    return Head(**head)


def _parsed(line: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The record of a line and its signature; None unless the line is byte for byte as `_line` writes it."""
    try:
        found = json.loads(line)
        record, signature = found["entry"], bytes.fromhex(found["signature"])
        same = isinstance(record, dict) and _line(record, signature) == line
    except (ValueError, TypeError, LookupError, RecursionError, AttributeError):
        return None
    return (record, signature) if same else None


def _line(record: dict[str, Any], signature: bytes) -> bytes:
    return b'{"entry":' + _json(record) + b',"signature":"' + signature.hex().encode() + b'"}\n'


def _json(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def _signed(what: str, data: bytes) -> bytes:
    return f"coterie/1 {what}\0".encode() + data


def _signed_by(public: bytes, data: bytes, signature: bytes) -> bool:
    # of the extra `deploy`, which runs without a network do not need
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _entry(entry: dict[str, Any], digest: str) -> Entry:
    return Entry(entry["n"], entry["time"], entry["kind"], entry["facts"], digest)


def _head_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write everything: an unbuffered file may take less than it is given."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]

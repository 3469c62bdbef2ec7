"""A folder of blobs, each under the SHA-256 of its bytes: models and updates on their way over a network.

A blob is whole or not there. What is being received lies beside the whole ones as a part that survives a
crash, so that a transfer goes on where it broke. The same bytes are kept once, whoever sends them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from coterie.core.errors import RunError
from coterie.core.types import Tree
from coterie.storage.files import dump_tree, make_folder, open_tree, sync_folder, write_error

CHUNK = 1 << 20  # bytes read at a time


class Blob(NamedTuple):
    """What names a blob: the SHA-256 of its bytes, in hexadecimal, and how many there are."""

    digest: str
    size: int


class Corrupt(RunError):
    """Bytes that are not those their digest promised."""


class Blobs:
    """The blobs of one process; parts are received by one writer at a time, each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_folder(folder)

    def __contains__(self, digest: str) -> bool:
        """Is the whole blob here?"""
        return self.path(digest).exists()

    def __iter__(self) -> Iterator[str]:
        """The digests of all whole blobs."""
        return (path.name for path in self.folder.iterdir() if _DIGEST.fullmatch(path.name))

    def path(self, digest: str) -> Path:
        """Where the whole blob lies or would. Raises ValueError for what is no digest."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest[:80]!r} is no SHA-256 in hexadecimal")
        return self.folder / digest

    def write(self, tree: Tree, *, lasting: bool = True) -> Blob:
        """Keep a tree; return its name. Raises what `core.codec.encode` does, RunError.

        lasting: durably. False is quicker, and for what nobody will look for after a crash of the machine.
        """
        known = hashlib.sha256()
        size = 0
        arriving = self.folder / f"new-{os.urandom(8).hex()}"
        try:
            with arriving.open("xb") as file:
                for part in dump_tree(tree):
                    known.update(part)
                    size += len(part)
                    file.write(part)
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            arriving.replace(self.path(known.hexdigest()))
            if lasting:
                sync_folder(self.folder)
        except OSError as error:
            raise write_error(arriving, error, size) from error
        finally:
            arriving.unlink(missing_ok=True)
        return Blob(known.hexdigest(), size)

    def read(self, digest: str) -> Tree:
        """The tree of a blob. Raises RunError when it is missing or holds no tree."""
        return open_tree(self.path(digest))

    def held(self, digest: str) -> int:
        """How many bytes of it are here: of the whole, or of a part that was being received."""
        for path in (self.path(digest), self._part(digest)):
            if path.exists():
                return path.stat().st_size
        return 0

    def begun(self, digest: str) -> hashlib._Hash:
        """A running SHA-256 of the part that is here."""
        part = self._part(digest)
        if not part.exists():
            return hashlib.sha256()
        with part.open("rb") as file:
            return hashlib.file_digest(file, "sha256")

    def receive(self, digest: str, start: int, data: bytes | memoryview) -> int:
        """Add bytes to a part, from `start` on; return how many there are now.

        What is there already is written again, never skipped over. Raises RunError when the disk is full,
        ValueError when `start` leaves a gap.
        """
        part = self._part(digest)
        try:
            with part.open("r+b" if part.exists() else "w+b") as file:
                if start > file.seek(0, os.SEEK_END):
                    raise ValueError(f"blob {digest[:12]}: bytes from {start} on, but {file.tell()} are here")
                file.seek(start)
                file.write(data)
                file.truncate()
                return file.tell()
        except OSError as error:
            raise write_error(part, error, 0) from error

    def finish(self, digest: str, size: int, *, found: str = "", into: Blobs | None = None) -> None:
        """Make a part a whole blob, once its digest is right. Raises Corrupt; the part is then dropped.

        found: the digest of the part, from `begun` on; without it the part is read. into: the folder where it
        shall lie, on the same file system; this one unless told.
        """
        whole = (into or self).path(digest)
        part = self._part(digest)
        if whole.exists():
            part.unlink(missing_ok=True)
            return
        with part.open("rb") as file:
            found = found or hashlib.file_digest(file, "sha256").hexdigest()
            arrived = file.seek(0, os.SEEK_END)
            if found == digest and arrived == size:
                os.fsync(file.fileno())
        if found != digest or arrived != size:
            part.unlink()
            raise Corrupt(f"a blob arrived damaged: {arrived} bytes of {found[:12]}, not {digest[:12]}")
        part.replace(whole)
        sync_folder(whole.parent)

    def keep(self, wanted: Collection[str]) -> None:
        """Drop every whole blob that is not among these."""
        for digest in set(self) - set(wanted):
            self.path(digest).unlink(missing_ok=True)

    def _part(self, digest: str) -> Path:
        return self.path(digest).with_suffix(".part")


_DIGEST = re.compile(r"[0-9a-f]{64}")

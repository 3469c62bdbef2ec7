"""The blobs that a run's rows name: in a folder of its own, and at home elsewhere (any fsspec URL) if told.

What is kept is at home before it counts, and what is missing here is fetched from there and verified: so a
server on another machine can go on with the run. One thread of one process writes an archive.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coterie.core.errors import ConfigError, CoterieError, RunError
from coterie.core.types import Tree
from coterie.storage.blobs import CHUNK, Blob, Blobs
from coterie.storage.files import remove_temporary, sync_folder


class Archive:
    """A run's blobs; what a killed writer left half-written is removed.

    home: a URL of the run's own, "s3://bucket/runs/one". Raises RunError when it cannot be reached,
    ConfigError when what it takes is not installed.
    """

    def __init__(self, folder: Path, home: str | None = None) -> None:
        self.home = home
        self._there: Any = None
        self.blobs = Blobs(folder)
        remove_temporary(folder)
        for leftover in folder.glob("new-*"):
            leftover.unlink()
        if home is not None:
            self._there = _file_system(home)
            with self._reaching():
                self._there.makedirs("", exist_ok=True)

    def write(self, tree: Tree) -> Blob:
        """Keep a tree. Raises what `core.codec.encode` does, RunError."""
        blob = self.blobs.write(tree)
        self._send(blob)
        return blob

    def adopt(self, path: Path) -> Blob:
        """Keep the blob in this file, which is named by its digest; it may go from where it is."""
        blob = Blob(path.name, path.stat().st_size)
        _share(path, self.blobs)
        self._send(blob)
        return blob

    def lend(self, digest: str, into: Blobs) -> None:
        """Put a blob that is kept into another folder, too. Raises RunError when it is lost."""
        self._fetch(digest)
        _share(self.blobs.path(digest), into)

    def read(self, digest: str) -> Tree:
        """The tree of a blob. Raises RunError when it is lost or holds no tree."""
        self._fetch(digest)
        return self.blobs.read(digest)

    def keep(self, wanted: Collection[str]) -> None:
        """Drop all but these."""
        self.blobs.keep(wanted)
        if self._there is not None:
            with self._reaching():
                names = {path.rpartition("/")[2] for path in self._there.ls("", detail=False)}
                for name in names.difference(wanted):
                    self._there.rm_file(name)

    def remove(self) -> None:
        """Drop everything."""
        if self._there is not None:
            with self._reaching():
                self._there.rm("", recursive=True)
        shutil.rmtree(self.blobs.folder, ignore_errors=True)

    def _send(self, blob: Blob) -> None:
        if self._there is None:
            return
        with self._reaching():  # another size: a transfer that broke
            if not self._there.exists(blob.digest) or self._there.size(blob.digest) != blob.size:
                self._there.put_file(str(self.blobs.path(blob.digest)), blob.digest)

    def _fetch(self, digest: str) -> None:
        if digest in self.blobs or self._there is None:
            return
        with self._reaching(), self._there.open(digest, "rb") as file:
            _receive(file, digest, self.blobs)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Say that it is the far side that fails; what its library raises is of any type."""
        try:
            yield
        except CoterieError:
            raise
        except FileNotFoundError as error:
            raise RunError(f"{self.home}: {error} is missing") from error
        except Exception as error:
            said = f"{self.home}: {type(error).__name__}: {error}"
            raise RunError(said, "is it there, and may this user write?") from error


def _share(path: Path, into: Blobs) -> None:
    """Let a blob lie in this folder, too: as another name of the same file where that is possible."""
    if path.name in into:
        return
    try:
        os.link(path, into.path(path.name))
        sync_folder(into.folder)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except OSError:  # another disk
        with path.open("rb") as file:
            _receive(file, path.name, into)


def _receive(file: Any, digest: str, into: Blobs) -> None:
    size = 0
    while data := file.read(CHUNK):
        size = into.receive(digest, size, data)
    into.finish(digest, size)


def _file_system(home: str) -> Any:
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415
        from fsspec.implementations.dirfs import DirFileSystem  # noqa: PLC0415

        there, root = url_to_fs(home)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{home}: {error}", "give a URL of fsspec's; pip install what it needs") from error
    return DirFileSystem(root, there)

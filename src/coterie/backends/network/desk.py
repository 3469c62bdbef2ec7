"""What a site has on its disk: answers that are not confirmed, and blobs while there is room."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from coterie.backends.network.messages import Answered, BadMessage, parse
from coterie.storage import Blob, Blobs, write_atomic
from coterie.storage.files import make_folder

Key = tuple[str, int]  # run, task


class Desk:
    """One process's; begins with what an earlier one left. room: bytes of blobs that nothing needs."""

    def __init__(self, folder: Path, blobs: Blobs, room: int) -> None:
        self.folder, self.blobs, self.room = folder, blobs, room
        self.answered: dict[Key, Answered] = {}
        self._needed: Counter[str] = Counter()
        self._idle: OrderedDict[str, int] = OrderedDict()  # oldest first -> bytes
        make_folder(folder)
        for path in folder.glob("*/*.json"):
            with suppress(BadMessage):
                message = parse(path.read_bytes())
                if isinstance(message, Answered) and message.up.digest in blobs:
                    self.answered[message.run, message.id] = message
                    self.need(message.up)
        ages = {digest: blobs.path(digest).stat() for digest in blobs if digest not in self._needed}
        for digest in sorted(ages, key=lambda each: ages[each].st_mtime):
            self._idle[digest] = ages[digest].st_size

    def need(self, blob: Blob) -> None:
        """Keep a blob, once more."""
        self._idle.pop(blob.digest, None)
        self._needed[blob.digest] += 1

    def rest(self, blob: Blob) -> None:
        """Need it once less. What nothing needs stays while there is room; the oldest go first."""
        self._needed[blob.digest] -= 1
        if self._needed[blob.digest] > 0:
            return
        del self._needed[blob.digest]
        self._idle[blob.digest] = blob.size
        while sum(self._idle.values()) > self.room:
            self.blobs.path(self._idle.popitem(last=False)[0]).unlink(missing_ok=True)

    def keep(self, message: Answered) -> None:
        """Keep an answer, durably. Raises RunError when the disk is full."""
        path = self._path((message.run, message.id))
        make_folder(path.parent)
        write_atomic(path, bytes(message))
        self.answered[message.run, message.id] = message
        self.need(message.up)

    def forget(self, keys: Iterable[Key]) -> None:
        """The server has these answers, or does not want them."""
        for key in keys:
            if message := self.answered.pop(key, None):
                self._path(key).unlink(missing_ok=True)
                self.rest(message.up)

    def _path(self, key: Key) -> Path:
        return self.folder / key[0] / f"{key[1]}.json"

"""Client memory: what each client keeps from task to task, one generation for each of its tasks.

A generation is the id of the task that made it, and is never changed. So a run resumed from a checkpoint
finds every memory as that checkpoint knew it; memory changed in place would already be of a later round.

At a commit: `commit` the accepted generations, write the checkpoint, then `prune` the unreferenced ones.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

from coterie.core.errors import RunError
from coterie.core.trees import nbytes
from coterie.core.types import ClientId, Tree
from coterie.storage.files import load_tree, make_folder, remove_temporary, save_tree


class Memories:
    """The memories of all clients: in RAM, or with a folder on disk. Trees are shared, so never change one.

    cache_bytes: with a folder, how much of what is safely on disk stays in RAM too; the clients longest
    unused go first. Without a folder everything stays in RAM. Not for use by several threads at once.
    Each call costs what the clients that changed cost, however large the population.
    """

    def __init__(self, folder: Path | None = None, cache_bytes: int = 256 << 20) -> None:
        self._folder = folder
        self._cache_bytes = cache_bytes
        self._pending: defaultdict[ClientId, dict[int, Tree]] = defaultdict(dict)  # put, not committed
        self._cache: OrderedDict[ClientId, dict[int, Tree]] = OrderedDict()  # committed
        self._cached_bytes = 0
        self._several: dict[ClientId, set[int]] = {}  # committed, of clients that may have more than one
        if folder is not None:
            remove_temporary(folder / ".partial")

    def get(self, client: ClientId, generation: int | None) -> Tree | None:
        """The client's memory after task `generation`; None for a new client (generation None).

        Raises RunError when there is no such generation or its file is damaged.
        """
        if generation is None:
            return None
        if generation in self._pending.get(client, {}):
            return self._pending[client][generation]
        if generation in self._cache.get(client, {}):
            self._cache.move_to_end(client)
            return self._cache[client][generation]
        if self._folder is None:
            raise RunError(f"client {client!r} has no memory of generation {generation}")
        path = self._file(self._folder, client, generation)
        tree, meta = load_tree(path)
        if meta != {"client": client, "generation": generation}:
            raise RunError(f"{path} is another client's memory: {meta}", "use a copy of the run folder")
        self._keep(client, generation, tree)
        return tree

    def put(self, client: ClientId, generation: int, tree: Tree) -> None:
        """Hold what task `generation` leaves behind until it is committed or forgotten."""
        self._pending[client][generation] = tree

    def forget(self, client: ClientId, generation: int) -> None:
        """Drop a memory that will never be accepted: its task was lost or cancelled."""
        self._pending.get(client, {}).pop(generation, None)

    def commit(self, accepted: Mapping[ClientId, int]) -> None:
        """Make the accepted generations durable, before the checkpoint that refers to them is written.

        Raises RunError when the disk is full; what could not be written stays pending.
        """
        for client in [name for name, held in self._pending.items() if accepted.get(name) in held]:
            generation = accepted[client]
            tree = self._pending[client][generation]
            known = self._known(client)
            if self._folder is not None:
                path, scratch = self._file(self._folder, client, generation), self._folder / ".partial"
                make_folder(path.parent)
                make_folder(scratch)
                save_tree(path, tree, {"client": client, "generation": generation}, scratch=scratch)
            self._several[client] = known | {generation}
            del self._pending[client][generation]
            self._keep(client, generation, tree)

    def prune(self, kept: Collection[Mapping[ClientId, int]]) -> None:
        """Drop the generations that no checkpoint refers to, once the newest checkpoint is durable.

        kept: for each checkpoint that still exists, which generation each client is at. Pending memories
        newer than all of these stay: their replies may yet be accepted.
        """

        def referenced(client: ClientId) -> set[int]:
            return {mapping[client] for mapping in kept if client in mapping}

        for client, generations in list(self._several.items()):
            live = generations & referenced(client)
            for generation in generations - live:
                self._discard(client, generation)
                if self._folder is not None:
                    self._file(self._folder, client, generation).unlink(missing_ok=True)
            self._several[client] = live
            if len(live) <= 1:
                del self._several[client]
        for client, held in list(self._pending.items()):
            newest = max(referenced(client), default=-1)
            self._pending[client] = {g: tree for g, tree in held.items() if g > newest}
            if not self._pending[client]:
                del self._pending[client]

    def _known(self, client: ClientId) -> set[int]:
        """The committed generations of a client, those that an earlier process left included."""
        if client in self._several:
            return self._several[client]
        if self._folder is None:
            return set(self._cache.get(client, {}))
        names = (path.name for path in (self._folder / folder_name(client)).glob("*.safetensors"))
        return {int(match[1]) for name in names if (match := re.fullmatch(r"(\d+)\.safetensors", name))}

    def _keep(self, client: ClientId, generation: int, tree: Tree) -> None:
        self._discard(client, generation)
        self._cache.setdefault(client, {})[generation] = tree
        self._cache.move_to_end(client)
        self._cached_bytes += nbytes(tree)
        while self._folder is not None and self._cached_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= sum(map(nbytes, oldest.values()))

    def _discard(self, client: ClientId, generation: int) -> None:
        held = self._cache.get(client, {})
        if generation in held:
            self._cached_bytes -= nbytes(held.pop(generation))
            if not held:
                del self._cache[client]

    @staticmethod
    def _file(folder: Path, client: ClientId, generation: int) -> Path:
        return folder / folder_name(client) / f"{generation}.safetensors"


def folder_name(client: ClientId) -> str:
    """A client's name as one path component, different for different names even where case is ignored.

    Lower-case ASCII letters, digits and "-" stay; any other byte of the UTF-8 becomes "_" and two hex
    digits; what gets longer than 120 characters is "__" and the SHA-256 instead.
    """
    raw = client.encode("utf-8", "surrogatepass")
    name = "".join(chr(b) if chr(b) in "abcdefghijklmnopqrstuvwxyz0123456789-" else f"_{b:02x}" for b in raw)
    return name if 0 < len(name) <= 120 else f"__{hashlib.sha256(raw).hexdigest()}"

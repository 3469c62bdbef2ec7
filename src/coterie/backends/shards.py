"""A worker's half of a shared-out cohort: it folds the blocks it is given into one partial result.

What goes to a worker and comes back is a `Parcel`: a tree whose tensors lie in one flat buffer, so that
whoever carries it (a pipe, shared memory, Ray's object store) moves one thing, whatever the model's layers.
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coterie.backends.site import Site, Store
from coterie.core import trees
from coterie.core.errors import CoterieError, RunError
from coterie.core.gather import Fold, Gathered, OnNan, empty
from coterie.core.types import ClientId, Lost, Reply, Task, Tree

ALIGN = 64  # bytes, as torch aligns its own: the bits of a matrix product may depend on it
Slot = tuple[ClientId, int]  # a client and the generation of its memory
Make = Callable[[Store], Site]  # builds a worker's site around the memories it is sent
log = logging.getLogger("coterie")


@dataclass(frozen=True, slots=True)
class Held:
    """Where in a parcel a tensor lies."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Parcel(NamedTuple):
    """A tree with `Held` in the place of its tensors, and their bytes: a Tensor or an array, uint8 [n]."""

    tree: Tree
    flat: Any


class Part(NamedTuple):
    """What has come of one list of tasks.

    lost: why clients are not in the fold. replies: (up, weight, metrics, samples) or a reason for each task,
    when nothing is folded.
    """

    lost: tuple[str, ...]
    replies: tuple[Any, ...]


class Failed(NamedTuple):
    """An error that ends the run, as it was raised in a worker."""

    error: Exception


def space(size: int) -> Tensor:
    """Plain memory of `size` bytes."""
    return torch.empty(size, dtype=torch.uint8)


def packed(tree: Tree, space: Callable[[int], Tensor] = space) -> Parcel:
    """Copy a tree's tensors, of any device, into one flat buffer that `space` provides."""
    size, tensors = 0, []

    def held(leaf: Any) -> Any:
        nonlocal size
        if not isinstance(leaf, Tensor):
            return leaf
        place = Held(size, leaf.dtype, tuple(leaf.shape))
        tensors.append((place, leaf))
        size += -(-leaf.numel() * leaf.element_size() // ALIGN) * ALIGN
        return place

    skeleton = trees.map_tree(held, tree)
    flat = space(size)
    for place, leaf in tensors:
        _view(flat, place).copy_(leaf.detach())
    return Parcel(skeleton, flat)


def opened(parcel: Parcel) -> Tree:
    """The tree again; its tensors are views of the parcel's buffer."""
    flat = parcel.flat
    if not isinstance(flat, Tensor):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a buffer of Ray's store cannot be written to, and is not
            flat = torch.from_numpy(flat)
    return trees.map_tree(lambda leaf: _view(flat, leaf) if isinstance(leaf, Held) else leaf, parcel.tree)


def owned(flat: Any) -> Tensor:
    """A copy of a buffer in memory of one's own."""
    copy = space(len(flat))
    np.copyto(copy.numpy(), flat)
    return copy


def _view(flat: Tensor, held: Held) -> Tensor:
    count = 1
    for length in held.shape:
        count *= length
    size = count * held.dtype.itemsize
    if not size:
        return torch.empty(held.shape, dtype=held.dtype)
    return flat[held.start : held.start + size].view(held.dtype).view(held.shape)


class Carried:
    """The memories of a worker: what came with its tasks, and what goes back to whoever keeps them."""

    def __init__(self) -> None:
        self.came: dict[Slot, Any] = {}
        self.made: list[tuple[ClientId, int, Tree]] = []

    def get(self, client: ClientId, generation: int | None) -> Tree | None:
        """The memory that came with the task. Raises what its keeper met instead of it."""
        if generation is None:
            return None
        found = self.came[client, generation]
        if isinstance(found, Exception):
            raise found
        return found

    def put(self, client: ClientId, generation: int, tree: Tree) -> None:
        """Send it back with the next answer."""
        self.made.append((client, generation, tree))


class Shard:
    """Does what it is asked, with a site of its own. Every answer is a Parcel, or the error as a Failed."""

    def __init__(self, make: Make, said: list[tuple[int, str]]) -> None:
        self.said = said
        self.memories = Carried()
        self.site = make(self.memories)
        self.downs: Tree = ()
        self.on_nan: OnNan | None = None
        self.got = Gathered(empty(self.site.algorithm.aggregator))

    def brief(self, on_nan: OnNan | None, downs: Parcel) -> None:
        """Start on a new call. on_nan None: answer task by task. downs: what the server sends, each once."""
        self.downs, self.on_nan = opened(downs), on_nan
        self.got = Gathered(empty(self.site.algorithm.aggregator))

    def answer(self, what: str, parcel: Parcel, into: Callable[[int], Tensor] = space) -> Parcel | Failed:
        """work: (lists of tasks, memories) -> (parts, new memories, log); partial: -> `as_gathered`'s."""
        try:
            made = self._work(parcel) if what == "work" else self._partial()
            return packed(made, into)
        except Exception as error:
            return Failed(portable(error))
        finally:
            self.memories.made.clear()
            self.said.clear()

    def _work(self, parcel: Parcel) -> Tree:
        lists, memories = opened(parcel)
        self.memories.came = memories
        parts = [self._part([replace(task, down=self.downs[task.down]) for task in tasks]) for tasks in lists]
        return parts, list(self.memories.made), list(self.said)

    def _part(self, tasks: Sequence[Task]) -> Part:
        if self.on_nan is None:
            return Part((), tuple(map(_bare, self.site.answer(tasks))))
        before = len(self.got.fold.lost)
        self.got = self.site.fold(tasks, self.on_nan, self.got)
        return Part(self.got.fold.lost[before:], ())

    def _partial(self) -> Tree:
        got, self.got = self.got, Gathered(empty(self.site.algorithm.aggregator))
        return tuple(got.fold._replace(lost=())), got.accepted


def as_gathered(tree: Tree) -> Gathered:
    """What a worker's "partial" says."""
    fold, accepted = tree
    return Gathered(Fold(*fold), accepted)


def as_answer(task: Task, bare: Any) -> Reply | Lost:
    """The answer to a task, from a Part's replies."""
    if isinstance(bare, str):
        return Lost(task, bare)
    up, weight, metrics, samples = bare
    return Reply(task, up, weight, metrics, samples)


def portable(error: Exception) -> Exception:
    """The error with the worker's traceback as a note, or a plain one where it is not Coterie's own."""
    told = "".join(traceback.format_exception(error)).rstrip()
    if not isinstance(error, CoterieError) or type(error).__module__ != CoterieError.__module__:
        error = RunError(f"a worker failed: {type(error).__name__}: {error}", str(getattr(error, "hint", "")))
    error.__cause__ = error.__context__ = error.__traceback__ = None
    error.add_note(f"in a worker:\n{told}")
    return error


def _bare(answer: Reply | Lost) -> Any:
    if isinstance(answer, Lost):
        return answer.reason
    return answer.up, answer.weight, dict(answer.metrics), answer.samples


def listen() -> list[tuple[int, str]]:
    """Collect what the library logs in this process: it is logged where the run is."""
    said: list[tuple[int, str]] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelno, record.getMessage()))

    log.handlers[:] = [Collect()]
    log.propagate = False
    log.setLevel(logging.INFO)
    return said

"""Derived seeds: every random draw of a run is a function of (seed, purpose, round, client).

Law 5: nothing draws from a global generator. A `Key` names one stream; deriving is hashing, so two
different paths give independent streams and nobody has to keep count of draws.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NewType

import numpy as np
import torch
from numpy.typing import NDArray

_own = threading.local()  # a generator for each thread
_NONE = np.zeros(4, dtype=np.uint64)
Key = NewType("Key", bytes)  # 32 bytes; split by `derive`, never reused for two purposes
STILL = Key(b"")  # the key of a step that is compared with another and thrown away: nothing is drawn


def derive(parent: int | Key, *path: str | int) -> Key:
    """Return the key at `path` below a run's seed or below another key (SHA-256, type- and length-prefixed).

    >>> derive(7, "batches", 3, "client-01") == derive(7, "batches", 3, "client-01")
    True
    >>> derive(7, "a", "bc") == derive(7, "ab", "c")
    False
    """
    digest = hashlib.sha256(b"coterie/1")
    for part in (parent, *path):
        if isinstance(part, bool) or not isinstance(part, int | str | bytes):
            raise TypeError(f"derive: {part!r} is neither int, str nor Key")
        raw = part if isinstance(part, bytes) else str(part).encode()
        digest.update(f"{type(part).__name__}:{len(raw)}:".encode() + raw)
    return Key(digest.digest())


def rng(key: Key) -> np.random.Generator:
    """A counter-based NumPy generator on 128 bits of the key; cheap to make (tens of microseconds)."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))


def permutation(key: Key, n: int) -> NDArray[np.int64]:
    """rng(key).permutation(n), in a third of the time: no generator is made, one is set to the key."""
    if not hasattr(_own, "generator"):
        _own.generator = rng(key)
    words = np.frombuffer(key[:16], dtype="<u8").astype(np.uint64)
    _own.generator.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": _NONE, "key": words},
        "buffer": _NONE,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    order: NDArray[np.int64] = _own.generator.permutation(n)
    return order


def uniform(key: Key) -> float:
    """One draw from [0, 1), with 53 bits, straight from the key."""
    return (int.from_bytes(key[:8], "little") >> 11) * 2.0**-53


@contextmanager
def seeded(key: Key) -> Iterator[None]:
    """Run code that draws from torch's global CPU generator (dropout, layer initialisation) under a key.

    The generator is put back as it was. torch's CPU engine takes only 32 bits of a seed, so this is for
    such code alone; draws of our own use `rng`.
    """
    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
    try:
        yield
    finally:
        torch.random.set_rng_state(before)

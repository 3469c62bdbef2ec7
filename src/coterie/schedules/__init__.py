"""Who works when, and when the state moves on: plans without I/O. Knows core; no algorithm, no backend.

Read `synchronous` first. `hierarchical` is the same below relays, `buffered` is FedBuff's and (with a
buffer of one) FedAsync's, `gossip` has no server at all.
"""

from collections.abc import Callable, Mapping
from typing import Any

from coterie.schedules.buffered import STALENESS, Buffered, asynchronous, constant, hinge, polynomial
from coterie.schedules.gossip import TOPOLOGIES, Gossip
from coterie.schedules.hierarchical import Hierarchical
from coterie.schedules.synchronous import Synchronous

SCHEDULES: Mapping[str, Callable[..., Any]] = {
    "asynchronous": asynchronous,
    "buffered": Buffered,
    "gossip": Gossip,
    "hierarchical": Hierarchical,
    "synchronous": Synchronous,
}

__all__ = [
    "SCHEDULES", "STALENESS", "TOPOLOGIES", "Buffered", "Gossip", "Hierarchical", "Synchronous",
    "asynchronous", "constant", "hinge", "polynomial",
]  # fmt: skip

"""Partitions that are computed client by client when asked: a million clients cost nothing to have."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import overload

import numpy as np

from coterie.core.seeds import Key, derive, rng, uniform
from coterie.core.types import ClientId
from coterie.data.types import Rows


class Lazy(Mapping[ClientId, Rows]):
    """A partition that nobody walks through: rows are made anew at each look, and clients may share them.

    clients: all ids, in an order that never changes; that costs nothing. A client's rows come in a random
    order, always the same: the last of them are its test rows.
    """

    clients: Sequence[ClientId]

    @abstractmethod
    def size(self, client: ClientId) -> int:
        """How many rows the client has; cheaper than to look at them. Raises KeyError."""

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self.clients)

    def __len__(self) -> int:
        return len(self.clients)

    def __contains__(self, client: object) -> bool:
        return client in self.clients


class Numbered(Sequence[ClientId]):
    """The ids "client-000", "client-001", ... of so many clients, without holding them."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.digits = max(3, len(str(total - 1)))

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, place: int) -> ClientId: ...
    @overload
    def __getitem__(self, place: slice) -> list[ClientId]: ...
    def __getitem__(self, place: int | slice) -> ClientId | list[ClientId]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(self.total))]
        return f"client-{range(self.total)[place]:0{self.digits}d}"

    def __contains__(self, client: object) -> bool:
        if not (isinstance(client, str) and client.startswith("client-") and client.isascii()):
            return False
        digits = client[7:]
        return len(digits) == self.digits and digits.isdigit() and int(digits) < self.total

    def index(self, client: ClientId, start: int = 0, stop: int | None = None) -> int:
        """Return the place of an id. Raises ValueError when there is none."""
        if client not in self or int(client[7:]) not in range(self.total)[start:stop]:
            raise ValueError(f"{client!r} is not in the list")
        return int(client[7:])


@dataclass(frozen=True, slots=True, eq=False)
class Sampled(Lazy):
    """Each client's rows are drawn from the same n rows, in which the pools follow one another.

    pools: how many rows each has [L]: the labels, or one pool of all. order: the rows, pool by pool [n].
    samples, sigma: the median of the clients' sizes and how far they spread. alpha: how unevenly a client
    draws from the pools; None: in proportion.
    """

    clients: Numbered
    key: Key
    pools: Rows
    order: Rows
    samples: int
    sigma: float
    alpha: float | None

    def size(self, client: ClientId) -> int:
        """A log-normal number of rows, at least one and at most all."""
        if client not in self.clients:
            raise KeyError(client)
        if not self.sigma:
            return self.samples
        z = NormalDist().inv_cdf(uniform(derive(self.key, "size", client)) + 2.0**-54)
        return max(1, min(len(self.order), round(self.samples * math.exp(self.sigma * z))))

    def __getitem__(self, client: ClientId) -> Rows:
        size = self.size(client)
        draw = rng(derive(self.key, "rows", client))
        if self.alpha is None:
            return draw.choice(len(self.order), size, replace=False)
        shares = draw.dirichlet(self.alpha * self.pools / len(self.order))
        counts = _within(draw.multinomial(size, shares), self.pools)
        starts = np.cumsum(self.pools) - self.pools
        places = distinct(draw, np.repeat(starts, counts), np.repeat(self.pools, counts))
        return draw.permutation(self.order[places])


def distinct(draw: np.random.Generator, starts: Rows, widths: Rows) -> Rows:
    """One number from each of the ranges start .. start + width - 1, uniform among all different ones.

    Ranges are equal or do not overlap, and none is asked for more than its width.
    """
    drawn = starts + (draw.random(len(starts)) * widths).astype(np.int64)
    while True:
        _, first = np.unique(drawn, return_index=True)
        if len(first) == len(drawn):
            return drawn
        again = np.ones(len(drawn), dtype=bool)
        again[first] = False
        drawn[again] = starts[again] + (draw.random(int(again.sum())) * widths[again]).astype(np.int64)


def _within(counts: Rows, pools: Rows) -> Rows:
    """Counts, but no more from a pool than it has: what is too much goes to the pools with most left."""
    left = pools - counts
    if (left >= 0).all():
        return counts
    counts, over = np.minimum(counts, pools), int(-left[left < 0].sum())
    for pool in np.argsort(-left, kind="stable"):
        taken = min(over, int(pools[pool] - counts[pool]))
        counts[pool] += taken
        over -= taken
    return counts


def spread(clients: Sequence[ClientId], most: int) -> list[ClientId]:
    """All clients, or `most` of them at even distances: always the same ones."""
    if len(clients) <= most:
        return list(clients)
    return [clients[place * len(clients) // most] for place in range(most)]

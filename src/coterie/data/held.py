"""What clients hold, as rows of one prepared training set: nothing is copied until somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from coterie.core.types import ClientId
from coterie.data.population import Population
from coterie.data.types import ClientData

LARGEST = 1 << 30  # bytes of a prepared training set that are kept in memory
REMEMBERED = 1 << 16  # clients whose rows are


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """One client's rows of the whole prepared training set x, y; `train` and `test` copy them out."""

    x: Tensor
    y: Tensor
    rows: Tensor  # int64 [n], the training rows
    rest: Tensor  # int64 [m], the test rows
    weight: float | None = None

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Inputs [n, ...] and targets [n, ...]."""
        return self.x.index_select(0, self.rows), self.y.index_select(0, self.rows)

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Inputs [m, ...] and targets [m, ...]."""
        return self.x.index_select(0, self.rest), self.y.index_select(0, self.rest)


def holdings(population: Population) -> Callable[[ClientId], ClientData | Held]:
    """client -> what it holds: rows of the whole, prepared once, where that is at most a gigabyte."""
    stored = population.dataset.train
    one = population.dataset.prepare(stored.x[:1])
    if one.nbytes * len(stored) > LARGEST:
        return population.data

    @cache
    def whole() -> Tensor:
        return population.dataset.prepare(stored.x)

    @lru_cache(maxsize=REMEMBERED)
    def rows(client: ClientId) -> tuple[Tensor, Tensor, float | None]:
        train, test = (np.ascontiguousarray(part) for part in population.split(client))
        weight = None
        if population.weight is not None:
            weight = float(stored.column(population.weight)[train].sum())
        return torch.from_numpy(train), torch.from_numpy(test), weight

    return lambda client: Held(whole(), stored.y, *rows(client))

"""The population: every client's own rows, split into training and test rows, prepared when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coterie.core.errors import ConfigError, DataError
from coterie.core.seeds import Key, derive, rng
from coterie.core.types import ClientId
from coterie.data.types import ClientData, Dataset, Rows


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """Who holds which rows of a data set's training set; make one with `populate`, which checks it.

    A client's split into training and test rows depends on its rows, its id and the key, on nothing else.
    """

    dataset: Dataset
    partition: Mapping[ClientId, Rows]
    holdout: float
    key: Key
    weight: str | None = None

    @property
    def clients(self) -> tuple[ClientId, ...]:
        """The clients' ids, in the partition's order."""
        return tuple(self.partition)

    def sizes(self, client: ClientId) -> tuple[int, int]:
        """Return how many training and test rows the client has. Raises ConfigError for an unknown client."""
        n = len(self._rows(client))
        held_out = min(int(n * self.holdout + 0.5), n - 1)
        return n - held_out, held_out

    def split(self, client: ClientId) -> tuple[Rows, Rows]:
        """Return the client's training and test rows, shuffled. Raises ConfigError for an unknown client."""
        rows = rng(derive(self.key, "holdout", client)).permutation(self._rows(client))
        training, _ = self.sizes(client)
        return rows[:training], rows[training:]

    def data(self, client: ClientId) -> ClientData:
        """Prepare what the client holds; its weight is the sum over its training rows, if rows have weights.

        Raises ConfigError for an unknown client.
        """
        train, test = self.split(client)
        weight = None if self.weight is None else float(self.dataset.train.column(self.weight)[train].sum())
        return ClientData(self._prepared(train), self._prepared(test), weight)

    def pooled(self) -> ClientData:
        """Prepare all training parts together and all test parts together, for the centralised baseline."""
        splits = [self.split(client) for client in self.partition]
        train, test = (np.concatenate(parts) for parts in zip(*splits, strict=True))
        return ClientData(self._prepared(train), self._prepared(test))

    def _rows(self, client: ClientId) -> Rows:
        if client not in self.partition:
            raise ConfigError(
                f"client {client!r} is not in the partition", f"ids look like {next(iter(self.partition))!r}"
            )
        return self.partition[client]

    def _prepared(self, rows: Rows) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(rows)
        train = self.dataset.train
        return self.dataset.prepare(train.x[index]), train.y[index]


def populate(
    dataset: Dataset,
    partition: Mapping[ClientId, Rows],
    *,
    holdout: float = 0.1,
    key: Key,
    weight: str | None = None,
) -> Population:
    """Check a partition of the training set and join it with the data.

    holdout: share of each client's rows kept for its own test, rounded; at least one row stays for training.
    weight: key column of row weights, all finite and > 0 (default: the data set's own).
    Raises ConfigError for a holdout outside [0, 1) and DataError for a client without rows, a row that is out
    of range or held twice, or a weight that is not a positive number.
    """
    if not 0 <= holdout < 1:
        raise ConfigError(f"holdout={holdout}: must be at least 0 and below 1", "0.1 keeps a tenth")
    if not partition:
        raise DataError("partition: there are no clients")
    for client, rows in partition.items():
        if len(rows) == 0:
            raise DataError(f"partition: client {client!r} has no rows", "leave it out, or give it a row")
    rows = np.concatenate([np.asarray(part) for part in partition.values()])
    n = len(dataset.train)
    if rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= n:
        raise DataError(f"partition: rows must be whole numbers from 0 to {n - 1}")
    held = np.bincount(rows)
    if held.max() > 1:
        raise DataError(
            f"partition: row {int(held.argmax())} is held {held.max()} times", "give each row one owner"
        )
    weight = weight if weight is not None else dataset.weight
    if weight is not None:
        column = dataset.train.column(weight)
        if column.dtype.kind not in "iuf" or not (np.isfinite(column) & (column > 0)).all():
            raise DataError(f"weight column {weight!r}: every row needs a finite number > 0")
    return Population(
        dataset,
        {client: np.asarray(rows, dtype=np.int64) for client, rows in partition.items()},
        holdout,
        key,
        weight,
    )


def batches(
    n: int, *, epochs: int, batch_size: int | None, key: Key, drop_last: bool = False
) -> Iterator[Rows]:
    """Yield index batches over n rows, shuffled anew each epoch from derive(key, "epoch", e).

    batch_size None: all rows in one batch. drop_last: leave out a last batch that is not full; when even the
    first is not full, an epoch has no batches. Raises ConfigError for epochs < 0 or batch_size < 1.
    """
    if epochs < 0:
        raise ConfigError(f"epochs={epochs}: must be >= 0")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be >= 1", "leave it out for all rows in one batch")
    size = batch_size or max(n, 1)
    end = n - n % size if drop_last else n

    def shuffled() -> Iterator[Rows]:
        for epoch in range(epochs):
            rows = rng(derive(key, "epoch", epoch)).permutation(n)
            for start in range(0, end, size):
                yield rows[start : start + size]

    return shuffled()

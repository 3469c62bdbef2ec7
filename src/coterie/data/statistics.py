"""How uneven a partition is: sizes, label counts, and distances to the global label distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from coterie.core.errors import ConfigError
from coterie.core.types import ClientId
from coterie.data.lazy import Lazy, spread
from coterie.data.types import Examples, Floats, Rows

MOST = 2_000  # clients of a lazy partition that are looked at
DECILES = np.arange(1, 10) / 10


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """K clients, L labels (a regression's labels are the deciles of its targets).

    sizes: rows of each client, int64 [K]. counts: of each label, int64 [K, L]; rows with T targets count T
    times. jensen_shannon, earth_mover: float64 [K], each client's distance to the label distribution of all
    the clients' rows together. among: how many clients there are; more than K when only some were looked at.
    """

    clients: tuple[ClientId, ...]
    labels: tuple[str, ...]
    sizes: Rows
    counts: Rows
    jensen_shannon: Floats
    earth_mover: Floats
    among: int

    @property
    def smallest(self) -> int:
        """Rows of the smallest client."""
        return int(self.sizes.min())

    @property
    def median(self) -> float:
        """Median of the clients' sizes."""
        return float(np.median(self.sizes))

    @property
    def largest(self) -> int:
        """Rows of the largest client."""
        return int(self.sizes.max())

    @property
    def gini(self) -> float:
        """Gini coefficient of the sizes: 0 when all are equal, towards 1 when one client has everything."""
        sizes = np.sort(self.sizes)
        k = len(sizes)
        return float((2 * np.arange(1, k + 1) - k - 1) @ sizes / (k * sizes.sum()))

    @property
    def mean_jensen_shannon(self) -> float:
        """Mean of the Jensen-Shannon distances, weighted by size."""
        return float(np.average(self.jensen_shannon, weights=self.sizes))

    @property
    def mean_earth_mover(self) -> float:
        """Mean of the earth mover's distances, weighted by size."""
        return float(np.average(self.earth_mover, weights=self.sizes))


def describe(
    examples: Examples, partition: Mapping[ClientId, Rows], classes: Sequence[str] | None = None
) -> Statistics:
    """Count labels per client and compare each client with all of them together.

    Jensen-Shannon: the distance, i.e. the square root of the divergence in base 2, in [0, 1].
    Earth mover's: sum_i |p_i - q_i|, in [0, 2], as Zhao et al. 2018 (arXiv:1806.00582, section 3.2) use it.
    classes: the labels' names, for class indices. Of a lazy partition 2,000 clients at even distances stand
    for all. Raises ConfigError when a client has no rows.
    """
    if not partition:
        raise ConfigError("describe: there are no clients")
    among = len(partition)
    if isinstance(partition, Lazy):
        partition = {client: partition[client] for client in spread(partition.clients, MOST)}
    for client, rows in partition.items():
        if len(rows) == 0:
            raise ConfigError(f"describe: client {client!r} has no rows")
    y = examples.y.numpy()
    if examples.y.is_floating_point():
        edges = np.unique(np.quantile(y, DECILES))
        y = np.searchsorted(edges, y, side="right")
        marks = ["", *(f"{edge:.4g}" for edge in edges), ""]
        labels = tuple(f"{low}..{high}" for low, high in pairwise(marks))
    else:
        labels = tuple(classes) if classes is not None else tuple(map(str, range(int(y.max()) + 1)))
    counts = np.stack([np.bincount(y[rows].ravel(), minlength=len(labels)) for rows in partition.values()])
    p = counts / counts.sum(axis=1, keepdims=True)
    q = counts.sum(axis=0) / counts.sum()
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(np.broadcast_to(q, p.shape), middle)) / 2
    return Statistics(
        clients=tuple(partition),
        labels=labels,
        sizes=np.array([len(rows) for rows in partition.values()]),
        counts=counts,
        jensen_shannon=np.sqrt(np.clip(divergence, 0, 1)),
        earth_mover=np.abs(p - q).sum(axis=1),
        among=among,
    )


def _relative_entropy(p: Floats, q: Floats) -> Floats:
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log2(ratio)).sum(axis=1))

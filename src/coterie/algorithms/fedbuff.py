"""FedBuff: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba 2022, arXiv:2106.06639, Algorithm 1.

    server:  whenever K updates have come in, x <- x - server( 1/K * sum_i s(staleness_i) * (x_i - y_i) )

The `buffered` schedule fills the buffer and discounts each weight by s; this is the server's step.
Unlike a weighted mean, the sum is divided by K and not by the sum of the discounts: a buffer of stale
updates makes a small step.
"""

from __future__ import annotations

from dataclasses import replace

from coterie.algorithms.fedavg import fedavg
from coterie.algorithms.local import Local
from coterie.core import trees
from coterie.core.types import Algorithm, Optimizer, Tree


def fedbuff(local: Local, *, server: Optimizer | None = None) -> Algorithm:
    """Buffered asynchronous averaging; every client's update weighs the same before the discount."""
    base = fedavg(local, server=server, weighting="uniform")

    def finalize(state: Tree, aggregate: Tree, weight: float, count: int) -> Tree:
        delta = trees.scale(aggregate["delta"], weight / count)
        return base.finalize(state, {**aggregate, "delta": delta}, weight, count)

    return replace(base, finalize=finalize)

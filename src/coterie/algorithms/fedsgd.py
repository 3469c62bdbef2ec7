"""FedSGD, the "FedGD" of the literature: McMahan et al. 2017, arXiv:1602.05629, section 2.

client k:  g_k = grad F_k(x), over all of its data at once
server:    x <- x - lr * sum_k n_k / n * g_k
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coterie.algorithms.fedavg import fedavg
from coterie.algorithms.local import Local, Weighting, gradient
from coterie.algorithms.optimizers import sgd
from coterie.core.types import Aggregator, Algorithm, Optimizer, Params, Tree


def fedsgd(
    *,
    server: Optimizer | None = None,
    weighting: Weighting = "samples",
    aggregator: Aggregator | None = None,
) -> Algorithm:
    """One full local gradient a round, averaged. server: takes the step (None: SGD with lr 0.1)."""
    base = fedavg(
        Local(epochs=1, batch_size=None),
        server=server or sgd(0.1),
        weighting=weighting,
        aggregator=aggregator,
    )

    def keep(*args: Any) -> tuple[Params, Tree]:
        grads, carry = gradient(*args)
        return grads, {**carry, "gradient": grads}

    def finish(params: Params, down: Tree, carry: Tree, steps: int) -> tuple[Tree, Tree]:
        del params, down, steps
        return {"delta": carry["gradient"], "buffers": carry["buffers"]}, None

    return replace(base, client_work=base.client_work._replace(gradient=keep, finish=finish))

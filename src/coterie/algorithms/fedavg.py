"""FedAvg: McMahan, Moore, Ramage, Hampson, Agueera y Arcas 2017, arXiv:1602.05629, Algorithm 1.

client k:  y_k <- x;  E epochs of  y_k <- y_k - lr * grad f_k(y_k; batch)
server:    x <- x - server( sum_k n_k / n * (x - y_k) )          (server = SGD with lr 1: the mean of y_k)
"""

from __future__ import annotations

from collections.abc import Callable

from coterie.aggregators import each, mean
from coterie.algorithms.local import Local, Weighting, delta_work
from coterie.algorithms.optimizers import sgd
from coterie.core import trees
from coterie.core.types import Aggregator, Algorithm, Optimizer, Tree


def fedavg(
    local: Local,
    *,
    server: Optimizer | None = None,
    weighting: Weighting = "samples",
    aggregator: Aggregator | None = None,
) -> Algorithm:
    """Average what the clients learned.

    local: the client's steps. server: optimiser on the pseudo-gradient x - y (None: SGD with lr 1).
    weighting: "samples" (n_k), "uniform", or "client" (the weight a client's data names).
    aggregator: rule for the whole update {"delta", "buffers"} (None: the exact weighted mean).
    """
    server = server or sgd(1.0)
    return Algorithm(
        init=lambda model: {"model": model, "server": server.init(model["params"])},
        broadcast=lambda state: {"model": state["model"]},
        client_work=delta_work(local.optimizer),
        aggregator=aggregator or each(delta=mean(), buffers=mean()),
        finalize=server_step(server),
        local=local.config(weighting),
    )


def server_step(server: Optimizer) -> Callable[[Tree, Tree, float, int], Tree]:
    """Let the server's optimiser take the aggregated delta as its gradient; buffers are replaced."""

    def finalize(state: Tree, aggregate: Tree, weight: float, count: int) -> Tree:
        del weight, count
        params = state["model"]["params"]
        updates, slots = server.update(aggregate["delta"], state["server"], params)
        model = {"params": trees.add(params, updates), "buffers": aggregate["buffers"]}
        return {**state, "model": model, "server": slots}

    return finalize

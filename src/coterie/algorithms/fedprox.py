"""FedProx: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2020, arXiv:1812.06127, Algorithm 2.

client k:  minimise  f_k(y) + mu / 2 * ||y - x||^2,  whose gradient is  grad f_k(y) + mu * (y - x)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from coterie.algorithms.fedavg import fedavg
from coterie.algorithms.local import Local, Weighting
from coterie.core import trees
from coterie.core.errors import ConfigError
from coterie.core.types import Aggregator, Algorithm, ClientWork, Optimizer, Params, Tree


def fedprox(
    local: Local,
    *,
    mu: float,
    server: Optimizer | None = None,
    weighting: Weighting = "samples",
    aggregator: Aggregator | None = None,
) -> Algorithm:
    """FedAvg with a proximal term that holds clients near the server's model; mu = 0 is FedAvg itself."""
    base = fedavg(local, server=server, weighting=weighting, aggregator=aggregator)
    return replace(base, client_work=proximal(base.client_work, mu))


def proximal(work: ClientWork, mu: float) -> ClientWork:
    """Add mu * (y - x) to the gradient of any work that starts from the server's params x."""
    if mu < 0:
        raise ConfigError(f"fedprox(mu={mu}): mu must be >= 0", "typical values are 0.001 to 1; 0 is FedAvg")
    if mu == 0:
        return work

    def begin(down: Tree, memory: Tree, config: Mapping[str, Any]) -> tuple[Params, Tree]:
        params, carry = work.start(down, memory, config)
        return params, {**carry, "anchor": params}

    def pull(objective: Callable[..., Any], params: Params, *rest: Any) -> tuple[Params, Tree]:
        grads, carry = work.gradient(objective, params, *rest)
        prox = trees.map_tree(lambda g, y, x: g + mu * (y - x), grads, params, carry["anchor"])
        return prox, carry

    return work._replace(start=begin, gradient=pull)

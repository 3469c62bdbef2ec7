"""FedAsync: Xie, Koyejo, Gupta 2019, arXiv:1903.03934, Algorithm 1.

    client:  y = local solution of  f_i(y) + rho / 2 * ||y - x_tau||^2,  started from x_tau
    server:  on each arrival  x <- (1 - a) x + a y,   a = alpha * s(staleness)

The `asynchronous` schedule gives each arrival the weight s; this is the server's step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from coterie.aggregators import each, mean
from coterie.algorithms.fedavg import fedavg
from coterie.algorithms.fedprox import proximal
from coterie.algorithms.local import Local
from coterie.core import trees
from coterie.core.errors import ConfigError
from coterie.core.types import Algorithm, Params, Tree


def fedasync(local: Local, *, alpha: float = 0.6, rho: float = 0.005) -> Algorithm:
    """Mix each client's model in as it arrives. alpha: mixing weight of a fresh model; rho: proximal term."""
    if not 0 < alpha <= 1:
        raise ConfigError(f"fedasync(alpha={alpha}): alpha must be in (0, 1]", "the paper uses 0.6")
    base = fedavg(local, weighting="uniform")

    def finish(params: Params, down: Tree, carry: Tree, steps: int) -> tuple[Tree, Tree]:
        del down, steps
        return {"model": {"params": params, "buffers": carry["buffers"]}}, None

    def finalize(state: Tree, aggregate: Tree, weight: float, count: int) -> Tree:
        a = alpha * weight / count

        def mix(x: Any, y: Any) -> Any:
            return x + a * (y - x) if x.is_floating_point() else torch.maximum(x, y)

        return {**state, "model": trees.map_tree(mix, state["model"], aggregate["model"])}

    return replace(
        base,
        init=lambda model: {"model": model},
        client_work=proximal(base.client_work, rho)._replace(finish=finish),
        aggregator=each(model=mean()),
        finalize=finalize,
    )

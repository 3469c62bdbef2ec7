"""FedOpt: Reddi et al. 2021, arXiv:2003.00295, Algorithm 2; FedAvgM: Hsu, Qi, Brown 2019, arXiv:1909.06335.

With d = mean of the clients' (y - x), all element-wise, v0 = tau^2, no bias correction:

    m <- beta1 m + (1 - beta1) d
    v <- v + d^2                                     FedAdagrad
    v <- v - (1 - beta2) d^2 sign(v - d^2)           FedYogi
    v <- beta2 v + (1 - beta2) d^2                   FedAdam
    x <- x + lr * m / (sqrt(v) + tau)

FedAvgM: m <- beta m + d;  x <- x + lr m.  Each is FedAvg with another server optimiser.
"""

from __future__ import annotations

from coterie.algorithms.fedavg import fedavg
from coterie.algorithms.local import Local, Weighting
from coterie.algorithms.optimizers import adagrad, adam, sgd, yogi
from coterie.core.types import Aggregator, Algorithm


def fedavgm(
    local: Local,
    *,
    lr: float = 1.0,
    momentum: float = 0.9,
    weighting: Weighting = "samples",
    aggregator: Aggregator | None = None,
) -> Algorithm:
    """Server momentum (Hsu et al. 2019)."""
    return fedavg(local, server=sgd(lr, momentum=momentum), weighting=weighting, aggregator=aggregator)


def fedadagrad(
    local: Local,
    *,
    lr: float = 0.1,
    beta1: float = 0.0,
    tau: float = 1e-3,
    weighting: Weighting = "samples",
    aggregator: Aggregator | None = None,
) -> Algorithm:
    """FedAdagrad. tau: degree of adaptivity; smaller adapts more."""
    server = adagrad(lr, eps=tau, initial=tau**2, beta1=beta1)
    return fedavg(local, server=server, weighting=weighting, aggregator=aggregator)


def fedadam(
    local: Local,
    *,
    lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    weighting: Weighting = "samples",
    aggregator: Aggregator | None = None,
) -> Algorithm:
    """FedAdam. tau: degree of adaptivity; smaller adapts more."""
    server = adam(lr, beta1=beta1, beta2=beta2, eps=tau, initial=tau**2, bias_correction=False)
    return fedavg(local, server=server, weighting=weighting, aggregator=aggregator)


def fedyogi(
    local: Local,
    *,
    lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.99,
    tau: float = 1e-3,
    weighting: Weighting = "samples",
    aggregator: Aggregator | None = None,
) -> Algorithm:
    """FedYogi. tau: degree of adaptivity; smaller adapts more."""
    server = yogi(lr, beta1=beta1, beta2=beta2, eps=tau, initial=tau**2, bias_correction=False)
    return fedavg(local, server=server, weighting=weighting, aggregator=aggregator)

"""D-PSGD: Lian, Zhang, Zhang, Hsieh, Zhang, Liu 2017, arXiv:1705.09056, Algorithm 1.

    node i:  x_i <- sum_j W_ij x_j - lr * grad F_i(x_i; batch)

The node's half: one mini-batch gradient from x_i. The `gossip` schedule holds the n states and mixes.
"""

from __future__ import annotations

from dataclasses import replace

from coterie.algorithms.fedavg import fedavg
from coterie.algorithms.local import Local
from coterie.core.types import Algorithm


def dpsgd(local: Local) -> Algorithm:
    """Decentralised parallel SGD: `local.steps` (None: one) mini-batch steps between two mixings."""
    return fedavg(replace(local, steps=local.steps or 1), weighting="uniform")

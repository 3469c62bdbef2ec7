"""Krum and Multi-Krum: Blanchard, El Mhamdi, Guerraoui, Stainer 2017, arXiv:1703.02757.

score(i) = sum over the n - f - 2 updates j closest to i of ||u_i - u_j||^2; the update with the smallest
score is taken. Multi-Krum averages the m updates with the smallest scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.core import exact, trees
from coterie.core.errors import ConfigError, QuorumLost
from coterie.core.types import Aggregator, Tree


def krum(*, byzantine: int, select: int = 1, by: str | None = "delta") -> Aggregator:
    """Pick the update closest to its neighbours (Blanchard et al. 2017, section 4).

    byzantine: f, how many of the n replies may be hostile; needs n >= 2 f + 3.
    select: m, how many of the best to average, unweighted (Multi-Krum); m <= n - f.
    by: the part of the update that distances are measured on (None: all of it).
    Raises QuorumLost when fewer replies arrive. Cost: O(n^2 d) time, O(n d) memory. The result does not
    depend on the order of arrival: scores are sums in sorted order, ties go to the smaller digest.
    """
    if byzantine < 0 or select < 1:
        raise ConfigError(
            f"krum(byzantine={byzantine}, select={select}): needs byzantine >= 0 and select >= 1"
        )
    need = max(2 * byzantine + 3, select + byzantine)

    def add(acc: Tree, ups: Tree, weights: Any) -> Tree:
        if isinstance(weights, float | int):
            return (*acc, (ups, float(weights)))
        rows = [trees.map_tree(lambda leaf, i=i: leaf[i], ups) for i in range(len(weights))]
        return (*acc, *((row, float(weight)) for row, weight in zip(rows, weights, strict=True)))

    def finish(acc: Tree) -> tuple[Tree, float, int]:
        if len(acc) < need:
            raise QuorumLost(
                f"krum(byzantine={byzantine}, select={select}) got {len(acc)} replies and needs {need}",
                "enlarge schedule.cohort and schedule.quorum, or lower algorithm.aggregator.byzantine",
            )
        ups = sorted((up for up, _ in acc), key=trees.digest)
        scores = krum_scores(torch.stack([_flat(up if by is None else up[by]) for up in ups]), byzantine)
        chosen = None
        for index in sorted(range(len(ups)), key=lambda i: (float(scores[i]), i))[:select]:
            chosen = exact.add(chosen, ups[index], 1.0)
        aggregate, _, _ = exact.mean(chosen)
        return aggregate, sum(sorted(weight for _, weight in acc)), len(acc)

    return Aggregator(tuple, add, lambda left, right: left + right, finish, linear=False)


def krum_scores(points: Tensor, byzantine: int) -> Tensor:
    """points [n, d] -> scores [n], in float64: sum of the n - f - 2 smallest squared distances to others."""
    n = len(points)
    squared = torch.stack([((points - row) ** 2).sum(1) for row in points])  # no n x n x d intermediate
    squared.fill_diagonal_(torch.inf)
    return squared.sort(dim=1).values[:, : n - byzantine - 2].sum(1)


def _flat(up: Tree) -> Tensor:
    return torch.cat([leaf.double().reshape(-1) for leaf in trees.leaves(up) if leaf.is_floating_point()])

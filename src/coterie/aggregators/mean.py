"""The weighted mean, exact to the bit in any order and nesting; and products of aggregators."""

from __future__ import annotations

from typing import Any

from coterie.core import exact
from coterie.core.types import Aggregator, Tree


def mean(*, uniform: bool = False) -> Aggregator:
    """sum(w_i u_i) / sum(w_i), with O(model) memory (see `core.exact` for the error bound and the cost).

    uniform: count every update once, whatever its weight.
    """

    def add(acc: Tree, ups: Tree, weights: Any) -> Tree:
        if uniform:
            weights = 1.0 if isinstance(weights, float | int) else [1.0] * len(weights)
        return exact.add(acc, ups, weights)

    return Aggregator(lambda: None, add, exact.merge, exact.mean, linear=True)


def each(**parts: Aggregator) -> Aggregator:
    """The product of aggregators: one for each key of the update, e.g. each(delta=mean(), control=...).

    Weight and count of the result are those of the first part.
    """
    first = next(iter(parts))

    def init() -> Tree:
        return {name: part.init() for name, part in parts.items()}

    def add(acc: Tree, ups: Tree, weights: Any) -> Tree:
        if set(ups) != set(parts):
            raise ValueError(f"an update of {sorted(ups)} for aggregators of {sorted(parts)}")
        return {name: part.add(acc[name], ups[name], weights) for name, part in parts.items()}

    def merge(left: Tree, right: Tree) -> Tree:
        return {name: part.merge(left[name], right[name]) for name, part in parts.items()}

    def finish(acc: Tree) -> tuple[Tree, float, int]:
        done = {name: part.finish(acc[name]) for name, part in parts.items()}
        _, weight, count = done[first]
        return {name: aggregate for name, (aggregate, _, _) in done.items()}, weight, count

    return Aggregator(init, add, merge, finish, linear=all(part.linear for part in parts.values()))

"""SCAFFOLD: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh 2020, arXiv:1910.06378, Algorithm 1, option II.

    client i:  y <- x;  K steps of  y <- y - lr * (grad f_i(y) - c_i + c)
               c_i+ = c_i - c + (x - y) / (K lr);   sends  x - y  and  c_i+ - c_i;   keeps c_i+
    server:    x <- x - server( mean of (x - y) );   c <- c + |S| / N * mean of (c_i+ - c_i)

Two trees travel each way; the model is weighted, the controls never are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from coterie.aggregators import each, mean
from coterie.algorithms.fedavg import fedavg
from coterie.algorithms.local import Local, Weighting
from coterie.core import trees
from coterie.core.types import Algorithm, Optimizer, Params, Tree


def scaffold(
    local: Local, *, population: int, server: Optimizer | None = None, weighting: Weighting = "uniform"
) -> Algorithm:
    """Correct client drift with control variates, which are each client's memory between its tasks.

    population: N, how many clients there are in all. The client's optimiser should be plain SGD: the
    estimate of c_i divides by K * lr.
    """
    base = fedavg(local, server=server, weighting=weighting)
    work = base.client_work

    def start(down: Tree, memory: Tree, config: Mapping[str, Any]) -> tuple[Params, Tree]:
        params, carry = work.start(down, memory, config)
        return params, {**carry, "c": down["control"], "c_i": memory}

    def gradient(objective: Callable[..., Any], params: Params, *rest: Any) -> tuple[Params, Tree]:
        grads, carry = work.gradient(objective, params, *rest)
        return trees.map_tree(lambda g, c_i, c: g - c_i + c, grads, carry["c_i"], carry["c"]), carry

    def finish(params: Params, down: Tree, carry: Tree, steps: int) -> tuple[Tree, Tree]:
        up, _ = work.finish(params, down, carry, steps)
        scale = 1.0 / (steps * carry["lr"])
        control = trees.map_tree(
            lambda c_i, c, delta: c_i - c + scale.to(delta.dtype) * delta,
            carry["c_i"],
            carry["c"],
            up["delta"],
        )
        return {**up, "control": trees.subtract(control, carry["c_i"])}, control

    def finalize(state: Tree, aggregate: Tree, weight: float, count: int) -> Tree:
        after = base.finalize(state, aggregate, weight, count)
        return {
            **after,
            "control": trees.add(state["control"], trees.scale(aggregate["control"], count / population)),
        }

    return replace(
        base,
        init=lambda model: {**base.init(model), "control": trees.zeros_like(model["params"])},
        broadcast=lambda state: {"model": state["model"], "control": state["control"]},
        client_work=work._replace(
            start=start,
            gradient=gradient,
            finish=finish,
            remember=lambda down: trees.zeros_like(down["control"]),
        ),
        aggregator=each(delta=mean(), buffers=mean(), control=mean(uniform=True)),
        finalize=finalize,
    )

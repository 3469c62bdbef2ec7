"""Rewriting of recorded graphs: less to compute, and parameters updated in place."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def tidy(module: GraphModule) -> GraphModule:
    """Drop what nobody uses, and compute once what is computed twice."""
    graph, seen = module.graph, dict[Any, Node]()
    graph.eliminate_dead_code()
    written = _written(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in written or _draws(node):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
    graph.lint()
    module.recompile()
    return module


def in_place(module: GraphModule, inputs: Collection[int]) -> GraphModule:
    """Let outputs of the form input + update overwrite that input, for the inputs with these numbers.

    Gradient and step of a linear layer become one call: W += (-lr dz)^T h. The output is then that input.
    """
    graph = module.graph
    placed = [node for node in graph.nodes if node.op == "placeholder"]
    output: Any = next(node for node in graph.nodes if node.op == "output")
    order = {node: index for index, node in enumerate(graph.nodes)}
    for out in list(output.args[0]):
        if not (_calls(out, aten.add.Tensor) and out.args[0] in placed and not out.kwargs):
            continue
        held, update = out.args
        if placed.index(held) not in inputs or held in output.args[0] or not isinstance(update, Node):
            continue
        if any(user is not output for user in out.users) or _views_of(held) & set(output.args[0]):
            continue
        after = max([user for user in held.users if user is not out] + [update], key=order.__getitem__)
        with graph.inserting_after(after):
            made = _fused(graph, held, update)
        out.replace_all_uses_with(made)
        graph.erase_node(out)
        order = {node: index for index, node in enumerate(graph.nodes)}
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _fused(graph: torch.fx.Graph, held: Any, update: Any) -> Node:
    """held += update; with update = factor * gradient in one call."""
    if _calls(update, aten.mul.Tensor) and all(isinstance(each, Node) for each in update.args):
        factor, gradient = update.args
        if _calls(gradient, aten.bmm.default) and len(gradient.users) == 1 and _narrow(factor, gradient):
            left, right = gradient.args
            scaled = graph.call_function(aten.mul.Tensor, (left, factor))
            with graph.inserting_after(scaled):
                return graph.call_function(aten.baddbmm_.default, (held, scaled, right))
        return graph.call_function(aten.addcmul_.default, (held, gradient, factor))
    return graph.call_function(aten.add_.Tensor, (held, update))


def _narrow(factor: Any, gradient: Any) -> bool:
    """Is the factor one number, or one for each client?"""
    shape = factor.meta["val"].shape
    return all(size == 1 for size in shape[1:]) and (not shape or len(shape) == gradient.meta["val"].dim())


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def _hashable(value: object) -> object:
    if isinstance(value, list | tuple):
        return (type(value), *map(_hashable, value))
    if isinstance(value, dict):
        return tuple((key, _hashable(each)) for key, each in sorted(value.items()))
    return (type(value), value)


def _written(graph: torch.fx.Graph) -> set[Node]:
    """What some node writes into, the nodes that do, and what all these are views of."""
    found: set[Node] = set()
    ahead = [node for node in graph.nodes if _schema(node) is not None and _schema(node).is_mutable]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            if _is_view(node) or (_schema(node) is not None and _schema(node).is_mutable):
                ahead += node.all_input_nodes
    return found


def _views_of(node: Node) -> set[Node]:
    found: set[Node] = set()
    ahead = [node]
    while ahead:
        more = [user for user in ahead.pop().users if _is_view(user) and user not in found]
        found.update(more)
        ahead += more
    return found


def _is_view(node: Node) -> bool:
    schema = _schema(node)
    return schema is not None and any(made.alias_info is not None for made in schema.returns)


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _schema(node: Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None

"""Rewriting of recorded graphs: less to compute, and parameters updated in place."""

from __future__ import annotations

from collections.abc import Collection
from operator import getitem
from typing import Any

import torch
from torch.fx import GraphModule, Node

from coterie.trainers.ops import DIRECT, linear_step_
from coterie.trainers.sequences import gelu_forward  # noqa: F401  registers the operator

aten = torch.ops.aten
LINEAR_FORWARD = torch.ops.coterie.linear_forward.default
LINEAR_BACKWARD = torch.ops.coterie.linear_backward.default
LINEAR_GELU = torch.ops.coterie.linear_gelu.default
GELU_FORWARD = torch.ops.coterie.gelu_forward.default
VIEWS = (aten.view.default, aten.permute.default, aten.detach.default, aten.expand.default)


def tidy(module: GraphModule) -> GraphModule:
    """Drop what nobody uses or what changes nothing, and compute once what is computed twice."""
    graph, seen = module.graph, dict[Any, Node]()
    for node in list(graph.nodes):
        if _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    written = _written(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in written or draws(node):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
    for node in list(graph.nodes):
        _with_relu(node)
        _with_gelu(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def in_place(module: GraphModule, inputs: Collection[int]) -> GraphModule:
    """Let outputs of the form input + update overwrite that input, for the inputs with these numbers.

    Gradient and step of a linear layer become one call: W += -lr dz^T h. The output is then that input.
    """
    graph = module.graph
    placed = [node for node in graph.nodes if node.op == "placeholder"]
    output: Any = next(node for node in graph.nodes if node.op == "output")
    for out in list(output.args[0]):
        if not (_calls(out, aten.add.Tensor) and out.args[0] in placed and not out.kwargs):
            continue
        held, update = out.args
        if placed.index(held) not in inputs or held in output.args[0] or not isinstance(update, Node):
            continue
        if any(user is not output for user in out.users) or _views_of(held) & set(output.args[0]):
            continue
        out.replace_all_uses_with(_fused(graph, held, update, out))
        graph.erase_node(out)
    graph.eliminate_dead_code()
    graph.lint()
    for node in graph.nodes:
        node.target = DIRECT.get(node.target, node.target)
    module.recompile()
    return module


def _with_relu(node: Any) -> None:
    """Let linear layers do the ReLU behind them, and its gradient."""
    if _calls(node, aten.relu.default):
        (before,) = node.args
        if _calls(before, LINEAR_FORWARD) and len(before.users) == 1:
            before.args = (*before.args[:3], True, *before.args[4:])
            node.replace_all_uses_with(before)
    elif _calls(node, aten.threshold_backward.default):
        slope, value, threshold = node.args
        if _calls(slope, getitem) and len(slope.users) == 1 and threshold == 0:
            whole = slope.args[0]
            if _calls(whole, LINEAR_BACKWARD) and slope.args[1] == 0 and whole.args[1] is value:
                whole.args = (*whole.args[:5], True, *whole.args[6:])
                node.replace_all_uses_with(slope)


def _with_gelu(graph: torch.fx.Graph, node: Any) -> None:
    """The same for GELU, whose slope the linear layer makes too."""
    if _calls(node, GELU_FORWARD):
        before, views = _behind(node.args[0])
        if not (_calls(before, LINEAR_FORWARD) and not before.args[3] and views):
            return
        with graph.inserting_before(node):
            both = graph.call_function(LINEAR_GELU, (*before.args[:3], node.args[1], *before.args[4:]))
            for user in list(node.users):  # y, slope
                one = graph.call_function(getitem, (both, user.args[1]))
                user.replace_all_uses_with(graph.call_function(aten.view.default, (one, views[0].args[1])))
    elif _calls(node, aten.mul.Tensor) and all(isinstance(each, Node) for each in node.args):
        (whole, _), (slope, _) = map(_behind, node.args)
        ours = _calls(whole, getitem) and len(whole.users) == 1 and whole.args[1] == 0
        ours = ours and _calls(whole.args[0], LINEAR_BACKWARD) and not any(whole.args[0].args[6:7])
        if ours and _calls(slope, getitem) and _calls(slope.args[0], LINEAR_GELU) and slope.args[1] == 1:
            whole.args[0].args = (*whole.args[0].args[:6], slope, *whole.args[0].args[7:])
            node.replace_all_uses_with(node.args[0])


def _behind(node: Any) -> tuple[Any, list[Node]]:
    """What a node is a view of, where nobody else looks at it or at views between, and those views."""
    views = []
    while _calls(node, aten.view.default) and len(node.users) == 1:
        views.append(node)
        node = node.args[0]
    return node, views


def _changes_nothing(node: Any) -> bool:
    """Is it a view of its input as it is?"""
    if not any(_calls(node, view) for view in VIEWS):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    return bool(before.shape == after.shape and before.stride() == after.stride())


def _fused(graph: torch.fx.Graph, held: Any, update: Any, out: Node) -> Any:
    """held += update; with update = factor * gradient in one call."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    others = [user for user in held.users if user is not out]
    factor: Any = None
    gradient: Any = None
    if _calls(update, aten.mul.Tensor) and all(isinstance(each, Node) for each in update.args):
        factor, gradient = update.args
        if _calls(gradient, getitem) and len(gradient.users) == 1 and _narrow(factor, gradient):
            whole = gradient.args[0]
            last = all(order[user] <= order[whole] for user in others)
            ours = _calls(whole, LINEAR_BACKWARD) and gradient.args[1] == 1 and whole.args[2] is held
            if ours and last and _moved(factor, whole, order):
                whole.target, whole.args = linear_step_, (*whole.args[:6], factor, *whole.args[6:])
                return held
    with graph.inserting_after(max([*others, update], key=order.__getitem__)):
        if factor is None:
            return graph.call_function(aten.add_.Tensor, (held, update))
        if _calls(gradient, aten.bmm.default) and len(gradient.users) == 1 and _narrow(factor, gradient):
            left, right = gradient.args
            scaled = graph.call_function(aten.mul.Tensor, (left, factor))
            with graph.inserting_after(scaled):
                return graph.call_function(aten.baddbmm_.default, (held, scaled, right))
        return graph.call_function(aten.addcmul_.default, (held, gradient, factor))


def _moved(node: Node, target: Node, order: dict[Node, int]) -> bool:
    """Move what a node is made from, and the node, before the target; False where it needs the target."""
    ahead, found = [node], set[Node]()
    while ahead:
        each = ahead.pop()
        if each is target:
            return False
        if each not in found and order[each] > order[target]:
            found.add(each)
            ahead += each.all_input_nodes
    for each in sorted(found, key=order.__getitem__):
        target.prepend(each)
    return True


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
    ahead = [node for node in graph.nodes if writes(node)]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            if is_view(node) or writes(node):
                ahead += node.all_input_nodes
    return found


def _views_of(node: Node) -> set[Node]:
    found: set[Node] = set()
    ahead = [node]
    while ahead:
        more = [user for user in ahead.pop().users if is_view(user) and user not in found]
        found.update(more)
        ahead += more
    return found


def writes(node: Node) -> bool:
    """Does it change what it is given?"""
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def is_view(node: Node) -> bool:
    """Does what it makes share memory with what it is made from?"""
    schema = _schema(node)
    return schema is not None and any(made.alias_info is not None for made in schema.returns)


def draws(node: Node) -> bool:
    """Is it random?"""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _schema(node: Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None

"""A client's whole local training as one call: the kernels of a recorded step, run again and again in C.

A recorded graph costs a few microseconds an operation, and passes all clients' weights through the caches at
every step. A program is made from the graph of a single client whose operations are all kernels of
`core.native`, views or constants. Its memory is laid out once; then one client after the other takes all its
steps, with its weights in the cache, and no Python in between.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.core import native
from coterie.trainers import ops
from coterie.trainers.graphs import draws, is_view, writes

aten = torch.ops.aten
log = logging.getLogger("coterie")
MOST = 26  # arguments of a kernel, as in run.c
LINE = 64  # bytes of a cache's line
CLOSE = 1e-4  # relative difference of a step from the graph's, which sums in another order
CHECKED = ("cross_entropy_forward", "embedding_forward")  # kernels that return how much is wrong
CONSTANT = {
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
}
Said = tuple[str, tuple[Tensor | int | None, ...]]


class Unsupported(Exception):
    """Something in a graph that a program cannot do."""


@dataclass(frozen=True)
class Program:
    """calls [n, 2 + 2 * MOST]: kernels and their arguments, as run.c reads them.

    An argument may lie in a slot: the leaves of the state by path, then x, y, index and mask. moves: bytes by
    which each slot grows with a step. fixed: nodes that no step changes, and where their values belong;
    torch computes them from the leaves `needed`, once where clients share these. alive: memory
    that the calls point to.
    """

    calls: NDArray[np.int64]
    paths: list[str]
    moves: NDArray[np.int64]
    loss: int
    needed: dict[Node, str]
    fixed: list[tuple[Node, Tensor | None]]
    alive: list[Any]

    def train(
        self,
        state: Mapping[str, Tensor],
        shared: set[str],
        data: tuple[Tensor, Tensor],
        index: Tensor,
        mask: Tensor,
        steps: Sequence[int],
    ) -> Tensor:
        """All steps of all clients; state is changed in place, so its leaves must be the caller's own.

        data: x [rows, ...], y [rows, ...]; index (int64) and mask (float32) [clients, most steps, rows of a
        batch]; steps: of each client. Returns the mean loss of each step, [clients, most steps]. Raises
        IndexError for a target that is no class.
        """
        losses = torch.zeros(index.shape[:2])
        held = [state[path].contiguous() for path in self.paths] + [
            each.contiguous() for each in (*data, index, mask)
        ]
        own = (0 if path in shared else state[path][0].nbytes for path in self.paths)
        apart = [*own, 0, 0, index[0].nbytes, mask[0].nbytes]
        first = np.array([each.data_ptr() for each in held], dtype=np.int64)
        by_client = np.array(apart, dtype=np.int64)
        every = any(path not in shared for path in self.needed.values())  # has each client its own?
        for client, count in enumerate(steps):
            if every or not client:
                self._fix(
                    {
                        node: state[path] if path in shared else state[path][client : client + 1]
                        for node, path in self.needed.items()
                    }
                )
            slots = first + client * by_client
            wrong = native.call(
                "run_steps", self.calls.ctypes.data, len(self.calls), slots.ctypes.data,
                self.moves.ctypes.data, len(slots), count, self.loss, losses[client],
            )  # fmt: skip
            if wrong:
                raise IndexError(f"{wrong} inputs or targets are not among the classes")
        return losses

    def _fix(self, made: dict[Node, Any]) -> None:
        for node, place in self.fixed:
            args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
            made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if place is not None:
                place.copy_(made[node])


def program(
    graph: GraphModule, state: Mapping[str, Tensor], batch: Sequence[Tensor], moving: Sequence[str], loss: str
) -> Program | None:
    """The program of a graph of one client; None where it holds something that cannot be in one.

    state, batch (x, y, mask, seed): what the graph takes, with a first dimension of one client. moving: the
    leaves that the graph returns. A step of the program, from any state, is compared with one of the graph.
    """
    try:
        made = _translated(graph, state, batch, moving, loss)
    except (Unsupported, RuntimeError, TypeError, ValueError) as error:
        log.debug("no program: %s", error)
        return None
    x, y, mask, _ = batch
    draw = torch.Generator().manual_seed(0)
    state = {  # any, not that of now: whether there is a program must not depend on when it is asked for
        path: torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype) / 20
        if leaf.is_floating_point()
        else leaf.clone()
        for path, leaf in state.items()
    }
    its = dict(zip(moving, graph.forward(*(leaf.clone() for leaf in state.values()), *batch), strict=True))
    index, shared = torch.arange(x.shape[1]).view(1, 1, -1), {path for path in state if path not in moving}
    made.train(state, shared, (x[0], y[0]), index, mask.unsqueeze(0), [1])
    gap = max(float((state[path] - leaf).norm() / leaf.norm().clamp(min=1e-12)) for path, leaf in its.items())
    if not gap < CLOSE:
        log.debug("no program: its step differs by %.2g from the graph's", gap)
        return None
    return made


def _translated(
    graph: GraphModule, state: Mapping[str, Tensor], batch: Sequence[Tensor], moving: Sequence[str], loss: str
) -> Program:
    paths, calls = list(state), list[Said]()
    # stand-ins: what the slots point to is known at a run only. All zeros, so that nothing can be left over.
    x, y, mask, seed = (torch.zeros_like(part) for part in batch)
    leaves = {path: torch.zeros(leaf.shape, dtype=leaf.dtype) for path, leaf in state.items()}
    rows_of_x, rows_of_y, index = x[0].clone(), y[0].clone(), torch.zeros(x.shape[1], dtype=torch.int64)
    slots = [*leaves.values(), rows_of_x, rows_of_y, index, mask]
    if not native.fits(*(leaves[path] for path in moving), mask):
        raise Unsupported

    def hear(name: str, args: tuple[Tensor | int | None, ...]) -> None:
        if "_scratch" not in name:
            calls.append((name, args))

    def recorded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with native.listening(hear):
            return function(*args, **kwargs)

    for rows, batch_of in ((rows_of_x, x), (rows_of_y, y)):
        recorded(native.call, "gather", rows, index, batch_of, x.shape[1], rows[0].nbytes)
    nodes = list(graph.graph.nodes)
    placed = [node for node in nodes if node.op == "placeholder"]
    values: dict[Node, Any] = dict(zip(placed, (*leaves.values(), x, y, mask, seed), strict=True))
    still = {node: path for node, path in zip(placed, paths, strict=False) if path not in moving}
    fixed: list[tuple[Node, Tensor | None]] = []
    constant: set[Node] = set()

    def evaluated(node: Node) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        inputs = node.all_input_nodes
        if all(each in constant for each in inputs) and not (writes(node) or draws(node)):
            constant.add(node)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.target in RULES and not all(each in still for each in inputs):
            return recorded(RULES[node.target], *args, **kwargs)
        if node.target in ops.KERNELS:
            strided = ops.KERNELS[node.target]
            return recorded(node.target, *(recorded(_dense, each, strided) for each in args))
        if writes(node) or draws(node):
            raise Unsupported(str(node.target))
        view = node.target is operator.getitem or node.target is aten._unsafe_view.default or is_view(node)
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        if inputs and all(each in still for each in inputs):  # no step changes it
            still[node] = ""
            made = made if view else made.clone()
            fixed.append((node, None if view else made))
        elif not (view or node.target in CONSTANT):
            raise Unsupported(str(node.target))
        return made

    with _Empties() as empties:
        for node in nodes:
            if node.op == "call_function":
                values[node] = evaluated(node)
            elif node.op == "get_attr":
                values[node] = getattr(graph, str(node.target))
                constant.add(node)
    (output,) = (node for node in nodes if node.op == "output")
    for path, node in zip(moving, output.args[0], strict=True):
        if values[node].data_ptr() != leaves[path].data_ptr():
            recorded(_replaced, values[node], leaves, path)
    room, places = _packed(calls, empties.made)
    kept = [arg for _, args in calls for arg in args if isinstance(arg, Tensor) and _base(arg) not in places]
    return Program(
        _encoded(calls, slots, places),
        paths,
        np.array([0] * (len(paths) + 2) + [index.nbytes, mask.nbytes], dtype=np.int64),
        paths.index(loss),
        {each: still[each] for node, _ in fixed for each in node.all_input_nodes if each.op == "placeholder"},
        fixed,
        [room, kept],
    )


def _replaced(made: Tensor, leaves: Mapping[str, Tensor], path: str) -> None:
    if any(_base(made) == _base(leaf) for leaf in leaves.values()):
        raise Unsupported("a leaf that becomes another")
    _elementwise("COPY", made, made, leaves[path])


def _base(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Empties(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is made empty, by its memory: a kernel of the step writes there before one reads it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, Tensor] = {}  # held, so that nothing else comes to lie there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty):
            self.made[_base(made)] = made
        return made


def _packed(calls: Sequence[Said], empties: Collection[int]) -> tuple[Tensor, dict[int, int]]:
    """One piece of memory for all that is not needed at the same time, so that it stays in a near cache.

    empties: where what may move lies now. Returns the memory, and the new address of each.
    """
    spans: dict[int, tuple[int, int, int]] = {}  # size, first and last call
    for number, (_, args) in enumerate(calls):
        for arg in args:
            if isinstance(arg, Tensor) and arg.numel() and _base(arg) in empties:
                size = -(-arg.untyped_storage().nbytes() // LINE) * LINE
                _, first, _ = spans.get(_base(arg), (0, number, 0))
                spans[_base(arg)] = size, first, number
    placed: list[tuple[int, int, int, int]] = []  # start and end in the memory, first and last call
    places: dict[int, int] = {}
    for old, (size, first, last) in sorted(spans.items(), key=lambda span: -span[1][0]):
        start = 0
        for low, high, begin, end in sorted(placed):
            if begin <= last and first <= end and low < start + size:
                start = max(start, high)
        places[old] = start
        placed.append((start, start + size, first, last))
    room = torch.zeros(max((each[1] for each in placed), default=0) + LINE, dtype=torch.uint8)
    base = -(-room.data_ptr() // LINE) * LINE
    return room, {old: base + start for old, start in places.items()}


def _encoded(calls: Sequence[Said], slots: Sequence[Tensor], places: Mapping[int, int]) -> NDArray[np.int64]:
    where = {_base(each): number for number, each in enumerate(slots)}
    made = np.zeros((len(calls), 2 + 2 * MOST), dtype=np.int64)
    made[:, 2 : 2 + MOST] = -1
    for row, (name, args) in zip(made, calls, strict=True):
        row[:2] = native.address(name), name in CHECKED
        for place, arg in enumerate(args, 2):
            if isinstance(arg, Tensor) and arg.numel():
                base = _base(arg)
                row[place] = where.get(base, -1)
                row[place + MOST] = (
                    arg.data_ptr() - (base if base in where else 0) + places.get(base, base) - base
                )
            elif isinstance(arg, int):
                row[place + MOST] = arg
    return made


def _elementwise(what: str, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """A kernel's work on x and y, broadcast to out."""
    if not (native.fits(x, y, out) and out.dim() < 8):
        raise Unsupported
    x, y, out = (each.view(1) if each.dim() == 0 else each for each in (x, y, out))
    strides = [each.expand(out.shape).stride() for each in (out, x, y)]
    layout = torch.tensor([out.dim(), *out.shape, *(step for each in strides for step in each)])
    native.call("elementwise", WHAT[what], out, x, y, layout, gaps=True)
    return out


NAMES = "ADD SUBTRACT MULTIPLY DIVIDE ADD_PRODUCT ADD_TO WHERE_POSITIVE COPY NEGATE RELU"
WHAT = {name: number for number, name in enumerate(NAMES.split())}


def _dense(x: Any, strided: bool) -> Any:
    """A tensor without gaps, as kernels want it, or at least without gaps in its rows."""
    if not isinstance(x, Tensor) or x.is_contiguous() or (strided and ops.lined(x) is x):
        return x
    return _elementwise("COPY", x, x, torch.empty(x.shape, dtype=x.dtype))


def _alone(what: str) -> Callable[..., Tensor]:
    def rule(x: Tensor, *, memory_format: Any = None, dtype: Any = torch.float32) -> Tensor:
        if dtype != torch.float32:
            raise Unsupported
        format = torch.preserve_format if memory_format is None else memory_format
        return _elementwise(what, x, x, torch.empty_like(x, memory_format=format))

    return rule


def _pair(what: str) -> Callable[..., Tensor]:
    def rule(x: Any, y: Any) -> Tensor:
        x, y = (each if isinstance(each, Tensor) else torch.tensor(float(each)) for each in (x, y))
        like = x if x.dim() >= y.dim() else y
        whole = torch.broadcast_tensors(x, y)[0].shape  # type: ignore[no-untyped-call]
        return _elementwise(what, x, y, torch.empty_like(like) if like.shape == whole else torch.empty(whole))

    return rule


def _sum(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    dims = [each % x.dim() for each in dims]
    size = [1 if d in dims else n for d, n in enumerate(x.shape)]
    whole = torch.empty(size)
    zero = torch.zeros(())
    _elementwise("COPY", zero, zero, whole)
    _elementwise("ADD_TO", x, x, whole.expand(x.shape))
    return whole if keepdim else whole.squeeze(dims)


def _mean(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    whole = _sum(x, dims, keepdim)
    return _pair("DIVIDE")(whole, x.numel() // whole.numel())


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat: parts that lie side by side in one piece of memory already are joined by nobody."""
    dim, first, at = dim % parts[0].dim(), parts[0], 0
    size = [*first.shape[:dim], sum(each.shape[dim] for each in parts), *first.shape[dim + 1 :]]
    here = first.storage_offset()
    for part in parts:
        beside = _base(part) == _base(first)
        if not beside or part.stride() != first.stride() or part.storage_offset() != here:
            break
        here += part.shape[dim] * part.stride(dim)
    else:
        return first.as_strided(size, first.stride(), first.storage_offset())
    whole = torch.empty(size)
    for part in parts:
        _elementwise("COPY", part, part, whole.narrow(dim, at, part.shape[dim]))
        at += part.shape[dim]
    return whole


def _within(view: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The gradient of a view: zeros but there."""

    def rule(slope: Tensor, size: Sequence[int], *args: int) -> Tensor:
        whole, zero = torch.empty(size), torch.zeros(())
        _elementwise("COPY", zero, zero, whole)
        _elementwise("COPY", slope, slope, view(whole, *args))
        return whole

    return rule


def _threshold(slope: Tensor, x: Tensor, threshold: float) -> Tensor:
    if threshold:
        raise Unsupported
    return _pair("WHERE_POSITIVE")(slope, x)


RULES: dict[Any, Callable[..., Tensor]] = {
    aten.add.Tensor: _pair("ADD"),
    aten.sub.Tensor: _pair("SUBTRACT"),
    aten.mul.Tensor: _pair("MULTIPLY"),
    aten.div.Tensor: _pair("DIVIDE"),
    aten.neg.default: _alone("NEGATE"),
    aten.relu.default: _alone("RELU"),
    aten.clone.default: _alone("COPY"),
    aten._to_copy.default: _alone("COPY"),
    aten.threshold_backward.default: _threshold,
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _mean,
    aten.mul.Scalar: _pair("MULTIPLY"),
    aten.div.Scalar: _pair("DIVIDE"),
    aten.cat.default: _joined,
    aten.select_backward.default: _within(torch.select),
    aten.slice_backward.default: _within(aten.slice.Tensor),
    aten.add_.Tensor: lambda held, update: _elementwise("ADD", held, update, held),
    aten.addcmul_.default: lambda held, x, y: _elementwise("ADD_PRODUCT", x, y, held),
}

"""A client's whole local training as one call: the kernels of a recorded step, run again and again in C.

A recorded graph costs a few microseconds an operation, and passes all clients' weights through the caches at
every step. A program is made from the graphs of a single client, its step's and its end's, whose operations
are all kernels of `core.native`, views or constants. Its memory is laid out once, in a room; whoever holds a
room takes one client after the other, from the weights that were sent to the update, with the weights in the
cache and no Python in between. Several threads, each with a room of its own, share the clients of a block.
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
CLOSE = 1e-4  # relative difference of two steps from the graph's, which sums in another order
CHECKED = ("cross_entropy_forward", "embedding_forward")  # kernels that return how much is wrong
LINE = 64  # bytes at whose multiples things lie in a room
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

    counts: of the calls that a client begins with, of those in a step, and of those that it ends with. An
    argument may lie in a slot: the leaves that a client begins with, by path; x, y, index and mask; values of
    `fixed`; what is `made`, with its shape; and last the room. moves: bytes by which each slot grows with a
    step. fixed: nodes that no step changes, and whether they have a slot; torch computes them from the leaves
    `needed`, once where clients share these. results: what comes out: a number among `made`, a node of
    `fixed`, or a leaf's path. loss: where it lies in a room. rooms: one for each thread that there has been;
    they hold constants too.
    """

    calls: NDArray[np.int64]
    counts: NDArray[np.int64]
    paths: list[str]
    moves: NDArray[np.int64]
    needed: dict[Node, str]
    fixed: list[tuple[Node, bool]]
    made: list[torch.Size]
    results: list[Node | str | int]
    loss: int
    rooms: list[Tensor]

    def train(
        self,
        leaves: Mapping[str, Tensor],
        shared: Collection[str],
        data: tuple[Tensor, Tensor],
        index: Tensor,
        mask: Tensor,
        steps: Sequence[int],
        threads: int = 1,
    ) -> tuple[list[Tensor], Tensor]:
        """All steps of all clients; as many threads as are wanted take clients from each other.

        leaves: what clients begin with, stacked or shared. data: x [rows, ...], y [rows, ...]; index (int64)
        and mask (float32) [clients, most steps, rows of a batch]; steps: of each client. Returns what the
        end's graph returned, stacked, and the mean loss of each step, [clients, most steps]; with any number
        of threads the same bits. Raises IndexError for a target that is no class.
        """
        clients, most = index.shape[:2]
        losses, said = torch.zeros(clients, most), torch.empty(clients, dtype=torch.int64)
        values = self._fixed(leaves, shared, clients)
        made = [torch.empty(clients, *shape[1:]) for shape in self.made]
        held, by_client = [], []
        for each, one in (
            *((leaves[path], path in shared) for path in self.paths),
            *((each, True) for each in data),
            *((each, False) for each in (index, mask)),
            *((values[node], len(values[node]) == 1) for node, placed in self.fixed if placed),
            *((each, False) for each in made),
        ):
            if not one and each.stride(0) == 0:
                each, one = each[:1], True  # noqa: PLW2901  expanded: all of them begin with the same
            held.append(each.contiguous())
            by_client.append(0 if one else held[-1][0].nbytes)
        threads = min(threads, clients)
        while len(self.rooms) < threads:
            self.rooms.append(self.rooms[0].clone())
        addresses, grows, rooms = (
            torch.tensor(each)
            for each in (
                [each.data_ptr() for each in held],
                by_client,
                [room.data_ptr() for room in self.rooms],
            )
        )
        native.call(
            "run_clients", self.calls.ctypes.data, self.counts.ctypes.data, addresses, grows,
            self.moves.ctypes.data, len(held), rooms, threads, torch.tensor(steps), clients, most, self.loss,
            losses, said,
        )  # fmt: skip
        for wrong in said.tolist():
            if wrong:
                raise IndexError(f"{wrong} inputs or targets are not among the classes")
        return [
            made[each]
            if isinstance(each, int)
            else leaves[each]
            if isinstance(each, str)
            else values[each].flatten(0, 1).expand(clients, *values[each].shape[2:])
            for each in self.results
        ], losses

    def _fixed(
        self, leaves: Mapping[str, Tensor], shared: Collection[str], clients: int
    ) -> dict[Node, Tensor]:
        """The values of the nodes that no step changes: of each client, or of all where these share them."""
        every = any(path not in shared for path in self.needed.values())  # has each client its own?
        rows = []
        for client in range(clients if every else min(clients, 1)):
            made: dict[Node, Any] = {
                node: leaves[path] if path in shared else leaves[path][client : client + 1]
                for node, path in self.needed.items()
            }
            for node, _ in self.fixed:
                args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), made.__getitem__)
                made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            rows.append(made)
        return {node: torch.stack([made[node] for made in rows]) for node, _ in self.fixed}


def program(
    step: GraphModule,
    end: GraphModule,
    state: Mapping[str, Tensor],
    told: Mapping[str, Tensor],
    batch: Sequence[Tensor],
    moving: Sequence[str],
    loss: str,
) -> Program | None:
    """The program of the graphs of one client; None where they hold something that cannot be in one.

    state, batch (x, y, mask, seed): what `step` takes, with a first dimension of one client; moving: the
    leaves that it returns. told, and then the state: what `end` takes. Two steps of the program and its end,
    from any state, are compared with the graphs'.
    """
    try:
        made = _translated(step, end, state, told, batch, moving, loss)
    except (Unsupported, RuntimeError, TypeError, ValueError) as error:
        log.debug("no program: %s", error)
        return None
    x, y, mask, _ = batch
    draw = torch.Generator().manual_seed(0)
    anything = {  # not that of now: whether there is a program must not depend on when it is asked for
        path: torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype) / 20
        if leaf.is_floating_point()
        else leaf.clone()
        for path, leaf in {**state, **told}.items()
    }
    index = torch.arange(x.shape[1]).expand(1, 2, -1)
    shared = set(anything) - set(moving)
    ours, losses = made.train(anything, shared, (x[0], y[0]), index, mask.expand(1, 2, -1), [2])
    now = {path: anything[path].clone() for path in state}
    for _ in range(2):
        now |= zip(moving, step.forward(*(leaf.clone() for leaf in now.values()), *batch), strict=True)
    its = end.forward(*(anything[path] for path in told), *now.values())
    pairs = [*zip(ours, its, strict=True), (losses[:, 1], now[loss])]
    gaps = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs if b.is_floating_point()]
    if not all(gap < CLOSE for gap in gaps):
        log.debug("no program: two steps of it differ by %s from the graphs'", gaps)
        return None
    return made


class _Recording:
    """What graphs do with stand-ins, as calls of kernels.

    values: of nodes so far. still: nodes that no step changes, and the path of a leaf among them; fixed: the
    others of them, and the value of one that has memory of its own. constant: nodes of one value for ever.
    empties: memory that a call writes before one reads it.
    """

    def __init__(self) -> None:
        self.calls: list[Said] = []
        self.values: dict[Node, Any] = {}
        self.still: dict[Node, str] = {}
        self.fixed: dict[Node, Tensor | None] = {}
        self.constant: set[Node] = set()
        self.empties: dict[int, Tensor] = {}

    def of(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Record what a function calls."""
        with native.listening(self._hear):
            return function(*args, **kwargs)

    def graph(self, graph: GraphModule, takes: Mapping[str, Any], still: Collection[str]) -> Sequence[Any]:
        """Record a graph that takes these by name; return the nodes that it returns."""
        nodes = list(graph.graph.nodes)
        placed = (node for node in nodes if node.op == "placeholder")
        for node, (name, value) in zip(placed, takes.items(), strict=True):
            self.values[node] = value
            if name in still:
                self.still[node] = name
        with _Empties(self.empties):
            for node in nodes:
                if node.op == "call_function":
                    self.values[node] = self._evaluated(node)
                elif node.op == "get_attr":
                    self.values[node] = getattr(graph, str(node.target))
                    self.constant.add(node)
        (output,) = (node for node in nodes if node.op == "output")
        returned: Any = output.args[0]
        return returned  # type: ignore[no-any-return]

    def _hear(self, name: str, args: tuple[Tensor | int | None, ...]) -> None:
        if "_scratch" not in name:
            self.calls.append((name, args))

    def _evaluated(self, node: Node) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        inputs = node.all_input_nodes
        if all(each in self.constant for each in inputs) and not (writes(node) or draws(node)):
            self.constant.add(node)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.target in RULES and not all(each in self.still for each in inputs):
            return self.of(RULES[node.target], *args, **kwargs)
        if node.target in ops.KERNELS:
            strided = ops.KERNELS[node.target]
            return self.of(node.target, *(self.of(_dense, each, strided) for each in args))
        if writes(node) or draws(node):
            raise Unsupported(str(node.target))
        view = node.target is operator.getitem or node.target is aten._unsafe_view.default or is_view(node)
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        if inputs and all(each in self.still for each in inputs):
            self.still[node] = ""
            made = made if view else made.clone()
            self.fixed[node] = None if view else made
        elif not (view or node.target in CONSTANT):
            raise Unsupported(str(node.target))
        return made


def _translated(
    step: GraphModule,
    end: GraphModule,
    state: Mapping[str, Tensor],
    told: Mapping[str, Tensor],
    batch: Sequence[Tensor],
    moving: Sequence[str],
    loss: str,
) -> Program:
    # stand-ins: what the slots point to is known at a run only. All zeros, so that nothing can be left over.
    given = {path: torch.zeros(leaf.shape, dtype=leaf.dtype) for path, leaf in {**told, **state}.items()}
    x, y, mask, seed = (torch.zeros_like(part) for part in batch)
    rows_of_x, rows_of_y, index = x[0].clone(), y[0].clone(), torch.zeros(x.shape[1], dtype=torch.int64)
    if not native.fits(*(given[path] for path in moving), mask):
        raise Unsupported("a type that kernels do not know")
    here = {path: leaf.clone() if path in moving else leaf for path, leaf in given.items()}
    state, told = ({path: here[path] for path in each} for each in (state, told))
    own = {_base(leaf) for leaf in here.values()}
    record, still = _Recording(), set(given) - set(moving)

    for path in moving:
        record.of(_elementwise, "COPY", given[path], given[path], here[path])
    counts = [len(record.calls)]
    for rows, batch_of in ((rows_of_x, x), (rows_of_y, y)):
        record.of(native.call, "gather", rows, index, batch_of, x.shape[1], rows[0].nbytes)
    takes = {**state, "x": x, "y": y, "mask": mask, "seed": seed}
    for path, node in zip(moving, record.graph(step, takes, still), strict=True):
        made = record.values[node]
        if made.data_ptr() == here[path].data_ptr():
            continue
        if _base(made) in own:
            raise Unsupported("a leaf that becomes another")
        record.of(_elementwise, "COPY", made, made, here[path])
    counts.append(len(record.calls) - sum(counts))

    results, outs = list[Node | str | int](), list[Tensor]()
    for node in record.graph(end, {**told, **state}, still):
        if node in record.still:
            results.append(record.still[node] or node)
            continue
        made = record.values[node]
        fresh = node.target in RULES and _base(made) not in own | set(map(_base, outs))
        if not (fresh and made.is_contiguous()):  # else it is made where it is wanted
            made = record.of(_elementwise, "COPY", made, made, torch.empty(made.shape))
        results.append(len(outs))
        outs.append(made)
    counts.append(len(record.calls) - sum(counts))

    placed = [value for value in record.fixed.values() if value is not None]
    slots = [*given.values(), rows_of_x, rows_of_y, index, mask, *placed, *outs]
    encoded, room, places = _encoded(record.calls, slots, record.empties)
    return Program(
        encoded,
        np.array(counts, dtype=np.int64),
        list(given),
        np.array([each.nbytes if each is index or each is mask else 0 for each in slots], dtype=np.int64),
        {
            each: path
            for node in record.fixed
            for each in node.all_input_nodes
            if (path := record.still[each])
        },
        [(node, value is not None) for node, value in record.fixed.items()],
        [out.shape for out in outs],
        results,
        places[_base(here[loss])],
        [room],
    )


def _base(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Empties(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is made empty, by its memory; held, so that nothing else comes to lie there."""

    def __init__(self, made: dict[int, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty):
            self.made[_base(made)] = made
        return made


def _packed(spans: Mapping[int, tuple[int, int, int]], floor: int) -> dict[int, int]:
    """Where things lie that are not all needed at the same time, so that they stay in a near cache.

    spans: size, first and last call of each. floor: where the first of them may lie.
    """
    placed: list[tuple[int, int, int, int]] = []  # start and end in the memory, first and last call
    places: dict[int, int] = {}
    for base, (size, first, last) in sorted(spans.items(), key=lambda span: -span[1][0]):
        start = floor
        for low, high, begin, end in sorted(placed):
            if begin <= last and first <= end and low < start + size:
                start = max(start, high)
        places[base] = start
        placed.append((start, start + size, first, last))
    return places


def _encoded(
    calls: Sequence[Said], slots: Sequence[Tensor], empties: Collection[int]
) -> tuple[NDArray[np.int64], Tensor, dict[int, int]]:
    """The calls for run.c; a room for all that is in no slot, with its constants; where each lies in it.

    empties: memory that is written before it is read, and may be used for one thing after another.
    """
    where = {_base(each): number for number, each in enumerate(slots)}
    held, spans = dict[int, Any](), dict[int, tuple[int, int, int]]()
    for number, (_, args) in enumerate(calls):
        for each in args:
            if isinstance(each, Tensor) and each.numel() and (base := _base(each)) not in where:
                held[base] = storage = each.untyped_storage()
                _, first, _ = spans.get(base, (0, number, 0))
                spans[base] = -(-storage.nbytes() // LINE) * LINE, first, number
    places, end = dict[int, int](), 0
    for base, (size, _, _) in spans.items():
        if base not in empties:
            places[base], end = end, end + size
    reused = _packed({base: span for base, span in spans.items() if base in empties}, end)
    room = torch.zeros(max([end, *(at + spans[base][0] for base, at in reused.items())]), dtype=torch.uint8)
    for base, place in places.items():
        held_bytes = torch.empty(0, dtype=torch.uint8).set_(held[base])
        room[place : place + len(held_bytes)] = held_bytes
    places |= reused
    made = np.zeros((len(calls), 2 + 2 * MOST), dtype=np.int64)
    made[:, 2 : 2 + MOST] = -1
    for row, (name, args) in zip(made, calls, strict=True):
        row[:2] = native.address(name), name in CHECKED
        for place, arg in enumerate(args, 2):
            if isinstance(arg, Tensor) and arg.numel():
                base = _base(arg)
                row[place] = where.get(base, len(slots))
                row[place + MOST] = arg.data_ptr() - base + places.get(base, 0)
            elif isinstance(arg, int):
                row[place + MOST] = arg
    return made, room, places


def _elementwise(what: str, x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """A kernel's work on x and y, broadcast to out."""
    if not (native.fits(x, y, out) and out.dim() < 8):
        raise Unsupported
    given = [each.view(1) if each.dim() == 0 else each for each in (x, y, out)]
    if all(each.shape == out.shape and each.is_contiguous() for each in given):
        given = [each.view(-1) for each in given]
    x, y, whole = given
    strides = [each.expand(whole.shape).stride() for each in (whole, x, y)]
    layout = torch.tensor([whole.dim(), *whole.shape, *(step for each in strides for step in each)])
    native.call("elementwise", WHAT[what], whole, x, y, layout, gaps=True)
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

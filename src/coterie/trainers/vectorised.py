"""The vectorised trainer: a block of clients trains as one batched computation.

A step of one client, as its algorithm's ClientWork and optimiser define it, is batched by
`torch.func.vmap` over stacked parameters, with the layers of `trainers.layers`, and recorded once as a
graph of plain tensor operations (`make_fx`), which then runs step after step, round after round.

Unequal clients share a block. Rows that a batch lacks are padded and masked; a client that has taken its
last step leaves the block. What is the same for all clients (a proximal anchor, the server's control
variate, frozen parameters) is held once.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import mul
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.func import vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from coterie.core import native, trees
from coterie.core.errors import RunError
from coterie.core.seeds import STILL, Key, derive, seeded
from coterie.core.types import Algorithm, Params, Replies, Reply, Task, Tree
from coterie.data import ClientData, Held
from coterie.data.types import Rows
from coterie.trainers.graphs import in_place, tidy
from coterie.trainers.layers import DRAWS, Layers
from coterie.trainers.loop import ABSENT, GOLDEN, Loop, count_of, rows_of, step_seed, task_key, weight_of
from coterie.trainers.problem import Problem
from coterie.trainers.programs import Program, program

log = logging.getLogger("coterie")
Laid = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # what `_laid_out` returns
Shape = tuple[int, int]  # of a step: how many clients are computed, and how many rows in a batch
SMALL = 100_000  # bytes of parameters below which an operation costs less than starting it
LARGE = 1_000_000  # bytes of parameters from which padding costs more than a step without a graph
PADDED = 32  # such a model pads a row in so many at most
RECORD_FROM = 3  # steps of one shape in a block that are worth a graph
NARROW_FROM = 8  # steps of fewer clients that are worth a graph of their own
AGREES = 1e-3  # relative difference of a gradient from the loop's
GATHERED = 8_000_000  # bytes of batches that are put together at once


@dataclass
class Stepper:
    """The step of one algorithm over its flat state: params, the optimiser's slots and carry, by path.

    shared: leaves without a dimension for the clients; moving: leaves that a step replaces. fresh: leaves
    that the first step adds, as zeros of one client. graphs: what runs a step, by the shapes of a batch;
    programs: all steps of a client, likewise; ends: what finishes a block; forms: of what that makes. None:
    not possible, or not worth it yet.
    """

    step: Callable[..., Tree]
    slope: Callable[[Layers], Callable[..., Tree]]  # layers -> what gives a step's gradient, and the carry
    spec: TreeSpec
    paths: list[str]
    shared: set[str]
    moving: list[str]
    fresh: dict[str, Tensor]
    graphs: dict[Any, Callable[..., Sequence[Tensor]]] = field(default_factory=dict)
    programs: dict[Any, Program | None] = field(default_factory=dict)
    ends: dict[Any, Any] = field(default_factory=dict)
    forms: dict[Any, list[TreeSpec]] = field(default_factory=dict)

    @property
    def dims(self) -> list[int | None]:
        """Where each leaf of the state has its dimension for the clients, for vmap."""
        return [None if path in self.shared else 0 for path in self.paths]


class Ending(NamedTuple):
    """What finishes the clients of a block."""

    run: Callable[..., list[Tensor]]  # what they are told, then their state -> updates and memories, flat
    told: dict[str, Tensor]  # how many steps each took, and the leaves of what was sent
    shared: frozenset[str]  # those of them that are without a dimension for the clients
    key: Any
    form: list[TreeSpec]  # of what `run` has made

    def made(self, flat: Sequence[Tensor]) -> tuple[Tree, Tree]:
        """Updates and memories, or None."""
        ups, *after = tree_unflatten(list(flat), self.form[0])
        return ups, after[0] if after else None


class Vectorised:
    """fit_block(): many clients at once, to the same updates as the loop within rounding.

    block: how many clients in one. compile: let torch.compile fuse each graph. precision: "bfloat16"
    multiplies in that type and keeps parameters, sums and losses in float32.
    """

    name = "vectorised"

    def __init__(
        self,
        problem: Problem,
        seed: int | Key,
        *,
        block: Literal["auto"] | int = "auto",
        compile: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        self.problem, self.seed = problem, seed
        nbytes = max(trees.nbytes(problem.model()["params"]), 1)
        self.few = nbytes < LARGE  # few shapes of steps, at the price of padding
        self.width = _width(nbytes) if block == "auto" else max(block, 2)
        self.least = problem.least_rows  # that a client in a block has
        self.compile, self.precision = compile, precision
        self.layers = Layers(torch.bfloat16 if precision == "bfloat16" else None)
        self.steppers: dict[Any, Stepper] = {}
        self.compile_seconds = 0.0
        self.rows = [0, 0]  # computed, asked for: what padding wastes
        self.paths: dict[str, str] = {}  # layer -> what batches it, once `obstacle` has looked

    def obstacle(self, algorithm: Algorithm, datas: Sequence[ClientData | Held]) -> tuple[str, str] | None:
        """Why this model cannot be vectorised, and what to do; None when it can. datas: of two clients.

        Takes a step with both, and compares it with the step that each would take alone.
        """
        down, config = algorithm.broadcast(algorithm.init(self.problem.model())), algorithm.local(0)
        tasks = [Task(row, str(row), 0, 0, down, config=config) for row in range(2)]
        keys = [task_key(self.seed, task) for task in tasks]
        drawn = [
            [rows[:16] for rows in self._drawn(task, key, data)[:1]]
            for task, key, data in zip(tasks, keys, datas, strict=True)
        ]
        if len(drawn[1][0]) > max(2, self.problem.least_rows):
            drawn[1] = [drawn[1][0][:-1]]  # so that a row is padded: it must not matter to the others
        try:
            with (
                torch.no_grad(),
                seeded(keys[0]),
                _watched(self.problem.training, self.layers) as (at, paths),
            ):
                stepper, state = self._begin(algorithm, tasks, [None, None], datas[0])
                state, _ = self._descend(stepper, state, _laid_out(datas, drawn), keys, check=True)
                self._finish(stepper, self._ending(algorithm, stepper, tasks, [1, 1]), state)
        except RunError as error:
            return error.args[0], "its rows or clients depend on each other"
        except Exception as error:
            where = f" in {at[-1]}" if at else ""
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if ".item()" in said or "control flow" in said:
                said = "data-dependent control flow or .item()"
            return f"vmap cannot batch it{where}: {said}", _hint(self.problem.training)
        self.paths = paths
        return None

    def told(self) -> str:
        """How it works, in a line."""
        own = sorted({path for path in self.paths.values() if path != "vmap"})
        how = f"{', '.join(own)} batched by hand, the rest by vmap" if own else "by vmap"
        kernels = "kernels in C" if native.library() else "no kernels in C (no compiler)"
        return f"blocks of up to {self.width} clients; {how}; {kernels}"

    def fit(
        self, algorithm: Algorithm, task: Task, memory: Tree, data: ClientData | Held
    ) -> tuple[Reply, Tree]:
        """Train one client, as a block of its own."""
        if count_of(data) < self.least:
            return Loop(self.problem, self.seed).fit(algorithm, task, memory, data)
        ((block, after),) = self.fit_block(algorithm, [task], [memory], [data])
        metrics = {name: values[0] for name, values in block.metrics.items()}
        reply = Reply(task, _row(block.ups, 0), block.weights[0], metrics, block.samples[0])
        return reply, None if after is None else _row(after, 0)

    def fit_block(
        self,
        algorithm: Algorithm,
        tasks: Sequence[Task],
        memories: Sequence[Tree],
        datas: Sequence[ClientData | Held],
    ) -> list[tuple[Replies, Tree]]:
        """Train a block; tasks of one config. Returns stacked replies and stacked memories, or None.

        A block that does not fit the memory is halved, and its halves trained one after the other.
        """
        if len(tasks) <= self.width:
            try:
                return [self._fit(algorithm, tasks, memories, datas)]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if len(tasks) <= 2 or not _out_of_memory(error):  # one client takes the room of two
                    raise
            self.width = max(2, len(tasks) // 2)
            log.warning("out of memory with %d clients in a block: from now on %d", len(tasks), self.width)
        parts = [slice(start, start + self.width) for start in range(0, len(tasks), self.width)]
        return [
            made
            for part in parts
            for made in self.fit_block(algorithm, tasks[part], memories[part], datas[part])
        ]

    def _fit(
        self,
        algorithm: Algorithm,
        tasks: Sequence[Task],
        memories: Sequence[Tree],
        datas: Sequence[ClientData | Held],
    ) -> tuple[Replies, Tree]:
        if any(count_of(data) < self.least for data in datas):
            raise ValueError(f"a client of this block has fewer than {self.least} rows")
        keys = [task_key(self.seed, task) for task in tasks]
        drawn = [self._drawn(task, key, data) for task, key, data in zip(tasks, keys, datas, strict=True)]
        order = sorted(range(len(tasks)), key=lambda i: -len(drawn[i]))
        tasks, memories, datas = (
            [tasks[i] for i in order],
            [memories[i] for i in order],
            [datas[i] for i in order],
        )
        keys, drawn = [keys[i] for i in order], [drawn[i] for i in order]
        stepper, state = self._begin(algorithm, tasks, memories, datas[0])
        laid = _laid_out(datas, drawn)
        ending = self._ending(algorithm, stepper, tasks, [len(rows) for rows in drawn])
        with torch.no_grad(), seeded(derive(keys[0], "torch")):
            made = self._by_program(stepper, state, laid, ending, tasks[0].config.get("batch_size"))
            if made is None and len(tasks) > 1:
                state, losses = self._descend(stepper, state, laid, keys)
                made = *self._finish(stepper, ending, state), losses
        if made is None:  # a graph's bits are others for a block of one than for a block of two
            both, after = self._fit(algorithm, tasks * 2, memories * 2, datas * 2)
            metrics = {name: values[:1] for name, values in both.metrics.items()}
            first = Replies(tasks, _first(both.ups), both.weights[:1], metrics, both.samples[:1])
            return first, None if after is None else _first(after)
        ups, after, losses = made
        samples = [sum(map(len, rows)) for rows in drawn]
        replies = Replies(
            tasks,
            ups,
            [weight_of(task, data) for task, data in zip(tasks, datas, strict=True)],
            {"loss": [loss / seen for loss, seen in zip(losses.tolist(), samples, strict=True)]},
            samples,
        )
        return replies, after

    def _drawn(self, task: Task, key: Key, data: ClientData | Held) -> list[Rows]:
        count, least = count_of(data), self.problem.least_rows
        return list(rows_of(count, task.config, derive(key, "batches"), least=least))

    def _begin(
        self, algorithm: Algorithm, tasks: Sequence[Task], memories: Sequence[Tree], data: ClientData | Held
    ) -> tuple[Stepper, dict[str, Tensor]]:
        """The algorithm's step, and the state that it starts from, which may be the same memory for all."""
        work, config, down = algorithm.client_work, tasks[0].config, tasks[0].down
        if work.remember is not None:
            memories = [
                work.remember(task.down) if memory is None else memory
                for task, memory in zip(tasks, memories, strict=True)
            ]
        same_down = all(task.down is down for task in tasks)
        same_memory = all(memory is memories[0] for memory in memories)

        def start(down: Tree, memory: Tree, client: Tensor) -> Tree:
            del client  # so that there is something to batch over
            params, carry = work.start(down, memory, config)
            return params, work.optimizer(carry).init(params), carry

        downs = down if same_down else _stacked([task.down for task in tasks])
        kept = memories[0] if same_memory else _stacked(memories)
        dims = (None if same_down else 0, None if same_memory else 0, 0)
        leaves, batched, spec = _batch(start, dims, downs, kept, torch.arange(len(tasks)))
        key = (algorithm.client_work, str(spec), frozenset(batched))
        if key not in self.steppers:
            self.steppers[key] = self._stepper(algorithm, leaves, batched, spec, data)
        stepper, clients, state = self.steppers[key], len(tasks), {}
        for path in stepper.paths:
            leaf = leaves[path] if path in leaves else stepper.fresh[path]
            as_it_is = path in batched or path in stepper.shared
            state[path] = leaf if as_it_is else leaf.expand(clients, *leaf.shape)
        return stepper, state

    def _stepper(
        self,
        algorithm: Algorithm,
        leaves: Mapping[str, Tensor],
        batched: Collection[str],
        spec: TreeSpec,
        data: ClientData | Held,
    ) -> Stepper:
        """Take a step with two clients, to see which leaves it replaces, and which it adds to the carry."""
        x, y = (part[: max(2, self.problem.least_rows)] for part in data.train)
        batch = (
            torch.stack([x, x]),
            torch.stack([y, y]),
            torch.ones(2, len(y)),
            torch.zeros(2, dtype=torch.int64),
        )
        (step, slope), paths = self._step(algorithm), list(leaves)
        moving: list[str] = []

        def watched(*args: Any) -> Tree:
            made = step(tree_unflatten(list(args[:-4]), spec), *args[-4:])
            before = dict(zip(paths, args, strict=False))
            moving[:] = [path for path, leaf in _flat(made)[0].items() if leaf is not before.get(path)]
            return made

        own = ("[0]", "[2]['buffers']")  # modules write into buffers, which must then be each client's own
        dims = [0 if path in batched or path.startswith(own) else None for path in paths] + [0] * 4
        two = [
            leaf[:2] if path in batched else leaf.expand(2, *leaf.shape) if dim == 0 else leaf
            for (path, leaf), dim in zip(leaves.items(), dims, strict=False)
        ]
        with torch.no_grad():
            made, after = _flat(vmap(watched, in_dims=tuple(dims), randomness="different")(*two, *batch))
        shared = {path for path in made if path not in moving and path not in batched}
        fresh = {path: torch.zeros_like(leaf[0]) for path, leaf in made.items() if path not in leaves}
        return Stepper(step, slope, after, list(made), shared, list(moving), fresh)

    def _step(
        self, algorithm: Algorithm
    ) -> tuple[Callable[..., Tree], Callable[[Layers], Callable[..., Tree]]]:
        """One local step of one client, as the loop takes it; and its gradient alone, with given layers."""
        work, problem = algorithm.client_work, self.problem

        def objective(params: Params, batch: tuple[Tensor, Tensor], carry: Tree) -> tuple[Tensor, Tree]:
            return work.objective(problem.loss, params, batch, carry)

        def slope(layers: Layers, *, still: bool = True) -> Callable[..., Tree]:
            def gradient(state: Tree, x: Tensor, y: Tensor, mask: Tensor, seed: Tensor) -> Tree:
                params, _, carry = state
                layers.mask, layers.seed = mask, seed
                with layers:
                    return work.gradient(objective, params, (x, y), mask, carry, STILL if still else seed)

            return gradient

        batched = slope(self.layers, still=False)

        def step(state: Tree, *batch: Tensor) -> Tree:
            grads, carry = batched(state, *batch)
            params, slots, _ = state
            updates, slots = work.optimizer(carry).update(grads, slots, params)
            return trees.add(params, updates), slots, carry

        return step, slope

    def _descend(
        self,
        stepper: Stepper,
        state: Mapping[str, Tensor],
        laid: Laid,
        keys: Sequence[Key],
        *,
        check: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """All local steps of a block, the busiest clients first. Returns the state and the summed losses.

        check: compare each step's gradient with plain torch.
        """
        x, y, index, mask, lengths = laid
        state = {  # what a step changes in place
            path: leaf if path in stepper.shared else leaf.clone(memory_format=torch.contiguous_format)
            for path, leaf in state.items()
        }
        begun, clients = state, len(keys)
        seeds = torch.stack([step_seed(key, 0) for key in keys])
        losses, seen = torch.zeros(clients, dtype=torch.float64), lengths.double()
        working = (lengths > 0).sum(1).tolist()  # clients, in each step
        shapes = _shapes(working, lengths.amax(1).tolist(), few=self.few, narrow=not self.compile)
        worth = _recorded(shapes, few=self.few, narrow=not self.compile)
        done: list[dict[str, Tensor]] = []
        left = held = clients  # who has steps to take, and who is computed
        for first, last, (width, size) in _stretches(shapes, x[0].nbytes + y[0].nbytes):
            rows = index[first:last, :width, :size].reshape(-1)
            inputs, targets = (
                part.index_select(0, rows).view(-1, width, size, *part.shape[1:]) for part in (x, y)
            )
            later = torch.tensor([number * GOLDEN % 2**63 for number in range(first, last)])
            masks = mask[first:last, :width, :size].contiguous()
            batches = zip(inputs, targets, masks, later[:, None] + seeds[:width], strict=True)
            means = []
            for number, batch in enumerate(batches, first):
                active = working[number]
                if active < left:  # some have taken their last step
                    done.append({path: state[path][active:left].clone() for path in stepper.moving})
                    left = active
                if width < held:
                    shared = stepper.shared
                    state = {path: leaf if path in shared else leaf[:width] for path, leaf in state.items()}
                    held = width
                if number == first:
                    take = self._runner(stepper, state, batch, recorded=(width, size) in worth)
                made = take(*state.values(), *batch)
                if check:
                    self._compare(stepper, state, batch)
                state |= zip(stepper.moving, made, strict=True)
                means.append(state[LOSS])
            taken = seen[first:last, :width]
            losses[:width] += torch.where(taken > 0, torch.stack(means) * taken, 0).sum(0)
        self.rows[0] += sum(width * size for width, size in shapes)
        self.rows[1] += int(lengths.sum())
        for path in stepper.moving if done else ():
            state[path] = torch.cat([state[path][:left], *(part[path] for part in reversed(done))])
        return {**begun, **{path: state[path] for path in stepper.moving}}, losses

    def _by_program(
        self, stepper: Stepper, state: Mapping[str, Tensor], laid: Laid, ending: Ending, full: int | None
    ) -> tuple[Tree, Tree, Tensor] | None:
        """Stacked updates, memories and summed losses of a block whose clients a program trains; else None.

        full: rows of a full batch.
        """
        x, y, index, mask, lengths = laid
        if index.shape[2] != full or len(index) < RECORD_FROM:
            return None
        found = self._program(stepper, state, ending, x, y, full)
        if found is None:
            return None
        steps = (lengths > 0).sum(0).tolist()
        leaves, shared = {**ending.told, **state}, stepper.shared | ending.shared
        flat, losses = found.train(
            leaves,
            shared,
            (x, y),
            index.transpose(0, 1),
            mask.transpose(0, 1),
            steps,
            native.threads(),
        )
        self.rows[0] += sum(steps) * full
        self.rows[1] += int(lengths.sum())
        return *ending.made(flat), (losses.double() * lengths.T).sum(1)

    def _program(
        self, stepper: Stepper, state: Mapping[str, Tensor], ending: Ending, x: Tensor, y: Tensor, size: int
    ) -> Program | None:
        """What trains a client by itself, where all of its steps and its end is in kernels."""
        key = (ending.key, size, x.shape[1:], x.dtype, y.shape[1:], y.dtype)
        if key not in stepper.programs:
            stepper.programs[key] = None
            if not self.compile and native.library() is not None:
                one = {path: leaf if path in stepper.shared else leaf[:1] for path, leaf in state.items()}
                told = {
                    path: leaf if path in ending.shared else leaf[:1] for path, leaf in ending.told.items()
                }
                rows = torch.arange(size) % len(x)
                batch = (
                    x[rows].unsqueeze(0),
                    y[rows].unsqueeze(0),
                    torch.ones(1, size),
                    torch.zeros(1).long(),
                )
                step = in_place(self._graph(stepper, one, batch), _params(one))
                end = tidy(make_fx(ending.run)(*told.values(), *one.values()))
                stepper.programs[key] = program(step, end, one, told, batch, stepper.moving, LOSS)
        return stepper.programs[key]

    def _runner(
        self, stepper: Stepper, state: Mapping[str, Tensor], batch: tuple[Tensor, ...], *, recorded: bool
    ) -> Callable[..., Sequence[Tensor]]:
        """What takes a step of this shape: a recorded graph, or vmap itself where that is not worth it."""
        if not recorded:
            return self._batched(stepper)
        shape = tuple((part.shape, part.dtype) for part in batch)
        if shape not in stepper.graphs:
            graph = self._graph(stepper, state, batch)
            stepper.graphs[shape] = in_place(graph, _params(state)).forward
            if self.compile:
                stepper.graphs[shape] = compiled = torch.compile(graph)
                start = time.perf_counter()
                compiled(*(arg.clone() for arg in (*state.values(), *batch)))  # it compiles at its first call
                self.compile_seconds += time.perf_counter() - start
                log.info(
                    "compiled the step of %d clients in %.1f s so far", len(batch[2]), self.compile_seconds
                )
        return stepper.graphs[shape]

    def _batched(self, stepper: Stepper) -> Callable[..., Sequence[Tensor]]:
        """A step of several clients: their state's leaves and batches -> the leaves that it replaces."""

        def moved(*args: Tensor) -> list[Tensor]:
            made, _ = _flat(stepper.step(tree_unflatten(list(args[:-4]), stepper.spec), *args[-4:]))
            return [made[path] for path in stepper.moving]

        return vmap(moved, in_dims=(*stepper.dims, *[0] * 4), randomness="different")

    def _graph(self, stepper: Stepper, state: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> GraphModule:
        """The recorded step, once its gradient has been compared."""
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            graph = tidy(make_fx(self._batched(stepper))(*state.values(), *batch))
            self._compare(stepper, state, batch)
        return graph

    def _compare(self, stepper: Stepper, state: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> None:
        """Take the first and last client's gradient alone too, by plain torch and without padded rows.

        Raises RunError when the batched one differs.
        """
        dims = (*stepper.dims, *[0] * 4)

        def gradient(layers: Layers) -> Callable[..., Tree]:
            slope = stepper.slope(layers)
            return lambda *args: slope(tree_unflatten(list(args[:-4]), stepper.spec), *args[-4:])

        layers = self.layers if self.precision == "float32" else Layers()  # what bfloat16 rounds is no fault
        together = vmap(gradient(layers), in_dims=dims, randomness="different")(*state.values(), *batch)
        for row in (0, len(batch[2]) - 1):
            real = int(batch[2][row].sum())
            if not real:
                continue
            leaves = [leaf if path in stepper.shared else leaf[row] for path, leaf in state.items()]
            before = torch.random.get_rng_state()
            alone = gradient(Layers(table=DRAWS))(
                *leaves, *(part[row, :real] for part in batch[:3]), batch[3][row]
            )
            if not torch.equal(before, torch.random.get_rng_state()):
                return  # draws of the model's own: two runs differ anyway
            ours = trees.map_tree(lambda leaf, row=row: leaf[row], together)
            for what, (mine, its) in {
                "gradient": (ours[0], alone[0]),
                "buffers": (ours[1]["buffers"], alone[1]["buffers"]),
            }.items():
                gap = _gap(mine, its)
                if gap > AGREES:
                    raise RunError(
                        f"batched over clients, the model's {what} differs by {gap:.2g} from one alone",
                        'its rows or clients depend on each other: set backend.trainer = "loop"',
                    )

    def _ending(
        self, algorithm: Algorithm, stepper: Stepper, tasks: Sequence[Task], steps: Sequence[int]
    ) -> Ending:
        """What makes stacked updates and memories of the clients' state after their steps."""
        same = all(task.down is tasks[0].down for task in tasks)
        sent, spec = tree_flatten(tasks[0].down if same else _stacked([task.down for task in tasks]))
        told = {"steps": torch.tensor(steps), **{f"sent {number}": leaf for number, leaf in enumerate(sent)}}
        key = (same, spec)
        if key not in stepper.forms:
            stepper.forms[key] = []
        form = stepper.forms[key]

        def finish(steps: Tensor, *leaves: Tensor) -> list[Tensor]:
            params, _, carry = tree_unflatten(list(leaves[len(sent) :]), stepper.spec)
            down = tree_unflatten(list(leaves[: len(sent)]), spec)
            up, memory = algorithm.client_work.finish(params, down, carry, steps)
            flat, made = tree_flatten([up] if memory is None else [up, memory])
            form[:] = [made]
            return flat

        run = vmap(finish, in_dims=(0, *[None if same else 0] * len(sent), *stepper.dims))
        return Ending(run, told, frozenset(told) - {"steps"} if same else frozenset(), key, form)

    def _finish(self, stepper: Stepper, ending: Ending, state: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
        """Stacked updates and memories. A graph of it is recorded when the same is asked for again."""
        args = (*ending.told.values(), *state.values())
        key = (ending.key, *(arg.shape for arg in args))
        again = key in stepper.ends
        run = stepper.ends.get(key) or ending.run
        with torch.no_grad():
            if again and not stepper.ends[key]:
                run = make_fx(run)(*args).forward
            leaves = run(*args)
        stepper.ends[key] = run if again else None
        return ending.made(leaves)


LOSS = "[2]['loss']"


def _params(state: Mapping[str, Tensor]) -> list[int]:
    """The numbers of the leaves that are parameters."""
    return [number for number, path in enumerate(state) if path.startswith("[0]")]


def _flat(tree: Tree) -> tuple[dict[str, Any], TreeSpec]:
    """The leaves of (params, slots, carry) by path: "[0]['weight']", "[2]['loss']", ..."""
    leaves, spec = tree_flatten_with_path(tree)
    return {keystr(path): leaf for path, leaf in leaves}, spec


def _batch(
    function: Callable[..., Tree], dims: tuple[int | None, ...], *args: Tree
) -> tuple[dict[str, Tensor], frozenset[str], TreeSpec]:
    """vmap, but what depends on no batched argument keeps its shape; returns the paths of the others.

    The last argument is the clients' numbers, on which nothing depends.
    """
    if all(dim is None for dim in dims[:-1]):  # nothing of a client's own but its number
        leaves, spec = _flat(function(*args))
        return leaves, frozenset(), spec
    batched: set[str] = set()

    def watched(*args: Tree) -> Tree:
        made = function(*args)
        batched.clear()
        batched.update(path for path, leaf in _flat(made)[0].items() if is_batchedtensor(leaf))
        return made

    leaves, spec = _flat(vmap(watched, in_dims=dims)(*args))
    kept = {path: leaf if path in batched else leaf[0] for path, leaf in leaves.items()}
    return kept, frozenset(batched), spec


def _laid_out(datas: Sequence[ClientData | Held], drawn: Sequence[Sequence[Rows]]) -> Laid:
    """All clients' inputs and targets, and which rows of them are in each batch.

    Returns x [rows, ...], y [rows, ...], index and mask [steps, clients, rows in a batch], and how many rows
    each batch has, [steps, clients].
    """
    first = datas[0]
    if isinstance(first, Held) and all(isinstance(data, Held) and data.x is first.x for data in datas):
        x, y, owned = first.x, first.y, [data.rows.numpy() for data in datas if isinstance(data, Held)]
    else:
        trains = [data.train for data in datas]
        x, y = (torch.cat(parts) for parts in zip(*trains, strict=True))
        starts = np.cumsum([0, *(len(part[1]) for part in trains)])
        owned = [np.arange(start, end) for start, end in pairwise(starts)]
    lengths = np.zeros((len(drawn), max(map(len, drawn))), dtype=np.int64)
    for client, batches in enumerate(drawn):
        lengths[client, : len(batches)] = [len(rows) for rows in batches]
    real = np.arange(lengths.max()) < lengths[:, :, None]  # [clients, steps, rows in a batch]
    kept, index = real.copy(), np.empty(real.shape, dtype=np.int64)
    index[:] = np.array([rows[0] for rows in owned])[:, None, None]
    begins = np.cumsum([0, *map(len, owned[:-1])])  # of each client's rows, in those of all
    places = np.concatenate([rows for batches in drawn for rows in batches])
    kept[real] = places != ABSENT
    index[real] = np.concatenate(owned)[np.maximum(places, 0) + begins.repeat(lengths.sum(1))]
    if not real.all():  # the batch's own are padded with: 0 * NaN of others would be NaN
        index = np.where(real, index, index[:, :, :1])
    at, mask, taken = (torch.from_numpy(each).transpose(0, 1) for each in (index, kept, lengths))
    return x, y, at, mask.float(), taken


def _shapes(working: Sequence[int], sizes: Sequence[int], *, few: bool, narrow: bool) -> list[Shape]:
    """The shape of each step.

    working: clients that have a batch, falling; sizes: rows in the largest batch. A step of a shape without
    a graph costs as much as many rows, so steps are padded to the shapes of others. few: to full batches, and
    to powers of two of clients, where so many steps (and `narrow`) are worth a graph of their own; otherwise
    as far as it costs little.
    """
    full, widths = max(sizes), [max(active, 2) for active in working]
    width = widths[0]
    if few:
        rungs = [min(1 << (active - 1).bit_length(), width) for active in widths]
        often = Counter(rungs)
        kept = [rung for rung in sorted(often, reverse=True) if narrow and often[rung] >= NARROW_FROM]
        return [(min([width, *(each for each in kept if each >= rung)]), full) for rung in rungs]
    spare, shapes = sum(map(mul, widths, sizes)) // PADDED, list[Shape]()
    for least in zip(widths, sizes, strict=True):
        for shape in ((width, full), (least[0], full), least):
            waste = shape[0] * shape[1] - least[0] * least[1]
            if waste <= spare:
                break
        width, spare = shape[0], spare - waste
        shapes.append(shape)
    return shapes


def _recorded(shapes: Sequence[Shape], *, few: bool, narrow: bool) -> set[Shape]:
    """The shapes that are worth a graph: by the block alone, so that a resumed run has the same bits."""
    if few:
        return set(shapes) if len(shapes) >= RECORD_FROM else set()
    often = Counter(shapes)
    return {shape for shape in often if often[shape] >= RECORD_FROM and (narrow or shape == shapes[0])}


def _stretches(shapes: Sequence[Shape], nbytes: int) -> Iterator[tuple[int, int, Shape]]:
    """First step, last step + 1 and shape of steps whose batches are gathered at once. nbytes: of a row."""
    start = 0
    for shape, same in groupby(shapes):
        end = start + len(list(same))
        some = max(GATHERED // (shape[0] * shape[1] * nbytes), 1)
        for first in range(start, end, some):
            yield first, min(first + some, end), shape
        start = end


def _width(nbytes: int) -> int:
    # Ten, or as many as fit a few megabytes of cache; more where an operation costs less than starting it.
    return max(4, min(32 if nbytes < SMALL else 10, 10_000_000 // nbytes))


@contextmanager
def _watched(module: nn.Module, layers: Layers) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The layers that are being run now, outermost first, and what batched each of those that have run."""
    inside: list[str] = []
    paths: dict[str, str] = {}
    outer: list[set[str]] = []  # what batched those around, so far

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            inside.append(name)
            outer.append(set(layers.used))
            layers.used.clear()

        return hook

    def leave(name: str, *, leaf: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            inside.pop()
            if leaf or layers.used:
                paths.setdefault(name, ", ".join(sorted(layers.used)) or "vmap")  # then comes the reference
            layers.used = outer.pop()

        return hook

    handles = []
    for name, layer in module.named_modules():
        label, leaf = f"{name or 'model'} ({type(layer).__name__})", not any(True for _ in layer.children())
        handles += [
            layer.register_forward_pre_hook(enter(label)),
            layer.register_forward_hook(leave(label, leaf=leaf)),
        ]
    try:
        yield inside, paths
    finally:
        for handle in handles:
            handle.remove()


def _hint(module: nn.Module) -> str:
    """What to use instead of a layer that does not vectorise."""
    for layer in module.modules():
        if isinstance(layer, nn.LSTM | nn.GRU):
            kind = type(layer).__name__
            return f"coterie.models.{kind} is a drop-in replacement for nn.{kind} that can be batched"
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is None:
            return "give BatchNorm a momentum"
    return "branching on values and .item() cannot be batched; torch.where often can stand in"


def _gap(mine: Tree, its: Tree) -> float:
    """The largest difference of a leaf, relative to the norm of all; infinite where only one is finite."""
    pairs = [(a.double(), b.double()) for a, b in trees.rows(mine, its) if b.is_floating_point()]
    whole = sum(float(b.norm()) ** 2 for _, b in pairs) ** 0.5
    if not math.isfinite(whole):
        return 0.0 if not all(bool(a.isfinite().all()) for a, _ in pairs) else math.inf
    gap = max((float((a - b).norm()) for a, b in pairs), default=0.0)
    return gap / max(whole, 1e-12) if math.isfinite(gap) else math.inf


def _stacked(these: Sequence[Tree]) -> Tree:
    return trees.map_tree(lambda *leaves: torch.stack(leaves), *these)


def _row(tree: Tree, row: int) -> Tree:
    return trees.map_tree(lambda leaf: leaf[row].clone(), tree)


def _first(tree: Tree) -> Tree:
    return trees.map_tree(lambda leaf: leaf[:1], tree)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)

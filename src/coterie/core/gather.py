"""Gathering replies: the sub-plan that every schedule is made of, alone or below a relay.

`got = yield from gather(...)` sends tasks, folds what comes back in whatever order, and ends when all
have answered, enough have, or the deadline has passed. Nobody waits for the rest: they are cancelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from coterie.core import exact, trees
from coterie.core.errors import NonFinite
from coterie.core.types import (
    Action,
    Aggregator,
    Cancel,
    ClientId,
    Event,
    Lost,
    Plan,
    Replies,
    Reply,
    Task,
    Tick,
    Timer,
    Tree,
)

OnNan = Literal["stop", "drop"]
T = TypeVar("T")


class Fold(NamedTuple):
    """What has come in so far: a monoid again, so relays forward it unfinished. A Tree, so it travels."""

    acc: Tree  # the aggregator's accumulator
    metrics: dict[str, tuple[Fraction, Fraction]]  # name -> exact (sum of weight * value, sum of weights)
    replies: int
    samples: int  # seen in training
    bytes_up: int
    lost: tuple[str, ...]  # why each of those who are not here is lost


@dataclass
class Gathered:
    """A finished gathering: the fold, and which task of which client was accepted."""

    fold: Fold
    accepted: dict[ClientId, int] = field(default_factory=dict)

    def finish(self, aggregator: Aggregator) -> tuple[Tree, float, int]:
        """The aggregate, its weight and its count. What it is made of, several models large, is let go of."""
        acc, self.fold = self.fold.acc, self.fold._replace(acc=None)
        return aggregator.finish(acc)

    def metrics(self) -> dict[str, float]:
        """Weighted means of what the clients measured while training."""
        return {
            name: float(total / weight)
            for name, (total, weight) in sorted(self.fold.metrics.items())
            if weight
        }


def empty(aggregator: Aggregator) -> Fold:
    """The fold of nothing."""
    return Fold(aggregator.init(), {}, 0, 0, 0, ())


def take(fold: Fold, aggregator: Aggregator, reply: Reply, scale: float = 1.0) -> Fold:
    """Fold one reply in, its weight times `scale` (staleness). Raises NonFinite naming the client."""
    if reply.task.kind == "fold":  # a relay's; it may hold nothing, when all of its clients were lost
        return merge(fold, aggregator, Fold(*reply.up))
    weight, who = reply.weight * scale, _who(reply.task)
    if not (math.isfinite(weight) and weight >= 0):
        raise NonFinite(f"{who}: its weight is {weight}", "weights must be finite and >= 0")
    for name, value in reply.metrics.items():
        if not math.isfinite(value):
            raise NonFinite(f"{who}: {name} is {value}")
    try:
        # all of it, before any part of it is added; what alone exceeds the range of exact sums has diverged
        trees.check_finite(reply.up, below=exact.LIMIT / max(weight, 1.0))
    except NonFinite as error:
        raise NonFinite(f"{who}: {error.args[0]}") from None
    acc = aggregator.add(fold.acc, reply.up, weight)
    share = Fraction(weight)
    metrics = {name: (Fraction(value) * share, share) for name, value in reply.metrics.items()}
    return Fold(
        acc,
        _joined(fold.metrics, metrics),
        fold.replies + 1,
        fold.samples + reply.samples,
        fold.bytes_up + trees.nbytes(reply.up),
        fold.lost,
    )


def lose(fold: Fold, *reasons: str) -> Fold:
    """Count some as lost."""
    return fold._replace(lost=(*fold.lost, *reasons))


def accept(
    got: Gathered, aggregator: Aggregator, event: Reply | Lost, on_nan: OnNan, scale: float = 1.0
) -> str:
    """Fold what came back in, or count it as lost; return why it is lost, or "".

    Raises NonFinite when on_nan is "stop" and the update, its weight or a metric is not finite.
    """
    task = event.task
    if isinstance(event, Lost):
        reason = f"{task.client}: {event.reason}"
    else:
        try:
            got.fold = take(got.fold, aggregator, event, scale)
        except NonFinite as error:
            if on_nan == "stop":
                raise
            reason = error.args[0]
        else:
            got.accepted.update(event.answers if task.kind == "fold" else [(task.client, task.id)])
            return ""
    got.fold = lose(got.fold, reason)
    return reason


def accept_block(got: Gathered, aggregator: Aggregator, block: Replies, on_nan: OnNan) -> None:
    """As `accept` for each row of a block, at the cost of one addition."""
    why = [_refusal(block, row) for row in range(len(block.tasks))]
    limits = torch.tensor([exact.LIMIT / max(weight, 1.0) for weight in block.weights], dtype=torch.float64)
    fits = torch.ones(len(limits), dtype=torch.bool)
    for leaf in trees.leaves(block.ups):
        if leaf.is_floating_point() and leaf[0].numel():
            fits &= trees.largest(leaf) < limits  # False for NaN
    for row in (~fits).nonzero().flatten().tolist():
        why[row] = why[row] or _diverged(
            trees.map_tree(lambda leaf, row=row: leaf[row], block.ups), limits[row]
        )
    if any(why):
        reasons = [f"{_who(task)}: {said}" for task, said in zip(block.tasks, why, strict=True) if said]
        if on_nan == "stop":
            raise NonFinite(reasons[0])
        got.fold = lose(got.fold, *reasons)
        block = _rows(block, [row for row, said in enumerate(why) if not said])
    if not block.tasks:
        return
    weights, fold = block.weights, got.fold
    share = exact.dot(weights)
    sums = {name: (exact.dot(values, weights), share) for name, values in block.metrics.items()}
    got.fold = Fold(
        aggregator.add(fold.acc, block.ups, weights),
        _joined(fold.metrics, sums),
        fold.replies + len(block.tasks),
        fold.samples + sum(block.samples),
        fold.bytes_up + trees.nbytes(block.ups),
        fold.lost,
    )
    got.accepted.update((task.client, task.id) for task in block.tasks)


def _diverged(up: Tree, limit: Tensor) -> str:
    try:
        trees.check_finite(up, below=float(limit))
    except NonFinite as error:
        return str(error.args[0])
    return ""


def _refusal(block: Replies, row: int) -> str:
    weight = block.weights[row]
    if not (math.isfinite(weight) and weight >= 0):
        return f"its weight is {weight}"
    bad = (f"{n} is {values[row]}" for n, values in block.metrics.items() if not math.isfinite(values[row]))
    return next(bad, "")


def _rows(block: Replies, rows: list[int]) -> Replies:
    return Replies(
        [block.tasks[row] for row in rows],
        trees.map_tree(lambda leaf: leaf[rows], block.ups),
        [block.weights[row] for row in rows],
        {name: [values[row] for row in rows] for name, values in block.metrics.items()},
        [block.samples[row] for row in rows],
    )


def _who(task: Task) -> str:
    return f"client {task.client}, version {task.version}"


def merge(left: Fold, aggregator: Aggregator, right: Fold) -> Fold:
    """The fold of all that either holds."""
    return Fold(
        aggregator.merge(left.acc, right.acc),
        _joined(left.metrics, right.metrics),
        left.replies + right.replies,
        left.samples + right.samples,
        left.bytes_up + right.bytes_up,
        left.lost + right.lost,
    )


def gather(
    aggregator: Aggregator,
    tasks: Sequence[Task],
    *,
    timer: int = -1,
    enough: int | None = None,
    deadline: float | None = None,
    on_nan: OnNan = "stop",
) -> Plan[Gathered]:
    """Send the tasks and fold the replies.

    timer: an unused id of the plan's, for the deadline. enough: stop after that many replies (None: all).
    deadline: seconds after which the rest count as lost. on_nan: "drop" counts a client whose update or
    loss is not finite as lost; "stop" raises NonFinite.
    """
    waiting = {task.id: task for task in tasks}
    got = Gathered(empty(aggregator))
    actions: list[Action] = [*tasks]
    if deadline is not None:
        actions.append(Timer(timer, deadline))
    while waiting and (enough is None or len(got.accepted) < enough):
        event = yield actions
        actions = []
        if isinstance(event, Tick):
            if event.id == timer:
                late = [f"{task.client}: no reply after {deadline} s" for task in waiting.values()]
                got.fold = lose(got.fold, *late)
                break
            continue
        if waiting.pop(event.task.id, None) is None:
            continue
        accept(got, aggregator, event, on_nan)
        del event  # its tensors, while the next one is waited for
    rest = [Cancel(task) for task in waiting]
    if deadline is not None:
        rest.append(Cancel(timer))
    if rest:
        yield rest
    return got


def ask(tasks: Sequence[Task]) -> Plan[dict[ClientId, Reply]]:
    """One exchange with many: send the tasks and return every reply, by client. The lost are absent."""
    waiting = {task.id for task in tasks}
    replies: dict[ClientId, Reply] = {}
    actions: Sequence[Action] = tasks
    while waiting:
        event = yield actions
        actions = []
        if isinstance(event, Reply | Lost) and event.task.id in waiting:
            waiting.remove(event.task.id)
            if isinstance(event, Reply):
                replies[event.task.client] = event
    return replies


def fold_request(
    id: int,
    relay: ClientId,
    tasks: Sequence[Task],
    *,
    timer: int,
    enough: int | None = None,
    deadline: float | None = None,
) -> Task:
    """The one "fold" Task that asks a relay to gather these; all are of one version, with one config."""
    first = tasks[0]
    config = {
        "tasks": [[task.client, task.id, task.memory] for task in tasks],
        "local": first.config,
        "timer": timer,
        "enough": enough,
        "deadline": deadline,
    }
    return Task(id, relay, first.version, first.round, first.down, "fold", config)


def below(task: Task) -> list[Task]:
    """The tasks that a "fold" Task asks for."""
    return [
        Task(id, client, task.version, task.round, task.down, config=task.config["local"], memory=memory)
        for client, id, memory in task.config["tasks"]
    ]


def fold_task(
    task: Task, aggregator: Aggregator, *, on_nan: OnNan = "stop"
) -> Generator[Sequence[Action], Any, Reply]:
    """A relay's work on one "fold" Task (`fold_request`): tasks below, then one Reply with what they came to.

    The ids of the tasks below and of the timer were allotted by the sender.
    """
    got = yield from gather(
        aggregator,
        below(task),
        timer=task.config["timer"],
        enough=task.config.get("enough"),
        deadline=task.config["deadline"],
        on_nan=on_nan,
    )
    return folded(task, got)


def folded(task: Task, got: Gathered) -> Reply:
    """The answer to a "fold" Task."""
    return Reply(task, tuple(got.fold), 0.0, answers=tuple(got.accepted.items()))


def interleave(job: Callable[[Task], Generator[Sequence[Action], Any, Reply]]) -> Plan[None]:
    """A relay that serves several Tasks at once: one sub-plan each; events go to the one that asked."""
    live: dict[int, Generator[Sequence[Action], Any, Reply]] = {}  # incoming task -> its sub-plan
    owner: dict[int, int] = {}  # id of an outgoing task or timer -> incoming task

    def advance(key: int, event: Any) -> list[Action]:
        out: list[Action] = []
        try:
            while True:
                actions = live[key].send(event)
                out += actions
                for action in actions:
                    if isinstance(action, Task | Timer):
                        owner[action.id] = key
                    elif isinstance(action, Cancel):
                        owner.pop(action.id, None)
                if awaits(actions):
                    return out
                event = None
        except StopIteration as stop:
            del live[key]
            return [*out, stop.value]

    actions: list[Action] = []
    while True:
        event = yield actions
        if isinstance(event, Task):
            live[event.id] = job(event)
            actions = advance(event.id, None)
        else:
            key = owner.pop(event.id if isinstance(event, Tick) else event.task.id, None)
            actions = advance(key, event) if key in live else []
        del event


def unfolded(
    plan: Plan[T], job: Callable[[Task], Generator[Sequence[Action], Any, Reply]]
) -> Generator[Sequence[Action], Any, T]:
    """The plan with its "fold" tasks done here, by `job` (`fold_task`): for backends that have no relays."""
    relay, below = interleave(job), set[int]()
    next(relay)

    def relayed(event: Event) -> tuple[list[Action], Reply | None]:
        actions = relay.send(event)
        below.update(action.id for action in actions if isinstance(action, Task | Timer))
        answers = [action for action in actions if isinstance(action, Reply)]
        return [a for a in actions if not isinstance(a, Reply)], answers[0] if answers else None

    out: list[Action] = []
    try:
        actions = next(plan)
        while True:
            for action in actions:
                fold = isinstance(action, Task) and action.kind == "fold"
                out += relayed(action)[0] if fold else [action]  # type: ignore[arg-type]
            event, out = (yield out), []
            while event is not None and (event.id if isinstance(event, Tick) else event.task.id) in below:
                rest, answer = relayed(event)
                if answer is not None:
                    event, out, answer = answer, rest, None
                    break
                event = yield rest
                while event is None:  # the rest were cancellations
                    event = yield []
            actions = plan.send(event)
            event = None
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        plan.close()


def awaits(actions: Sequence[Action]) -> bool:
    """Does a yield of these wait for an event? Nothing but commits and cancellations is answered at once."""
    return not actions or any(isinstance(action, Task | Timer | Reply) for action in actions)


def _joined(
    left: Mapping[str, tuple[Fraction, Fraction]], right: Mapping[str, tuple[Fraction, Fraction]]
) -> dict[str, tuple[Fraction, Fraction]]:
    zero = (Fraction(0), Fraction(0))
    names = {**left, **right}
    return {
        name: tuple(a + b for a, b in zip(left.get(name, zero), right.get(name, zero), strict=True))  # type: ignore[misc]
        for name in names
    }

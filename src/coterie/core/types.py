"""The types that everything else is made of; read this page first.

One loop covers distributed SGD, local SGD, DiLoCo and federated learning: somebody holds the global
state and hands it out in `Task`s, others work on their own data, and what comes back in `Reply`s is
combined into the next state. Who decides what and when is a `Plan`: a generator without I/O that
yields `Action`s and is sent `Event`s. `core.drive` joins a plan to a `Backend`, which does the I/O.
An `Algorithm` is a record of pure functions and knows neither.

Two rules hold for every plan:
- ids of tasks and timers are unique within the plan and never reused;
- a yield of nothing but `Commit`s is answered at once with None; any other yield waits for an event.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from coterie.core.guarantees import Guarantees

Tree = Any  # nested dicts, tuples and lists whose leaves are tensors (and, in states, plain JSON values)
Params = Mapping[str, Any]  # {parameter name: tensor}
Batch = tuple[Any, Any]  # inputs [B, ...], targets [B, ...]
ClientId = str
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Server to client (or relay, or peer): data only, never code."""

    id: int
    client: ClientId
    version: int  # of the server's state that `down` was made from; staleness is counted in versions
    round: int  # with the client it seeds every draw of the task, so the pair is never used twice
    down: Tree
    kind: str = "train"  # or "evaluate", "fold" (to a relay), ...
    config: Mapping[str, Any] = field(default_factory=dict)  # plain JSON values: epochs, batch_size, lr, ...
    memory: int | None = None  # the client's last accepted task: which generation of its memory to use
    thread: int | None = None  # first task of a conversation of several exchanges


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """Client to server: the update, what it weighs, and numbers about it (weighted like the update)."""

    task: Task
    up: Tree
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0  # how many examples the training saw, repeats included
    answers: tuple[tuple[ClientId, int], ...] = ()  # to a "fold" Task: whose replies are folded into `up`


class Replies(NamedTuple):
    """The replies to a block of tasks, stacked: row i of everything answers tasks[i]."""

    tasks: Sequence[Task]
    ups: Tree  # leaves [tasks, ...]
    weights: Sequence[float]
    metrics: Mapping[str, Sequence[float]]
    samples: Sequence[int]


class Lost(NamedTuple):
    """The task will never be answered: dropped out, failed, refused by policy, timed out."""

    task: Task
    reason: str


class Tick(NamedTuple):
    """The timer with this id went off (virtual seconds in simulation)."""

    id: int
    now: float


class Timer(NamedTuple):
    """Ask for a Tick, `after` seconds from now: a plan has no clock, and needs none."""

    id: int
    after: float


class Cancel(NamedTuple):
    """Nobody waits any more for the task or the timer with this id."""

    id: int


class Commit(NamedTuple):
    """A new version of the state. `state["model"]` is what is evaluated and kept at the end.

    resume: what the plan needs to go on from here (next ids, tasks in flight). To start a schedule from it,
    add "memory": client -> generation, the union of all that was accepted up to this commit.
    """

    version: int
    state: Tree
    resume: Tree
    metrics: Mapping[str, Any]
    accepted: Mapping[ClientId, int] = MappingProxyType({})  # whose memory is now of which task


Event = Task | Reply | Lost | Tick  # a Task arrives at a relay or at a peer
Action = Task | Reply | Commit | Timer | Cancel
Plan = Generator[Sequence[Action], Any, T]  # event = yield actions


class Optimizer(NamedTuple):
    """A functional optimiser; client and server optimisers alike. `updates` are added to the params."""

    init: Callable[[Params], Tree]  # params -> state
    update: Callable[[Params, Tree, Params], tuple[Params, Tree]]  # grads, state, params -> updates, state


class ClientWork(NamedTuple):
    """The client's half of an algorithm: no loop, no device, no data."""

    start: Callable[
        ..., tuple[Params, Tree]
    ]  # down, memory, config -> params, carry (buffers, controls, ...)
    objective: Callable[..., tuple[Any, Tree]]  # loss, params, batch, carry -> per-example losses [B], carry
    gradient: Callable[..., tuple[Params, Tree]]  # objective, params, batch, mask, carry, key -> grads, carry
    optimizer: Callable[[Tree], Optimizer]  # carry -> Optimizer (per-client learning rates)
    finish: Callable[..., tuple[Tree, Tree]]  # params, down, carry, steps -> up, memory
    remember: Callable[[Tree], Tree] | None  # down -> a new client's memory; None: clients keep none


class Aggregator(NamedTuple):
    """A monoid, so that it streams, shards and nests; its accumulator is a Tree.

    `add` and `merge` may reuse the memory of their first argument: keep the result, drop the argument.
    """

    init: Callable[[], Tree]
    add: Callable[[Tree, Tree, Any], Tree]  # acc, up, weight; or acc, ups stacked [replies, ...], weights
    merge: Callable[[Tree, Tree], Tree]
    finish: Callable[[Tree], tuple[Tree, float, int]]  # acc -> aggregate, sum of weights, count
    linear: bool  # False: it must see each reply (Krum, median) and holds O(cohort) memory


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A federated algorithm, written once, for every backend.

    State is a dict with at least "model": {"params": ..., "buffers": ...}.
    """

    init: Callable[[Tree], Tree]  # model -> state
    broadcast: Callable[[Tree], Tree]  # state -> down
    client_work: ClientWork
    aggregator: Aggregator
    finalize: Callable[[Tree, Tree, float, int], Tree]  # state, aggregate, weight, count -> state
    local: Callable[[int], Mapping[str, Any]]  # version -> Task.config: epochs, batch_size, lr, weighting
    transforms: tuple[Any, ...] = ()  # Transform records: clip, noise, quantise, sparsify


class Schedule(Protocol):
    """When which client works, and when the state moves on."""

    def guarantees(self, population: int) -> Guarantees:
        """What is certain about who takes part, among so many clients."""

    def __call__(
        self, algorithm: Algorithm, state: Tree, clients: Sequence[ClientId], resume: Tree = None
    ) -> Plan[Tree]:
        """Return the plan that ends with the final state. `resume` is a Commit's, with "memory" added."""


class Backend(Protocol):
    """Carries tasks out and replies back: in one process, on a cluster, over a network."""

    def send(self, actions: Sequence[Action]) -> None:
        """Take actions (no Commits). Never blocks; reading events is the back-pressure."""

    async def event(self) -> tuple[float, Event]:
        """Wait for the next event; its time stamp is in seconds (virtual in simulation)."""

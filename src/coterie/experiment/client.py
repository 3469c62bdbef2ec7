"""A site inside your own training script: the smallest change that makes it take part in a federation.

    with coterie.client() as federation:
        for task in federation:
            model.load_state_dict(task.params)
            train(model)
            task.reply(model.state_dict(), weight=len(data))

Under torchrun only rank 0 talks to the server; the others get each task's parameters by broadcast, and what
they reply is not sent.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributed as dist

from coterie.algorithms import gradient
from coterie.core.errors import ConfigError, RunError
from coterie.core.transforms import encoded
from coterie.core.types import Algorithm, ClientId, Lost, Reply, Task, Tree
from coterie.experiment import host
from coterie.experiment.assemble import algorithm_of
from coterie.experiment.config import load
from coterie.experiment.hosting import Done, Job
from coterie.storage import Blobs


@dataclass
class Offered:
    """A task for your loop.

    params: the server's parameters and buffers, by name, as for `load_state_dict`. config: what the run says
    of local training (epochs, batch_size, lr, ...). send: None where another rank sends the reply.
    """

    client: ClientId
    round: int
    config: Mapping[str, Any]
    params: Mapping[str, Tensor]
    send: Callable[[Mapping[str, Tensor], float, Mapping[str, float]], None] | None = None
    answered: bool = False

    def reply(
        self, state: Mapping[str, Tensor], weight: float, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Send the trained parameters. weight: usually how many examples. Raises ValueError for a misfit."""
        if self.answered:
            raise RunError(f"round {self.round}: this task has been answered already")
        for name, wanted in self.params.items():
            found = state.get(name)
            if found is None or found.shape != wanted.shape:
                shape = None if found is None else tuple(found.shape)
                raise ValueError(f"reply: {name} must have the shape {tuple(wanted.shape)}, not {shape}")
        self.answered = True
        if self.send is not None:
            self.send(state, float(weight), dict(metrics or {}))


class Handed:
    """A run's work, given to the user's loop."""

    def __init__(
        self,
        offered: queue.SimpleQueue[Any],
        job: Job,
        heard: Callable[[Done], None],
        broken: Callable[[str, str], None],  # noqa: ARG002  a Training's signature
    ) -> None:
        self.offered, self.heard = offered, heard
        self.loop = asyncio.get_running_loop()
        self.doing: dict[int, Task] = {}
        self.blobs = Blobs(job.blobs)
        self.algorithm: Algorithm = algorithm_of(load(dict(job.config)))
        if self.algorithm.client_work.gradient is not gradient or self.algorithm.client_work.remember:
            raise ConfigError(
                "this run's algorithm changes the clients' own steps; a training script makes its own",
                "use fedavg or a FedOpt algorithm, or the site process",
            )

    def give(self, tasks: Sequence[Task]) -> None:
        """Offer them, one after the other."""
        for task in tasks:
            if task.id in self.doing:
                continue
            self.doing[task.id] = task
            if task.kind == "train":
                self.offered.put((self, task))
            else:
                self.tell(Done(task, None, reason=f"a training script answers no {task.kind!r} task"))

    def offer(self, task: Task) -> Offered:
        """The task with its parameters."""
        down = self.blobs.read(task.down)
        model = down["model"]
        params = {**model["params"], **model["buffers"]}
        return Offered(task.client, task.round, dict(task.config), params, partial(self._send, task, down))

    def _send(
        self, task: Task, down: Tree, state: Mapping[str, Tensor], weight: float, metrics: Mapping[str, float]
    ) -> None:
        after = {
            part: {
                name: state[name].detach().to("cpu", value.dtype, copy=True) for name, value in named.items()
            }
            for part, named in down["model"].items()
        }
        work = self.algorithm.client_work
        _, carry = work.start(down, None, task.config)
        up, _ = work.finish(after["params"], down, {**carry, "buffers": after["buffers"]}, 1)
        made = encoded(self.algorithm, Reply(replace(task, down=down), up, weight, metrics, int(weight)))
        if isinstance(made, Lost):
            self.tell(Done(task, None, reason=made.reason))
        else:
            self.tell(Done(task, self.blobs.write(made.up), made.weight, made.metrics, made.samples))

    def tell(self, done: Done) -> None:
        """From any thread."""
        self.loop.call_soon_threadsafe(self._tell, done)

    def _tell(self, done: Done) -> None:
        if self.doing.pop(done.task.id, None) is not None:
            self.heard(done)

    def drop(self, ids: Sequence[int]) -> None:
        """Nobody waits for these."""
        for id in ids:
            self.doing.pop(id, None)

    def accepted(self, version: int, accepted: Mapping[ClientId, int], flying: Sequence[int]) -> None:
        """Nothing is remembered here."""

    def progress(self) -> int:
        """CPU time of this process."""
        return int(100 * sum(os.times()[:4]))

    def close(self) -> None:
        """The run has ended."""
        self.doing.clear()
        self.offered.put(None)


class Federation:
    """An open connection; iterate over it for tasks. It ends when the run does, or with `close`."""

    def __init__(self, folder: Path, servers: Sequence[str], name: str | None) -> None:
        self.folder, self.servers, self.name = folder, servers, name
        self.offered: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self.talks = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def __enter__(self) -> Self:
        if self.talks:
            self._thread = threading.Thread(target=self._connect, name="coterie", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the federation."""
        if self.talks and self._thread.is_alive():
            link = getattr(self, "_link", None)
            if link is not None:
                self._loop.call_soon_threadsafe(link.stop)
            self._thread.join(10)

    def __iter__(self) -> Iterator[Offered]:
        group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        while True:
            offered = self._next() if self.talks else None
            if group:
                offered = _shared(offered)
            if offered is None:
                if self.failure is not None:
                    raise self.failure
                return
            yield offered

    def _next(self) -> Offered | None:
        while (item := self.offered.get()) is not None:
            work, task = item
            if task.id in work.doing:
                return work.offer(task)  # type: ignore[no-any-return]
        return None

    def _connect(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await host.serve(
                self.folder,
                self.servers,
                insecure_as=self.name,
                begin=partial(Handed, self.offered),
                started=lambda link: setattr(self, "_link", link),
            )

        try:
            asyncio.run(main())
        except BaseException as error:
            self.failure = error
        self.offered.put(None)


def client(
    folder: str | Path | None = None, server: str | None = None, *, insecure_as: str | None = None
) -> Federation:
    """Take part in a federation from a training script; use it in a `with` statement.

    folder: the site's (default: $COTERIE_SITE, else ./site). server: "host:port", several by commas (default:
    $COTERIE_SERVER, else the `server` of the folder's client.toml). insecure_as: a name, to go without
    certificates. Raises ConfigError when a server is named nowhere.
    """
    where = Path(folder or os.environ.get("COTERIE_SITE") or "site")
    named = server or os.environ.get("COTERIE_SERVER") or ""
    file = where / "client.toml"
    if not named and file.exists():
        import tomllib  # noqa: PLC0415

        named = str(tomllib.loads(file.read_text("utf-8")).get("server", ""))
    if not named:
        raise ConfigError(
            "coterie.client: no server is named",
            f'set COTERIE_SERVER, or write server = "host:port" in {file}',
        )
    return Federation(where, [each.strip() for each in named.split(",")], insecure_as)


def _shared(offered: Offered | None) -> Offered | None:
    """Rank 0's task, at every rank of the default group."""
    head: list[Any] = [None]
    if offered is not None:
        forms = [(name, tuple(value.shape), value.dtype) for name, value in offered.params.items()]
        head = [(offered.client, offered.round, dict(offered.config), forms)]
    dist.broadcast_object_list(head, src=0)
    if head[0] is None:
        return None
    who, round, config, forms = head[0]
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    params = {}
    for name, shape, dtype in forms:
        mine = offered.params[name] if offered else torch.empty(shape, dtype=dtype)
        there = mine.to(device)
        dist.broadcast(there, src=0)
        params[name] = there.cpu()
    return offered or Offered(who, round, config, params)

"""What worker processes and Ray actors are built from in tests (they import it by name), and how it is used."""

import asyncio
import os
import signal
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch

from coterie.core import ConfigError, Task, drive, trees
from coterie.data import Dataset, Examples
from coterie.experiment import assemble, load
from coterie.storage import Memories
from laws.conftest import KINDS as LAWS
from laws.conftest import SMALL

HOT = {"algorithm": {**SMALL["algorithm"], "client": {"optimizer": "sgd", "lr": 1e38, "epochs": 3}}}
KINDS = {**LAWS, "diverging": HOT}


@cache
def blobs():
    """Ten clouds of points, as images: quicker to load than digits."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 10
    x = torch.randn(10, 1, 8, 8, generator=draw)[y] + torch.randn(400, 1, 8, 8, generator=draw)
    return Dataset("blobs", Examples(x, y), None, tuple("0123456789"), torch.Tensor.float)


@cache
def parts_of(kind):
    """The parts of a small experiment."""
    return assemble(load({**SMALL, **KINDS[kind]}), dataset=blobs())


def site_of(kind, store, trap=None):
    """Its site; trap(task) is called before a client trains."""
    site = parts_of(kind).site(store)
    if trap is not None:
        fit = site.trainer.fit

        def trapped(algorithm, task, memory, data):
            trap(task)
            return fit(algorithm, task, memory, data)

        site.trainer = SimpleNamespace(fit=trapped, width=1)
    return site


def make(kind, trap=None):
    """How a worker builds it."""
    return partial(site_of, kind, trap=trap)


def make_sharing(dataset, store):
    """Refuses data that was copied on its way."""
    if not dataset.train.x.is_shared():
        raise ConfigError("the data set was copied")
    return site_of("synchronous", store)


def cannot_start(store):
    raise ConfigError("no such data", "look elsewhere")


def ends_at_once(store):
    os._exit(3)


def dies_once(folder, task):
    """SIGKILL for each token in the folder."""
    for token in Path(folder).glob("token-*"):
        try:
            token.unlink()
        except FileNotFoundError:  # another worker died of it
            continue
        os.kill(os.getpid(), signal.SIGKILL)


def dies_on(client, task):
    if task.client == client:
        os.kill(os.getpid(), signal.SIGKILL)


def refuses(client, task):
    if task.client == client:
        raise ConfigError(f"{client} is wrong", "leave it out")


def fails(client, task):
    if task.client == client:
        raise OSError(f"{client} has lost its disk")


def played(kind, pool_of):
    """How a run on a pool ends: digest of the model, and what each commit reports."""
    parts = parts_of(kind)
    commits = []
    pool = pool_of(parts.site(Memories()))
    try:
        plan = parts.schedule(parts.algorithm, parts.algorithm.init(parts.initial), parts.population.clients)
        state = asyncio.run(drive(plan, parts.backend(pool, None), on_commit=commits.append))
    finally:
        pool.close()
    return trees.digest(state["model"]), [commit.metrics for commit in commits]


def alone(site):
    """The pool of one process."""
    return site


def tasks_of(kind, *, first=100, memory=None, what="train"):
    """A task for every client. memory: the generation of the first one's, which the others follow."""
    parts = parts_of(kind)
    down = {"model": parts.initial}
    if what == "train":
        down = parts.algorithm.broadcast(parts.algorithm.init(parts.initial))
    config = parts.algorithm.local(0)
    return [
        Task(first + i, client, 0, 0, down, what, config, None if memory is None else memory + i)
        for i, client in enumerate(parts.population.clients)
    ]


def told(kind, got):
    """All that a fold says, comparable."""
    aggregate, weight, count = parts_of(kind).algorithm.aggregator.finish(got.fold.acc)
    return trees.digest(aggregate), weight, count, tuple(got.fold)[1:], list(got.accepted.items())


def answered(answers):
    """All that answers say, comparable."""
    return [
        (a.task.id, a.reason)
        if hasattr(a, "reason")
        else (a.task.id, trees.digest(a.up), a.weight, dict(a.metrics), a.samples)
        for a in answers
    ]

"""A run's training at a site: a child process, so that the connection never waits for it.

The child holds the model, the data and the clients' memories; what is sent and received lies in a folder of
blobs, which it reads and writes itself. The parent knows names and numbers only. A child that dies is
replaced and its tasks are done again; what it had answered, and the memories that go with it, are on disk.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from coterie.backends.shards import listen
from coterie.core.errors import CoterieError, RunError
from coterie.core.types import ClientId, Lost, Reply, Task, Tree
from coterie.data import Dataset, own
from coterie.experiment.assemble import load_dataset, site_of
from coterie.experiment.child import Child, Parent, how
from coterie.experiment.code import Environment
from coterie.experiment.config import Config, load
from coterie.storage import Blob, Blobs, Memories

LOG = 200_000  # characters of what was said during a task that are passed on
DEATHS = 3  # of the training process after which a task is given up
log = logging.getLogger("coterie")


@dataclass(frozen=True)
class Job:
    """What a site needs to train for one run; it travels to the child process.

    config: the run's, as plain values. folder: where relative paths of the config start. home: where this
    run's memories are kept; blobs: the site's. site, data: who has data of its own, and how it is loaded.
    trainer: what trains here, whatever the config says. limits: "cpus", "memory" (bytes), "nice", "gpu" (how
    many), "gpus" (which), "gpu_memory" (share of each). code: where the model and the trainer come from that
    the config names, when they travel with the run.
    """

    config: Mapping[str, Any]
    folder: Path
    home: Path
    blobs: Path
    data_dir: Path | None = None
    site: str = ""
    data: Mapping[str, Any] | None = None
    trainer: Any = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    code: Environment | None = None


class Done(NamedTuple):
    """A finished task. up: where the update lies; None: it was lost, for this reason. log: what was said.

    began, ended: of the block in which it was trained, Unix time; None when unknown.
    """

    task: Task
    up: Blob | None
    weight: float = 0.0
    metrics: Mapping[str, float] = {}
    samples: int = 0
    reason: str = ""
    log: str = ""
    began: float | None = None
    ended: float | None = None


class Told(BaseModel):
    """What the child says: a Done by its task's id, or why (`broken`) it cannot train for the run at all."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    broken: str = ""
    id: int = -1
    up: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], Annotated[int, Field(ge=0)]] | None = None
    weight: float = 0.0
    metrics: dict[str, float] = {}
    samples: Annotated[int, Field(ge=0)] = 0
    reason: str = ""
    log: str = ""
    began: float | None = None
    ended: float | None = None


class Training:
    """The child process of one run. For use in an event loop; `heard` is called there with every Done.

    broken: called once with the reason, and the traceback if there is one, when the run cannot be trained
    here at all.
    """

    def __init__(self, job: Job, heard: Callable[[Done], None], broken: Callable[[str, str], None]) -> None:
        self.job, self.heard, self.broken = job, heard, broken
        self.doing: dict[int, Task] = {}
        self.deaths: dict[int, int] = {}
        self.spent = 0  # CPU time of children that are gone, in ticks
        self.version = 0  # of the newest commit
        self.generations: dict[ClientId, int] = {}  # whose memory is of which task, for a child that is new
        self.flying: list[int] = []
        self.child: Child | None = None

    def give(self, tasks: Sequence[Task]) -> None:
        """Train these; each `down` is a blob's digest. What is being done already is not done twice."""
        fresh = [task for task in tasks if task.id not in self.doing]
        self.doing |= {task.id: task for task in fresh}
        if self.child is None:
            self._start()
        elif fresh:
            self._send("tasks", fresh)

    def drop(self, ids: Sequence[int]) -> None:
        """Nobody waits for these any more; what has begun is finished, and not told."""
        for id in ids:
            self.doing.pop(id, None)

    def accepted(self, version: int, accepted: Mapping[ClientId, int], flying: Sequence[int]) -> None:
        """A commit: these tasks' memories are the clients' from now on."""
        self.version, self.flying = version, list(flying)
        self.generations |= accepted
        if self.child is not None:
            self._send("accepted", version, dict(accepted), self.flying)

    def progress(self) -> int:
        """A number that grows while the child works: the CPU time that it has taken, in ticks."""
        if self.child is None:
            return self.spent
        try:
            fields = Path(f"/proc/{self.child.process.pid}/stat").read_text().rpartition(")")[2].split()
            return self.spent + int(fields[11]) + int(fields[12])
        except (OSError, IndexError):
            return self.spent

    def close(self) -> None:
        """End the child, at once."""
        self.doing.clear()
        self._bury()

    def _start(self) -> None:
        self.child = Child("hosting", self.job, self.job.home, self.job.code)
        asyncio.get_running_loop().add_reader(self.child.pipe.fileno(), self._hear)
        if self.version:
            self._send("accepted", self.version, self.generations, self.flying)
        if self.doing:
            self._send("tasks", list(self.doing.values()))

    def _send(self, *message: Any) -> None:
        assert self.child is not None
        self.child.send(message)

    def _hear(self) -> None:
        assert self.child is not None
        try:
            lines = [Told.model_validate_json(line) for line in self.child.lines()]
        except (EOFError, OSError, ValueError):  # dead, or it talks nonsense
            self._died()
            return
        for told in lines:
            if told.broken:
                self._bury()
                self.broken(told.broken, told.log)
                return
            if (task := self.doing.pop(told.id, None)) is not None:
                up = None if told.up is None else Blob(*told.up)
                facts = told.model_dump(exclude={"broken", "id", "up"})
                self.heard(Done(task, up, **facts))

    def _died(self) -> None:
        """Begin again with what was not done; what kills every child is given up."""
        code = self._bury()
        for id, task in list(self.doing.items()):
            self.deaths[id] = self.deaths.get(id, 0) + 1
            if self.deaths[id] >= DEATHS:
                del self.doing[id]
                self.heard(Done(task, None, reason=f"its training process died {DEATHS} times ({how(code)})"))
        if self.doing:
            self._start()

    def _bury(self) -> int:
        child, self.child = self.child, None
        if child is None:
            return 0
        asyncio.get_running_loop().remove_reader(child.pipe.fileno())
        self.spent += 1
        return child.end()


def live(handle: int) -> None:
    """The child's life: get ready, then train what it is told to until it is alone."""
    parent, said = Parent(handle), listen()
    job = parent.hear()
    try:
        _limit(job.limits)
        trained = _Trained(job, said)
    except CoterieError as error:
        parent.tell(broken=str(error))
        return
    except Exception as error:
        parent.tell(broken=f"{type(error).__name__}: {error}", log=traceback.format_exc())
        return
    with suppress(EOFError, OSError):
        while True:
            what, *given = parent.hear()
            if what == "accepted":
                trained.accepted(*given)
                continue
            for task, facts in trained.done(given[0]):
                parent.tell(id=task, **facts)
    os._exit(0)


class _Trained:
    """The child's state."""

    def __init__(self, job: Job, said: list[tuple[int, str]]) -> None:
        config, dataset = _prepared(job)
        if job.code:
            os.chdir(job.home)  # after the site's data is loaded, and before what travelled is
        torch.set_num_threads(config.run["threads"])
        self.blobs, self.said = Blobs(job.blobs), said
        self.memories = Memories(job.home / "memories", cache_bytes=0)  # on disk before an answer is told
        self.memories.regain()
        self.site = site_of(config, dataset, self.memories)
        self.down: tuple[str, Tree] = ("", None)

    def accepted(self, version: int, accepted: Mapping[ClientId, int], flying: Sequence[int]) -> None:
        if version > self.memories.newest():
            self.memories.commit(version, accepted, set(flying))
            self.memories.prune(version)

    def done(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Train in the blocks that the trainer wants; yield what to tell of each once its block is done."""
        ready = []
        for task in tasks:
            try:
                ready.append(replace(task, down=self._read(task.down)))
            except RunError as error:  # the task is old, and its model gone
                yield self._told(_lost(task, error))
        alone, blocks = self.site.packed(ready)
        for block in [*([task] for task in alone), *blocks]:
            began = time.time()
            for id, facts in self._answered(block):
                yield id, {**facts, "began": began, "ended": time.time()}

    def _answered(self, block: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        """What ends a run where there is one process loses a task here, and none beside it: the disk is full,
        or the task is old and the client's memory gone."""
        try:
            yield from [self._told(answer) for answer in self.site.answer(block)]
        except CoterieError as error:
            if len(block) == 1:
                yield self._told(_lost(block[0], error))
            else:
                for task in block:
                    yield from self._answered([task])

    def _told(self, answer: Reply | Lost) -> tuple[int, dict[str, Any]]:
        log = "\n".join(text for _, text in self.said)[-LOG:]
        self.said.clear()
        if isinstance(answer, Lost):
            return answer.task.id, {"reason": answer.reason, "log": log}
        metrics = {name: float(value) for name, value in answer.metrics.items()}
        up, weight = self.blobs.write(answer.up), float(answer.weight)
        return answer.task.id, {
            "up": up,
            "weight": weight,
            "metrics": metrics,
            "samples": answer.samples,
            "log": log,
        }

    def _read(self, digest: str) -> Tree:
        """The same object for tasks of one blob, by which blocks know that they share it."""
        if digest != self.down[0]:
            self.down = (digest, self.blobs.read(digest))
        return self.down[1]


def _lost(task: Task, error: CoterieError) -> Lost:
    said = "".join(traceback.format_exception(error)).rstrip()
    log.warning("client %s failed in round %d:\n%s", task.client, task.round + 1, said)
    return Lost(task, str(error))


def _prepared(job: Job) -> tuple[Config, Dataset]:
    """The run's config and data, with what is the site's own in its place."""
    told = dict(job.config)
    told["backend"] = {**told.get("backend", {}), "kind": "inprocess", "workers": 1}
    if job.trainer is not None:
        told["backend"]["trainer"] = job.trainer
    here = replace(load(told), folder=job.folder)  # what loads data is never what travelled
    config = replace(here, folder=job.code.folder) if job.code else here
    if job.data is None:
        return config, load_dataset(here, job.data_dir)
    wanted = {name: value for name, value in here.data.items() if name != "test"}
    mine = {"holdout": 0.0, **job.data, "partition": {"kind": "iid"}}
    return config, own(
        load_dataset(replace(here, data=wanted), job.data_dir),
        load_dataset(replace(here, data=mine), job.data_dir),
        job.site,
    )


def _limit(limits: Mapping[str, Any]) -> None:
    """Before anything has asked for a GPU: CUDA reads once which devices it may see."""
    if "cpus" in limits:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: limits["cpus"]])
    if "memory" in limits:
        resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    if "nice" in limits:
        os.nice(limits["nice"])
    if "gpu" in limits or "gpus" in limits:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible(limits.get("gpu"), limits.get("gpus"), seen)
    if "gpu_memory" in limits and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            torch.cuda.set_per_process_memory_fraction(limits["gpu_memory"], device)


def visible(count: int | None, which: Sequence[str] | None, seen: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a process that may use so many GPUs, of these, where `seen` are in sight.

    Devices are named as in `seen`; one that is not in sight stays out of it.
    """
    devices = list(which) if which is not None else None
    if seen is not None:
        there = [each.strip() for each in seen.split(",") if each.strip()]
        devices = there if devices is None else [each for each in devices if each in there]
    if devices is None:
        devices = [str(number) for number in range(count or 0)]
    return ",".join(devices[:count])

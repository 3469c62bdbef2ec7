"""A run's training at a site: a child process, so that the connection never waits for it.

The child holds the model, the data and the clients' memories; what is sent and received lies in a folder of
blobs, which it reads and writes itself. The parent knows names and numbers only. A child that dies is
replaced and its tasks are done again; what it had answered, and the memories that go with it, are on disk.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from coterie.backends.shards import listen
from coterie.backends.workers import end_with_parent
from coterie.core.errors import CoterieError
from coterie.core.types import ClientId, Lost, Reply, Task, Tree
from coterie.data import Dataset, own
from coterie.experiment.assemble import load_dataset, site_of
from coterie.experiment.config import Config, load
from coterie.storage import Blob, Blobs, Memories

DEATHS = 3  # of the training process after which a task is given up


@dataclass(frozen=True)
class Job:
    """What a site needs to train for one run; it travels to the child process.

    config: the run's, as plain values. folder: where relative paths of the config start. home: where this
    run's memories are kept; blobs: the site's. site, data: who has data of its own, and how it is loaded.
    trainer: what trains here, whatever the config says. limits: "cpus", "memory" (bytes), "nice",
    "gpu" (how many), "gpus" (which), "gpu_memory" (share of each).
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


class Training:
    """The child process of one run. For use in an event loop; `heard` is called there with every Done.

    broken: called once with the reason when the run cannot be trained here at all.
    """

    def __init__(self, job: Job, heard: Callable[[Done], None], broken: Callable[[str], None]) -> None:
        self.job, self.heard, self.broken = job, heard, broken
        self.doing: dict[int, Task] = {}
        self.deaths: dict[int, int] = {}
        self.spent = 0  # CPU time of children that are gone, in ticks
        self.version = 0  # of the newest commit
        self.generations: dict[ClientId, int] = {}  # whose memory is of which task, for a child that is new
        self.flying: list[int] = []
        self.process: BaseProcess | None = None
        self.pipe: Any = None

    def give(self, tasks: Sequence[Task]) -> None:
        """Train these; each `down` is a blob's digest. What is being done already is not done twice."""
        fresh = [task for task in tasks if task.id not in self.doing]
        self.doing |= {task.id: task for task in fresh}
        if self.process is None:
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
        if self.process is not None:
            self._send("accepted", version, dict(accepted), self.flying)

    def progress(self) -> int:
        """A number that grows while the child works: the CPU time that it has taken, in ticks."""
        if self.process is None or self.process.pid is None:
            return self.spent
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return self.spent + int(fields[11]) + int(fields[12])
        except (OSError, IndexError):
            return self.spent

    def close(self) -> None:
        """End the child, at once."""
        self.doing.clear()
        self._bury()

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.job), daemon=False)
        self.process.start()
        theirs.close()
        asyncio.get_running_loop().add_reader(self.pipe.fileno(), self._hear)
        if self.version:
            self._send("accepted", self.version, self.generations, self.flying)
        if self.doing:
            self._send("tasks", list(self.doing.values()))

    def _send(self, *message: Any) -> None:
        with suppress(OSError):  # it is dead, as `_hear` will find
            self.pipe.send(message)

    def _hear(self) -> None:
        try:
            while self.pipe is not None and self.pipe.poll():
                told = self.pipe.recv()
                if isinstance(told, str):
                    self._bury()
                    self.broken(told)
                elif self.doing.pop(told.task.id, None) is not None:
                    self.heard(told)
        except (EOFError, OSError):
            self._died()

    def _died(self) -> None:
        """Begin again with what was not done; what kills every child is given up."""
        code = self._bury()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        for id, task in list(self.doing.items()):
            self.deaths[id] = self.deaths.get(id, 0) + 1
            if self.deaths[id] >= DEATHS:
                del self.doing[id]
                self.heard(Done(task, None, reason=f"its training process died {DEATHS} times ({how})"))
        if self.doing:
            self._start()

    def _bury(self) -> int | None:
        process, pipe, self.process, self.pipe = self.process, self.pipe, None, None
        if process is None:
            return None
        asyncio.get_running_loop().remove_reader(pipe.fileno())
        self.spent += 1
        pipe.close()
        process.kill()
        process.join()
        return process.exitcode


def _serve(pipe: Any, job: Job) -> None:
    """The child's life: get ready, then train what it is told to until it is alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    said = listen()
    try:
        _limit(job.limits)
        trained = _Trained(job, said)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}" if not isinstance(error, CoterieError) else str(error))
        return
    with suppress(EOFError, OSError):
        while True:
            what, *given = pipe.recv()
            if what == "accepted":
                trained.accepted(*given)
                continue
            for done in trained.done(given[0]):
                pipe.send(done)
    os._exit(0)


class _Trained:
    """The child's state."""

    def __init__(self, job: Job, said: list[tuple[int, str]]) -> None:
        config, dataset = _prepared(job)
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

    def done(self, tasks: Sequence[Task]) -> Any:
        """Train in the blocks that the trainer wants; yield each Done when its block is finished."""
        alone, blocks = self.site.packed([replace(task, down=self._read(task.down)) for task in tasks])
        for block in [*([task] for task in alone), *blocks]:
            began = time.time()
            for answer in self.site.answer(block):
                yield self._told(answer)._replace(began=began, ended=time.time())

    def _told(self, answer: Reply | Lost) -> Done:
        task = replace(answer.task, down=None)
        log = "\n".join(text for _, text in self.said)
        self.said.clear()
        if isinstance(answer, Lost):
            return Done(task, None, reason=answer.reason, log=log)
        up = self.blobs.write(answer.up)
        return Done(task, up, answer.weight, dict(answer.metrics), answer.samples, log=log)

    def _read(self, digest: str) -> Tree:
        """The same object for tasks of one blob, by which blocks know that they share it."""
        if digest != self.down[0]:
            self.down = (digest, self.blobs.read(digest))
        return self.down[1]


def _prepared(job: Job) -> tuple[Config, Dataset]:
    """The run's config and data, with what is the site's own in its place."""
    told = dict(job.config)
    told["backend"] = {**told.get("backend", {}), "kind": "inprocess", "workers": 1}
    if job.trainer is not None:
        told["backend"]["trainer"] = job.trainer
    config = replace(load(told), folder=job.folder)
    if job.data is None:
        return config, load_dataset(config, job.data_dir)
    wanted = {name: value for name, value in config.data.items() if name != "test"}
    mine = {"holdout": 0.0, **job.data, "partition": {"kind": "iid"}}
    return config, own(
        load_dataset(replace(config, data=wanted), job.data_dir),
        load_dataset(replace(config, data=mine), job.data_dir),
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

"""A run's training at a site: the same bits as in one process, whatever is killed."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from coterie import experiment
from coterie.core import Commit, Lost, Reply, drive, trees
from coterie.experiment.hosting import Job, Training, _limit, visible
from coterie.storage import Blobs

BASE = {
    "name": "hosted",
    "seed": 3,
    "data": {"dataset": "digits", "partition": {"kind": "iid", "clients": 6}},
    "model": {"kind": "mlp", "hidden": 8},
    "schedule": {"kind": "synchronous", "rounds": 3, "cohort": 4},
    "run": {"evaluate_clients": False},
}
CLIENT = {"lr": 0.1, "epochs": 1, "batch_size": 32}
KINDS = {
    "fedavg": {"kind": "fedavg", "client": CLIENT},
    "scaffold": {"kind": "scaffold", "client": CLIENT},
}


class Hosted:
    """A backend over two sites' Trainings; `meddle(sites, event)` is called before each event is given."""

    def __init__(self, config, folder, meddle):
        self.events, self.meddle, self.blobs = asyncio.Queue(), meddle, Blobs(folder / "blobs")
        self.sites = []
        for n in range(2):
            job = Job(config, folder, folder / str(n), folder / "blobs")
            self.sites.append(
                Training(job, self.heard, lambda why, trace: self.events.put_nowait(RuntimeError(why)))
            )
        self.flying = {}

    def heard(self, done):
        task = self.flying.pop(done.task.id)
        if done.up is None:
            self.events.put_nowait(Lost(task, done.reason))
        else:
            up = self.blobs.read(done.up.digest)
            self.events.put_nowait(Reply(task, up, done.weight, done.metrics, done.samples))

    def send(self, actions):
        by_site = {}
        for task in actions:
            self.flying[task.id] = task
            named = replace(task, down=self.blobs.write(task.down).digest)
            by_site.setdefault(int(task.client[-3:]) % 2, []).append(named)
        for site, tasks in by_site.items():
            self.sites[site].give(tasks)

    async def event(self):
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        self.meddle(self.sites, event)
        return 0.0, event

    def commit(self, commit: Commit):
        for n, site in enumerate(self.sites):
            mine = {c: t for c, t in commit.accepted.items() if int(c[-3:]) % 2 == n}
            site.accepted(commit.version, mine, ())


def played(kind, folder, meddle=lambda sites, event: None):
    config = {**BASE, "algorithm": KINDS[kind], "backend": {"trainer": "loop"}}
    parts = experiment.assemble(experiment.load(config))

    async def play():
        backend = Hosted(config, folder, meddle)
        schedule = replace(parts.schedule, pooled=False)
        plan = schedule(parts.algorithm, parts.algorithm.init(parts.initial), parts.population.clients)
        try:
            return await drive(plan, backend, on_commit=backend.commit)
        finally:
            for site in backend.sites:
                site.close()

    return trees.digest(asyncio.run(play())["model"])


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    found = {}
    for kind, algorithm in KINDS.items():
        config = {**BASE, "algorithm": algorithm, "backend": {"trainer": "loop"}}
        found[kind] = experiment.run(config, out=tmp_path_factory.mktemp(kind) / "run").model_digest
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_sites_end_with_the_bits_of_one_process(kind, digests, tmp_path):
    assert played(kind, tmp_path) == digests[kind]


def test_children_that_are_killed_do_not_matter(digests, tmp_path):
    events = itertools.count()

    def kill(sites, event):
        if next(events) in (1, 5, 8):
            os.kill(sites[int(event.task.client[-3:]) % 2].child.process.pid, signal.SIGKILL)

    assert played("scaffold", tmp_path, kill) == digests["scaffold"]


def test_what_kills_every_child_is_given_up(tmp_path):
    (tmp_path / "net.py").write_text(
        "import os\nfrom torch import nn\n\n\nclass Net(nn.Linear):\n    def forward(self, x):\n"
        "        if self.training:\n            os._exit(9)\n        return super().forward(x.flatten(1))\n"
    )
    config = {
        **BASE,
        "model": {"kind": "net.py:Net", "in_features": 64, "out_features": 10},
        "algorithm": KINDS["fedavg"],
        "backend": {"trainer": "loop"},
    }
    config["schedule"] = {**BASE["schedule"], "rounds": 1}
    got = []

    async def play():
        ended = asyncio.Event()

        def heard(done):
            got.append(done)
            ended.set()

        job = Job(config, tmp_path, tmp_path / "home", tmp_path / "blobs")
        training = Training(job, heard, pytest.fail)
        parts = experiment.assemble(replace(experiment.load(config), folder=tmp_path))
        down = Blobs(tmp_path / "blobs").write(parts.algorithm.broadcast(parts.algorithm.init(parts.initial)))
        plan = replace(parts.schedule, pooled=False)(
            parts.algorithm, parts.algorithm.init(parts.initial), parts.population.clients
        )
        training.give([replace(next(plan)[0], down=down.digest)])
        await asyncio.wait_for(ended.wait(), 60)
        training.close()

    asyncio.run(play())
    assert got[0].up is None
    assert got[0].reason == "its training process died 3 times (exit code 9)"


def test_a_config_that_cannot_be_built_is_told(tmp_path):
    told = []

    async def play():
        ended = asyncio.Event()

        def broken(why, trace):
            told.append(why)
            ended.set()

        config = {**BASE, "algorithm": KINDS["fedavg"], "model": {"kind": "nothing"}}
        training = Training(Job(config, tmp_path, tmp_path, tmp_path / "blobs"), pytest.fail, broken)
        training.give([])
        await asyncio.wait_for(ended.wait(), 60)
        training.close()

    asyncio.run(play())
    assert "no such" in told[0] or "nothing" in told[0]


@pytest.mark.parametrize(
    ("count", "which", "seen", "expected"),
    [
        (2, None, None, "0,1"),
        (0, None, None, ""),
        (1, None, "3,5", "3"),
        (None, ("1", "5"), "3, 5", "5"),
        (1, ("GPU-8932f937", "0"), None, "GPU-8932f937"),
        (9, (), "0", ""),
    ],
)
def test_a_run_sees_the_gpus_that_the_policy_allows(count, which, seen, expected):
    assert visible(count, which, seen) == expected


def test_the_child_sees_them_in_its_environment():
    """As CUDA would, which reads it when it is first asked for."""
    code = (
        "import os\nfrom coterie.experiment.hosting import _limit\n"
        "_limit({'gpu': 1, 'gpus': ('2', '3'), 'gpu_memory': 0.5})\nprint(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,3"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


def test_a_share_of_gpu_memory_is_set_for_each_device(monkeypatch):
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *of: told.append(of))
    _limit({"gpu_memory": 0.5})
    assert told == [(0.5, 0), (0.5, 1)]

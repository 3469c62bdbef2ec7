"""Laws 1 and 2: one definition, every backend, any order of arrival, the same bits."""

import asyncio
import json
import os
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from coterie.core import Cancel, Lost, Reply, Task, drive, fold_task, interleave, trees
from coterie.core.codec import decode, encode
from coterie.core.gather import awaits
from coterie.experiment import assemble, run
from coterie.schedules.synchronous import POOL
from coterie.storage import Memories

SYNCHRONOUS = ["synchronous", "adam", "scaffold", "hierarchical", "krum", "gossip", "batchnorm"]


def over_the_wire(tree):
    """What arrives when only JSON text and raw bytes are sent."""
    structure, tensors = encode(tree)
    raw = {name: (bytes(trees.raw_bytes(t)), t.dtype, t.shape) for name, t in tensors.items()}
    back = {
        name: (
            torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        ).reshape(shape)
        for name, (data, dtype, shape) in raw.items()
    }
    return decode(json.loads(json.dumps(structure)), back)


class Wire:
    """Another backend: concurrent workers, serialised messages, replies in a scrambled order."""

    def __init__(self, parts, seed):
        site = parts.site(Memories())
        self.site, self.device = site, parts.backend(site, None).device
        fold = partial(fold_task, aggregator=parts.algorithm.aggregator)
        self.relays = {name: interleave(fold) for name in (*parts.schedule.relays, POOL)}
        for relay in self.relays.values():
            next(relay)
        self.draw, self.queue, self.above = random.Random(seed), [], {}

    def send(self, actions, node=""):
        for action in actions:
            if isinstance(action, Task) and action.client in self.relays:
                self.above[action.id] = node
                self.tell(action.client, over_the_wire(action))
            elif isinstance(action, Task):
                self.queue.append((node, over_the_wire(action)))
            elif isinstance(action, Reply):
                self.queue.append((self.above.pop(action.task.id), over_the_wire(action)))
            elif isinstance(action, Cancel):
                self.queue = [
                    (n, q) for n, q in self.queue if not (isinstance(q, Task) and q.id == action.id)
                ]

    def tell(self, node, event):
        actions = self.relays[node].send(event)
        self.send(actions, node)
        if not awaits(actions):
            self.tell(node, None)

    async def event(self):
        while True:
            await asyncio.sleep(0)
            node, what = self.queue.pop(self.draw.randrange(len(self.queue)))
            if isinstance(what, Task):
                what = Lost(what, "gone") if self.device(what, 0.0).lost else over_the_wire(self.site(what))
            if node == "":
                return 0.0, what
            self.tell(node, what)


@pytest.mark.parametrize("kind", SYNCHRONOUS)
def test_a_serialised_scrambled_backend_ends_with_the_same_bits(kind, experiment, tmp_path, unreported):
    config = experiment(kind)
    if kind == "hierarchical":  # the wire backend has no clock, so no deadline
        config = experiment(kind, schedule={k: v for k, v in config.schedule.items() if k != "deadline"})
    reference = run(config, out=tmp_path / "run").model_digest
    for seed in range(3):
        parts = assemble(config)
        state = parts.algorithm.init(parts.initial)
        plan = parts.schedule(parts.algorithm, state, parts.population.clients)
        state = asyncio.run(drive(plan, Wire(parts, seed)))
        assert trees.digest(state["model"]) == reference


@pytest.mark.parametrize("groups", [1, 2, 9])
@pytest.mark.parametrize("kind", ["synchronous", "scaffold", "krum", "batchnorm"])
def test_two_levels_equal_the_flat_run(kind, groups, experiment, tmp_path, unreported):
    flat = experiment(kind)
    schedule = {**flat.schedule, "deadline": 2.0}
    flat = run(experiment(kind, schedule=schedule), out=tmp_path / "flat")
    deep = {**schedule, "kind": "hierarchical", "groups": groups}
    assert run(experiment(kind, schedule=deep), out=tmp_path / "deep").model_digest == flat.model_digest


@pytest.mark.parametrize("trainer", ["loop", "vectorised"])
@pytest.mark.parametrize("kind", ["synchronous", "scaffold"])
def test_worker_processes_end_with_the_same_bits(kind, trainer, experiment, tmp_path, unreported):
    digests = [
        run(
            experiment(kind, backend={"trainer": trainer, "workers": workers}), out=tmp_path / str(workers)
        ).model_digest
        for workers in (1, 2)
    ]
    assert digests[0] == digests[1]


SCRIPT = """
import sys, torch, random, numpy
seed = int(sys.argv[2]); torch.manual_seed(seed); random.seed(seed); numpy.random.seed(seed)
import coterie as ct
print(ct.run(sys.argv[1], out=sys.argv[3]).model_digest)
"""


def test_two_processes_end_with_the_same_bits(experiment, tmp_path):
    from coterie.experiment import to_toml

    (tmp_path / "c.toml").write_text(to_toml(experiment("batchnorm")))
    digests = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, tmp_path / "c.toml", str(n), tmp_path / str(n)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(n)},
        ).stdout
        for n in (1, 2)
    ]
    assert digests[0] == digests[1]
    assert digests[0].startswith("sha256:")


def test_global_generators_are_neither_read_nor_moved(experiment, tmp_path, unreported):
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
        digests.append(run(experiment("batchnorm"), out=tmp_path / str(seed)).model_digest)
        after = (torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert digests[0] == digests[1]


def test_another_seed_ends_with_other_bits(experiment, tmp_path, unreported):
    runs = [run(experiment("synchronous", seed=seed), out=tmp_path / str(seed)) for seed in (3, 4)]
    assert runs[0].model_digest != runs[1].model_digest

"""The vectorised trainer against the loop, client by client; what it refuses, and what it survives."""

import logging
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie import models
from coterie.algorithms import (
    Local,
    adagrad,
    adam,
    adamw,
    dpsgd,
    fedadam,
    fedasync,
    fedavg,
    fedavgm,
    fedbuff,
    fedprox,
    fedsgd,
    scaffold,
    sgd,
    yogi,
)
from coterie.backends import Site
from coterie.core import Lost, Task, derive, rng, seeded, trees
from coterie.core.packing import pack
from coterie.data import ClientData, Held
from coterie.data.idx import read_idx
from coterie.data.partitions import dirichlet
from coterie.data.types import Examples
from coterie.storage import Memories
from coterie.trainers import Loop, Problem, Vectorised, vectorised
from worlds import KEY

SEED = 23
SIZES = (14, 11, 9)  # one of the shapes that these make comes often enough to be recorded, two do not
LOCAL = Local(lr=0.05, batch_size=4, epochs=2)


def learnable(sizes=SIZES, shape=(5,), *, classes=3, dtype=torch.float64, name="data"):
    """Clients of one concept: the class is the largest of some fixed linear scores, and the client's noise."""
    rule = rng(derive(SEED, "rule", *shape)).normal(size=(int(np.prod(shape)), classes))
    people = []
    for index, n in enumerate(sizes):
        draw = rng(derive(SEED, name, index))
        x = draw.normal(size=(n, *shape))
        scores = x.reshape(n, -1) @ rule + draw.normal(size=(n, classes))
        rows = torch.from_numpy(x).to(dtype), torch.from_numpy(scores.argmax(1))
        people.append(ClientData(rows, rows, weight=index + 0.5))
    return people


def characters(sizes=SIZES, *, length=6, vocabulary=7):
    people = []
    for index, n in enumerate(sizes):
        x = torch.from_numpy(rng(derive(SEED, "text", index)).integers(0, vocabulary, size=(n, length)))
        people.append(ClientData((x, (x + 1) % vocabulary), (x, x)))
    return people


def numbers(sizes=SIZES, *, dtype=torch.float64):
    people = []
    for index, n in enumerate(sizes):
        draw = rng(derive(SEED, "numbers", index))
        x = draw.normal(size=(n, 5))
        rows = torch.from_numpy(x).to(dtype), torch.from_numpy(np.sin(x.sum(1))).to(dtype)
        people.append(ClientData(rows, rows))
    return people


class Model(nn.Module):
    """A forward written as a function of its layers."""

    def __init__(self, forward, *layers):
        super().__init__()
        self.layers, self.written = nn.ModuleList(layers), forward

    def forward(self, x):
        return self.written(x, *self.layers)


def made(build, dtype=torch.float64):
    with seeded(derive(SEED, "model")):
        return build().to(dtype)


def dense(dtype=torch.float64):
    return made(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), dtype)


def tasks_of(algorithm, problem, count, version=0):
    """One task for each of `count` clients, of one server state."""
    down, config = algorithm.broadcast(algorithm.init(problem.model())), algorithm.local(version)
    return [Task(i, f"client-{i}", version, version, down, config=config) for i in range(count)]


def trained(trainer, algorithm, tasks, memories, datas):
    """What fit_block made of each client: {id: (up, memory, weight, metrics, samples)}."""
    found = {}
    for block, after in trainer.fit_block(algorithm, tasks, memories, datas):
        for row, task in enumerate(block.tasks):
            pick = lambda leaf, row=row: leaf[row].clone()  # noqa: E731
            found[task.id] = (
                trees.map_tree(pick, block.ups),
                None if after is None else trees.map_tree(pick, after),
                block.weights[row],
                {name: values[row] for name, values in block.metrics.items()},
                block.samples[row],
            )
    assert sorted(found) == sorted(task.id for task in tasks)
    return found


def flat(tree):
    leaves = [leaf.double().flatten() for _, leaf in trees.named_leaves(tree) if leaf.is_floating_point()]
    return torch.cat(leaves) if leaves else torch.zeros(1)


def distance(one, other):
    """Norm of the difference, relative to that of `other`."""
    return float((flat(one) - flat(other)).norm() / flat(other).norm().clamp(min=1e-30))


def agree(
    module,
    algorithm,
    datas,
    *,
    task="classification",
    tolerance=1e-10,
    memories=None,
    version=0,
    tasks=None,
    precision="float32",
):
    """fit_block equals the loop on every client; returns the problem and what was made."""
    problem = Problem(module, task)
    tasks = tasks or tasks_of(algorithm, problem, len(datas), version)
    memories = memories or [None] * len(datas)
    trainer = Vectorised(problem, SEED, block=max(2, len(datas)), precision=precision)
    found, loop = trained(trainer, algorithm, tasks, memories, datas), Loop(problem, SEED)
    for each, memory, data in zip(tasks, memories, datas, strict=True):
        reply, left = loop.fit(algorithm, each, memory, data)
        up, kept, weight, metrics, samples = found[each.id]
        assert set(up) == set(reply.up)
        for part in set(up) - {"buffers"}:
            assert distance(up[part], reply.up[part]) <= tolerance, (each.client, part)
        buffers = [
            made["buffers"] if "buffers" in made else made["model"]["buffers"] for made in (up, reply.up)
        ]
        for (name, a), (_, b) in zip(*map(trees.named_leaves, buffers), strict=True):
            assert a.dtype == b.dtype, name
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance, msg=f"{each.client} {name}")
        assert [t.dtype for t in trees.leaves(up)] == [t.dtype for t in trees.leaves(reply.up)]
        assert (kept is None) == (left is None)
        if left is not None:
            assert distance(kept, left) <= 10 * tolerance
        assert (weight, samples) == (reply.weight, reply.samples)
        assert metrics.keys() == reply.metrics.keys()
        assert metrics["loss"] == pytest.approx(reply.metrics["loss"], rel=max(tolerance, 1e-12))
    return problem, found


ALGORITHMS = {
    "fedavg": fedavg(LOCAL),
    "uniform": fedavg(LOCAL, weighting="uniform"),
    "own weights": fedavg(LOCAL, weighting="client"),
    "fedprox": fedprox(LOCAL, mu=0.7),
    "fedsgd": fedsgd(),
    "scaffold": scaffold(LOCAL, population=9),
    "fedadam": fedadam(LOCAL),
    "fedavgm": fedavgm(LOCAL),
    "fedbuff": fedbuff(LOCAL),
    "fedasync": fedasync(LOCAL),
    "dpsgd": dpsgd(LOCAL),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm(name):
    agree(dense(), ALGORITHMS[name], learnable())


@pytest.mark.parametrize(
    "optimizer",
    [
        sgd,
        lambda lr: sgd(lr, momentum=0.9),
        lambda lr: sgd(lr, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda lr: sgd(lr, weight_decay=0.1),
        adam,
        lambda lr: adam(lr, weight_decay=0.1, bias_correction=False, initial=1e-3),
        adamw,
        adagrad,
        lambda lr: adagrad(lr, beta1=0.5, weight_decay=0.1),
        yogi,
    ],
)
def test_every_client_optimiser(optimizer):
    agree(dense(), fedavg(replace(LOCAL, optimizer=optimizer)), learnable())


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 1},
        {"epochs": 5, "batch_size": 7},
        {"steps": 1},
        {"steps": 7},
        {"batch_size": None},
        {"batch_size": 1, "epochs": 1},
        {"batch_size": 1000},
    ],
)
def test_how_long_clients_train(options):
    """SCAFFOLD's memory is divided by the number of steps."""
    agree(dense(), scaffold(replace(LOCAL, **options), population=9), learnable())


def test_the_learning_rate_of_later_versions():
    algorithm = fedavg(replace(LOCAL, lr_decay=0.5))
    _, early = agree(dense(), algorithm, learnable())
    problem, late = agree(dense(), algorithm, learnable(), version=3)
    assert float(flat(late[0][0]).norm()) < 0.3 * float(flat(early[0][0]).norm())
    trainer = Vectorised(problem, SEED, block=3)  # one trainer, two versions: no rate is baked in
    trained(trainer, algorithm, tasks_of(algorithm, problem, 3), [None] * 3, learnable())
    again = trained(trainer, algorithm, tasks_of(algorithm, problem, 3, 3), [None] * 3, learnable())
    assert all(trees.digest(again[i][0]) == trees.digest(late[i][0]) for i in range(3))


def test_several_algorithms_may_share_a_trainer(monkeypatch):
    """A step belongs to its algorithm, even when another was let go whose address is used again."""
    monkeypatch.setattr("coterie.trainers.vectorised.id", lambda _: 4711, raising=False)
    problem, datas = Problem(dense()), learnable()
    trainer = Vectorised(problem, SEED, block=3)
    for momentum in (0.9, 0.5):
        algorithm = fedavg(replace(LOCAL, optimizer=lambda lr, m=momentum: sgd(lr, momentum=m)))
        tasks = tasks_of(algorithm, problem, 3)
        found = trained(trainer, algorithm, tasks, [None] * 3, datas)
        reply, _ = Loop(problem, SEED).fit(algorithm, tasks[0], None, datas[0])
        assert distance(found[0][0], reply.up) < 1e-10, momentum


def test_scaffold_with_old_and_new_memories_in_one_block():
    algorithm, problem = scaffold(LOCAL, population=9), Problem(dense())
    _, first = agree(dense(), algorithm, learnable())
    state = algorithm.init(problem.model())
    state["control"] = first[0][1]
    down = algorithm.broadcast(state)
    tasks = [Task(10 + i, f"client-{i}", 1, 1, down, config=algorithm.local(1)) for i in range(3)]
    agree(dense(), algorithm, learnable(), memories=[first[0][1], None, first[2][1]], tasks=tasks)


def test_every_client_from_a_model_of_its_own():
    """As in gossip."""
    algorithm, problem = dpsgd(replace(LOCAL, steps=4)), Problem(dense())
    tasks = [
        replace_down(task, trees.map_tree(lambda leaf, i=i: leaf * (1 + i), task.down))
        for i, task in enumerate(tasks_of(algorithm, problem, 3))
    ]
    agree(dense(), algorithm, learnable(), tasks=tasks)


def replace_down(task, down):
    return Task(task.id, task.client, task.version, task.round, down, task.kind, task.config)


def test_one_client_alone():
    agree(dense(), ALGORITHMS["scaffold"], learnable((9,)))
    problem, algorithm, data = Problem(dense()), ALGORITHMS["scaffold"], learnable((9,))[0]
    (task,) = tasks_of(algorithm, problem, 1)
    reply, memory = Vectorised(problem, SEED).fit(algorithm, task, None, data)
    theirs, kept = Loop(problem, SEED).fit(algorithm, task, None, data)
    assert distance(reply.up, theirs.up) < 1e-10
    assert distance(memory, kept) < 1e-10
    assert (reply.weight, reply.samples, reply.task) == (theirs.weight, theirs.samples, task)


def test_many_unequal_clients():
    """Every number of steps from 1 to 7, in any order, with last batches of every size."""
    sizes = [int(n) for n in rng(derive(SEED, "many")).permutation(np.arange(1, 22))]
    agree(dense(), fedavg(replace(LOCAL, epochs=1, batch_size=3)), learnable(sizes))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embed(x)))).transpose(1, 2)


class Counting(nn.Module):
    """Buffers of its own: one that changes, in floats and in whole numbers, and one that does not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("scale", torch.full((5,), 2.0))
        self.register_buffer("norm", torch.tensor(1.0))

    def forward(self, x):
        self.calls += 1
        self.norm.mul_(0.5).add_(self.linear.weight.detach().norm())
        return self.linear(x * self.scale)


class Raw(nn.Module):
    """Parameters without modules, and a 0-d one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(3, 6))
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return torch.einsum("bi,oi->bo", torch.tanh(x @ self.a), self.b) * self.temperature.exp()


def functional(x, conv, head):
    h = F.max_pool2d(F.relu(conv(x)), 3, stride=2, padding=1, ceil_mode=True)
    return head(F.avg_pool2d(F.pad(h, (1, 1)), 2).flatten(1))


def residual(x, first, second, head):
    h = F.relu(first(x))
    h = h + second(h)
    return head(F.max_pool2d(F.relu(h), 2).flatten(1))


def conv(*options, inside=72, **more):
    return nn.Conv2d(*options, **more), nn.Flatten(), nn.Linear(inside, 3)


IMAGE, TEXT = {"input_shape": (1, 8, 8), "outputs": 3}, {"input_shape": (6,), "outputs": 7}
LARGER = {"input_shape": (1, 16, 16), "outputs": 3}
IMAGES = {
    "softmax": lambda: models.softmax(**IMAGE),
    "mlp": lambda: models.mlp(**IMAGE, hidden=[7, 6]),
    "cnn": lambda: models.cnn(**IMAGE, channels=[3, 4], hidden=6),
    "cnn group": lambda: models.cnn(**IMAGE, channels=[4, 6], hidden=6, norm="group"),
    "cnn batch": lambda: models.cnn(**IMAGE, channels=[3, 4], hidden=6, norm="batch"),
    "mcmahan_cnn": lambda: models.mcmahan_cnn(**IMAGE),
    "functional": lambda: Model(functional, nn.Conv2d(1, 3, 3), nn.Linear(18, 3)),
    "residual": lambda: Model(residual, nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(27, 3)),
    "no bias": lambda: nn.Sequential(*conv(1, 2, 3, bias=False)),
    "strided": lambda: nn.Sequential(*conv(1, 2, 3, stride=2, padding=2, inside=50)),
    "dilated": lambda: nn.Sequential(*conv(1, 2, 3, dilation=2, inside=32)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), *conv(4, 6, 3, groups=2, inside=96)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *conv(4, 4, 3, groups=4, inside=64)),
    "padded as before": lambda: nn.Sequential(*conv(1, 2, 3, padding="same", inside=128)),
    "circular": lambda: nn.Sequential(*conv(1, 2, 3, padding=1, padding_mode="circular", inside=128)),
    "layer norm": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.LayerNorm([2, 6, 6]), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    ),
    "batch norm first": lambda: nn.Sequential(nn.BatchNorm2d(1), *conv(1, 2, 3)),
    "batch norm untracked": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False),
        nn.BatchNorm2d(2, track_running_stats=False, affine=False),
        nn.Flatten(),
        nn.Linear(72, 3),
    ),
    "pooled to one": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(1, 1, 2, 2), nn.Flatten(), nn.Linear(256, 3)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_models_of_images(name):
    """Some with recorded steps, which take a while to record; all with steps that are not."""
    if name in ("cnn", "cnn group", "cnn batch", "residual"):
        agree(made(IMAGES[name]), fedavg(LOCAL), learnable(shape=(1, 8, 8)))
    else:
        agree(made(IMAGES[name]), fedavg(replace(LOCAL, epochs=1)), learnable((10, 7), (1, 8, 8)))


def test_niid_cnn():
    agree(
        made(lambda: models.niid_cnn(**LARGER)),
        fedavg(replace(LOCAL, epochs=1)),
        learnable((9, 5), (1, 16, 16)),
    )


def recurrent(layer):
    return Model(
        lambda x, rnn, head: head(rnn(x.unsqueeze(2))[0][:, -1]),
        layer(1, 4, batch_first=True),
        nn.Linear(4, 3),
    )


TABLES = {
    "GRU": lambda: recurrent(models.GRU),
    "LSTM": lambda: recurrent(models.LSTM),
    "nn.GRU": lambda: recurrent(nn.GRU),
    "conv1d": lambda: Model(
        lambda x, a, b, head: head(b(torch.relu(a(x.unsqueeze(1)))).flatten(1)),
        nn.Conv1d(1, 4, 3, padding=1), nn.Conv1d(4, 2, 2, stride=2, groups=2), nn.Linear(4, 3),
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
    "batch norm of sequences": lambda: Model(
        lambda x, conv, norm, head: head(norm(conv(x.unsqueeze(1))).flatten(1)),
        nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3, momentum=0.3), nn.Linear(12, 3),
    ),
    "one layer twice": lambda: Model(
        lambda x, a, b, c: c(torch.tanh(b(torch.tanh(b(a(x)))))), nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
    ),
    "one batch norm twice": lambda: Model(
        lambda x, a, b, c: c(torch.tanh(b(torch.tanh(b(a(x)))))),
        nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 3),
    ),
    "own buffers": Counting,
    "raw parameters": Raw,
    "writing in place": lambda: Model(writing, nn.Linear(5, 6), nn.Linear(6, 3)),
    "dropout of nothing": lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.0), nn.Linear(6, 3)),
    "a layer that nobody uses": lambda: Model(lambda x, a, b: a(x), nn.Linear(5, 3), nn.Linear(5, 3)),
}  # fmt: skip


def writing(x, first, second):
    """Two fresh tensors of one shape, both written into."""
    h = first(x)
    left, right = torch.zeros_like(h), torch.zeros_like(h)
    left[:, 0] = h[:, 0]
    right[:, 1:] = h[:, 1:] ** 2
    return second(left + 2 * right)


@pytest.mark.parametrize("name", TABLES)
def test_models_of_tables(name):
    agree(made(TABLES[name]), fedavg(LOCAL), learnable())


def test_an_lstm_of_torch_is_trained_or_refused_with_its_replacement():
    problem, datas = Problem(made(lambda: recurrent(nn.LSTM))), learnable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Vectorised(problem, SEED).obstacle(fedavg(LOCAL), [datas[0], datas[-1]])
        if found is None:
            agree(made(lambda: recurrent(nn.LSTM)), fedavg(replace(LOCAL, epochs=1)), datas)
        else:
            assert "coterie.models.LSTM" in found[1]


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.char_gru(**TEXT, embedding=3, hidden=5),
        lambda: models.char_gru(**TEXT, embedding=3, hidden=5, layers=2),
        lambda: models.transformer(**TEXT, width=8, heads=2, layers=1),
        Tied,
    ],
)
def test_models_of_whole_numbers(build):
    agree(made(build), fedavg(LOCAL), characters())


def test_bytes_as_inputs():
    datas = [
        ClientData(((d.train[0].abs() * 60).to(torch.uint8), d.train[1]), d.test, d.weight)
        for d in learnable()
    ]
    agree(
        made(lambda: Model(lambda x, a: a(x / 255), nn.Linear(5, 3)), torch.float32),
        fedavg(LOCAL),
        datas,
        tolerance=1e-5,
    )


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_regression(shape):
    datas = [
        ClientData((x, torch.stack([y] * 2, 1) if shape == (2,) else y.view(-1, *shape)), (x, y))
        for (x, y) in (data.train for data in numbers())
    ]
    head = nn.Linear(6, 2 if shape == (2,) else 1)
    agree(
        made(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), head)), fedavg(LOCAL), datas, task="regression"
    )


def test_frozen_parameters_are_neither_copied_nor_learned():
    def build():
        module = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 5), nn.Linear(5, 3)
        )
        module[0].requires_grad_(False)
        module[4].bias.requires_grad_(False)
        return module

    problem, found = agree(made(build), fedavg(LOCAL), learnable(shape=(1, 8, 8)))
    assert set(found[0][0]["delta"]) == {"4.weight", "5.weight", "5.bias"}
    assert torch.equal(problem.training[0].weight, made(build)[0].weight)


FLOAT32 = {
    "mlp": lambda: models.mlp(**IMAGE, hidden=[20]),
    "cnn": lambda: models.cnn(**IMAGE, channels=[3, 4], hidden=6),
    "batch": lambda: models.cnn(**IMAGE, channels=[4], hidden=6, norm="batch"),
}


@pytest.mark.parametrize("name", FLOAT32)
def test_one_epoch_in_float32_is_within_1e_5(name):
    datas = learnable((30, 25, 12), (1, 8, 8), dtype=torch.float32)
    agree(made(FLOAT32[name], torch.float32), fedavg(Local(lr=0.05, batch_size=5)), datas, tolerance=1e-5)


@pytest.mark.parametrize(
    "build", [lambda: models.char_gru(**TEXT, hidden=6), lambda: models.transformer(**TEXT, width=8, heads=2)]
)
def test_text_in_float32(build):
    agree(made(build, torch.float32), fedavg(Local(lr=0.05, batch_size=5)), characters(), tolerance=1e-5)


def test_bfloat16_is_near():
    """Updates within a few percent; what comes back is float32."""
    for build, datas in (
        (
            lambda: models.cnn(**IMAGE, channels=[4], hidden=6),
            learnable(shape=(1, 8, 8), dtype=torch.float32),
        ),
        (lambda: models.char_gru(**TEXT, hidden=6), characters()),
    ):
        problem, algorithm = Problem(made(build, torch.float32)), fedavg(Local(lr=0.05, batch_size=4))
        trainer = Vectorised(problem, SEED, block=3, precision="bfloat16")
        tasks = tasks_of(algorithm, problem, 3)
        found = trained(trainer, algorithm, tasks, [None] * 3, datas)
        for task, data in zip(tasks, datas, strict=True):
            reply, _ = Loop(problem, SEED).fit(algorithm, task, None, data)
            assert 1e-6 < distance(found[task.id][0], reply.up) < 0.05
            assert {leaf.dtype for leaf in trees.leaves(found[task.id][0])} == {torch.float32}


# What rests on a gradient that is zero but for rounding: a bias before BatchNorm, the keys' bias of attention.
NOISY = {
    "batch": (lambda: models.cnn(**IMAGE, channels=[4], hidden=6, norm="batch"), (1, 8, 8)),
    "attention": (lambda: models.transformer(**TEXT, width=8, heads=2, layers=1), None),
}


@pytest.mark.parametrize("name", NOISY)
def test_adam_on_parameters_without_a_gradient_is_no_reason_to_refuse(name):
    """Adam makes whole steps of rounding errors, which nobody can reproduce, and which change no output."""
    build, shape = NOISY[name]
    datas = learnable((30, 30), shape, dtype=torch.float32) if shape else characters((30, 30))
    problem, algorithm = Problem(made(build, torch.float32)), fedavg(Local(adam, lr=0.01, batch_size=5))
    trainer = Vectorised(problem, SEED, block=2)
    assert trainer.obstacle(algorithm, datas) is None
    found = trained(trainer, algorithm, tasks_of(algorithm, problem, 2), [None] * 2, datas)
    for task, data in zip(tasks_of(algorithm, problem, 2), datas, strict=True):
        reply, _ = Loop(problem, SEED).fit(algorithm, task, None, data)
        assert found[task.id][3]["loss"] == pytest.approx(reply.metrics["loss"], rel=1e-4)


class Masked(nn.Module):
    """Its first gradient shows which coins of a dropout fell on which side."""

    def __init__(self, width=400, p=0.3):
        super().__init__()
        self.w, self.p = nn.Parameter(torch.zeros(width)), p

    def forward(self, x):
        return F.dropout(self.w.expand(len(x), -1), self.p, self.training).sum(1)


def coins(clients, steps, *, width=400, round=0, row=1):
    """Which parameters moved in the last of some steps: {client: [width]}. Batches hold one row."""
    problem = Problem(Masked(width), "regression")
    updates = []
    for number in (steps - 1, steps):
        if number == 0:
            updates.append({client: torch.zeros(width) for client in clients})
            continue
        algorithm = fedavg(Local(lr=0.01, batch_size=row, steps=number))
        down, config = algorithm.broadcast(algorithm.init(problem.model())), algorithm.local(0)
        tasks = [Task(i, client, round, round, down, config=config) for i, client in enumerate(clients)]
        x, y = torch.zeros(8, 1), torch.full((8,), 100.0)
        datas = [ClientData((x, y), (x, y))] * len(clients)
        found = trained(Vectorised(problem, SEED, block=16), algorithm, tasks, [None] * len(clients), datas)
        updates.append({task.client: found[task.id][0]["delta"]["w"] for task in tasks})
    before, after = updates
    return {client: (after[client] - before[client]).abs() > 1e-6 for client in clients}


def test_dropout_draws_are_independent_between_clients_steps_and_rounds():
    """Of the right rate; 5 standard deviations allowed, so less than one false alarm in 10,000 runs."""
    series = [each for step in (1, 2, 5) for each in coins(["a", "b", "c"], step).values()]
    series += coins(["a", "b"], 1, round=1).values()
    spread = 5 * (0.3 * 0.7 / 400) ** 0.5
    for index, one in enumerate(series):
        assert abs(float(one.double().mean()) - 0.7) < spread
        for other in series[:index]:
            both = float((one & other).double().mean())
            assert abs(both - 0.49) < 5 * (0.49 * 0.51 / 400) ** 0.5


def test_dropout_draws_do_not_depend_on_who_shares_the_block():
    alone = coins(["a"], 2)["a"]
    for company in (["a", "b"], ["z", "a"], ["y", "b", "x", "a", "c"]):
        assert torch.equal(coins(company, 2)["a"], alone)


def test_a_model_with_dropout_trains():
    module = made(lambda: nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Dropout(0.3), nn.Linear(40, 3)))
    problem, datas = Problem(module), learnable((200, 150, 40))
    algorithm = fedavg(Local(lr=0.3, batch_size=20, epochs=8))
    trainer = Vectorised(problem, SEED, block=3)
    assert trainer.obstacle(algorithm, datas[:2]) is None
    found = trained(trainer, algorithm, tasks_of(algorithm, problem, 3), [None] * 3, datas)
    for task, data in zip(tasks_of(algorithm, problem, 3), datas, strict=True):
        theirs = Loop(problem, SEED).fit(algorithm, task, None, data)[0].metrics["loss"]
        assert found[task.id][3]["loss"] == pytest.approx(theirs, rel=0.15)


def noisy(x, layer):
    """Two draws of one shape that must differ."""
    h = layer(x)
    return torch.cat([h + torch.rand_like(h), h - torch.rand_like(h)], 1)


@pytest.mark.parametrize(
    "draw", [torch.rand_like, torch.randn_like, lambda h: torch.empty_like(h).exponential_()]
)
def test_two_draws_of_a_models_own_are_two(draw):
    """Their difference is the whole loss: were they one, it would be 0."""
    x = torch.zeros(24, 5)
    data = ClientData((x, torch.zeros(24)), (x, x))
    module = Model(lambda x, layer: (draw(x) - draw(x)).mean(1) + 0 * layer(x)[:, 0], nn.Linear(5, 1))
    problem, algorithm = Problem(module, "regression"), fedavg(Local(lr=0.1, batch_size=4))
    found = trained(
        Vectorised(problem, SEED), algorithm, tasks_of(algorithm, problem, 2), [None] * 2, [data, data]
    )
    assert found[0][3]["loss"] > 0.01
    assert found[0][3]["loss"] != found[1][3]["loss"]


def digests(found):
    return {i: trees.digest({"up": up, "memory": memory or {}}) for i, (up, memory, *_) in found.items()}


REPEATED = {
    "cnn": lambda: made(lambda: models.cnn(**IMAGE, channels=[3], hidden=6, norm="batch"), torch.float32),
    "gru": lambda: made(lambda: models.char_gru(**TEXT, hidden=6), torch.float32),
    "dropout": lambda: made(lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Linear(8, 3))),
    "own draws": lambda: made(lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Dropout1d(0.4), nn.Flatten(), nn.Linear(5, 3))),
    "noise": lambda: made(lambda: Model(noisy, nn.Linear(5, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_the_same_block_makes_the_same_bits_whatever_was_trained_before(name):
    """A resumed run starts with no recorded graph and no history."""
    problem, algorithm = Problem(REPEATED[name]()), scaffold(LOCAL, population=9)
    kinds = {"cnn": lambda sizes: learnable(sizes, (1, 8, 8), dtype=torch.float32), "gru": characters}
    some = kinds.get(name, learnable)
    other, block = [
        (tasks_of(algorithm, problem, len(sizes), version), some(sizes))
        for version, sizes in enumerate([(22, 18, 12, 3), SIZES])
    ]

    def play(*blocks):
        trainer = Vectorised(problem, SEED, block=4)
        return [digests(trained(trainer, algorithm, *_args(each))) for each in blocks]

    first, second, third, _ = play(block, block, other, block)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        before, after = play(other, block)
    assert first == second == after
    assert before == third


def _args(block):
    tasks, datas = block
    return tasks, [None] * len(tasks), datas


def test_many_unequal_clients_in_one_block():
    """More than a few clients leave the block one after the other, between full and partial batches."""
    agree(dense(), fedavg(LOCAL), learnable([3 + 7 * index % 38 for index in range(24)]))


def test_global_generators_are_neither_read_nor_moved():
    for name in ("dropout", "noise"):
        problem, algorithm = Problem(REPEATED[name]()), fedavg(LOCAL)
        before = torch.random.get_rng_state()
        trainer = Vectorised(problem, SEED, block=4)
        trainer.obstacle(algorithm, learnable()[:2])
        trained(trainer, algorithm, *_args((tasks_of(algorithm, problem, 3), learnable())))
        assert torch.equal(before, torch.random.get_rng_state())


def test_nothing_that_comes_in_is_written_into():
    problem, algorithm = Problem(REPEATED["cnn"]()), scaffold(LOCAL, population=9)
    datas = learnable(shape=(1, 8, 8), dtype=torch.float32)
    tasks = tasks_of(algorithm, problem, 3)
    memories = [trees.map_tree(torch.ones_like, tasks[0].down["control"]), None, None]
    given = {"down": tasks[0].down, "m": memories[0], "x": [d.train for d in datas], "model": problem.model()}
    before = trees.digest(given)
    trained(Vectorised(problem, SEED, block=4), algorithm, tasks, memories, datas)
    assert trees.digest({**given, "model": problem.model()}) == before


PROCESS = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from trainers.test_vectorised import *
problem, algorithm = Problem(REPEATED["cnn"]()), scaffold(LOCAL, population=9)
datas = learnable(shape=(1, 8, 8), dtype=torch.float32)
found = trained(Vectorised(problem, SEED, block=4), algorithm, tasks_of(algorithm, problem, 3), [None] * 3, datas)
print(digests(found))
"""


def python(script, **environment):
    """Run a script that may import this file."""
    folder = str(Path(__file__).parents[1])
    path = os.pathsep.join([folder, *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_make_the_same_bits():
    """Whatever order a process hashes in."""
    problem, algorithm = Problem(REPEATED["cnn"]()), scaffold(LOCAL, population=9)
    datas = learnable(shape=(1, 8, 8), dtype=torch.float32)
    trainer = Vectorised(problem, SEED, block=4)
    here = digests(trained(trainer, algorithm, tasks_of(algorithm, problem, 3), [None] * 3, datas))
    assert python(PROCESS, PYTHONHASHSEED="7").strip() == str(here)


def branching(x, layer):
    return layer(x) if x.mean() > 0 else -layer(x)


class Remembering(nn.Module):
    """Adds what it saw in the call before: a state that is no buffer."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(5, 3), torch.zeros(3, dtype=torch.float64)

    def forward(self, x):
        out = self.linear(x) + 0.5 * self.seen
        self.seen = out.detach().mean(0)
        return out


class Numbering(nn.Module):
    """Does something else in every call."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(5, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


REFUSED = {
    "branch": (lambda: Model(branching, nn.Linear(5, 3)), "data-dependent|control flow", "torch.where"),
    "item": (lambda: Model(lambda x, a: a(x) * x.abs().max().item(), nn.Linear(5, 3)), r"\.item\(\)", ""),
    "momentum": (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, momentum=None)), "BatchNorm1d", "momentum"),
    "rows": (lambda: Model(lambda x, a, b: b(torch.tanh(a(x) - a(x).mean(0))), nn.Linear(5, 6), nn.Linear(6, 3)), "", "rows"),
    "statistics": (lambda: Model(lambda x, a, n, b: b(n(a(x).view(len(x), 2, 3)).flatten(1)), nn.Linear(5, 6), nn.InstanceNorm1d(2, track_running_stats=True), nn.Linear(6, 3)), "", ""),
    "remembering": (Remembering, "", ""),
    "numbering": (Numbering, "", ""),
    "time as rows": (lambda: Model(lambda x, n, b: b(n(x.reshape(-1, 1)).reshape(-1, 5)), nn.BatchNorm1d(1), nn.Linear(5, 3)), "", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_batched_is_refused_before_training(name):
    """With the reason and what to do. Both clients whose data is tried out have full batches."""
    build, reason, hint = REFUSED[name]
    trainer, datas = Vectorised(Problem(made(build)), SEED, block=3), learnable((14, 9))
    found = trainer.obstacle(fedavg(LOCAL), datas)
    assert found is not None
    assert re.search(reason, found[0])
    assert hint in found[1]
    assert len(found[0].splitlines()) == 1
    assert len(found[0]) < 300


FINE = {
    **{name: TABLES[name] for name in ("writing in place", "one batch norm twice", "own buffers")},
    **{name: REPEATED[name] for name in ("dropout", "noise")},
}


@pytest.mark.parametrize("name", FINE)
def test_what_can_be_batched_is_not_refused(name):
    trainer = Vectorised(Problem(made(FINE[name])), SEED, block=3)
    assert trainer.obstacle(fedavg(LOCAL), learnable((2, 14))) is None
    assert trainer.told()


def test_an_algorithm_that_keeps_the_params_before_the_step():
    """The step may write the new params over the old ones; whoever kept a view of those must not see it."""
    base = fedavg(LOCAL)
    work = base.client_work

    def start(*given):
        params, carry = work.start(*given)
        return params, {**carry, "before": trees.map_tree(torch.zeros_like, params)}

    def gradient(objective, params, *rest):
        grads, carry = work.gradient(objective, params, *rest)
        return grads, {**carry, "before": trees.map_tree(lambda p: p.detach().view_as(p), params)}

    def finish(params, down, carry, steps):
        up, memory = work.finish(params, down, carry, steps)
        return {**up, "last": trees.subtract(params, carry["before"])}, memory

    agree(
        dense(),
        replace(base, client_work=work._replace(start=start, gradient=gradient, finish=finish)),
        learnable(),
    )


def test_a_step_clipped_by_the_norm_of_the_whole_gradient():
    base = fedavg(LOCAL)
    work = base.client_work

    def gradient(*given):
        grads, carry = work.gradient(*given)
        norm = torch.sqrt(sum((leaf**2).sum() for leaf in trees.leaves(grads)))
        return trees.map_tree(lambda g: g * torch.clamp(0.1 / norm, max=1.0), grads), carry

    agree(dense(), replace(base, client_work=work._replace(gradient=gradient)), learnable())


def poisoned(datas, which, value=torch.nan):
    x, y = datas[which].train
    x = x.clone()
    x[0] = value
    return [*datas[:which], ClientData((x, y), (x, y)), *datas[which + 1 :]]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [4, None])
@pytest.mark.parametrize("build", [dense, TABLES["batch norm"]])
def test_a_client_with_nan_spoils_its_own_update_alone(which, batch_size, build):
    """As in the loop: its reply is not finite, and the server decides; the others' are what they were."""
    problem, algorithm = Problem(made(build)), fedavg(replace(LOCAL, batch_size=batch_size))
    datas = poisoned(learnable(), which)
    found = trained(
        Vectorised(problem, SEED, block=3), algorithm, *_args((tasks_of(algorithm, problem, 3), datas))
    )
    for task, data in zip(tasks_of(algorithm, problem, 3), datas, strict=True):
        reply, _ = Loop(problem, SEED).fit(algorithm, task, None, data)
        if task.id == which:
            assert not np.isfinite(reply.metrics["loss"])
            assert not torch.isfinite(flat(found[task.id][0])).all()
        else:
            assert distance(found[task.id][0], reply.up) < 1e-10


def held(datas, *, first=0.0):
    """The same clients as rows of one shuffled whole, behind a first row that is nobody's."""
    x, y = (torch.cat([data.train[half] for data in datas]) for half in (0, 1))
    order = torch.from_numpy(rng(derive(SEED, "held")).permutation(len(x)))
    whole = torch.cat([torch.full_like(x[:1], first), x[order]]), torch.cat([y[:1], y[order]])
    places, ends = order.argsort() + 1, np.cumsum([0, *(len(data.train[1]) for data in datas)])
    return [
        Held(*whole, places[start:end], places[:0], data.weight)
        for data, start, end in zip(datas, ends[:-1], ends[1:], strict=True)
    ]


@pytest.mark.parametrize("first", [0.0, torch.nan])
@pytest.mark.parametrize("build", [dense, TABLES["batch norm"]])
def test_clients_held_as_rows_of_one_whole_make_the_same_bits(build, first):
    """Whatever the rows of others hold."""
    problem, algorithm, datas = Problem(made(build)), fedavg(LOCAL, weighting="client"), learnable()
    tasks = tasks_of(algorithm, problem, 3)
    mine, theirs = (
        trained(Vectorised(problem, SEED, block=3), algorithm, tasks, [None] * 3, given)
        for given in (held(datas, first=first), datas)
    )
    assert digests(mine) == digests(theirs)
    assert [mine[i][2:] for i in range(3)] == [theirs[i][2:] for i in range(3)]


def test_a_client_that_diverges_is_no_reason_to_stop_the_run():
    """An lr far too large: the loop's reply is not finite, and so is the block's."""
    problem = Problem(made(lambda: nn.Linear(5, 1), torch.float32), "regression")
    algorithm, datas = fedavg(replace(LOCAL, lr=1e9)), numbers(dtype=torch.float32)
    tasks = tasks_of(algorithm, problem, 3)
    found = trained(Vectorised(problem, SEED, block=3), algorithm, tasks, [None] * 3, datas)
    for task, data in zip(tasks, datas, strict=True):
        reply, _ = Loop(problem, SEED).fit(algorithm, task, None, data)
        assert not torch.isfinite(flat(reply.up)).all()
        assert not torch.isfinite(flat(found[task.id][0])).all()


def site(trainer, algorithm, people, memories=None):
    return Site(algorithm, trainer, lambda *_: {}, people, memories or Memories(), lambda client: 10)


def broken(kind, datas):
    """client -> data, where client-1's is broken."""
    x, y = datas[1].train
    shapes = {
        "label": lambda: ClientData((x, y + 5), (x, y)),
        "narrow": lambda: ClientData((x[:, :3], y), (x, y)),
        "empty": lambda: ClientData((x[:0], y[:0]), (x, y)),
        "unweighted": lambda: ClientData((x, y), (x, y)),
    }

    def people(client):
        index = int(client.removeprefix("client-"))
        if index == 1 and kind == "missing":
            raise OSError("patient 17 is missing")
        return shapes[kind]() if index == 1 else datas[index]

    return people


@pytest.mark.parametrize("kind", ["missing", "label", "narrow", "empty", "unweighted"])
def test_a_client_whose_data_is_broken_is_lost_alone(kind):
    problem = Problem(dense())
    algorithm = fedavg(LOCAL, weighting="client")
    people, tasks = broken(kind, learnable()), tasks_of(algorithm, problem, 3)
    answers = site(Vectorised(problem, SEED, block=3), algorithm, people).answer(tasks)
    theirs = site(Loop(problem, SEED), algorithm, people).answer(tasks)
    assert [type(answer) for answer in answers] == [type(answer) for answer in theirs]
    assert isinstance(answers[1], Lost)
    assert answers[1].task is tasks[1]
    if kind in ("missing", "unweighted"):
        assert answers[1].reason == theirs[1].reason
    for mine, reference in ((answers[0], theirs[0]), (answers[2], theirs[2])):
        assert distance(mine.up, reference.up) < 1e-10


def test_a_character_beyond_the_vocabulary_loses_its_client_alone():
    datas = characters()
    x, y = datas[1].train
    x = x.clone()
    x[2, 3] = 7
    datas[1] = ClientData((x, y), (x, y))
    problem, algorithm = Problem(made(lambda: models.char_gru(**TEXT, hidden=5))), fedavg(LOCAL)
    tasks = tasks_of(algorithm, problem, 3)
    answers = [
        site(trainer(problem, SEED), algorithm, lambda client: datas[int(client[-1])]).answer(tasks)
        for trainer in (lambda *args: Vectorised(*args, block=3), Loop)
    ]
    assert [type(a) for a in answers[0]] == [type(a) for a in answers[1]]
    for mine, theirs in zip(answers[0], answers[1], strict=True):
        if not isinstance(theirs, Lost):
            assert distance(mine.up, theirs.up) < 1e-10


def test_a_single_row_before_batch_norm_loses_its_client_alone():
    """torch refuses to normalise over one value; a block must not make NaN of it."""
    datas = learnable((14, 1, 5))
    problem, algorithm = Problem(made(TABLES["batch norm"])), fedavg(LOCAL)
    tasks = tasks_of(algorithm, problem, 3)
    answers = [
        site(trainer(problem, SEED), algorithm, lambda client: datas[int(client[-1])]).answer(tasks)
        for trainer in (lambda *args: Vectorised(*args, block=3), Loop)
    ]
    assert [type(a) for a in answers[0]] == [type(a) for a in answers[1]]
    assert answers[0][1].reason == answers[1][1].reason


def test_memories_are_kept_for_each_client():
    problem, algorithm = Problem(dense()), scaffold(LOCAL, population=9)
    datas, kept = learnable(), {}
    for name, trainer in (("loop", Loop(problem, SEED)), ("block", Vectorised(problem, SEED, block=3))):
        memories = Memories()
        site(trainer, algorithm, lambda client: datas[int(client[-1])], memories).answer(
            tasks_of(algorithm, problem, 3)
        )
        kept[name] = [memories.get(f"client-{i}", i) for i in range(3)]
    for mine, theirs in zip(kept["block"], kept["loop"], strict=True):
        assert distance(mine, theirs) < 1e-9


class Hungry:
    """A problem's loss that finds no memory where a block has more than so many clients."""

    def __init__(self, problem, most, error):
        self.most, self.error, self.loss, self.refused = most, error, problem.loss, 0

    def __call__(self, params, buffers, batch):
        leaf = next(iter(params.values()))
        while torch._C._functorch.is_functorch_wrapped_tensor(leaf):
            clients = leaf.shape[0] if torch._C._functorch.is_batchedtensor(leaf) else None
            value = torch._C._functorch.get_unwrapped(leaf)
            if torch._C._functorch.is_batchedtensor(leaf):
                clients = value.shape[torch._C._functorch.maybe_get_bdim(leaf)]
                if clients > self.most:
                    self.refused += 1
                    raise self.error
            leaf = value
        return self.loss(params, buffers, batch)


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_halves_the_block_and_says_so_once(error, monkeypatch, caplog):
    problem, algorithm = Problem(dense()), scaffold(LOCAL, population=99)
    sizes = (14, 9, 5, 6, 7, 8, 3, 2, 12, 13, 4, 10)
    datas, tasks = learnable(sizes), tasks_of(algorithm, problem, len(sizes))
    whole = trained(Vectorised(problem, SEED, block=12), algorithm, *_args((tasks, datas)))
    hungry = Hungry(problem, 3, error)
    monkeypatch.setattr(problem, "loss", hungry)
    trainer = Vectorised(problem, SEED, block=6)
    with caplog.at_level(logging.WARNING, "coterie"):
        answers = site(trainer, algorithm, lambda client: datas[int(client.removeprefix("client-"))]).answer(
            tasks
        )
    for task, answer in zip(tasks, answers, strict=True):
        assert distance(answer.up, whole[task.id][0]) < 1e-10
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, said
    assert "out of memory" in said[0]
    assert trainer.width == 3
    refused = hungry.refused
    with caplog.at_level(logging.WARNING, "coterie"):  # the next round does not try again
        site(trainer, algorithm, lambda client: datas[int(client.removeprefix("client-"))]).answer(tasks)
    assert hungry.refused == refused
    assert len(caplog.records) == 1


def test_a_client_for_which_there_is_never_enough_memory_is_lost_with_that_reason(monkeypatch):
    problem, algorithm = Problem(dense()), fedavg(LOCAL)
    monkeypatch.setattr(problem, "loss", Hungry(problem, 0, ERRORS[2]))
    tasks = tasks_of(algorithm, problem, 3)
    answers = site(Vectorised(problem, SEED, block=3), algorithm, lambda client: learnable()[0]).answer(tasks)
    assert all(isinstance(answer, Lost) and "allocate memory" in answer.reason for answer in answers)


LIMITED = """
import resource, sys, logging
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from trainers.test_vectorised import *
logging.basicConfig(stream=sys.stdout, format="%(message)s")
module = nn.Sequential(nn.Linear(1000, 3000), nn.ReLU(), nn.Linear(3000, 3))  # 12 MB of parameters
problem, algorithm = Problem(module), fedavg(Local(lr=0.01, batch_size=4))
datas = learnable([4] * 8, (1000,), dtype=torch.float32)
tasks, loop = tasks_of(algorithm, problem, 8), Loop(problem, SEED)
trained(Vectorised(problem, SEED, block=2), algorithm, tasks[:2], [None] * 2, datas[:2])  # what torch itself needs
pages = int(open("/proc/self/statm").read().split()[0])
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 220_000_000, most))
blocks = Vectorised(problem, SEED, block=8).fit_block(algorithm, tasks, [None] * 8, datas)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print("blocks", [len(block.tasks) for block, _ in blocks])
for block, _ in blocks:
    task = block.tasks[0]
    reply, _ = loop.fit(algorithm, task, None, datas[task.id])
    print("distance", distance({name: leaf[0] for name, leaf in block.ups["delta"].items()}, reply.up["delta"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_really_out_of_memory():
    lines = python(LIMITED, MALLOC_ARENA_MAX="1").splitlines()
    assert any("out of memory with 8 clients" in line for line in lines), lines
    assert "blocks [8]" not in lines
    gaps = [float(line.split()[1]) for line in lines if line.startswith("distance")]
    assert gaps
    assert max(gaps) < 1e-5


@pytest.fixture(scope="module")
def mnist_sizes(real_data):
    """How many rows each of 100 clients has, by Dirichlet(0.3) over the labels."""
    labels = torch.from_numpy(read_idx(real_data / "mnist" / "train-labels-idx1-ubyte.gz"))
    dealt = dirichlet(Examples(labels[:, None], labels.long()), key=KEY, clients=100, alpha=0.3)
    return [len(rows) for rows in dealt.values()]


@pytest.mark.parametrize("batch_size", [10, 32])
@pytest.mark.parametrize("cohort", [20, 50])
def test_padding_wastes_less_than_a_tenth(batch_size, cohort, mnist_sizes, monkeypatch):
    """Where computing is what costs."""
    monkeypatch.setattr(vectorised, "LARGE", 0)
    computed, asked, _ = _padded(batch_size, cohort, mnist_sizes)
    assert computed < 1.1 * asked


@pytest.mark.parametrize("cohort", [20, 50])
def test_a_small_model_pads_rather_than_takes_steps_that_are_not_recorded(cohort, mnist_sizes, monkeypatch):
    made = []
    run = Vectorised._runner

    def runner(self, *args, recorded):
        made.append(recorded)
        return run(self, *args, recorded=recorded)

    monkeypatch.setattr(Vectorised, "_runner", runner)
    computed, asked, graphs = _padded(10, cohort, mnist_sizes)
    assert all(made)
    assert graphs <= 5 * cohort / 20  # 32, 16, 8, 4, 2 clients, and as many as a block has
    assert computed < 1.5 * asked


@given(
    lengths=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=30), min_size=2, max_size=20),
    few=st.booleans(),
    narrow=st.booleans(),
)
def test_shapes_of_steps_hold_what_is_to_be_done(lengths, few, narrow):
    lengths.sort(key=len, reverse=True)
    columns = [[each[step] for each in lengths if step < len(each)] for step in range(len(lengths[0]))]
    working, sizes = [len(column) for column in columns], [max(column) for column in columns]
    shapes = vectorised._shapes(working, sizes, few=few, narrow=narrow)
    least = [(max(active, 2), size) for active, size in zip(working, sizes, strict=True)]
    assert len(shapes) == len(columns)
    for shape, needed in zip(shapes, least, strict=True):
        assert shape[0] >= needed[0]
        assert shape[1] >= needed[1]
    widths = [width for width, _ in shapes]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == len(lengths)
    if few:
        assert len(set(shapes)) <= 6
    else:
        area, bound = (sum(width * size for width, size in each) for each in (shapes, least))
        assert area <= bound * (1 + 1 / vectorised.PADDED)


def _padded(batch_size, cohort, mnist_sizes):
    """Rows computed, rows asked for and graphs recorded, when a cohort of these clients trains."""
    problem, algorithm = Problem(nn.Linear(1, 2)), fedavg(Local(lr=0.1, batch_size=batch_size))
    people = {}
    for index, n in enumerate(mnist_sizes):
        rows = torch.zeros(n, 1), torch.zeros(n, dtype=torch.int64)
        people[f"client-{index}"] = ClientData(rows, rows)
    trainer = Vectorised(problem, SEED, block=32)
    chosen = rng(derive(SEED, "cohort", cohort)).choice(len(people), cohort, replace=False)
    every = tasks_of(algorithm, problem, len(people))
    tasks = [every[i] for i in chosen]
    for block in pack(tasks, lambda client: len(people[client].train[1]), trainer.width):
        trained(trainer, algorithm, *_args((block, [people[task.client] for task in block])))
    computed, asked = trainer.rows
    assert asked == sum(mnist_sizes[i] for i in chosen)
    print(f"B = {batch_size}, cohort of {cohort}: padding wastes {computed / asked - 1:.1%}")
    return computed, asked, sum(len(stepper.graphs) for stepper in trainer.steppers.values())

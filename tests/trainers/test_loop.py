"""The loop trainer against a plain torch.optim loop over the same batches, and its isolation of clients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from coterie.algorithms import Local, adam, adamw, fedavg, scaffold, sgd
from coterie.core import derive, rng, seeded
from coterie.core.trees import digest
from coterie.data import ClientData, batches
from coterie.trainers import Loop, Problem, rows_of, task_key
from worlds import KEY, first_task, linear_world

SEED = 17


def people(dtype=torch.float64, sizes=(23, 10, 31)):
    made = {}
    for index, n in enumerate(sizes):
        draw = rng(derive(SEED, "data", index))
        rows = (
            torch.tensor(draw.normal(size=(n, 5)), dtype=dtype),
            torch.from_numpy(draw.integers(0, 3, size=n)),
        )
        made[f"client-{index}"] = ClientData(rows, rows)
    return made


def network(*, dropout=0.0, dtype=torch.float64):
    with seeded(derive(SEED, "model")):
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).to(dtype)


def expected(module, data, make, rows):
    """What plain PyTorch makes of the module; and the mean loss over all examples seen."""
    module = module.train()
    optimizer, total, seen = make(module.parameters()), 0.0, 0
    for batch in rows:
        index = torch.from_numpy(batch)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(data.train[0][index]), data.train[1][index])
        loss.backward()
        optimizer.step()
        total, seen = total + loss.item() * len(batch), seen + len(batch)
    return module, total / seen, seen


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda lr: sgd(lr, momentum=0.9, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, 0.05, 0.9, 0, 0.01),
        ),
        (
            lambda lr: sgd(lr, momentum=0.9, nesterov=True),
            lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True),
        ),
        (adam, lambda p: torch.optim.Adam(p, 0.05)),
        (adamw, lambda p: torch.optim.AdamW(p, 0.05)),
    ],
    ids=["momentum", "nesterov", "adam", "adamw"],
)
def test_is_a_plain_training_loop(ours, theirs, dtype, tolerance):
    data, problem = people(dtype)["client-1"], Problem(network(dtype=dtype))
    algorithm = fedavg(Local(ours, lr=0.05, epochs=3, batch_size=4))
    task = first_task(algorithm, problem.model(), round=2)
    reply, memory = Loop(problem, SEED).fit(algorithm, task, None, data)
    rows = batches(10, epochs=3, batch_size=4, key=derive(derive(SEED, "train", 2, "client-1"), "batches"))
    module, loss, seen = expected(network(dtype=dtype), data, theirs, rows)
    start = dict(network(dtype=dtype).named_parameters())
    for name, value in module.named_parameters():
        torch.testing.assert_close(reply.up["delta"][name], start[name] - value, rtol=0, atol=tolerance)
    assert reply.metrics["loss"] == pytest.approx(loss, abs=tolerance)
    assert (reply.samples, seen, reply.weight, memory) == (30, 30, 10.0, None)


def test_steps_instead_of_epochs():
    """10 rows by 4: batches of 4, 4, 2, again and again; the fifth step is the second of epoch two."""
    key = derive(SEED, "x")
    ours = list(rows_of(10, {"epochs": 9, "batch_size": 4, "steps": 5}, key))
    whole = list(batches(10, epochs=2, batch_size=4, key=key))
    assert [len(batch) for batch in ours] == [4, 4, 2, 4, 4]
    assert all(np.array_equal(a, b) for a, b in zip(ours, whole, strict=False))
    assert [len(b) for b in rows_of(10, {"epochs": 1, "batch_size": None, "steps": 3}, key)] == [10, 10, 10]
    assert [len(b) for b in rows_of(3, {"epochs": 1, "batch_size": 8, "steps": 4}, key)] == [3, 3, 3, 3]
    assert [len(b) for b in rows_of(10, {"epochs": 2, "batch_size": 6, "steps": None}, key)] == [6, 4, 6, 4]


@pytest.mark.parametrize("n", [1, 3, 4, 7, 10])
@pytest.mark.parametrize("size", [None, 1, 3, 4, 20])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_there_are_as_many_steps_as_asked_for(n, size, steps):
    batch_sizes = [len(b) for b in rows_of(n, {"epochs": 1, "batch_size": size, "steps": steps}, KEY)]
    assert len(batch_sizes) == steps
    assert all(b == min(size or n, n) or b == n % size for b in batch_sizes)


def test_the_key_of_a_task_is_its_kind_round_and_client():
    task = first_task(fedavg(Local()), Problem(network()).model(), round=3)
    assert task_key(SEED, task) == derive(SEED, "train", 3, "client-1")
    others = [replace(task, round=4), replace(task, client="client-2"), replace(task, kind="evaluate")]
    assert len({task_key(SEED, other) for other in [task, *others]}) == 4
    assert task_key(SEED, replace(task, id=9, version=8, memory=7)) == task_key(SEED, task)


def test_dropout_repeats_and_leaves_the_global_generator_alone():
    algorithm = fedavg(Local(lr=0.1, batch_size=4))
    problem, data = Problem(network(dropout=0.5)), people()["client-1"]
    task = first_task(algorithm, problem.model())

    def trained(seed=SEED, task=task):
        return digest(Loop(problem, seed).fit(algorithm, task, None, data)[0].up)

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = trained()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert trained() == first
    without = Loop(Problem(network()), SEED).fit(algorithm, task, None, data)[0]
    assert (
        len({first, trained(seed=1), trained(task=replace(task, client="client-9")), digest(without.up)}) == 4
    )


def test_dropout_masks_differ_from_step_to_step():
    masks = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(5, 3).double(), nn.Dropout(0.5)

        def forward(self, x):
            masks.append(self.dropout(torch.ones(64)) == 0)
            return self.linear(x)

    problem, algorithm = Problem(Spy()), fedavg(Local(lr=0.1, batch_size=4))
    Loop(problem, SEED).fit(algorithm, first_task(algorithm, problem.model()), None, people()["client-1"])
    assert len(masks) == 3
    assert len({tuple(mask.tolist()) for mask in masks}) == 3


@pytest.mark.parametrize(
    "make", [fedavg, lambda local: scaffold(local, population=3)], ids=["fedavg", "scaffold"]
)
def test_no_client_sees_another(make):
    """B's reply is the same bits whether A trained before it or not, and the Problem stays as it was."""
    algorithm = make(Local(lambda lr: sgd(lr, momentum=0.9), lr=0.1, batch_size=4))
    module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    problem, data = Problem(module), people()
    start = digest(problem.model())
    model = problem.model()

    def fit(trainer, client):
        reply, memory = trainer.fit(algorithm, first_task(algorithm, model, client), None, data[client])
        return digest({"up": reply.up, "memory": memory or {}})

    alone = fit(Loop(problem, SEED), "client-2")
    trainer = Loop(problem, SEED)
    fit(trainer, "client-0")
    assert fit(trainer, "client-2") == alone
    fit(trainer, "client-1")
    assert fit(trainer, "client-2") == alone
    assert digest(model) == digest(problem.model()) == start
    evaluation = dict(problem.evaluation.state_dict())
    assert digest(evaluation) == digest(dict(module.state_dict()))
    assert problem.training.training
    assert not problem.evaluation.training


def test_frozen_parameters_stay_and_are_not_sent():
    module = network()
    module[0].weight.requires_grad_(False)
    frozen = module[0].weight.clone()
    problem, data = Problem(module), people()["client-1"]
    algorithm = fedavg(Local(lr=0.1, batch_size=4, epochs=2))
    task = first_task(algorithm, problem.model())
    reply, _ = Loop(problem, SEED).fit(algorithm, task, None, data)
    assert set(task.down["model"]["params"]) == set(reply.up["delta"]) == {"0.bias", "3.weight", "3.bias"}
    assert torch.equal(problem.training[0].weight, frozen)
    assert problem.parameters() == sum(p.numel() for p in module.parameters() if p.requires_grad)
    rows = batches(10, epochs=2, batch_size=4, key=derive(derive(SEED, "train", 0, "client-1"), "batches"))
    plain, _, _ = expected(
        module, data, lambda p: torch.optim.SGD([q for q in p if q.requires_grad], 0.1), rows
    )
    for name, delta in reply.up["delta"].items():
        ours = task.down["model"]["params"][name] - delta
        torch.testing.assert_close(ours, plain.get_parameter(name).detach(), rtol=0, atol=1e-12)


def test_tied_parameters_are_one():
    def tied():
        module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
        module[2].weight = module[0].weight
        return module

    with seeded(derive(SEED, "model")):
        module = tied()
    problem, data = Problem(module), people()["client-1"]
    algorithm = fedavg(Local(lr=0.1, batch_size=4))
    task = first_task(algorithm, problem.model())
    reply, _ = Loop(problem, SEED).fit(algorithm, task, None, data)
    assert set(reply.up["delta"]) == {"0.weight", "0.bias", "2.bias"}
    rows = batches(10, epochs=1, batch_size=4, key=derive(derive(SEED, "train", 0, "client-1"), "batches"))
    plain, _, _ = expected(module, data, lambda p: torch.optim.SGD(p, 0.1), rows)
    ours = task.down["model"]["params"]["0.weight"] - reply.up["delta"]["0.weight"]
    torch.testing.assert_close(ours, plain[2].weight.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("weighting", "weight"), [("samples", 14.0), ("uniform", 1.0), ("client", 1.5)])
def test_weighs_the_update_as_configured(weighting, weight):
    world = linear_world()
    algorithm = fedavg(Local(), weighting=weighting)
    task = first_task(algorithm, world.problem.model())
    assert Loop(world.problem, SEED).fit(algorithm, task, None, world.people["client-1"])[0].weight == weight


def test_a_client_without_a_weight_cannot_weigh_itself():
    algorithm = fedavg(Local(), weighting="client")
    problem = Problem(network())
    with pytest.raises(ValueError, match="client-1 names no weight"):
        Loop(problem, SEED).fit(algorithm, first_task(algorithm, problem.model()), None, people()["client-1"])


def test_measures_in_evaluation_mode_over_all_rows():
    """Whatever the batch size: the mean over examples, with dropout off."""
    problem, (x, y) = Problem(network(dropout=0.9)), people()["client-2"].test
    with torch.no_grad():
        scores = network()(x).numpy()
    losses = [math.log(np.exp(row).sum()) - row[label] for row, label in zip(scores, y, strict=True)]
    hits = scores.argmax(1) == y.numpy()
    for batch_size in (1, 7, 31, 512):
        measured = problem.measure(problem.model(), x, y, batch_size=batch_size)
        assert measured == pytest.approx(
            {"loss": np.mean(losses), "count": 31.0, "accuracy": hits.mean()}, abs=1e-12
        )


@pytest.mark.parametrize("count", [7, 11, 21])
@pytest.mark.parametrize("steps", [None, 1, 2, 5])
def test_a_single_last_row_joins_the_batch_before_and_nothing_is_lost(count, steps):
    """BatchNorm refuses a batch of one row; the rows of an epoch stay the same."""
    config = {"epochs": 3, "batch_size": 10, "steps": steps}
    drawn = [rows.tolist() for rows in rows_of(count, config, KEY, least=2)]
    assert min(map(len, drawn)) >= 2
    if steps is not None:
        assert len(drawn) == steps
    else:
        assert sorted(row for rows in drawn for row in rows) == sorted(3 * list(range(count)))
    plain = [rows.tolist() for rows in rows_of(count, config, KEY)]
    if count == 7:
        assert drawn == plain

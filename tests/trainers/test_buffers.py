"""Buffers: BatchNorm's running statistics through local training, aggregation and the next round."""

import numpy as np
import torch
from torch import nn

from coterie.algorithms import Local, fedavg, fedprox, fedsgd, scaffold, sgd
from coterie.core import Reply, derive, rng, seeded
from coterie.core.trees import digest
from coterie.data import ClientData
from coterie.schedules import Synchronous
from coterie.trainers import Loop, Problem
from worlds import KEY, World, first_task

SIZES = (12, 20, 10)


def network():
    with seeded(derive(1, "model")):
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


def world():
    people = {}
    for index, n in enumerate(SIZES):
        draw = rng(derive(1, "data", index))
        rows = (
            torch.from_numpy(draw.normal(index, 1 + index, size=(n, 4))),
            torch.from_numpy(draw.integers(0, 3, size=n)),
        )
        people[f"client-{index}"] = ClientData(rows, rows)
    return World(Problem(network()), people)


WORLD = world()
LOCAL = Local(lr=0.1, epochs=2, batch_size=4)


def plain(module, client, round):
    """Train as anybody would; the module's buffers then are the oracle."""
    x, y = WORLD.people[client].train
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for batch in WORLD.rows(client, round, epochs=2, batch_size=4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
        optimizer.step()
    return module


def test_local_training_leaves_the_buffers_of_a_plain_loop():
    algorithm = fedavg(LOCAL)
    task = first_task(algorithm, WORLD.problem.model())
    before = digest(task.down)
    reply, _ = Loop(WORLD.problem, WORLD.seed).fit(algorithm, task, None, WORLD.people["client-1"])
    module = plain(network(), "client-1", 0)
    assert set(reply.up["buffers"]) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for name, value in module.named_buffers():
        torch.testing.assert_close(reply.up["buffers"][name], value, rtol=1e-12, atol=1e-12)
    assert reply.up["buffers"]["1.num_batches_tracked"].item() == 10
    assert digest(task.down) == before


def test_the_servers_buffers_are_weighted_means_round_after_round():
    outcome = WORLD.play(fedavg(LOCAL), Synchronous(rounds=3, cohort=1.0, key=KEY))
    module = network()
    for r, commit in enumerate(outcome.commits):
        trained = {}
        for client in WORLD.clients:
            copy = network()
            copy.load_state_dict(module.state_dict())
            trained[client] = plain(copy, client, r).state_dict()
        counts = [state["1.num_batches_tracked"].item() for state in trained.values()]
        merged = {
            name: torch.from_numpy(np.average([s[name] for s in trained.values()], axis=0, weights=SIZES))
            for name in module.state_dict()
            if name != "1.num_batches_tracked"
        }
        merged["1.num_batches_tracked"] = torch.tensor(round(sum(counts) / len(counts)))
        module.load_state_dict(merged)
        ours = {**commit.state["model"]["params"], **commit.state["model"]["buffers"]}
        for name, value in module.state_dict().items():
            assert ours[name].dtype == value.dtype
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10)
    x, y = WORLD.people["client-0"].train
    measured = WORLD.problem.measure(outcome.state["model"], x, y)
    with torch.no_grad():
        theirs = nn.functional.cross_entropy(module.eval()(x), y)
    np.testing.assert_allclose(measured["loss"], theirs, rtol=1e-10)


def test_every_algorithm_carries_the_buffers_along():
    """The forward passes are those of FedAvg where the steps are; FedSGD makes one over all rows."""
    task = {}
    for name, algorithm in {
        "fedavg": fedavg(LOCAL),
        "fedprox": fedprox(LOCAL, mu=0.5),
        "scaffold": scaffold(LOCAL, population=3),
        "fedsgd": fedsgd(),
    }.items():
        reply, _ = Loop(WORLD.problem, WORLD.seed).fit(
            algorithm, first_task(algorithm, WORLD.problem.model()), None, WORLD.people["client-1"]
        )
        task[name] = reply.up["buffers"]
    assert digest(task["scaffold"]) == digest(task["fedavg"]) != digest(task["fedprox"])
    assert task["fedsgd"]["1.num_batches_tracked"].item() == 1
    with torch.no_grad():
        hidden = network()[0](WORLD.people["client-1"].train[0])
    torch.testing.assert_close(task["fedsgd"]["1.running_mean"], 0.1 * hidden.mean(0))
    torch.testing.assert_close(task["fedsgd"]["1.running_var"], 0.9 + 0.1 * hidden.var(0))


def test_the_servers_learning_rate_does_not_touch_the_buffers():
    schedule = Synchronous(rounds=1, cohort=2, key=KEY)
    full = WORLD.play(fedavg(LOCAL), schedule)
    half = WORLD.play(fedavg(LOCAL, server=sgd(0.5)), schedule)
    assert digest(full.state["model"]["buffers"]) == digest(half.state["model"]["buffers"])
    assert digest(full.state["model"]["params"]) != digest(half.state["model"]["params"])


def test_a_lost_clients_buffers_take_no_part():
    gone = Synchronous(rounds=1, cohort=1.0, key=KEY)
    outcome = WORLD.play(fedavg(LOCAL), gone, dropped=lambda task: task.client != "client-1")
    (reply,) = [event for _, event in outcome.events if isinstance(event, Reply)]
    for name, value in reply.up["buffers"].items():
        torch.testing.assert_close(outcome.state["model"]["buffers"][name], value, rtol=1e-14, atol=1e-14)

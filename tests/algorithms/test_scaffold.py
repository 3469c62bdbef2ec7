"""SCAFFOLD (Karimireddy et al. 2020, Algorithm 1, option II) against NumPy and closed forms."""

import numpy as np
import pytest
import torch
from torch import nn

from coterie.algorithms import Local, fedavg, fedsgd, scaffold, sgd
from coterie.backends import drop_out
from coterie.core import derive, rng
from coterie.data import ClientData
from coterie.schedules import Synchronous
from coterie.trainers import Problem
from worlds import KEY, World, descended, linear_world, slope, theta

WORLD = linear_world()
N = len(WORLD.clients)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize(
    ("weighting", "local"),
    [("uniform", {"epochs": 2, "batch_size": 4}), ("samples", {"epochs": 9, "batch_size": 4, "steps": 3})],
)
def test_follows_algorithm_1_with_a_part_of_the_clients(weighting, local):
    algorithm = scaffold(
        Local(lr=0.04, lr_decay=0.9, **local), population=N, server=sgd(0.8), weighting=weighting
    )
    outcome = WORLD.play(algorithm, Synchronous(rounds=7, cohort=3, key=KEY))
    x, c, controls = WORLD.theta(), np.zeros(4), {k: np.zeros(4) for k in WORLD.clients}
    for r, commit in enumerate(outcome.commits):
        lr, cohort = 0.04 * 0.9**r, [task.client for task in outcome.sent if task.round == r]
        ys, new = {}, {}
        for k in cohort:
            batches = WORLD.rows(k, r, **local)
            correction = c - controls[k]
            ys[k] = descended(*WORLD.arrays(k), batches, x, lr, lambda y, by=correction: by)
            new[k] = controls[k] - c + (x - ys[k]) / (len(batches) * lr)
        sizes = [len(WORLD.people[k].train[1]) if weighting == "samples" else 1 for k in cohort]
        x = x + 0.8 * np.average([ys[k] - x for k in cohort], axis=0, weights=sizes)
        c = c + sum(new[k] - controls[k] for k in cohort) / N
        controls |= new
        np.testing.assert_allclose(theta(commit.state["model"]), x, **CLOSE)
        np.testing.assert_allclose(theta(commit.state["control"]), c, **CLOSE)
    assert any(task.memory is not None for task in outcome.sent)
    for client, generation in outcome.memories.at(outcome.commits[-1].version).items():
        np.testing.assert_allclose(theta(outcome.memories.get(client, generation)), controls[client], **CLOSE)


def test_the_servers_control_is_the_mean_of_the_clients_whoever_drops_out():
    algorithm = scaffold(Local(lr=0.04, batch_size=4), population=N)
    schedule = Synchronous(rounds=8, cohort=4, key=KEY)
    outcome = WORLD.play(algorithm, schedule, dropped=drop_out(0.3, key=derive(1, "drop")))
    for commit in outcome.commits:
        memory = outcome.memories.at(commit.version)
        kept = [theta(outcome.memories.get(client, generation)) for client, generation in memory.items()]
        np.testing.assert_allclose(theta(commit.state["control"]), sum(kept) / N, rtol=0, atol=1e-12)
    assert 0 < len(outcome.trained) < len(outcome.sent)


def test_after_one_full_step_the_control_is_the_gradient():
    """Then options I and II agree: c_i+ = c_i - c + (g - c_i + c) = g."""
    algorithm = scaffold(Local(lr=0.1, batch_size=None), population=N)
    outcome = WORLD.play(algorithm, Synchronous(rounds=4, cohort=3, key=KEY))
    before = theta(outcome.commits[-2].state["model"])
    for task in outcome.sent:
        if task.round == 3:
            control = theta(outcome.memories.get(task.client, task.id))
            np.testing.assert_allclose(control, slope(*WORLD.arrays(task.client), before), **CLOSE)


def test_with_everybody_and_one_full_step_it_is_fedsgd():
    """The corrections c - c_i then cancel in the mean."""
    everybody = Synchronous(rounds=5, cohort=1.0, key=KEY)
    ours = WORLD.play(scaffold(Local(lr=0.1, batch_size=None), population=N), everybody).state
    plain = WORLD.play(fedsgd(server=sgd(0.1), weighting="uniform"), everybody).state
    np.testing.assert_allclose(theta(ours["model"]), theta(plain["model"]), **CLOSE)


def test_finds_the_optimum_where_fedavg_is_biased():
    """Client i is the quadratic with Hessian H_i and minimum m_i, and takes K full steps.

    One FedAvg round is x <- mean of m_i + M_i (x - m_i) with M_i = (1 - lr H_i)^K, so its fixed point
    solves sum (1 - M_i) (x - m_i) = 0; the optimum solves sum H_i (x - m_i) = 0.
    """
    steps, lr, people = 4, 0.1, {}
    for index, scales in enumerate(([1.5, 0.6], [0.5, 1.0], [1.0, 1.4])):
        corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * scales
        target = corners @ rng(derive(8, "minimum", index)).normal(size=2) * 2 + index
        rows = torch.from_numpy(corners), torch.from_numpy(target)
        people[str(index)] = ClientData(rows, rows)
    world = World(Problem(nn.Linear(2, 1).double(), "regression"), people)
    biased, optimum = [np.zeros((3, 3)), np.zeros(3)], [np.zeros((3, 3)), np.zeros(3)]
    for client in people:
        a, y = world.arrays(client)
        hessian, minimum = 2 * a.T @ a / len(y), np.linalg.solve(a.T @ a, a.T @ y)
        pull = np.eye(3) - np.linalg.matrix_power(np.eye(3) - lr * hessian, steps)
        for total, matrix in ((biased, pull), (optimum, hessian)):
            total[0] += matrix
            total[1] += matrix @ minimum
    biased, optimum = np.linalg.solve(*biased), np.linalg.solve(*optimum)
    assert np.linalg.norm(biased - optimum) > 0.05

    local = Local(lr=lr, batch_size=None, steps=steps)
    schedule = Synchronous(rounds=60, cohort=1.0, key=KEY)
    np.testing.assert_allclose(theta(world.play(fedavg(local), schedule).state["model"]), biased, atol=1e-7)
    ours = world.play(scaffold(local, population=3), schedule).state["model"]
    np.testing.assert_allclose(theta(ours), optimum, atol=1e-7)


class Scaled(nn.Module):
    """A linear layer times a learned number: a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 1), nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * self.linear(x)


def test_parameters_without_dimensions_keep_their_type():
    people = {
        k: ClientData(tuple(t.float() for t in d.train), tuple(t.float() for t in d.test))
        for k, d in WORLD.people.items()
    }
    world = World(Problem(Scaled(), "regression"), people)
    algorithm = scaffold(Local(lr=0.02, batch_size=4), population=N)
    outcome = world.play(algorithm, Synchronous(rounds=3, cohort=4, key=KEY))
    assert {leaf.dtype for leaf in outcome.state["model"]["params"].values()} == {torch.float32}
    assert outcome.state["control"]["scale"].dtype == torch.float32

"""FedSGD, FedAvg and FedProx against NumPy transcriptions of McMahan et al. 2017 and Li et al. 2020."""

import numpy as np
import pytest
import torch
from torch import nn

from coterie.algorithms import Local, fedavg, fedprox, fedsgd, sgd
from coterie.core import ConfigError, derive, rng
from coterie.core.trees import digest
from coterie.data import ClientData
from coterie.schedules import Synchronous
from coterie.trainers import Problem
from worlds import KEY, World, descended, linear_world, slope, theta

WORLD = linear_world()
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
EVERYBODY = Synchronous(rounds=5, cohort=1.0, key=KEY)
SOME = Synchronous(rounds=5, cohort=3, key=KEY)


def weight(client, weighting):
    data = WORLD.people[client]
    return {"samples": len(data.train[1]), "uniform": 1, "client": data.weight}[weighting]


def averaged(values, weights):
    return np.average(np.stack(values), axis=0, weights=weights)


def rounds_of(outcome):
    """The cohort of each round."""
    return [[task.client for task in outcome.sent if task.round == r] for r in range(len(outcome.commits))]


def test_fedsgd_with_everybody_is_gradient_descent_on_the_pooled_data():
    outcome = WORLD.play(fedsgd(server=sgd(0.2)), EVERYBODY)
    pooled = [np.concatenate(parts) for parts in zip(*map(WORLD.arrays, WORLD.clients), strict=True)]
    x = WORLD.theta()
    for commit in outcome.commits:
        x = x - 0.2 * slope(*pooled, x)
        np.testing.assert_allclose(theta(commit.state["model"]), x, **CLOSE)


@pytest.mark.parametrize("weighting", ["samples", "uniform", "client"])
def test_fedsgd_of_a_cohort(weighting):
    outcome = WORLD.play(fedsgd(server=sgd(0.2), weighting=weighting), SOME)
    x = WORLD.theta()
    for cohort, commit in zip(rounds_of(outcome), outcome.commits, strict=True):
        weights = [weight(client, weighting) for client in cohort]
        x = x - 0.2 * averaged([slope(*WORLD.arrays(client), x) for client in cohort], weights)
        np.testing.assert_allclose(theta(commit.state["model"]), x, **CLOSE)


def test_fedsgd_is_fedavg_with_one_step_over_all_rows():
    one_step = fedavg(Local(lr=0.05, batch_size=None), server=sgd(4.0))
    ours = WORLD.play(fedsgd(server=sgd(0.2)), SOME).state
    np.testing.assert_allclose(
        theta(ours["model"]), theta(WORLD.play(one_step, SOME).state["model"]), **CLOSE
    )


@pytest.mark.parametrize(
    ("weighting", "local", "server_lr", "mu"),
    [
        ("samples", {"epochs": 2, "batch_size": 4}, 1.0, 0.0),
        ("uniform", {"epochs": 1, "batch_size": 3}, 0.7, 0.0),
        ("client", {"epochs": 1, "batch_size": None}, 1.0, 0.0),
        ("samples", {"epochs": 9, "batch_size": 4, "steps": 5}, 1.3, 0.0),
        ("samples", {"epochs": 3, "batch_size": 4}, 1.0, 0.8),
        ("uniform", {"epochs": 3, "batch_size": 2}, 0.9, 0.05),
    ],
)
def test_fedavg_and_fedprox_of_a_cohort(weighting, local, server_lr, mu):
    settings = Local(lr=0.06, lr_decay=0.8, **local)
    server = None if server_lr == 1.0 else sgd(server_lr)
    if mu:
        algorithm = fedprox(settings, mu=mu, server=server, weighting=weighting)
    else:
        algorithm = fedavg(settings, server=server, weighting=weighting)
    outcome = WORLD.play(algorithm, SOME)
    x = WORLD.theta()
    for r, (cohort, commit) in enumerate(zip(rounds_of(outcome), outcome.commits, strict=True)):
        lr, start = 0.06 * 0.8**r, x
        ys = [
            descended(*WORLD.arrays(k), WORLD.rows(k, r, **local), start, lr, lambda y, x=start: mu * (y - x))
            for k in cohort
        ]
        x = x + server_lr * (averaged(ys, [weight(k, weighting) for k in cohort]) - x)
        np.testing.assert_allclose(theta(commit.state["model"]), x, **CLOSE)


def test_the_client_optimizer_starts_anew_in_every_task():
    outcome = WORLD.play(fedavg(Local(lambda lr: sgd(lr, momentum=0.9), lr=0.02, batch_size=4)), SOME)
    x = WORLD.theta()
    for r, cohort in enumerate(rounds_of(outcome)):
        ys = []
        for k in cohort:
            (a, t), y, buffer = WORLD.arrays(k), x, 0.0
            for batch in WORLD.rows(k, r, batch_size=4):
                buffer = 0.9 * buffer + slope(a[batch], t[batch], y)
                y = y - 0.02 * buffer
            ys.append(y)
        x = averaged(ys, [weight(k, "samples") for k in cohort])
    np.testing.assert_allclose(theta(outcome.state["model"]), x, **CLOSE)


def test_fedprox_without_its_term_is_fedavg_to_the_bit():
    local = Local(lr=0.06, epochs=2, batch_size=4)
    plain = digest(WORLD.play(fedavg(local), SOME).state)
    assert digest(WORLD.play(fedprox(local, mu=0), SOME).state) == plain
    assert digest(WORLD.play(fedprox(local, mu=1e-3), SOME).state) != plain


def test_fedprox_refuses_to_push_away():
    with pytest.raises(ConfigError, match=r"mu=-1"):
        fedprox(Local(), mu=-1)


def test_softmax_regression():
    """Cross-entropy: the gradient in the scores is softmax - one-hot."""
    labels, people = 3, {}
    for index, n in enumerate((4, 11, 6, 8)):
        draw = rng(derive(6, "softmax", index))
        rows = torch.from_numpy(draw.normal(size=(n, 2))), torch.from_numpy(draw.integers(0, labels, size=n))
        people[f"client-{index}"] = ClientData(rows, rows)
    world = World(Problem(nn.Linear(2, labels).double()), people)
    outcome = world.play(fedavg(Local(lr=0.3, epochs=2, batch_size=3)), SOME)
    start = world.problem.model()["params"]
    w = np.column_stack([start["weight"].numpy(), start["bias"].numpy()])
    for r, cohort in enumerate(rounds_of(outcome)):
        ys = []
        for k in cohort:
            a, t = world.arrays(k)
            y = w
            for batch in world.rows(k, r, epochs=2, batch_size=3):
                scores = np.exp(a[batch] @ y.T)
                error = scores / scores.sum(1, keepdims=True) - np.eye(labels)[t[batch]]
                y = y - 0.3 * error.T @ a[batch] / len(batch)
            ys.append(y)
        w = averaged(ys, [len(people[k].train[1]) for k in cohort])
    params = outcome.state["model"]["params"]
    np.testing.assert_allclose(np.column_stack([params["weight"], params["bias"]]), w, **CLOSE)

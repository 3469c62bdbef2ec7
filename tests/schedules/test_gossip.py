"""D-PSGD (Lian et al. 2017, Algorithm 1) against NumPy with the matrix W."""

import numpy as np
import pytest
import torch

from coterie.algorithms import Local, dpsgd, fedavg
from coterie.core import ConfigError, Lost, QuorumLost
from coterie.data import ClientData
from coterie.schedules import Gossip, Synchronous
from coterie.schedules.gossip import TOPOLOGIES
from worlds import KEY, World, descended, linear_world, slope, theta

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SIZES = (3, 14, 5, 9, 2, 7, 4, 6)


def mixing(topology, n):
    """W: on the ring 1/3 for oneself and each neighbour, as far as these are different nodes."""
    if topology == "complete":
        return np.full((n, n), 1 / n)
    w = np.zeros((n, n))
    for i in range(n):
        near = {(i - 1) % n, i, (i + 1) % n}
        w[i, list(near)] = 1 / len(near)
    return w


def nodes_of(commit):
    return np.stack([theta(node["model"]) for node in commit.state["nodes"]])


@pytest.mark.parametrize("topology", ["ring", "complete"])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_mixes_by_w_and_steps_by_the_nodes_own_gradient(n, topology):
    world = linear_world(SIZES[:n])
    outcome = world.play(dpsgd(Local(lr=0.05, batch_size=4)), Gossip(rounds=6, topology=topology))
    w, x = mixing(topology, n), np.tile(world.theta(), (n, 1))
    np.testing.assert_allclose(w.sum(0), 1)  # doubly stochastic: mixing keeps the average
    assert [TOPOLOGIES[topology](i, n) for i in range(n)] == [set(np.flatnonzero(row)) for row in w]
    for r, commit in enumerate(outcome.commits):
        gradients = []
        for i, client in enumerate(world.clients):
            (a, y), (batch,) = world.arrays(client), world.rows(client, r, batch_size=4, steps=1)
            gradients.append(slope(a[batch], y[batch], x[i]))
        x = w @ x - 0.05 * np.stack(gradients)
        np.testing.assert_allclose(nodes_of(commit), x, **CLOSE)
        np.testing.assert_allclose(theta(commit.state["model"]), x.mean(0), **CLOSE)
    assert n < 2 or np.abs(x[0] - x[1]).max() > 1e-3


def test_several_local_steps():
    world = linear_world(SIZES[:4])
    outcome = world.play(dpsgd(Local(lr=0.05, batch_size=4, steps=3)), Gossip(rounds=4))
    w, x = mixing("ring", 4), np.tile(world.theta(), (4, 1))
    for r in range(4):
        ys = [
            descended(*world.arrays(k), world.rows(k, r, batch_size=4, steps=3), x[i], 0.05)
            for i, k in enumerate(world.clients)
        ]
        x = w @ x - (x - np.stack(ys))
    np.testing.assert_allclose(nodes_of(outcome.commits[-1]), x, **CLOSE)


def test_the_first_round_of_a_complete_graph_is_a_round_of_uniform_fedavg():
    world, local = linear_world(), Local(lr=0.05, batch_size=4, steps=1)
    ours = world.play(dpsgd(local), Gossip(rounds=1, topology="complete")).state
    flat = world.play(fedavg(local, weighting="uniform"), Synchronous(rounds=1, cohort=1.0, key=KEY)).state
    np.testing.assert_allclose(theta(ours["model"]), theta(flat["model"]), rtol=1e-13, atol=1e-13)


def test_nodes_with_the_same_data_are_one_machine():
    """Then every graph is gradient descent on that data, and every round is centralised averaging."""
    base = linear_world()
    alike = World(base.problem, {f"node-{i}": base.people["client-1"] for i in range(4)})
    outcome = alike.play(dpsgd(Local(lr=0.05, batch_size=None)), Gossip(rounds=5, topology="complete"))
    x = alike.theta()
    for commit in outcome.commits:
        x = x - 0.05 * slope(*base.arrays("client-1"), x)
        np.testing.assert_allclose(nodes_of(commit), np.tile(x, (4, 1)), **CLOSE)


@pytest.mark.parametrize("how", ["dropped", "nan"])
def test_a_lost_node_mixes_all_the_same(how):
    world, sick = linear_world(SIZES[:5]), "client-2"
    if how == "dropped":
        outcome = world.play(
            dpsgd(Local(lr=0.05, batch_size=None)), Gossip(rounds=4), dropped=lambda task: task.client == sick
        )
    else:
        x, y = world.people[sick].train
        broken = ClientData((x, torch.full_like(y, torch.nan)), (x, y))
        outcome = world.play(
            dpsgd(Local(lr=0.05, batch_size=None)),
            Gossip(rounds=4, on_nan="drop"),
            data=lambda client: broken if client == sick else world.people[client],
        )
    w, x = mixing("ring", 5), np.tile(world.theta(), (5, 1))
    for commit in outcome.commits:
        gradients = [slope(*world.arrays(k), x[i]) * (k != sick) for i, k in enumerate(world.clients)]
        x = w @ x - 0.05 * np.stack(gradients)
        np.testing.assert_allclose(nodes_of(commit), x, **CLOSE)
        assert commit.metrics["clients"] == {"asked": 5, "answered": 4, "lost": 1}
    assert sum(isinstance(event, Lost) for _, event in outcome.events) == (4 if how == "dropped" else 0)


def test_refuses_a_run_without_rounds_and_stops_without_nodes():
    with pytest.raises(ConfigError, match=r"rounds = 0"):
        Gossip(rounds=0)
    with pytest.raises(QuorumLost, match="round 1: no node finished"):
        linear_world(SIZES[:3]).play(dpsgd(Local()), Gossip(rounds=1), dropped=lambda task: True)

"""FedAvgM (Hsu et al. 2019) and Algorithm 2 of Reddi et al. 2021 through whole rounds, against NumPy."""

import numpy as np
import pytest

from coterie.algorithms import Local, fedadagrad, fedadam, fedavg, fedavgm, fedyogi
from coterie.core.trees import digest
from coterie.schedules import Synchronous
from worlds import KEY, descended, linear_world, theta

WORLD = linear_world()
SCHEDULE = Synchronous(rounds=6, cohort=4, key=KEY)
LOCAL = Local(lr=0.05, epochs=2, batch_size=4)
ETA, BETA1, BETA2, TAU = 0.3, 0.8, 0.95, 0.02


def adagrad(v, d):
    return v + d**2


def yogi(v, d):
    return v - (1 - BETA2) * d**2 * np.sign(v - d**2)


def adam(v, d):
    return BETA2 * v + (1 - BETA2) * d**2


def pseudo_gradients(outcome):
    """Yield (a function x -> Delta_t, the state after the round)."""
    for r, commit in enumerate(outcome.commits):
        cohort = [task.client for task in outcome.sent if task.round == r]
        sizes = [len(WORLD.people[k].train[1]) for k in cohort]

        def delta(x, r=r, cohort=cohort, sizes=sizes):
            moved = [
                descended(*WORLD.arrays(k), WORLD.rows(k, r, epochs=2, batch_size=4), x, 0.05) - x
                for k in cohort
            ]
            return np.average(np.stack(moved), axis=0, weights=sizes)

        yield delta, theta(commit.state["model"])


@pytest.mark.parametrize(
    ("algorithm", "second_moment"),
    [
        (fedadagrad(LOCAL, lr=ETA, beta1=BETA1, tau=TAU), adagrad),
        (fedyogi(LOCAL, lr=ETA, beta1=BETA1, beta2=BETA2, tau=TAU), yogi),
        (fedadam(LOCAL, lr=ETA, beta1=BETA1, beta2=BETA2, tau=TAU), adam),
    ],
    ids=["fedadagrad", "fedyogi", "fedadam"],
)
def test_follows_algorithm_2(algorithm, second_moment):
    x, m, v = WORLD.theta(), np.zeros(4), np.full(4, TAU**2)
    for delta, after in pseudo_gradients(WORLD.play(algorithm, SCHEDULE)):
        d = delta(x)
        m = BETA1 * m + (1 - BETA1) * d
        v = second_moment(v, d)
        x = x + ETA * m / (np.sqrt(v) + TAU)
        np.testing.assert_allclose(after, x, rtol=1e-9, atol=1e-10)


def test_fedadagrad_has_no_momentum_unless_told():
    x, v = WORLD.theta(), np.full(4, TAU**2)
    for delta, after in pseudo_gradients(WORLD.play(fedadagrad(LOCAL, lr=ETA, tau=TAU), SCHEDULE)):
        d = delta(x)
        v = v + d**2
        x = x + ETA * d / (np.sqrt(v) + TAU)
        np.testing.assert_allclose(after, x, rtol=1e-9, atol=1e-10)


def test_server_momentum():
    x, m = WORLD.theta(), np.zeros(4)
    for delta, after in pseudo_gradients(WORLD.play(fedavgm(LOCAL, lr=0.7, momentum=0.6), SCHEDULE)):
        m = 0.6 * m + delta(x)
        x = x + 0.7 * m
        np.testing.assert_allclose(after, x, rtol=1e-10, atol=1e-10)


def test_fedavgm_without_momentum_is_fedavg_to_the_bit():
    ours = WORLD.play(fedavgm(LOCAL, momentum=0.0), SCHEDULE).state
    assert digest(ours) == digest(WORLD.play(fedavg(LOCAL), SCHEDULE).state)

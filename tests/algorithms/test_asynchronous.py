"""FedBuff (Nguyen et al. 2022, Algorithm 1) and FedAsync (Xie et al. 2019, Algorithm 1) on a virtual clock.

The oracle is an event simulation in NumPy. It takes from the library which client was drawn next, and how
long that task takes; arrivals, versions, staleness and all steps are its own.
"""

import heapq

import numpy as np
import pytest

from coterie.algorithms import Local, fedasync, fedavg, fedbuff, sgd
from coterie.backends import DURATIONS, drop_out
from coterie.core import ConfigError, derive
from coterie.schedules import Buffered, Synchronous, asynchronous, constant, hinge, polynomial
from worlds import KEY, descended, linear_world, theta

WORLD = linear_world()
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SLOW = DURATIONS["half_normal"](key=derive(1, "delays"))


def simulate(outcome, *, concurrency, train, step, buffer=1, dropped=lambda task: False, oldest=np.inf):
    """Return the model after each version and the staleness of every update taken in.

    train: (task, x) -> what the client makes of x. step: (x, [(x at start, y, staleness)]) -> x.
    """
    queue, waiting, x, version, now = [], iter(enumerate(outcome.sent)), WORLD.theta(), 0, 0.0
    held, models, ages = [], [], []

    def start():
        number, task = next(waiting)
        assert task.version == version
        heapq.heappush(queue, (now + SLOW(task), number, task, version, x))

    for _ in range(concurrency):
        start()
    while len(models) < len(outcome.commits):
        now, _, task, sent_at, x_then = heapq.heappop(queue)
        if not dropped(task) and version - sent_at <= oldest:
            held.append((x_then, train(task, x_then), version - sent_at))
        if len(held) == buffer:
            ages += [age for _, _, age in held]
            x, version, held = step(x, held), version + 1, []
            models.append(x)
        if len(models) < len(outcome.commits):
            start()
    assert next(waiting, None) is None
    return models, ages


def s_half(t):
    return 1 / np.sqrt(1 + t)


def s_hinge(t):
    return 1.0 if t <= 1 else 1 / (2 * (t - 1) + 1)


@pytest.mark.parametrize(
    ("buffer", "staleness", "s", "server_lr", "rate", "oldest"),
    [
        (1, polynomial(), s_half, 0.6, 0.0, None),
        (2, polynomial(), s_half, 1.0, 0.0, None),
        (3, constant(), lambda t: 1.0, 0.7, 0.0, None),
        (2, hinge(a=2.0, b=1.0), s_hinge, 1.0, 0.3, None),
        (2, polynomial(a=1.0), lambda t: 1 / (1 + t), 1.0, 0.0, 1),
    ],
)
def test_fedbuff(buffer, staleness, s, server_lr, rate, oldest):
    lost = drop_out(rate, key=derive(2, "drop"))
    algorithm = fedbuff(Local(lr=0.05, epochs=2, batch_size=4), server=sgd(server_lr))
    schedule = Buffered(
        rounds=8, concurrency=4, buffer=buffer, staleness=staleness, max_staleness=oldest, key=KEY
    )
    outcome = WORLD.play(algorithm, schedule, duration=SLOW, dropped=lost)

    def train(task, x):
        return descended(
            *WORLD.arrays(task.client), WORLD.rows(task.client, task.round, epochs=2, batch_size=4), x, 0.05
        )

    def step(x, updates):
        return x - server_lr / buffer * sum(s(age) * (start - y) for start, y, age in updates)

    limit = np.inf if oldest is None else oldest
    models, ages = simulate(
        outcome, concurrency=4, train=train, step=step, buffer=buffer, dropped=lost, oldest=limit
    )
    for commit, x in zip(outcome.commits, models, strict=True):
        np.testing.assert_allclose(theta(commit.state["model"]), x, **CLOSE)
    assert max(ages) == (oldest or max(ages)) > 0
    if rate or oldest:
        assert sum(commit.metrics["clients"]["lost"] for commit in outcome.commits) > 0


@pytest.mark.parametrize(
    ("staleness", "s"),
    [(polynomial(a=0.5), s_half), (hinge(a=2.0, b=1.0), s_hinge), (constant(), lambda t: 1.0)],
)
def test_fedasync(staleness, s):
    alpha, rho = 0.6, 0.5
    algorithm = fedasync(Local(lr=0.05, epochs=2, batch_size=4), alpha=alpha, rho=rho)
    outcome = WORLD.play(
        algorithm, asynchronous(rounds=12, concurrency=4, staleness=staleness, key=KEY), duration=SLOW
    )

    def train(task, x):
        batches = WORLD.rows(task.client, task.round, epochs=2, batch_size=4)
        return descended(*WORLD.arrays(task.client), batches, x, 0.05, lambda y: rho * (y - x))

    def step(x, updates):
        ((_, y, age),) = updates
        return (1 - alpha * s(age)) * x + alpha * s(age) * y

    models, ages = simulate(outcome, concurrency=4, train=train, step=step)
    for commit, x in zip(outcome.commits, models, strict=True):
        np.testing.assert_allclose(theta(commit.state["model"]), x, **CLOSE)
    assert max(ages) > 2


def test_with_alpha_1_and_nothing_stale_the_server_takes_over_the_clients_model():
    algorithm = fedasync(Local(lr=0.05, batch_size=4), alpha=1.0)
    outcome = WORLD.play(algorithm, asynchronous(rounds=5, concurrency=1, key=KEY))
    for commit, (_, reply) in zip(outcome.commits, outcome.events, strict=True):
        np.testing.assert_allclose(
            theta(commit.state["model"]), theta(reply.up["model"]), rtol=1e-14, atol=1e-14
        )


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_fedasync_refuses_weights_that_do_not_mix(alpha):
    with pytest.raises(ConfigError, match="alpha must be in"):
        fedasync(Local(), alpha=alpha)


def test_a_buffer_of_everybody_from_one_version_is_a_round_of_uniform_fedavg():
    local = Local(lr=0.05, batch_size=None, steps=3)  # whole batches: the order of the rows is another
    buffered = Buffered(rounds=1, concurrency=1.0, buffer=len(WORLD.clients), key=KEY)
    ours = WORLD.play(fedbuff(local), buffered)
    everybody = Synchronous(rounds=1, cohort=1.0, key=KEY)
    flat = WORLD.play(fedavg(local, weighting="uniform"), everybody)
    np.testing.assert_allclose(theta(ours.state["model"]), theta(flat.state["model"]), rtol=1e-12, atol=1e-12)

"""DP-SGD: clipping against brute force, noise against its law, both trainers against each other, faults injected."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.func import functional_call, vmap

from coterie import models
from coterie.algorithms import Local, fedavg, fedprox, scaffold
from coterie.core import Task, derive, trees
from coterie.core.errors import ConfigError, RunError
from coterie.core.seeds import STILL
from coterie.data import ClientData
from coterie.privacy import examples
from coterie.privacy.examples import dp_sgd, exposures, private_work
from coterie.privacy.ghosts import ghost_sum
from coterie.trainers import Loop, Problem, Vectorised
from coterie.trainers.layers import Layers
from coterie.trainers.loop import ABSENT, room_for, rows_of, step_seed

ALARM = 1e-6  # how often each statistical test fails a sound sampler
LOCAL = Local(lr=0.1, batch_size=8, epochs=2)
torch.manual_seed(5)


@pytest.fixture(autouse=True)
def draws():
    torch.manual_seed(7)


def network(*layers, dtype=torch.float32):
    return nn.Sequential(*layers).to(dtype)


def images(dtype=torch.float32):
    return network(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(),
        nn.Linear(16, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), dtype=dtype,
    )  # fmt: skip


def people(sizes=(20, 13, 17), shape=(1, 8, 8), dtype=torch.float32):
    found = []
    for n in sizes:
        rows = torch.randn(n, *shape, dtype=dtype), torch.randint(0, 5, (n,))
        found.append(ClientData(rows, rows))
    return found


def asked(algorithm, problem, count=3, round=0):
    down = algorithm.broadcast(algorithm.init(problem.model()))
    return [Task(i, str(i), 0, round, down, config=algorithm.local(0)) for i in range(count)]


def objective_of(problem):
    return lambda params, batch, carry: (problem.loss(params, carry, batch)[0], carry)


def brute(problem, params, x, y, norm):
    """One example after the other, by plain autograd."""
    total = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    for one in range(len(y)):
        free = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
        loss = problem.per_example(
            functional_call(problem.training, free, (x[one : one + 1],)), y[one : one + 1]
        )
        grads = torch.autograd.grad(loss.sum(), list(free.values()))
        length = math.sqrt(sum(float(g.square().sum()) for g in grads))
        for name, g in zip(free, grads, strict=True):
            total[name] += g * min(1.0, norm / length)
    return total


def apart(mine, its):
    return max(float((a - b).norm() / b.norm()) for a, b in trees.rows(mine, its))


def norm_of(tree):
    return math.sqrt(sum(float(leaf.double().square().sum()) for leaf in trees.leaves(tree)))


@pytest.mark.parametrize("norm", [0.05, 1.0, 1e6])
def test_clipped_sums_are_those_of_a_plain_loop(norm):
    problem = Problem(images(torch.float64))
    ((x, y),) = (data.train for data in people((9,), dtype=torch.float64))
    params = problem.model()["params"]
    mask = torch.tensor([1.0] * 7 + [0.0] * 2)
    made, _ = examples.clipped_sum(objective_of(problem), params, (x, y), mask, {}, norm)
    assert apart(made, brute(problem, params, x[:7], y[:7], norm)) < 1e-6
    assert norm_of(made) <= 7 * norm * (1 + 1e-9)


NETWORKS = {
    "images": (images, (1, 8, 8)),
    "padded, no bias": (
        lambda: network(
            nn.Conv2d(1, 3, 3, 2, 1, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5, bias=False)
        ),
        (1, 8, 8),
    ),
    "sequence": (lambda: network(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5)), (12, 3)),
    "many places": (lambda: network(nn.Linear(30, 40), nn.Flatten(), nn.Linear(80, 5)), (2, 30)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_ghosts_agree_with_the_reference(name):
    make, shape = NETWORKS[name]
    problem = Problem(make())
    clients = [data.train for data in people((7, 7), shape)]
    x, y = (torch.stack(parts) for parts in zip(*clients, strict=True))
    params = problem.model()["params"]
    mask = torch.ones(2, 7)
    mask[1, 5:] = 0

    def fast(x, y, mask):
        with Layers():
            return ghost_sum(objective_of(problem), params, (x, y), mask, {}, 0.3)[0]

    made = vmap(fast)(x, y, mask)
    for row, real in ((0, 7), (1, 5)):
        batch = x[row, :real], y[row, :real]
        its, _ = examples.clipped_sum(objective_of(problem), params, batch, torch.ones(real), {}, 0.3)
        assert apart({name: leaf[row] for name, leaf in made.items()}, its) < 2e-5


def test_ghosts_of_an_embedding_count_repeated_words():
    problem = Problem(network(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(18, 5)))
    x, y = torch.randint(0, 4, (6, 6)), torch.randint(0, 5, (6,))
    params = problem.model()["params"]
    given = objective_of(problem), params, (x, y), torch.ones(6), {}, 0.3
    assert apart(ghost_sum(*given)[0], examples.clipped_sum(*given)[0]) < 2e-5


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 5), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.inner(x * self.scale)


@pytest.mark.parametrize("module", [Tied(), Bare(), network(nn.Linear(5, 5), nn.Dropout(0.5))])
def test_ghosts_leave_what_they_do_not_know(module):
    problem = Problem(module)
    batch = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    given = objective_of(problem), problem.model()["params"], batch, torch.ones(4), {}, 1.0
    assert ghost_sum(*given) is None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=5, max_size=5),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e3]),
    st.booleans(),
)
def test_one_example_moves_the_sum_by_at_most_the_norm(row, norm, protected):
    problem = Problem(network(nn.Linear(5, 5), nn.Linear(5, 5)))
    params = problem.model()["params"]
    x, y = torch.cat([torch.ones(2, 5), torch.tensor([row])]), torch.tensor([0, 1, 2])
    make = examples._protected if protected else examples._simulated
    without, whole = (
        make(objective_of(problem), params, (x, y), torch.tensor([1.0, 1.0, there]), {}, STILL, norm, 1.0)[0]
        for there in (0.0, 1.0)
    )
    moved = norm_of(trees.subtract(whole, without))
    exact = (1 + 2.0**-20) if protected else 1 + 1e-5  # of a float32 sum of three
    assert moved <= norm * exact + 1e-6 * norm_of(without)
    if not torch.isfinite(torch.tensor(row)).all():
        assert moved == 0  # not refused, which would tell


def test_protected_gradients_keep_their_norm_in_integers():
    most = 1000
    long = torch.tensor([[600, 800, 0], [600, 800, 1], [10**6, 0, 0], [-600, -800, -2]])
    made = examples.within(long, most)
    assert torch.equal(made[0], long[0])
    assert (made.square().sum(1) <= most**2).all()


def noise_of(algorithm, problem, trainer, clients, seed=7, round=0):
    made = trainer(problem, seed)
    still = dp_sgd(fedavg(LOCAL), norm=0.3, multiplier=0, protected=False)
    found = []
    for each in (algorithm, still):
        ups = [made.fit(each, task, None, data)[0].up["delta"] for task, data in
               zip(asked(each, problem, len(clients), round), clients, strict=True)]  # fmt: skip
        found.append([torch.cat([leaf.flatten() for leaf in up.values()]) for up in ups])
    return [mine - its for mine, its in zip(*found, strict=True)]


def law(noise, scale, sampled=1):
    """Refuse samples of N(0, scale^2) at a false alarm of ALARM, by their variance."""
    statistic, count = float((noise.double() / scale).square().sum()), noise.numel()
    low, high = stats.chi2.ppf([ALARM / 2, 1 - ALARM / 2], count)
    return low < statistic < high


def one_step(make, seed=0, sigma=2.0, norm=0.5, count=3):
    """The noise of one step on a model of 20,000 parameters."""
    problem = Problem(network(nn.Linear(200, 100, bias=False)))
    batch = torch.randn(count, 200, generator=torch.Generator().manual_seed(1)), torch.zeros(count).long()
    given = objective_of(problem), problem.model()["params"], batch, torch.ones(count), {}
    noisy, still = (make(*given, key, norm, sigma)[0] for key in (step_seed(derive(seed), 0), STILL))
    return trees.leaves(trees.subtract(noisy, still))[0].flatten()


@pytest.mark.parametrize("make", [examples._simulated, examples._protected])
def test_the_noise_has_its_variance(make):
    assert law(one_step(make), 1.0)


def test_halved_noise_is_caught(monkeypatch):
    real = examples.float_noise
    monkeypatch.setattr(examples, "float_noise", lambda seed, size, scale: real(seed, size, scale / 2))
    assert not law(one_step(examples._simulated), 1.0)
    integers = examples.integer_noise
    monkeypatch.setattr(examples, "integer_noise", lambda like, sigma: integers(like, sigma / 2))
    assert not law(one_step(examples._protected), 1.0)


def test_a_skipped_clip_is_caught(monkeypatch):
    problem = Problem(network(nn.Linear(5, 5), dtype=torch.float64))
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4)
    params, real = problem.model()["params"], examples.clip_factors

    def skipped(squares, mask, norm):
        return torch.where(torch.arange(len(mask)) == 2, 1.0, real(squares, mask, norm))

    monkeypatch.setattr(examples, "clip_factors", skipped)
    made, _ = examples.clipped_sum(objective_of(problem), params, (x, y), torch.ones(4), {}, 0.01)
    assert norm_of(made) > 4 * 0.01
    assert apart(made, brute(problem, params, x, y, 0.01)) > 1e-6


def test_ghosts_that_mix_examples_are_caught_by_the_trainer():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x):
            return self.inner(x - x.mean(0))

    algorithm = dp_sgd(fedavg(LOCAL), norm=0.3, multiplier=1, protected=False)
    why, _ = Vectorised(Problem(Mixed()), 7).obstacle(algorithm, people((20, 13), (5,)))
    assert "differs" in why


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("trainer", [Loop, Vectorised])
def test_clients_rounds_and_steps_have_noise_of_their_own(trainer, protected):
    problem = Problem(network(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 5)))
    algorithm = dp_sgd(
        fedavg(Local(lr=1.0, batch_size=8, steps=6)), norm=1e-9, multiplier=1e9, protected=protected
    )
    clients = people((20, 20), (5,))
    tasks = asked(algorithm, problem, 2) + asked(algorithm, problem, 2, round=1)
    made = [
        trainer(problem, 7).fit(algorithm, t, None, clients[0])[0].up["delta"] for t in (*tasks, tasks[0])
    ]
    flat = [torch.cat([leaf.flatten() for leaf in up.values()]) for up in made]
    assert len({tuple(each[:8].tolist()) for each in flat[:4]}) == 4
    assert torch.equal(flat[0], flat[4]) is not protected  # the seed makes float noise, and only that
    # six steps of noise 1 / 8 each: were it drawn once and repeated, the variance would be six times this
    assert all(law(each, math.sqrt(6) / 8) for each in flat)


def test_reused_noise_is_caught(monkeypatch):
    problem = Problem(network(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 5)))
    algorithm = dp_sgd(
        fedavg(Local(lr=1.0, batch_size=8, steps=6)), norm=1e-9, multiplier=1e9, protected=False
    )
    real = examples.float_noise
    monkeypatch.setattr(examples, "float_noise", lambda seed, size, scale: real(torch.tensor(1), size, scale))
    ups = (
        Loop(problem, 7)
        .fit(algorithm, asked(algorithm, problem)[0], None, people((20,), (5,))[0])[0]
        .up["delta"]
    )
    assert not law(torch.cat([leaf.flatten() for leaf in ups.values()]), math.sqrt(6) / 8)


def test_a_block_draws_for_each_client_in_each_step():
    problem = Problem(network(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 5)))
    for protected in (False, True):
        algorithm = dp_sgd(
            fedavg(Local(lr=1.0, batch_size=8, steps=6)), norm=1e-9, multiplier=1e9, protected=protected
        )
        ((block, _),) = Vectorised(problem, 7).fit_block(
            algorithm, asked(algorithm, problem), [None] * 3, people((20, 20, 20), (5,))
        )
        flat = torch.cat([leaf.flatten(1) for leaf in block.ups["delta"].values()], 1)
        assert all(law(each, math.sqrt(6) / 8) for each in flat)
        assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 5 / math.sqrt(flat.shape[1])


@pytest.mark.parametrize("sampling", ["poisson", "shuffled"])
@pytest.mark.parametrize("base", [fedavg(LOCAL), fedprox(LOCAL, mu=0.1), scaffold(LOCAL, population=3)])
def test_trainers_agree(base, sampling):
    problem, clients = Problem(images()), people()
    algorithm = dp_sgd(base, norm=0.3, multiplier=0.5, sampling=sampling, protected=False)
    trainer = Vectorised(problem, 7)
    assert trainer.obstacle(algorithm, clients[:2]) is None
    tasks = asked(algorithm, problem)
    ((block, _),) = trainer.fit_block(algorithm, tasks, [None] * 3, clients)
    for row, task in enumerate(block.tasks):
        alone, _ = Loop(problem, 7).fit(algorithm, task, None, clients[task.id])
        mine = {name: leaf[row] for name, leaf in block.ups["delta"].items()}
        assert norm_of(trees.subtract(mine, alone.up["delta"])) < 1e-5 * norm_of(alone.up["delta"])
        assert block.metrics["loss"][row] == pytest.approx(alone.metrics["loss"], rel=1e-4)


@pytest.mark.parametrize("kind", ["char_gru", "transformer"])
def test_recurrent_and_attention_models_train(kind):
    with torch.random.fork_rng():
        module = models.MODELS[kind](input_shape=(6,), outputs=7)
    problem = Problem(module)
    x = torch.randint(0, 7, (12, 6))
    data = ClientData((x, (x + 1) % 7), (x, x))
    algorithm = dp_sgd(fedavg(Local(lr=0.1, batch_size=4, steps=2)), norm=0.5, multiplier=0, protected=False)
    up = Loop(problem, 7).fit(algorithm, asked(algorithm, problem)[0], None, data)[0].up["delta"]
    assert 0 < norm_of(up) <= 2 * 0.1 * 0.5 * 16 / 4  # steps, lr, norm, places / expected batch


def test_without_noise_and_clipping_it_is_the_algorithm_itself():
    problem, clients = Problem(images(torch.float64)), people((16,), dtype=torch.float64)
    plain = fedprox(LOCAL, mu=0.1)
    private = dp_sgd(plain, norm=1e9, multiplier=0, sampling="shuffled", protected=False)
    mine, its = (
        Loop(problem, 7).fit(each, asked(each, problem)[0], None, clients[0])[0].up["delta"]
        for each in (private, plain)
    )
    assert apart(mine, its) < 1e-9


def test_poisson_batches_are_coin_flips():
    config = {"sampling": "poisson", "secret": False, "batch_size": 10, "steps": 4000, "epochs": 1}
    drawn = list(rows_of(50, config, derive(3)))
    real = [rows[rows != ABSENT] for rows in drawn]
    sizes, each = np.array([len(rows) for rows in real]), np.bincount(np.concatenate(real), minlength=50)
    assert {len(rows) for rows in drawn} == {room_for(10)}
    for counts, (n, p) in ((sizes, (50, 0.2)), (each, (4000, 0.2))):
        spread = ((counts - n * p) ** 2).sum() / (n * p * (1 - p))
        assert stats.chi2.sf(spread, len(counts)) > ALARM / 2
        assert stats.chi2.cdf(spread, len(counts)) > ALARM / 2
    again = list(rows_of(50, config, derive(3)))
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    secret = [list(rows_of(50, {**config, "secret": True}, derive(3))) for _ in range(2)]
    assert not all(np.array_equal(a, b) for a, b in zip(*secret, strict=True))


@pytest.mark.parametrize("size", [1, 8, 32, 256, 4096])
def test_room_is_enough_but_once_in_a_million(size):
    assert stats.poisson.sf(room_for(size), size) < 1e-6


def test_a_batch_that_outgrows_its_room_is_whole(monkeypatch):
    monkeypatch.setattr("coterie.trainers.loop.room_for", lambda size: size)
    config = {"sampling": "poisson", "secret": False, "batch_size": 8, "steps": 40, "epochs": 1}
    assert max(len(rows) for rows in rows_of(50, config, derive(3))) > 8
    test_trainers_agree(fedavg(LOCAL), "poisson")


def test_exposures_are_those_of_the_worst_clients():
    kind = {"batch_size": 10, "epochs": 2, "rounds": 3, "multiplier": 1.1}
    small, large = exposures([100, 37, 100], steps=None, **kind)
    assert (small.rate, small.steps, small.sampling) == (10 / 37, 2 * 4 * 3, "poisson")
    assert (large.rate, large.steps) == (0.1, 2 * 10 * 3)
    (same,) = exposures([100, 37], steps=5, **kind)
    assert (same.rate, same.steps) == (10 / 37, 15)
    (shuffled,) = exposures([100, 37], steps=None, sampling="shuffled", **kind)
    assert (shuffled.sampling, shuffled.rate, shuffled.steps) == ("none", 1.0, 6)
    (tiny,) = exposures([4], steps=5, **kind)
    assert (tiny.sampling, tiny.rate) == ("none", 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"norm": 0.0},
        {"norm": math.inf},
        {"multiplier": -1.0},
        {"multiplier": math.nan},
        {"sampling": "fixed"},
    ],
)
def test_refuses_what_has_no_meaning(wrong):
    with pytest.raises(ConfigError, match="dp_sgd"):
        dp_sgd(fedavg(LOCAL), **{"norm": 1.0, "multiplier": 1.0, **wrong})


def test_refuses_whole_data_mixed_examples_and_no_key():
    with pytest.raises(ConfigError, match="batch_size"):
        dp_sgd(fedavg(Local(batch_size=None)), norm=1.0, multiplier=1.0)
    mixed = network(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 5))
    algorithm, problem = dp_sgd(fedavg(LOCAL), norm=1.0, multiplier=1.0), Problem(mixed)
    with pytest.raises(ConfigError, match="statistics"):
        Loop(problem, 7).fit(algorithm, asked(algorithm, problem)[0], None, people((9,))[0])
    with pytest.raises(ConfigError, match="BatchNorm2d"):
        examples.check_model(mixed)
    examples.check_model(images())
    work = private_work(fedavg(LOCAL).client_work, norm=1.0, multiplier=1.0, protected=True)
    with pytest.raises(RunError, match="no key"):
        work.gradient(None, {}, (None, None), None, {}, None)

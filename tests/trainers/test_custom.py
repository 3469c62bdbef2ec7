"""The custom trainer: a user's own loop is the loop, and what it does to its module stays with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from coterie.aggregators import krum
from coterie.algorithms import Local, fedadam, fedavg
from coterie.core import Lost, derive, rng, seeded
from coterie.core.trees import digest
from coterie.data import ClientData
from coterie.schedules import Buffered, Hierarchical, Synchronous
from coterie.trainers import Context, Custom, Fit, Problem
from worlds import KEY, World, first_task, linear_world, theta

WORLD = linear_world()
LOCAL = Local(lr=0.05, lr_decay=0.9, epochs=2, batch_size=4)
SCHEDULE = Synchronous(rounds=3, cohort=3, key=KEY)


def own_loop(model, data, context):
    """SGD as a user would write it, over the batches that the loop trainer would draw."""
    x, y = data.train
    optimizer = torch.optim.SGD(model.parameters(), context.config["lr"])
    sums = 0.0
    config = {name: context.config[name] for name in ("epochs", "batch_size")}
    for batch in WORLD.rows(context.client, context.round, **config):
        optimizer.zero_grad()
        loss = ((model(x[batch]).squeeze(1) - y[batch]) ** 2).mean()
        loss.backward()
        optimizer.step()
        sums += loss.item() * len(batch)
    return {"loss": sums / len(y) / context.config["epochs"]}


def custom(fit, world=WORLD):
    return Custom(world.problem, world.seed, fit)


def answered(fit, algorithm=None, world=WORLD, **changes):
    """One task's reply."""
    algorithm = algorithm or fedavg(LOCAL)
    task = replace(first_task(algorithm, world.problem.model()), **changes)
    return custom(fit, world).fit(algorithm, task, None, world.people[task.client])[0]


@pytest.mark.parametrize("algorithm", [fedavg(LOCAL), fedadam(LOCAL, lr=0.1)], ids=["fedavg", "fedadam"])
@pytest.mark.parametrize(
    "schedule",
    [
        SCHEDULE,
        Hierarchical(rounds=3, cohort=3, groups=2, key=KEY),
        Buffered(rounds=3, concurrency=3, buffer=2, key=KEY),
    ],
    ids=["synchronous", "hierarchical", "buffered"],
)
def test_a_users_own_sgd_is_the_loop(algorithm, schedule):
    ours, loop = WORLD.play(algorithm, schedule, trainer=custom(own_loop)), WORLD.play(algorithm, schedule)
    for mine, theirs in zip(ours.commits, loop.commits, strict=True):
        np.testing.assert_allclose(
            theta(mine.state["model"]), theta(theirs.state["model"]), rtol=1e-6, atol=1e-6
        )
        assert mine.metrics["train_loss"] == pytest.approx(theirs.metrics["train_loss"], rel=1e-6)
        assert mine.metrics["samples"] == theirs.metrics["samples"]


def test_what_fit_may_return():
    """client-1 has 14 rows and weighs them by default; two epochs are 28 samples."""
    nothing = answered(lambda model, data, context: None)
    assert (nothing.metrics, nothing.weight, nothing.samples) == ({}, 14.0, 28)
    metrics = answered(lambda model, data, context: {"auc": torch.tensor(0.75)})
    assert (metrics.metrics, metrics.weight, metrics.samples) == ({"auc": 0.75}, 14.0, 28)
    told = answered(lambda model, data, context: Fit({"loss": 1}, weight=2, samples=99))
    assert (told.metrics, told.weight, told.samples) == ({"loss": 1.0}, 2.0, 99)
    assert isinstance(told.weight, float)
    assert all(not leaf.any() for leaf in nothing.up["delta"].values())


def test_weights_told_by_the_user_weigh_the_update():
    weights = {client: index + 0.25 for index, client in enumerate(WORLD.clients)}

    def fit(model, data, context):
        with torch.no_grad():
            model.bias.fill_(float(context.client[-1]))
        return Fit({"loss": weights[context.client]}, weight=weights[context.client])

    outcome = WORLD.play(fedavg(LOCAL), replace(SCHEDULE, rounds=1), trainer=custom(fit))
    cohort = [task.client for task in outcome.sent]
    total = sum(weights[k] for k in cohort)
    mean = sum(weights[k] * float(k[-1]) for k in cohort) / total
    assert outcome.state["model"]["params"]["bias"].item() == pytest.approx(mean, rel=1e-12)
    squares = sum(weights[k] ** 2 for k in cohort) / total
    assert outcome.commits[0].metrics["train_loss"] == pytest.approx(squares, rel=1e-12)


def test_a_fit_that_raises_loses_its_client_only(caplog):
    def fit(model, data, context):
        if context.client == "client-2":
            raise RuntimeError("cuda is not happy")
        return own_loop(model, data, context)

    everybody = replace(SCHEDULE, cohort=1.0)
    outcome = WORLD.play(fedavg(LOCAL), everybody, trainer=custom(fit))
    reasons = [event.reason for _, event in outcome.events if isinstance(event, Lost)]
    assert reasons == ["RuntimeError: cuda is not happy"] * 3
    assert "client client-2 failed in round 1" in caplog.text
    without = WORLD.play(
        fedavg(LOCAL), everybody, trainer=custom(own_loop), dropped=lambda t: t.client == "client-2"
    )
    assert digest(outcome.state) == digest(without.state)


def test_what_a_fit_does_to_its_module_stays_with_it():
    """Parameters, mode, attributes, settings: the next client starts from the server's model."""
    seen = []

    def vandal(model, data, context):
        assert model.training
        assert not hasattr(model, "mine")
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        seen.append(theta(dict(model.state_dict())))
        own_loop(model, data, context)
        model.mine = True
        model.eval()
        context.config["lr"] = 0.0

    start = digest(WORLD.problem.model())
    outcome = WORLD.play(fedavg(LOCAL), replace(SCHEDULE, rounds=1), trainer=custom(vandal))
    assert digest(WORLD.problem.model()) == start
    assert all((vector == WORLD.theta()).all() for vector in seen)
    assert len(seen) == 3
    plain = WORLD.play(fedavg(LOCAL), replace(SCHEDULE, rounds=1), trainer=custom(own_loop))
    assert digest(outcome.state) == digest(plain.state)


@pytest.mark.parametrize("who", [["client-1"], WORLD.clients], ids=["one", "all"])
def test_updates_keep_the_models_type_whatever_the_user_computes_in(who):
    people = {
        k: ClientData((d.train[0].float(), d.train[1].float()), d.test) for k, d in WORLD.people.items()
    }
    world = World(Problem(nn.Linear(3, 1), "regression"), people)

    def fit(model, data, context):
        if context.client in who:
            model.double()
            with torch.no_grad():
                model.bias += 1.0

    everybody = replace(SCHEDULE, cohort=1.0)
    outcome = world.play(fedavg(LOCAL), everybody, trainer=custom(fit, world))
    assert {leaf.dtype for leaf in outcome.state["model"]["params"].values()} == {torch.float32}


@pytest.mark.parametrize("aggregator", [None, krum(byzantine=1)], ids=["mean", "krum"])
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_none_is_dropped_with_its_update(aggregator, weight):
    def fit(model, data, context):
        return Fit(weight=weight if context.client == "client-1" else None)

    careful = replace(SCHEDULE, cohort=1.0, on_nan="drop")
    outcome = WORLD.play(fedavg(LOCAL, aggregator=aggregator), careful, trainer=custom(fit))
    assert [commit.metrics["clients"]["lost"] for commit in outcome.commits] == [1, 1, 1]


def test_a_fit_gets_the_servers_newest_model():
    seen = {}

    def fit(model, data, context):
        seen.setdefault(context.round, theta(dict(model.state_dict())))
        own_loop(model, data, context)

    outcome = WORLD.play(fedavg(LOCAL), SCHEDULE, trainer=custom(fit))
    for round in (1, 2):
        assert (seen[round] == theta(outcome.commits[round - 1].state["model"])).all()


def test_the_context_names_the_task():
    told = []
    answered(lambda model, data, context: told.append(context), round=3, config={**fedavg(LOCAL).local(3)})
    (context,) = told
    assert isinstance(context, Context)
    assert (context.client, context.round) == ("client-1", 3)
    assert context.config["lr"] == pytest.approx(0.05 * 0.9**3)
    assert (context.config["epochs"], context.config["batch_size"]) == (2, 4)


def test_draws_repeat_and_leave_the_global_generator_alone():
    def noisy(model, data, context):
        with torch.no_grad():
            model.weight += torch.randn(1, 3)
            model.bias += rng(context.key).normal()
        return {"drawn": float(torch.rand(()))}

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = answered(noisy)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again = answered(noisy)
    assert (digest(again.up), again.metrics) == (digest(first.up), first.metrics)
    for other in (answered(noisy, round=1), answered(noisy, client="client-2")):
        delta, same = other.up["delta"], first.up["delta"]
        assert not any(torch.equal(delta[name], same[name]) for name in delta)


def test_buffers_and_frozen_parameters():
    """BatchNorm's statistics are sent; what the problem froze is neither sent nor loaded."""
    with seeded(derive(1, "model")):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    module[0].weight.requires_grad_(False)
    draw = rng(derive(1, "rows"))
    rows = torch.from_numpy(draw.normal(2, 3, size=(20, 3))), torch.from_numpy(draw.integers(0, 2, size=20))
    world = World(Problem(module), {"client-1": ClientData(rows, rows)})

    def fit(model, data, context):
        assert torch.equal(model[0].weight, module[0].weight)
        assert not model[0].weight.requires_grad
        nn.functional.cross_entropy(model(data.train[0]), data.train[1]).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()

    reply = answered(fit, world=world)
    assert set(reply.up["delta"]) == {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    with torch.no_grad():
        hidden = module[0](rows[0])
    torch.testing.assert_close(reply.up["buffers"]["1.running_mean"], 0.1 * hidden.mean(0))
    assert reply.up["buffers"]["1.num_batches_tracked"].item() == 1
    assert reply.up["delta"]["2.weight"].any()

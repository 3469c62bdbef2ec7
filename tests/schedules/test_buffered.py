"""The asynchronous schedule: a function of its seed, durations and events. Its steps: tests/algorithms."""

import dataclasses

import pytest

from coterie.algorithms import Local, fedasync, fedbuff
from coterie.backends import DURATIONS, drop_out
from coterie.core import Cancel, ConfigError, QuorumLost, Reply, Task, awaits, derive, rng
from coterie.core.trees import digest, zeros_like
from coterie.schedules import Buffered, asynchronous, constant, hinge, polynomial
from worlds import KEY, linear_world

WORLD = linear_world()
LOCAL = Local(lr=0.05, batch_size=4)


def delays(seed):
    return {"duration": DURATIONS["log_normal"](sigma=1.0, key=derive(seed, "delays"))}


def start(algorithm, schedule):
    return schedule(algorithm, algorithm.init(WORLD.problem.model()), WORLD.clients)


def replay(plan, events):
    """Send a plan recorded events and return what it returns."""
    events = iter(events)
    try:
        actions = next(plan)
        while True:
            actions = plan.send(next(events) if awaits(actions) else None)
    except StopIteration as stop:
        return stop.value


@pytest.mark.parametrize(
    ("algorithm", "schedule"),
    [
        (fedbuff(LOCAL), Buffered(rounds=6, concurrency=4, buffer=3, key=KEY)),
        (fedasync(LOCAL), asynchronous(rounds=10, concurrency=4, key=KEY)),
    ],
    ids=["fedbuff", "fedasync"],
)
def test_a_run_is_a_function_of_its_durations_and_of_its_events(algorithm, schedule):
    lost = drop_out(0.2, key=derive(1, "drop"))
    outcome = WORLD.play(algorithm, schedule, dropped=lost, **delays(1))
    ours = digest(outcome.state)
    assert digest(WORLD.play(algorithm, schedule, dropped=lost, **delays(1)).state) == ours
    assert digest(WORLD.play(algorithm, schedule, dropped=lost, **delays(2)).state) != ours
    assert digest(replay(start(algorithm, schedule), [event for _, event in outcome.events])) == ours


def test_the_key_draws_the_clients():
    schedule = Buffered(rounds=6, concurrency=4, buffer=3, key=KEY)
    other = dataclasses.replace(schedule, key=derive(KEY, "other"))
    drawn, others = ([task.client for task in WORLD.play(fedbuff(LOCAL), s).sent] for s in (schedule, other))
    assert drawn != others


def test_as_many_clients_as_allowed_are_at_work_and_none_twice():
    plan, draw, working = (
        start(fedbuff(LOCAL), Buffered(rounds=8, concurrency=4, buffer=2, key=KEY)),
        rng(KEY),
        {},
    )
    up = {"delta": zeros_like(WORLD.problem.model()["params"]), "buffers": {}}
    actions = next(plan)
    while not (actions and isinstance(actions[0], Cancel)):
        for task in actions:
            if isinstance(task, Task):
                assert task.client not in working
                working[task.client] = task
        event = None
        if awaits(actions):
            assert len(working) == 4
            event = Reply(working.pop(draw.choice(sorted(working))), up, 1.0)
        actions = plan.send(event)
    assert {action.id for action in actions} == {task.id for task in working.values()}


def test_a_buffer_counts_updates_even_of_one_client():
    """Two clients at a time fill a buffer larger than the population, or they would work for ever."""
    full = len(WORLD.clients) + 3
    outcome = WORLD.play(fedbuff(LOCAL), Buffered(rounds=2, concurrency=2, buffer=full, key=KEY), **delays(1))
    assert len(outcome.events) == 2 * full
    assert [commit.metrics["clients"]["answered"] for commit in outcome.commits] == [full, full]


def test_ends_when_everybody_is_lost():
    with pytest.raises(
        QuorumLost, match=r"20 clients in a row were lost, the last one: client-.: dropped out"
    ):
        WORLD.play(
            fedbuff(LOCAL), Buffered(rounds=1, concurrency=2, buffer=1, key=KEY), dropped=lambda task: True
        )


def test_the_staleness_discounts_are_those_of_the_papers():
    assert [polynomial(a=0.5)(t) for t in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [hinge(a=10.0, b=4.0)(t) for t in (0, 4, 5, 6)] == [
        1.0,
        1.0,
        pytest.approx(1 / 11),
        pytest.approx(1 / 21),
    ]
    assert [constant()(t) for t in (0, 100)] == [1.0, 1.0]


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"buffer": 0}, {"concurrency": 7}, {"concurrency": 0}])
def test_refuses_what_cannot_run(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        start(
            fedbuff(LOCAL), Buffered(**{"rounds": 1, "concurrency": 2, "buffer": 1, "key": KEY} | wrong)
        ).send(None)

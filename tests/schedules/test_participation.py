"""Who takes part: Poisson and cyclic sampling, and what every schedule promises about it.

Statistical tests have a false-alarm rate of 1e-6 over the choice of the key, which is fixed.
"""

from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from coterie.algorithms import Local, fedavg, scaffold
from coterie.backends import drop_out
from coterie.core import Aggregator, ConfigError, Guarantees, QuorumLost, Reply, Task, derive
from coterie.core.trees import digest
from coterie.schedules import SCHEDULES, Buffered, Gossip, Hierarchical, Synchronous, asynchronous
from worlds import KEY, linear_world

WORLD = linear_world()
FEDAVG = fedavg(Local(lr=0.05, batch_size=4))
FALSE_ALARM = 1e-6
POISSON = Synchronous(rounds=3, cohort=2, sampling="poisson", key=KEY)
CYCLIC = replace(POISSON, sampling="cyclic")


def empty_rounds(schedule, clients, rounds=400):
    return [r for r in range(rounds) if not schedule.draw(clients, 1, r)]


def test_poisson_clients_each_throw_a_coin_of_their_own():
    """Sizes are binomial, every client comes at the rate, and pairs at its square."""
    clients, cohort, rounds = 12, 4, 6000
    drawn = [POISSON.draw(clients, cohort, r) for r in range(rounds)]
    assert all(len(set(each)) == len(each) for each in drawn)
    inside = np.zeros((rounds, clients))
    for r, each in enumerate(drawn):
        inside[r, each] = 1
    sizes = np.bincount(inside.sum(1).astype(int), minlength=clients + 1)
    expected = rounds * stats.binom.pmf(np.arange(clients + 1), clients, cohort / clients)
    few = expected < 5
    observed = [*sizes[~few], sizes[few].sum()]
    assert stats.chisquare(observed, [*expected[~few], expected[few].sum()]).pvalue > FALSE_ALARM
    each = [stats.binomtest(int(n), rounds, cohort / clients).pvalue for n in inside.sum(0)]
    both = [
        stats.binomtest(int((inside[:, i] * inside[:, j]).sum()), rounds, (cohort / clients) ** 2).pvalue
        for i in range(clients)
        for j in range(i)
    ]
    later = stats.binomtest(int((inside[1:, 0] * inside[:-1, 0]).sum()), rounds - 1, (cohort / clients) ** 2)
    assert min(*each, *both, later.pvalue) > FALSE_ALARM / (len(each) + len(both) + 1)


@pytest.mark.parametrize("schedule", [POISSON, CYCLIC])
def test_a_cohort_of_a_million_asks_only_those_drawn(schedule):
    class Million:
        asked = 0

        def __len__(self):
            return 1_000_000

        def __getitem__(self, place):
            Million.asked += 1
            return f"client-{place}"

    plan = replace(schedule, cohort=50)(FEDAVG, FEDAVG.init(WORLD.problem.model()), Million())
    tasks = [action for action in next(plan) if isinstance(action, Task)]
    plan.close()
    assert Million.asked == len(tasks)
    assert 0 < len(tasks) < 120


@pytest.mark.parametrize(("clients", "cohort"), [(12, 4), (13, 4), (10, 9), (7, 7), (5, 1), (101, 10)])
def test_cyclic_clients_take_turns(clients, cohort):
    """All clients are in each cycle, once; parts differ by one at most; what is promised is what happens."""
    schedule = replace(CYCLIC, cohort=cohort, rounds=57)
    promised = schedule.guarantees(clients)
    turns = -(-clients // cohort)
    assert promised.separation == turns
    drawn = [schedule.draw(clients, cohort, r) for r in range(schedule.rounds)]
    for start in range(0, schedule.rounds - turns + 1, turns):
        assert sorted(chain(*drawn[start : start + turns])) == list(range(clients))
    sizes = {len(each) for each in drawn}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == promised.cohort <= cohort
    for client in range(clients):
        at = [r for r, each in enumerate(drawn) if client in each]
        assert all(b - a == turns for a, b in pairwise(at))
        assert len(at) <= promised.participations()
    assert max(Counter(chain(*drawn)).values()) == promised.participations()
    other = replace(schedule, key=derive(KEY, "other"))
    assert clients < 10 or other.draw(clients, cohort, 0) != drawn[0]


@pytest.mark.parametrize("schedule", [replace(POISSON, rounds=6, cohort=0.5), replace(CYCLIC, rounds=6)])
def test_relays_and_resumption_end_with_the_bits_of_the_flat_schedule(schedule):
    """With drop-outs; for an algorithm whose clients remember, too."""
    algorithm = scaffold(Local(lr=0.05, batch_size=4), population=6)
    trouble = {"dropped": drop_out(0.1, key=derive(4, "drop"))}
    flat = WORLD.play(algorithm, schedule, **trouble)
    settings = {name: getattr(schedule, name) for name in ("rounds", "cohort", "sampling", "key")}
    for groups in (1, 3):
        tree = WORLD.play(algorithm, Hierarchical(**settings, groups=groups), **trouble)
        assert digest(tree.state) == digest(flat.state)
    flat = WORLD.play(FEDAVG, schedule, **trouble)
    half = flat.commits[2]
    plan = schedule(FEDAVG, half.state, WORLD.clients, half.resume)
    rest = WORLD.play(FEDAVG, schedule, plan=plan, **trouble)
    assert digest(rest.state) == digest(flat.state)
    assert len(rest.commits) == 3


@pytest.mark.parametrize("make", [Synchronous, Hierarchical])
@pytest.mark.parametrize("deadline", [None, 5.0])
def test_a_round_without_clients_is_a_round(make, deadline):
    """Without noise the state stays as it is; the count of rounds goes on, and so does the run."""
    schedule = make(rounds=12, cohort=1, sampling="poisson", deadline=deadline, key=KEY)
    outcome = WORLD.play(FEDAVG, schedule)
    empty = empty_rounds(schedule, 6, 12)
    assert 0 < len(empty) < 12
    states = [FEDAVG.init(WORLD.problem.model()), *(commit.state for commit in outcome.commits)]
    for round, commit in enumerate(outcome.commits):
        assert commit.version == round + 1
        assert (digest(states[round]) == digest(states[round + 1])) == (round in empty)
        assert (commit.metrics["clients"]["asked"] == 0) == (round in empty)


def test_a_private_round_without_clients_is_noised_like_any_other():
    """What adds noise to sums (it has a `cohort`) is handed the sum of nobody, too."""
    seen = []

    def finalize(state, aggregate, weight, count):
        seen.append(aggregate)
        return state

    counting = Aggregator(
        init=lambda: None,
        add=lambda acc, up, weight: (acc or 0) + 1,
        merge=lambda left, right: (left or 0) + (right or 0),
        finish=lambda acc: (acc, float(acc or 0), acc or 0),
        linear=True,
    )
    private = replace(FEDAVG, aggregator=counting, finalize=finalize, transforms=(SimpleNamespace(cohort=1),))
    schedule = replace(POISSON, cohort=1, rounds=12)
    plan = schedule(private, private.init(WORLD.problem.model()), WORLD.clients)
    actions = next(plan)
    while len(seen) < schedule.rounds:
        tasks = [action for action in actions if isinstance(action, Task)]
        for event in [Reply(task, {}, 1.0) for task in tasks] or [None]:
            actions = plan.send(event)
    assert seen == [len(schedule.draw(6, 1, round)) or None for round in range(12)]
    assert None in seen


def test_a_quorum_is_of_those_who_were_asked():
    gone = {"dropped": lambda task: task.client == "client-0"}
    schedule = replace(POISSON, cohort=3, rounds=8, quorum=3)
    least = min(len(schedule.draw(6, 3, r)) for r in range(8))
    assert least < 3  # fewer than the quorum, and none of them may be lost
    assert len(WORLD.play(FEDAVG, schedule).commits) == 8
    with pytest.raises(QuorumLost, match=r"the quorum is"):
        WORLD.play(FEDAVG, replace(schedule, quorum=1.0), **gone)
    assert len(WORLD.play(FEDAVG, replace(schedule, quorum=0.5), **gone).commits) == 8


@pytest.mark.parametrize("sampling", ["poisson", "cyclic"])
def test_over_selection_is_refused(sampling):
    with pytest.raises(ConfigError, match=f"over_selection = 1.3: with {sampling} sampling"):
        replace(POISSON, sampling=sampling, over_selection=1.3)


UNIFORM = Synchronous(rounds=30, cohort=0.1, key=KEY)
BASE = {"population": 200, "cohort": 20, "rounds": 30}


def test_what_is_sampled_is_credited():
    assert UNIFORM.guarantees(200) == Guarantees(sampling="fixed", **BASE)
    poisson = replace(UNIFORM, sampling="poisson").guarantees(200)
    assert poisson == Guarantees(sampling="poisson", **BASE)
    assert poisson.rate == 0.1
    assert replace(UNIFORM, quorum=0.5, on_nan="drop", pooled=True).guarantees(200).sampling == "fixed"


@pytest.mark.parametrize(("schedule", "why"), [
    (replace(UNIFORM, cohort=1.0), "all clients"),
    (replace(UNIFORM, sampling="poisson", cohort=1.0), "all clients"),
    (replace(UNIFORM, sampling="weighted"), "more data"),
    (replace(UNIFORM, over_selection=1.3), "over-selection"),
    (replace(UNIFORM, deadline=3.0), "deadline"),
    (replace(UNIFORM, sampling="poisson", deadline=3.0), "deadline"),
    (replace(UNIFORM, sampling="cyclic"), "turns"),
    (Hierarchical(rounds=30, cohort=20, key=KEY), "relays"),
    (Hierarchical(rounds=30, cohort=20, sampling="poisson", key=KEY), "relays"),
    (Buffered(rounds=30, concurrency=9, buffer=4, key=KEY), "quick"),
    (asynchronous(rounds=30, concurrency=9, key=KEY), "quick"),
    (Gossip(rounds=30), "every node"),
])  # fmt: skip
def test_what_is_not_sampled_is_not_credited_and_why(schedule, why):
    told = schedule.guarantees(200)
    assert (told.sampling, told.rate, told.rounds) == ("none", 1.0, 30)
    assert why in told.why
    assert told.participations() == (3 if "turns" in why else 30)
    assert told.repeats == (4 if isinstance(schedule, Buffered) and schedule.buffer == 4 else 1)


def test_every_schedule_promises_something():
    for make in SCHEDULES.values():
        assert hasattr(make, "guarantees") or make is asynchronous


def test_a_quick_client_may_be_in_one_step_as_often_as_promised():
    """One client answers at once, the others never: it fills every buffer, all of it."""
    schedule = Buffered(rounds=2, concurrency=6, buffer=3, key=KEY)
    outcome = WORLD.play(FEDAVG, schedule, duration=lambda t: 1e-3 if t.client == "client-1" else 1e6)
    first = Counter(task.client for task in outcome.trained[:3])
    assert first["client-1"] == schedule.guarantees(6).repeats

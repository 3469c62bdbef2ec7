"""The synchronous schedule: who is drawn, who is waited for, and what becomes of the rest.

Statistical tests have a false-alarm rate of 1e-6 over the choice of the key, which is fixed.
"""

from collections import Counter
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from coterie.algorithms import Local, fedavg, scaffold
from coterie.backends import drop_out
from coterie.core import ConfigError, Lost, NonFinite, QuorumLost, Reply, derive
from coterie.core.trees import digest
from coterie.schedules import Buffered, Hierarchical, Synchronous, synchronous
from coterie.trainers import Loop
from worlds import KEY, linear_world

WORLD = linear_world()
FEDAVG = fedavg(Local(lr=0.05, batch_size=4))
FALSE_ALARM = 1e-6


def seconds(*by_client):
    """How long client-0, client-1, ... take."""
    return lambda task: by_client[int(task.client.removeprefix("client-"))]


def chi_square(counts, probabilities):
    draws = sum(counts.values())
    observed = [counts[cell] for cell in probabilities]
    assert sum(observed) == draws  # nothing outside the cells
    return stats.chisquare(observed, [draws * p for p in probabilities.values()]).pvalue


@pytest.mark.parametrize("sampling", ["uniform", "weighted"])
def test_cohorts_are_drawn_without_replacement_and_fairly(sampling):
    """Ordered pairs: P(i, j) = p_i p_j / (1 - p_i), with p_i = 1/n or in proportion to the size."""
    sizes = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 6.0}
    schedule = Synchronous(rounds=1, cohort=2, sampling=sampling, size=sizes.__getitem__, key=KEY)
    p = {k: size / 12 if sampling == "weighted" else 0.25 for k, size in sizes.items()}
    pairs = {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in permutations(sizes, 2)}
    names, odds = tuple(sizes), schedule.odds(tuple(sizes))
    drawn = Counter(tuple(names[i] for i in schedule.draw(4, 2, round, odds)) for round in range(8000))
    assert chi_square(drawn, pairs) > FALSE_ALARM
    other = dict.fromkeys(pairs, 1 / 12)  # the test can tell one from the other
    assert (chi_square(drawn, other) > FALSE_ALARM) == (sampling == "uniform")


def test_draws_depend_on_the_key_and_the_round():
    schedule = Synchronous(rounds=1, cohort=2, key=KEY)
    first = schedule.draw(40, 20, 0)
    assert sorted(set(first)) == sorted(first)
    assert set(first) <= set(range(40))
    assert schedule.draw(40, 20, 0) == first
    assert schedule.draw(40, 20, 1) != first
    assert replace(schedule, key=derive(KEY, "other")).draw(40, 20, 0) != first


def test_weighted_draws_from_many_have_the_same_odds(monkeypatch):
    """The draw that never looks at all clients, where it is drawn again and again: one holds half of all."""
    monkeypatch.setattr(synchronous, "FEW", 99)
    sizes = dict(zip("abc", (50.0, 30.0, 19.03), strict=True)) | {f"{i}": 0.01 for i in range(97)}
    schedule = Synchronous(rounds=1, cohort=2, sampling="weighted", size=sizes.__getitem__, key=KEY)
    names, odds = [*sizes], schedule.odds([*sizes])
    p = {name: sizes[name] / 100 for name in "abc"} | {"rest": 0.0097}
    drawn = [[names[i] for i in schedule.draw(100, 2, round, odds)] for round in range(8000)]
    assert all(first != second for first, second in drawn)
    pairs = Counter(tuple(name if name in p else "rest" for name in pair) for pair in drawn)
    chances = {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in permutations("abc", 2)}
    chances |= {("rest", "any"): p["rest"]} | {(i, "rest"): p[i] * p["rest"] / (1 - p[i]) for i in "abc"}
    cells = Counter({("rest", "any") if i == "rest" else (i, j): 0 for i, j in pairs})
    for (i, j), count in pairs.items():
        cells["rest" if i == "rest" else i, "any" if i == "rest" else j] += count
    assert chi_square(cells, chances) > FALSE_ALARM


def test_a_cohort_of_a_million_costs_what_the_cohort_costs():
    """Nobody looks at all clients: not to draw, nor to remember; those who were drawn are asked by place."""

    class Million:
        asked = 0

        def __len__(self):
            return 1_000_000

        def __getitem__(self, place):
            Million.asked += 1
            return f"client-{place}"

    for schedule in (
        Synchronous(rounds=1, cohort=5, key=KEY),
        Hierarchical(rounds=1, cohort=5, groups=2, key=KEY),
        Buffered(rounds=1, concurrency=5, key=KEY),
    ):
        Million.asked = 0
        plan = schedule(FEDAVG, FEDAVG.init(WORLD.problem.model()), Million())
        tasks = next(plan)
        assert tasks
        plan.close()
        assert Million.asked == 5


@pytest.mark.parametrize(("cohort", "asked"), [(4, 4), (0.5, 3), (0.51, 4), (1.0, 6), (0.01, 1), (1, 1)])
def test_a_cohort_is_a_number_or_a_fraction(cohort, asked):
    outcome = WORLD.play(FEDAVG, Synchronous(rounds=2, cohort=cohort, key=KEY))
    assert [commit.metrics["clients"]["asked"] for commit in outcome.commits] == [asked, asked]
    assert len(outcome.sent) == len(outcome.trained) == 2 * asked


@pytest.mark.parametrize(
    "wrong",
    [
        {"cohort": 7},
        {"cohort": 0},
        {"cohort": 1.5},
        {"quorum": 4},
        {"quorum": 0.0},
        {"rounds": 0},
        {"over_selection": 0.9},
        {"deadline": 0.0},
    ],
)
def test_refuses_what_no_population_can_satisfy(wrong):
    with pytest.raises(ConfigError, match=rf"schedule\.{next(iter(wrong))} = "):
        WORLD.play(FEDAVG, Synchronous(**{"rounds": 1, "cohort": 3, "key": KEY} | wrong))


def test_over_selection_takes_the_first_replies_and_the_rest_never_train():
    """4 wanted, ceil(1.4 * 4) = 6 asked: with these devices 3, 1, 5 and 0 are first."""
    schedule = Synchronous(rounds=2, cohort=4, over_selection=1.4, key=KEY)
    outcome = WORLD.play(FEDAVG, schedule, duration=seconds(4.0, 2.0, 9.0, 1.0, 8.0, 3.0))
    assert [task.client for task in outcome.trained] == ["client-3", "client-1", "client-5", "client-0"] * 2
    assert [now for now, _ in outcome.events] == [1, 2, 3, 4, 5, 6, 7, 8]
    for commit in outcome.commits:
        assert commit.metrics["clients"] == {"asked": 6, "answered": 4, "lost": 0}


def test_over_selection_replaces_those_who_drop_out():
    schedule = Synchronous(rounds=1, cohort=4, over_selection=1.4, key=KEY)
    gone = ("client-1", "client-4")
    outcome = WORLD.play(
        FEDAVG,
        schedule,
        dropped=lambda t: t.client in gone,
        duration=lambda t: 0.5 if t.client in gone else 1.0,
    )
    assert outcome.commits[0].metrics["clients"] == {"asked": 6, "answered": 4, "lost": 2}


def test_over_selection_never_asks_more_than_there_are():
    outcome = WORLD.play(FEDAVG, Synchronous(rounds=1, cohort=5, over_selection=3.0, key=KEY))
    assert outcome.commits[0].metrics["clients"] == {"asked": 6, "answered": 5, "lost": 0}


def test_who_misses_the_deadline_is_lost_and_never_trains():
    """A reply at the very deadline still counts. The round ends at the deadline if anybody is missing."""
    schedule = Synchronous(rounds=2, cohort=1.0, deadline=3.0, key=KEY)
    outcome = WORLD.play(FEDAVG, schedule, duration=seconds(3.0, 3.1, 1.0, 9.0, 2.0, 2.5))
    assert [task.client for task in outcome.trained] == ["client-2", "client-4", "client-5", "client-0"] * 2
    assert [now for now, _ in outcome.events] == [1, 2, 2.5, 3, 3, 4, 5, 5.5, 6, 6]
    for commit in outcome.commits:
        assert commit.metrics["clients"] == {"asked": 6, "answered": 4, "lost": 2}
    same = Synchronous(rounds=2, cohort=1.0, key=KEY)
    without = WORLD.play(FEDAVG, same, dropped=lambda task: task.client in ("client-1", "client-3"))
    assert digest(without.state) == digest(outcome.state)


def test_a_round_that_all_answer_does_not_wait_for_its_deadline():
    outcome = WORLD.play(FEDAVG, Synchronous(rounds=3, cohort=2, deadline=100.0, key=KEY))
    assert [now for now, _ in outcome.events] == [1, 1, 2, 2, 3, 3]


def test_clients_drop_out_at_the_rate_asked_for():
    """Binomial(6000, 0.3) over tasks; and no client, nor round, is struck more than others."""
    lost = drop_out(0.3, key=derive(9, "drop"))
    clients = [f"c{index}" for index in range(20)]
    task = WORLD.play(FEDAVG, Synchronous(rounds=1, cohort=1, key=KEY)).sent[0]
    struck = [(k, r) for k in clients for r in range(300) if lost(replace(task, client=k, round=r))]
    assert stats.binomtest(len(struck), 6000, 0.3).pvalue > FALSE_ALARM
    by_client, by_round = Counter(k for k, _ in struck), Counter(r % 10 for _, r in struck)
    assert chi_square(by_client, dict.fromkeys(clients, 1 / 20)) > FALSE_ALARM
    assert chi_square(by_round, dict.fromkeys(range(10), 1 / 10)) > FALSE_ALARM


def test_a_drop_out_is_counted_and_takes_no_part():
    lost = drop_out(0.3, key=derive(9, "drop"))
    outcome = WORLD.play(FEDAVG, Synchronous(rounds=6, cohort=5, key=KEY), dropped=lost)
    for round, commit in enumerate(outcome.commits):
        cohort = [task for task in outcome.sent if task.round == round]
        assert commit.metrics["clients"] == {
            "asked": 5,
            "answered": sum(not lost(task) for task in cohort),
            "lost": sum(map(lost, cohort)),
        }
        samples = sum(len(WORLD.people[task.client].train[1]) for task in cohort if not lost(task))
        assert commit.metrics["samples"] == samples
    assert not any(map(lost, outcome.trained))
    with pytest.raises(ConfigError, match="drop_out = 1"):
        drop_out(1.0, key=KEY)


def broken(client, how):
    """The world's data, but this client's raises or holds NaN."""

    def data(name):
        found = WORLD.people[name]
        if name != client:
            return found
        if how == "raise":
            raise OSError("no such patient\ndisk on fire")
        inputs, targets = found.train
        return replace(found, train=(inputs, torch.full_like(targets, torch.nan)))

    return data


def test_too_few_replies_stop_the_run_and_say_why():
    schedule = Synchronous(rounds=3, cohort=1.0, quorum=5, key=KEY)
    trouble = {"dropped": lambda task: task.client == "client-0"}
    with pytest.raises(QuorumLost) as caught:
        WORLD.play(FEDAVG, schedule, data=broken("client-2", "raise"), **trouble)
    text = str(caught.value)
    assert "round 1: 4 of 6 clients replied, the quorum is 5" in text
    assert "client-0: dropped out" in text
    assert "client-2: OSError: no such patient" in text
    assert "hint: " in text
    assert len(WORLD.play(FEDAVG, replace(schedule, quorum=0.8), **trouble).commits) == 3


def test_a_client_that_raises_is_lost_and_the_run_goes_on(caplog):
    schedule = Synchronous(rounds=2, cohort=1.0, key=KEY)
    outcome = WORLD.play(FEDAVG, schedule, data=broken("client-2", "raise"))
    lost = [event for _, event in outcome.events if isinstance(event, Lost)]
    assert [(event.task.client, event.reason) for event in lost] == [
        ("client-2", "OSError: no such patient\ndisk on fire")
    ] * 2
    assert "client client-2 failed in round 2:\nTraceback (most recent call last)" in caplog.text
    assert 'raise OSError("no such patient' in caplog.text
    without = WORLD.play(FEDAVG, schedule, dropped=lambda task: task.client == "client-2")
    assert digest(outcome.state) == digest(without.state)


def test_nan_stops_the_run_or_drops_the_client():
    schedule = Synchronous(rounds=2, cohort=1.0, key=KEY)
    with pytest.raises(NonFinite, match="client client-4, version 0: "):
        WORLD.play(FEDAVG, schedule, data=broken("client-4", "nan"))
    outcome = WORLD.play(FEDAVG, replace(schedule, on_nan="drop"), data=broken("client-4", "nan"))
    without = WORLD.play(FEDAVG, schedule, dropped=lambda task: task.client == "client-4")
    assert digest(outcome.state) == digest(without.state)
    assert outcome.commits[1].metrics["clients"] == {"asked": 6, "answered": 5, "lost": 1}
    assert outcome.commits[1].metrics["train_loss"] == without.commits[1].metrics["train_loss"]


def test_nan_in_the_last_part_of_an_update_leaves_no_trace_of_the_first():
    algorithm, loop = scaffold(Local(lr=0.05, batch_size=4), population=6), Loop(WORLD.problem, WORLD.seed)

    def fit(algorithm, task, memory, data):
        reply, memory = loop.fit(algorithm, task, memory, data)
        if task.client == "client-4":
            reply.up["control"]["bias"].fill_(torch.nan)
        return reply, memory

    schedule = Synchronous(rounds=2, cohort=1.0, on_nan="drop", key=KEY)
    outcome = WORLD.play(algorithm, schedule, trainer=SimpleNamespace(fit=fit, width=1))
    without = WORLD.play(algorithm, schedule, dropped=lambda task: task.client == "client-4")
    assert digest(outcome.state) == digest(without.state)


def test_the_reported_loss_is_weighted_as_the_updates_are():
    outcome = WORLD.play(FEDAVG, Synchronous(rounds=1, cohort=3, key=KEY))
    replies = [event for _, event in outcome.events if isinstance(event, Reply)]
    total = sum(reply.weight * reply.metrics["loss"] for reply in replies)
    expected = total / sum(reply.weight for reply in replies)
    assert outcome.commits[0].metrics["train_loss"] == pytest.approx(expected, rel=1e-14)


def test_commits_count_the_bytes_that_travel():
    """4 parameters of 8 bytes, down and up, and no buffers."""
    outcome = WORLD.play(FEDAVG, Synchronous(rounds=1, cohort=3, key=KEY), dropped=lambda task: task.id == 0)
    assert outcome.commits[0].metrics["bytes"] == {"up": 2 * 32, "down": 3 * 32}

"""Two and three levels of aggregation end with the bits of the flat schedule."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from coterie.aggregators import krum
from coterie.algorithms import Local, fedadam, fedavg, scaffold
from coterie.backends import DURATIONS, drop_out
from coterie.core import (
    ConfigError,
    NonFinite,
    QuorumLost,
    Reply,
    Task,
    derive,
    fold_task,
    gather,
    interleave,
)
from coterie.core.trees import digest
from coterie.data import ClientData
from coterie.schedules import Hierarchical, Synchronous
from worlds import KEY, linear_world

WORLD = linear_world(sizes=(3, 14, 5, 9, 2, 7, 4, 6, 8, 3, 11), features=2)
LOCAL = Local(lr=0.03, batch_size=4)
ALGORITHMS = {
    "fedavg": fedavg(LOCAL),
    "scaffold": scaffold(LOCAL, population=len(WORLD.clients)),
    "fedadam": fedadam(LOCAL),
    "krum": fedavg(LOCAL, aggregator=krum(byzantine=1)),
}
TROUBLE = {
    "dropped": drop_out(0.15, key=derive(4, "drop")),
    "duration": DURATIONS["log_normal"](seconds=1.0, sigma=0.5, key=derive(4, "speed")),
}
SETTINGS = {"rounds": 4, "cohort": 9, "deadline": 1.6, "key": KEY}


def same(left, right):
    assert digest(left.state) == digest(right.state)
    for ours, theirs in zip(left.commits, right.commits, strict=True):
        assert ours.metrics == theirs.metrics
    assert {(task.client, task.round) for task in left.trained} == {
        (task.client, task.round) for task in right.trained
    }


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_levels_are_flat_to_the_bit(name):
    """With drop-outs, stragglers and a deadline; whatever the number of relays."""
    flat = WORLD.play(ALGORITHMS[name], Synchronous(**SETTINGS), **TROUBLE)
    lost = [commit.metrics["clients"]["lost"] for commit in flat.commits]
    assert all(lost)
    for groups in (1, 2, 3):
        same(WORLD.play(ALGORITHMS[name], Hierarchical(**SETTINGS, groups=groups), **TROUBLE), flat)


@pytest.mark.parametrize("name", ["fedavg", "krum"])
def test_a_relay_whose_clients_are_all_lost(name):
    """Eleven relays of one client each: some of them have nothing to send."""
    flat = WORLD.play(ALGORITHMS[name], Synchronous(**SETTINGS), **TROUBLE)
    same(WORLD.play(ALGORITHMS[name], Hierarchical(**SETTINGS, groups=11), **TROUBLE), flat)


def test_the_server_hears_from_relays_only():
    outcome = WORLD.play(ALGORITHMS["fedavg"], Hierarchical(rounds=2, cohort=1.0, groups=3, key=KEY))
    assert [task.client for task in outcome.sent] == ["relay-0", "relay-1", "relay-2"] * 2
    assert all(task.kind == "fold" for task in outcome.sent)
    assert {task.kind for task in outcome.trained} == {"train"}
    assert len({task.id for task in [*outcome.sent, *outcome.trained]}) == 2 * (3 + len(WORLD.clients))


def test_a_relay_drops_or_stops_at_nan_as_the_server_would():
    x, y = WORLD.people["client-4"].train
    broken = {**WORLD.people, "client-4": ClientData((x * torch.nan, y), (x, y))}.__getitem__
    two, one = Hierarchical(**SETTINGS, on_nan="drop", groups=3), Synchronous(**SETTINGS, on_nan="drop")
    ours = WORLD.play(ALGORITHMS["scaffold"], two, data=broken)
    same(ours, WORLD.play(ALGORITHMS["scaffold"], one, data=broken))
    assert any(task.client == "client-4" for task in ours.trained)
    with pytest.raises(NonFinite, match="client-4"):
        WORLD.play(ALGORITHMS["scaffold"], Hierarchical(**SETTINGS, groups=3), data=broken)


def test_a_quorum_counts_clients_and_not_relays():
    schedule = Hierarchical(rounds=1, cohort=6, quorum=5, groups=2, key=KEY)
    first = WORLD.play(ALGORITHMS["fedavg"], schedule).trained
    gone = {first[0].client, first[1].client}
    with pytest.raises(QuorumLost, match="4 of 6 clients replied, the quorum is 5"):
        WORLD.play(ALGORITHMS["fedavg"], schedule, dropped=lambda task: task.client in gone)


def test_a_lost_quorum_says_why():
    schedule = Hierarchical(rounds=1, cohort=6, quorum=6, groups=2, key=KEY)
    gone = WORLD.play(ALGORITHMS["fedavg"], schedule).trained[0].client
    with pytest.raises(QuorumLost, match=f"{gone}: dropped out"):
        WORLD.play(ALGORITHMS["fedavg"], schedule, dropped=lambda task: task.client == gone)


@pytest.mark.parametrize("wrong", [{"groups": 0}, {"groups": 12}, {"over_selection": 1.2}])
def test_refuses_what_relays_cannot_do(wrong):
    with pytest.raises(ConfigError, match=rf"schedule\.{next(iter(wrong))}"):
        WORLD.play(ALGORITHMS["fedavg"], Hierarchical(**{"rounds": 1, "cohort": 3, "key": KEY} | wrong))


@dataclass(frozen=True, kw_only=True)
class ThreeLevels(Hierarchical):
    """Two regions between the server and the relays: a region's task holds its relays' tasks."""

    def collect(self, algorithm, tasks, places, among, cohort, ids):
        plan = super().collect(algorithm, tasks, places, among, cohort, ids)
        folds = next(plan)
        plan.close()
        regions = [
            Task(next(ids), name, tasks[0].version, tasks[0].round, tasks[0].down, "fold", {"folds": part})
            for name, part in (("north", folds[:2]), ("south", folds[2:]))
        ]
        return (yield from gather(algorithm.aggregator, regions, on_nan=self.on_nan))


def region(task, aggregator):
    """A relay of relays: forward the tasks, merge the accumulators."""
    got = yield from gather(aggregator, task.config["folds"])
    return Reply(task, tuple(got.fold), 0.0, answers=tuple(got.accepted.items()))


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "krum"])
def test_three_levels_are_flat_to_the_bit(name):
    aggregator = ALGORITHMS[name].aggregator
    flat = WORLD.play(ALGORITHMS[name], Synchronous(**SETTINGS), **TROUBLE)
    schedule = ThreeLevels(**SETTINGS, groups=4)
    relays = {
        **{
            relay: partial(interleave, partial(fold_task, aggregator=aggregator)) for relay in schedule.relays
        },
        **{name: partial(interleave, partial(region, aggregator=aggregator)) for name in ("north", "south")},
    }
    same(WORLD.play(ALGORITHMS[name], schedule, relays=relays, **TROUBLE), flat)

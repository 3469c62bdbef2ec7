"""What a commit says of the clients' memories, and how a plan goes on from it."""

from types import MappingProxyType

import pytest

from coterie.algorithms import Local, dpsgd, fedavg, scaffold
from coterie.core.trees import digest
from coterie.schedules import Buffered, Gossip, Hierarchical, Synchronous
from worlds import KEY, linear_world

WORLD = linear_world(sizes=(3, 4, 5, 9, 2, 7, 3, 4))
LOCAL = Local(lr=0.05, batch_size=4)
SCAFFOLD = scaffold(LOCAL, population=8)
SCHEDULES = {
    "synchronous": Synchronous(rounds=6, cohort=3, key=KEY),
    "pooled": Synchronous(rounds=6, cohort=3, pooled=True, key=KEY),
    "hierarchical": Hierarchical(rounds=6, cohort=3, groups=2, key=KEY),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_plan_goes_on_from_any_commit_with_the_memories_of_that_version(name):
    schedule = SCHEDULES[name]
    lost = {"dropped": lambda task: task.client == "client-2"} if name == "synchronous" else {}
    whole = WORLD.play(SCAFFOLD, schedule, **lost)
    known = {}
    for commit in whole.commits:
        assert "memory" not in commit.resume
        known |= commit.accepted
        for memory in (MappingProxyType(known), whole.memories.at(commit.version)):
            whole.memories.back_to(commit.version)
            resume = {**commit.resume, "memory": memory}
            plan = schedule(SCAFFOLD, commit.state, WORLD.clients, resume)
            rest = WORLD.play(SCAFFOLD, schedule, plan=plan, memories=whole.memories, **lost)
            assert digest(rest.state) == digest(whole.state)
            sent = [(t.id, t.client, t.memory) for t in whole.trained if t.version >= commit.version]
            assert [(t.id, t.client, t.memory) for t in rest.trained] == sent
    assert len(known) > 3
    assert "client-2" not in known or not lost


def test_each_task_starts_from_the_clients_last_accepted_one():
    schedule = Buffered(rounds=12, concurrency=4, buffer=3, key=KEY)
    outcome = WORLD.play(SCAFFOLD, schedule, duration=lambda task: 1.0 + task.id % 5)
    known = {}
    for commit in outcome.commits:
        accepted = {
            e.task.client: e.task.id for _, e in outcome.events if e.task.id in commit.accepted.values()
        }
        assert accepted == commit.accepted
        assert 0 < len(accepted) <= 3
        later = [t for t in outcome.sent if t.version == commit.version]
        known |= commit.accepted
        assert all(task.memory == known.get(task.client) for task in later)
    assert any(task.memory is not None for task in outcome.sent)


@pytest.mark.parametrize(
    ("algorithm", "schedule"),
    [
        (fedavg(LOCAL), Synchronous(rounds=2, cohort=3, key=KEY)),
        (fedavg(LOCAL), Buffered(rounds=2, concurrency=3, buffer=2, key=KEY)),
        (dpsgd(LOCAL), Gossip(rounds=2)),
    ],
)
def test_clients_without_memory_are_not_listed(algorithm, schedule):
    outcome = WORLD.play(algorithm, schedule)
    assert [dict(commit.accepted) for commit in outcome.commits] == [{}, {}]
    assert all(task.memory is None for task in outcome.sent)


def test_a_commit_says_why_clients_were_lost():
    schedule = Synchronous(rounds=1, cohort=1.0, deadline=3.0, key=KEY)
    gone = {"dropped": lambda task: task.client == "client-2"}
    late = {"duration": lambda task: 9.0 if task.client in ("client-0", "client-5") else 1.0}
    told = WORLD.play(fedavg(LOCAL), schedule, **gone, **late).commits[0].metrics
    assert (told["clients"]["lost"], told["lost_why"]) == (3, {"dropped out": 1, "late": 2})
    assert "lost_why" not in WORLD.play(fedavg(LOCAL), schedule).commits[0].metrics

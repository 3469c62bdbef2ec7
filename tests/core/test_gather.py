"""Gathering, relays and drive(), on plans small enough to see through."""

import asyncio
import random

import pytest
import torch

from coterie.aggregators import mean
from coterie.core import (
    Cancel,
    Commit,
    Lost,
    NonFinite,
    Reply,
    Task,
    Tick,
    Timer,
    ask,
    drive,
    fold_task,
    gather,
    interleave,
    run_sync,
    trees,
)


def task(id, client="a", **more):
    return Task(id, client, 0, 0, {"x": torch.zeros(2)}, **more)


def reply(to, value=1.0, weight=1.0, **more):
    return Reply(to, {"x": torch.full((2,), value)}, weight, **more)


def start(plan):
    return plan, next(plan)


def end(plan, event):
    """Send the event that ends a plan; answer its last yield of cancellations, and return both."""
    try:
        actions = plan.send(event)
    except StopIteration as stop:
        return stop.value, []
    with pytest.raises(StopIteration) as stop:
        plan.send(None)
    return stop.value.value, actions


def test_gather_folds_in_any_order_and_counts_the_lost():
    tasks = [task(i, f"c{i}") for i in range(6)]
    digests = set()
    for trial in range(20):
        plan, actions = start(gather(mean(), tasks))
        assert list(actions) == tasks
        order = list(tasks)
        random.Random(trial).shuffle(order)
        for each in order[:-1]:
            event = (
                Lost(each, "gone")
                if each.id == 2
                else reply(each, 0.1 * each.id, 1.0 + each.id, metrics={"loss": each.id / 7})
            )
            assert plan.send(event) == []
        last = order[-1]
        got, _ = end(
            plan,
            Lost(last, "gone")
            if last.id == 2
            else reply(last, 0.1 * last.id, 1.0 + last.id, metrics={"loss": last.id / 7}),
        )
        assert got.fold.lost == ("c2: gone",)
        assert set(got.accepted) == {"c0", "c1", "c3", "c4", "c5"}
        digests.add((trees.digest(mean().finish(got.fold.acc)[0]), got.metrics()["loss"]))
    assert len(digests) == 1


def test_gather_takes_the_first_and_cancels_the_rest():
    tasks = [task(i, f"c{i}") for i in range(4)]
    plan, _ = start(gather(mean(), tasks, enough=2))
    plan.send(reply(tasks[3]))
    got, actions = end(plan, reply(tasks[1]))
    assert got.accepted == {"c3": 3, "c1": 1}
    assert sorted(actions) == [Cancel(0), Cancel(2)]


def test_gather_stops_at_the_deadline_and_ignores_what_it_did_not_ask():
    tasks = [task(i, f"c{i}") for i in range(3)]
    plan, actions = start(gather(mean(), tasks, timer=9, deadline=5.0))
    assert actions[-1] == Timer(9, 5.0)
    assert plan.send(reply(tasks[0])) == []
    assert plan.send(reply(task(77, "stranger"))) == []
    assert plan.send(reply(tasks[0], 1e6)) == []  # a second reply to the same task
    assert plan.send(Tick(8, 1.0)) == []  # somebody else's timer
    got, actions = end(plan, Tick(9, 5.0))
    assert (got.accepted, len(got.fold.lost)) == ({"c0": 0}, 2)
    assert mean().finish(got.fold.acc)[0]["x"].tolist() == [1.0, 1.0]
    assert {Cancel(1), Cancel(2)} <= set(actions)


@pytest.mark.parametrize("metrics", [{}, {"loss": float("nan")}])
def test_what_is_not_finite_stops_or_is_dropped_whole(metrics):
    tasks = [task(0, "good"), task(1, "bad")]
    poison = Reply(tasks[1], {"x": torch.tensor([1.0, 1.0 if metrics else torch.nan])}, 1.0, metrics)
    plan, _ = start(gather(mean(), tasks))
    plan.send(reply(tasks[0]))
    with pytest.raises(NonFinite, match="client bad"):
        plan.send(poison)
    plan, _ = start(gather(mean(), tasks, on_nan="drop"))
    plan.send(poison)
    got, _ = end(plan, reply(tasks[0]))
    assert (got.accepted, len(got.fold.lost)) == ({"good": 0}, 1)


def fold(id, members):
    config = {
        "tasks": [[c, 10 * id + n, None] for n, c in enumerate(members)],
        "local": {},
        "timer": 10 * id + 9,
        "deadline": None,
    }
    return Task(id, "relay", 0, 0, None, "fold", config)


def test_a_relay_serves_overlapping_tasks():
    plan, _ = start(interleave(lambda incoming: fold_task(incoming, mean())))
    first = plan.send(fold(1, ["a", "b"]))
    second = plan.send(fold(2, ["a", "c"]))
    assert [t.id for t in first] == [10, 11]
    assert [t.id for t in second] == [20, 21]
    assert plan.send(reply(first[0], 1.0)) == []
    assert plan.send(reply(second[1], 5.0)) == []
    (answer,) = plan.send(reply(second[0], 3.0))
    assert (answer.task.id, answer.answers) == (2, (("c", 21), ("a", 20)))
    assert mean().finish(answer.up[0])[0]["x"].tolist() == [4.0, 4.0]
    (answer,) = plan.send(reply(first[1], 2.0))
    assert answer.task.id == 1
    assert mean().finish(answer.up[0])[0]["x"].tolist() == [1.5, 1.5]


def test_ask_returns_replies_by_client():
    tasks = [task(0, "a"), task(1, "b"), task(2, "c")]
    plan, _ = start(ask(tasks))
    plan.send(reply(tasks[2]))
    plan.send(Lost(tasks[0], "gone"))
    got, _ = end(plan, reply(tasks[1]))
    assert set(got) == {"b", "c"}


class Echo:
    """A backend that answers every task at once, in a scrambled order."""

    def __init__(self, seed):
        self.draw, self.queue, self.sent = random.Random(seed), [], []

    def send(self, actions):
        self.sent += actions
        self.queue += [action for action in actions if isinstance(action, Task)]

    async def event(self):
        return 1.0, reply(self.queue.pop(self.draw.randrange(len(self.queue))))


def counting(rounds):
    for number in range(rounds):
        got = yield from gather(mean(), [task(2 * number, "a"), task(2 * number + 1, "b")], enough=1)
        yield [Commit(number + 1, {"n": number}, None, {})]
    return len(got.accepted)


def test_drive_commits_before_it_sends_and_ends():
    backend, log = Echo(0), []

    def on_commit(commit):
        log.append((commit.version, len(backend.sent)))

    result = asyncio.run(drive(counting(3), backend, on_commit=on_commit, on_event=lambda now, event: None))
    assert result == 1
    # each round sends two tasks and one cancellation, all before its commit
    assert log == [(1, 3), (2, 6), (3, 9)]


def test_drive_closes_the_plan_when_the_caller_stops_it():
    closed = []

    def plan():
        try:
            while True:
                yield [task(len(closed))]
        finally:
            closed.append(True)

    def stop(now, event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(drive(plan(), Echo(0), on_event=stop))
    assert closed == [True]


def test_run_sync_works_inside_a_running_loop():
    async def notebook():
        return run_sync(lambda: asyncio.run(drive(counting(1), Echo(1))))

    assert asyncio.run(notebook()) == 1

    async def failing():
        return run_sync(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(failing())

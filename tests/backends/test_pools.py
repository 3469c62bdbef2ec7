"""The simulator's own folding of a cohort, against the same "fold" task done by a relay's plan."""

import asyncio
import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.aggregators import each, mean
from coterie.backends import InProcess, Site
from coterie.backends.system import Arrival
from coterie.core import NonFinite, Reply, RunError, Task, derive, fold_task, interleave, rng, trees
from coterie.core.gather import fold_request
from coterie.core.types import Replies
from coterie.storage import Memories

AGGREGATOR = each(delta=mean(), buffers=mean())


class Stub:
    """A trainer that makes up updates, of any width; some of its clients fail, some send NaN."""

    def __init__(self, width, failing=(), nan=()):
        self.width, self.failing, self.nan = width, failing, nan
        self.worked = []

    def update(self, task):
        draw = rng(derive(8, "stub", task.client, task.round))
        delta = torch.from_numpy(draw.normal(size=(3, 2)))
        if task.client in self.nan:
            delta[1, 1] = torch.nan
        up = {"delta": {"w": delta}, "buffers": {"n": torch.tensor(int(draw.integers(9)))}}
        return up, float(draw.uniform(1, 50)), float(draw.normal()), int(draw.integers(1, 30))

    def fit(self, algorithm, task, memory, data):
        self.worked.append(task.client)
        if task.client in self.failing:
            raise OSError(f"{task.client} has lost its disk")
        up, weight, loss, samples = self.update(task)
        return Reply(task, up, weight, {"loss": loss}, samples), {"seen": torch.tensor(task.round)}

    def fit_block(self, algorithm, tasks, memories, datas):
        if any(task.client in self.failing for task in tasks):
            raise OSError("one of them")
        self.worked += [task.client for task in tasks]
        ups, weights, losses, samples = zip(*map(self.update, tasks), strict=True)
        stacked = trees.map_tree(lambda *leaves: torch.stack(leaves), *ups)
        replies = Replies(tasks, stacked, list(weights), {"loss": list(losses)}, list(samples))
        return [(replies, {"seen": torch.tensor([task.round for task in tasks])})]


class Algorithm:
    aggregator = AGGREGATOR
    transforms = ()


def played(folds, device, *, width, relays, on_nan, failing=(), nan=()):
    """Send the fold tasks; return, for each, when it was answered and with what, and who worked."""
    trainer, memories = Stub(width, failing, nan), Memories()
    site = Site(Algorithm, trainer, None, lambda client: None, memories, len)
    relay = partial(interleave, partial(fold_task, aggregator=AGGREGATOR, on_nan=on_nan))
    names = {task.client for task in folds} if relays else ()
    backend = InProcess(site, device=device, relays=dict.fromkeys(names, relay), on_nan=on_nan)
    backend.send(folds)

    async def answers():
        found = {}
        while len(found) < len(folds):
            now, reply = await backend.event()
            found[reply.task.id] = (now, reply)
        return found

    return asyncio.run(answers()), trainer.worked, memories


def same(mine, theirs):
    """When, who, which bits, and how many were lost for which reasons."""
    for id, (now, reply) in mine.items():
        at, reference = theirs[id]
        assert now == at
        assert dict(reply.answers) == dict(reference.answers)
        acc, metrics, replies, samples, bytes_up, lost = reply.up
        other, *expected, gone = reference.up
        assert [metrics, replies, samples, bytes_up] == expected
        assert sorted(lost) == sorted(gone)
        if replies:
            ours, right = AGGREGATOR.finish(copy.deepcopy(acc)), AGGREGATOR.finish(copy.deepcopy(other))
            assert trees.digest(ours[0]) == trees.digest(right[0])
            assert ours[1:] == right[1:]


clients = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(0, 3)),  # when it answers
        st.sampled_from(["", "", "", "dropped out", "went offline", "fails", "nan"]),
    ),
    min_size=1,
    max_size=12,
)


def cohort(some, *, id=0, round=0, relay="relay", **options):
    """A fold task of so many clients, and the device that answers as told."""
    tasks = [Task(id + i, f"c{id + i}", round, round, None, config={}) for i in range(len(some))]
    return fold_request(id + 90, relay, tasks, timer=id + 91, **options)


def device_of(*cohorts):
    """Each (first id, clients): client -> Arrival."""
    told = {f"c{first + i}": each for first, some in cohorts for i, each in enumerate(some)}

    def device(task, now):
        after, fate = told[task.client]
        return Arrival(after, fate if "o" in fate else "")  # dropped out, went offline

    failing = {client for client, (_, fate) in told.items() if fate == "fails"}
    nan = {client for client, (_, fate) in told.items() if fate == "nan"}
    return {"device": device, "failing": failing, "nan": nan}


@settings(max_examples=150)
@given(
    some=clients,
    enough=st.one_of(st.none(), st.integers(1, 8)),
    deadline=st.one_of(st.none(), st.sampled_from([0.5, 1.0, 2.0]), st.floats(0, 3)),
    width=st.sampled_from([1, 2, 3, 32]),
)
def test_a_fold_is_what_a_relay_would_make_of_it(some, enough, deadline, width):
    fold = cohort(some, enough=enough, deadline=deadline)
    world = device_of((0, some))
    mine, worked, kept = played([fold], **world, width=width, relays=False, on_nan="drop")
    theirs, reference, memories = played([fold], **world, width=1, relays=True, on_nan="drop")
    same(mine, theirs)
    assert set(worked) == set(reference), "nobody works whose reply nobody waits for"
    assert {remembered(kept, index) for index in range(len(some))} == {
        remembered(memories, index) for index in range(len(some))
    }


def remembered(memories, index):
    """The client, if the task left a memory."""
    try:
        return index if memories.get(f"c{index}", index) else None
    except RunError:
        return None


@settings(max_examples=60)
@given(
    first=clients, second=clients, deadline=st.one_of(st.none(), st.floats(0, 3)),
    enough=st.one_of(st.none(), st.integers(1, 4)),
)  # fmt: skip
def test_folds_of_several_groups_at_once(first, second, deadline, enough):
    folds = [
        cohort(first, relay="west", enough=enough, deadline=deadline),
        cohort(second, id=100, relay="east", deadline=deadline),
    ]
    world = device_of((0, first), (100, second))
    mine, *_ = played(folds, **world, width=3, relays=False, on_nan="drop")
    theirs, *_ = played(folds, **world, width=1, relays=True, on_nan="drop")
    same(mine, theirs)


@settings(max_examples=40)
@given(some=clients, enough=st.one_of(st.none(), st.integers(1, 4)))
def test_what_is_not_finite_stops_both_or_neither(some, enough):
    fold, world = cohort(some, enough=enough), device_of((0, some))
    outcomes = []
    for relays, width in ((False, 3), (True, 1)):
        try:
            outcomes.append(played([fold], **world, width=width, relays=relays, on_nan="stop")[0])
        except NonFinite as error:
            outcomes.append(type(error))
    if NonFinite in outcomes:
        assert outcomes == [NonFinite, NonFinite]
    else:
        same(*outcomes)


def test_who_fails_is_made_up_for_by_the_next_and_the_clock_waits_for_it():
    """Two of four are waited for; the second fails and the third sends NaN, so the fourth, at 4 s, is taken."""
    some = [(1.0, ""), (2.0, "fails"), (3.0, "nan"), (4.0, ""), (5.0, "")]
    fold, world = cohort(some, enough=2), device_of((0, some))
    mine, worked, _ = played([fold], **world, width=4, relays=False, on_nan="drop")
    now, reply = mine[90]
    assert now == 4.0
    assert set(dict(reply.answers)) == {"c0", "c3"}
    assert set(worked) == {"c0", "c1", "c2", "c3"}
    assert len(reply.up[5]) == 2


def test_who_answers_at_the_deadline_itself_is_in_time():
    some = [(1.0, ""), (2.0, ""), (2.0 + 1e-9, "")]
    fold, world = cohort(some, deadline=2.0), device_of((0, some))
    for relays in (False, True):
        now, reply = played([fold], **world, width=2, relays=relays, on_nan="drop")[0][90]
        assert now == 2.0
        assert set(dict(reply.answers)) == {"c0", "c1"}
        assert reply.up[5] == ("c2: no reply after 2.0 s",)


def test_a_fold_of_nobody_is_answered_when_the_last_is_lost():
    some = [(1.0, "dropped out"), (0.5, "went offline"), (0.25, "fails")]
    fold, world = cohort(some), device_of((0, some))
    for relays in (False, True):
        now, reply = played([fold], **world, width=2, relays=relays, on_nan="drop")[0][90]
        assert now == 1.0
        assert reply.answers == ()
        assert len(reply.up[5]) == 3


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_site_answers_the_same_in_blocks_and_one_by_one(width):
    tasks = [Task(i, f"c{i}", 0, 0, None, config={}) for i in range(9)]
    site = Site(Algorithm, Stub(width, {"c4"}), None, lambda client: None, Memories())
    done = []
    site.progress = done.append
    answers = site.answer(tasks)
    assert [answer.task.id for answer in answers] == list(range(9))
    assert sum(done) == 9
    assert answers[4].reason == "OSError: c4 has lost its disk"
    reference = Site(Algorithm, Stub(1, {"c4"}), None, lambda client: None, Memories()).answer(tasks)
    for mine, theirs in zip(answers, reference, strict=True):
        if isinstance(theirs, Reply):
            assert trees.digest(mine.up) == trees.digest(theirs.up)
            assert (mine.weight, mine.metrics, mine.samples) == (
                theirs.weight,
                theirs.metrics,
                theirs.samples,
            )


def test_tasks_of_other_configs_and_versions_never_share_a_block():
    seen = []

    class Watching(Stub):
        def fit_block(self, algorithm, tasks, memories, datas):
            seen.append({(task.version, task.config["lr"]) for task in tasks})
            return super().fit_block(algorithm, tasks, memories, datas)

    tasks = [Task(i, f"c{i}", i % 2, i % 2, None, config={"lr": 0.1 * (i % 3)}) for i in range(12)]
    site = Site(Algorithm, Watching(8), None, lambda client: None, Memories())
    assert len(site.answer(tasks)) == 12
    assert all(len(kinds) == 1 for kinds in seen)
    assert len(seen) == 6

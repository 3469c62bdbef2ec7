"""A crew of scripted workers in this process: who does what, and who dies when, must not show."""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coterie.backends import Crew
from coterie.backends import crew as crew_room
from coterie.backends.crew import Died
from coterie.backends.shards import Shard, opened, packed
from coterie.core import ConfigError, Interrupted, NonFinite, RunError, trees
from coterie.core.types import Replies
from coterie.storage import Memories
from crews import LAWS, answered, fails, make, played, refuses, site_of, tasks_of, told
from crews import alone as one_process

FLAT = "synchronous"


class Desk:
    """A Hand that works in this process when it is asked, and dies when `dies()` says so."""

    def __init__(self, make, dies):
        self.shard, self.dies, self.next, self.dead = Shard(make, []), dies, None, False

    def brief(self, on_nan, downs):
        self.shard.brief(on_nan, downs)

    def ask(self, what, tree=None):
        self.dead = self.dies(what, tree)
        self.next = None if self.dead else self.shard.answer(what, packed(tree))

    def answer(self):
        if self.dead:
            raise Died("by the script")
        return self.next

    def end(self, *, at_once):
        self.dead = True


class Office:
    """A Staff of desks; `order` says which of those that wait is heard first."""

    def __init__(self, make, count, dies=lambda what, tree: False, order=lambda n: 0):
        self.make, self.count, self.dies, self.order = make, count, dies, order

    def hire(self):
        return Desk(self.make, self.dies)

    def spread(self, downs):
        return packed(downs)

    def wait(self, hands):
        return [hands[self.order(len(hands))]]

    def close(self):
        pass


def wide(kind, store, trap=None):
    """A site whose trainer works in blocks of three, with bits that depend on who shares a block."""
    site = site_of(kind, store, trap)
    fit = site.trainer.fit

    def fit_block(algorithm, tasks, memories, datas):
        each = zip(tasks, memories, datas, strict=True)
        replies, after = zip(*(fit(algorithm, *one) for one in each), strict=True)
        shift = 1 + 1e-6 * sum(len(data.train[1]) for data in datas)
        ups = trees.map_tree(lambda *leaves: torch.stack(leaves) * shift, *(reply.up for reply in replies))
        weights, losses = [r.weight for r in replies], [r.metrics["loss"] for r in replies]
        block = Replies(tasks, ups, weights, {"loss": losses}, [r.samples for r in replies])
        return [(block, trees.map_tree(lambda *leaves: torch.stack(leaves), *after))]

    site.trainer = SimpleNamespace(fit=fit, fit_block=fit_block, width=3)
    return site


@pytest.fixture(autouse=True)
def _clockless(monkeypatch):
    """Portions that do not depend on how fast this machine is."""
    monkeypatch.setattr(crew_room, "STRETCH", 1e9)


@pytest.fixture(scope="module")
def alone():
    """What one process makes of two rounds of all clients: {make: (its memories, two folds)}."""

    def made(make):
        store = Memories()
        site = make("scaffold", store)
        folds = [told("scaffold", site.fold(tasks, "stop")) for tasks in rounds()]
        return store, folds

    return {make: made(make) for make in (site_of, wide)}


def rounds():
    return tasks_of("scaffold"), tasks_of("scaffold", first=200, memory=100)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_who_did_what_and_who_died_when_does_not_show(data, alone):
    """Two rounds with memory, for any number of workers, order of answers and up to two deaths a round."""
    make = data.draw(st.sampled_from([site_of, wide]))
    deadly = set()

    def dies(what, tree):
        when = data.draw(st.integers(0, 5)) == 0
        return when and len(deadly) < 2 and not deadly.add(len(deadly))

    office = Office(partial(make, "scaffold"), data.draw(st.integers(1, 4)), dies)
    office.order = lambda n: data.draw(st.integers(0, n - 1))
    store = Memories()
    crew = Crew(make("scaffold", store), office)
    kept, folds = alone[make]
    for tasks, expected in zip(rounds(), folds, strict=True):
        deadly.clear()
        done = []
        crew.progress = done.append
        assert told("scaffold", crew.fold(tasks, "stop")) == expected
        assert sum(done) == len(tasks)
        for task in tasks:
            mine, theirs = store.get(task.client, task.id), kept.get(task.client, task.id)
            assert trees.digest(mine) == trees.digest(theirs)


@pytest.mark.parametrize("kind", LAWS)
def test_every_schedule_and_algorithm_ends_with_the_bits_of_one_process(kind):
    expected = played(kind, one_process)
    for count in (1, 3):
        office = Office(make(kind), count)
        assert played(kind, partial(Crew, staff=office)) == expected


def crew(kind=FLAT, count=2, dies=lambda what, tree: False, trap=None, store=None):
    return Crew(site_of(kind, store or Memories()), Office(make(kind, trap), count, dies))


def clients(tree):
    return [task.client for tasks in tree[0] for task in tasks] if tree else []


def test_a_client_that_kills_every_worker_is_lost_and_no_other(caplog):
    tasks = tasks_of(FLAT)
    guilty = tasks[4].client
    pool = crew(dies=lambda what, tree: guilty in clients(tree))
    with caplog.at_level(logging.WARNING):
        got = pool.fold(tasks, "stop")
    assert got.fold.lost == (f"{guilty}: its worker died 3 times",)
    others = site_of(FLAT, Memories()).fold([task for task in tasks if task.client != guilty], "stop")
    assert told(FLAT, got)[:3] == told(FLAT, others)[:3]
    assert sum("a worker died (by the script)" in line for line in caplog.messages) == 3
    answers = pool.answer(tasks)
    assert answers[4].reason == "its worker died 3 times"
    assert sum(hasattr(answer, "reason") for answer in answers) == 1


def test_answers_come_in_the_order_of_the_tasks_evaluations_too():
    for what in ("train", "evaluate"):
        tasks = tasks_of(FLAT, what=what)
        expected = answered(site_of(FLAT, Memories()).answer(tasks))
        assert answered(crew(count=3).answer(tasks)) == expected


def test_an_error_of_the_experiment_is_raised_as_it_was():
    tasks = tasks_of(FLAT)
    seen = []
    pool = crew(trap=partial(refuses, tasks[2].client), dies=lambda what, tree: seen.append(tree))
    with pytest.raises(ConfigError, match="is wrong\nhint: leave it out") as raised:
        pool.fold(tasks, "stop")
    assert "in a worker:" in raised.value.__notes__[0]
    trained = sum(len(clients(tree)) for tree in seen)
    assert trained < len(tasks)  # what was not begun is not begun
    with pytest.raises(ConfigError):  # and the pool still works
        pool.answer(tasks)
    rest = [task for task in tasks if task is not tasks[2]]
    expected = site_of(FLAT, Memories()).fold(rest, "stop")
    assert told(FLAT, pool.fold(rest, "stop")) == told(FLAT, expected)


def test_an_update_that_is_not_finite_stops_or_is_dropped():
    tasks = tasks_of("diverging")
    pool = crew("diverging", count=3)
    with pytest.raises(NonFinite, match="client "):
        pool.fold(tasks, "stop")
    expected = site_of("diverging", Memories()).fold(tasks, "drop").fold
    assert len(expected.lost) == len(tasks)
    assert pool.fold(tasks, "drop").fold == expected


def test_what_a_client_raises_becomes_a_loss_with_the_same_words(caplog):
    tasks = tasks_of(FLAT)
    trap = partial(fails, tasks[0].client)
    with caplog.at_level(logging.WARNING):
        got = crew(trap=trap).fold(tasks, "stop")
    assert told(FLAT, got) == told(FLAT, site_of(FLAT, Memories(), trap).fold(tasks, "stop"))
    assert "has lost its disk" in got.fold.lost[0]


class Damaged(Memories):
    def get(self, client, generation):
        if generation == 3:
            raise OSError("the disk is gone")
        return super().get(client, generation)


def test_a_memory_that_cannot_be_read_is_the_clients_loss():
    tasks = [*tasks_of("scaffold")[:3], *tasks_of("scaffold", memory=0)[3:4]]
    expected = site_of("scaffold", Damaged()).fold(tasks, "stop")
    assert "the disk is gone" in expected.fold.lost[0]
    assert told("scaffold", crew("scaffold", store=Damaged()).fold(tasks, "stop")) == told(
        "scaffold", expected
    )


def test_nobody_left_ends_the_call_instead_of_waiting():
    pool = crew()
    for member in pool.members:
        member.hand.dead = True
    pool.staff.hire = lambda: SimpleNamespace(answer=raising, end=lambda at_once: None)
    tasks = tasks_of(FLAT)
    with pytest.raises(RunError, match="no worker is left: new ones end while they start"):
        pool.fold(tasks, "stop")


def raising():
    raise Died("exit code 3")


@pytest.mark.parametrize("when", [1, 3])
def test_a_stop_in_the_middle_leaves_nothing_of_the_call_behind(when):
    pool, tasks, calls = crew(), tasks_of(FLAT), []

    def stop(done):
        calls.append(done)
        if len(calls) == when:
            raise Interrupted("stopped")

    pool.staff.order = lambda n: n - 1
    pool.progress = stop
    with pytest.raises(Interrupted):
        pool.fold(tasks, "stop")
    for few in (tasks[:1], tasks):  # one worker is enough for the first
        expected = site_of(FLAT, Memories()).fold(few, "stop")
        assert told(FLAT, pool.fold(few, "stop")) == told(FLAT, expected)


def test_nothing_to_do_is_no_call():
    pool = crew(dies=lambda what, tree: pytest.fail("asked"))
    assert pool.fold((), "stop").fold.replies == 0
    assert pool.answer(()) == []


TREES = [
    torch.tensor(3.5),
    {"a": torch.arange(5), "b": (torch.zeros(0, 3), [True, None, "x", 2**70])},
    {
        "c": torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).T,
        "d": torch.ones(2, dtype=torch.bfloat16),
    },
]


@pytest.mark.parametrize("tree", TREES, ids=["scalar", "nested", "strided"])
def test_a_parcel_holds_a_tree_and_its_views_are_aligned(tree):
    back = opened(packed(tree))
    for mine, theirs in zip(trees.leaves(tree), trees.leaves(back), strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs)
            assert mine.dtype == theirs.dtype
            assert theirs.data_ptr() % 64 == 0
        else:
            assert mine == theirs

"""Packing: every task in one block, alike with alike, and the same blocks whoever packs."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from coterie.core import Task
from coterie.core.packing import pack

CONFIGS = ({"lr": 0.1, "epochs": 1}, {"lr": 0.05, "epochs": 1}, {"lr": 0.1, "epochs": 2})


def tasks_of(kinds):
    """kinds: (version, number of the config) of each; equal configs are not always one object."""
    return [
        Task(i, f"c{i}", version, version, None, config=dict(CONFIGS[config]))
        for i, (version, config) in enumerate(kinds)
    ]


def ids(blocks):
    return [[task.id for task in block] for block in blocks]


some = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 40)), min_size=0, max_size=60
)  # version, config, size


@given(some=some, width=st.integers(1, 12))
def test_blocks_are_a_partition_of_alike_tasks_by_size(some, width):
    tasks = tasks_of([kind for *kind, _ in some])
    sizes = {f"c{i}": size for i, (*_, size) in enumerate(some)}
    blocks = pack(tasks, sizes.__getitem__, width)
    assert sorted(task.id for block in blocks for task in block) == list(range(len(tasks)))
    groups = {}
    for block in blocks:
        assert 1 <= len(block) <= width
        assert len({(task.version, str(task.config)) for task in block}) == 1
        groups.setdefault((block[0].version, str(block[0].config)), []).append(block)
    for alike in groups.values():
        lengths = [len(block) for block in alike]
        assert max(lengths) - min(lengths) <= 1
        if sum(lengths) >= 8 and width > 1 and len(alike) > 1:
            assert len(alike) % 2 == 0, "an odd block leaves a core without work at the end"
        assert len(alike) <= -(-sum(lengths) // width) + 1
        of = sorted(
            ([sizes[task.client] for task in block] for block in alike), key=lambda s: (-max(s), -min(s))
        )
        for larger, smaller in pairwise(of):
            assert min(larger) >= max(smaller)


@given(some=some, width=st.integers(1, 12))
def test_the_longest_work_comes_first(some, width):
    tasks = tasks_of([kind for *kind, _ in some])
    sizes = {f"c{i}": size for i, (*_, size) in enumerate(some)}
    work = [
        len(block) * max(sizes[task.client] for task in block)
        for block in pack(tasks, sizes.__getitem__, width)
    ]
    assert work == sorted(work, reverse=True)


@given(some=some, width=st.integers(1, 12), seed=st.integers(0, 1000))
def test_the_same_blocks_again_and_for_distinct_sizes_in_any_order(some, width, seed):
    tasks = tasks_of([kind for *kind, _ in some])
    sizes = {f"c{i}": 100 * size + i for i, (*_, size) in enumerate(some)}
    once = pack(tasks, sizes.__getitem__, width)
    assert ids(pack(tasks, sizes.__getitem__, width)) == ids(once)
    random.Random(seed).shuffle(tasks)
    assert sorted(ids(pack(tasks, sizes.__getitem__, width))) == sorted(ids(once))


def test_by_hand():
    sizes = {"c0": 5, "c1": 50, "c2": 7, "c3": 40, "c4": 6}
    tasks = tasks_of([(0, 0)] * 5)
    assert ids(pack(tasks, sizes.__getitem__, 2)) == [[3, 2], [1], [4, 0]]
    assert ids(pack(tasks, sizes.__getitem__, 9)) == [[1, 3, 2, 4, 0]]
    assert pack([], sizes.__getitem__, 4) == []


def test_several_blocks_are_even_in_number_for_two_cores():
    for count, width, blocks in ((7, 32, [7]), (20, 32, [20]), (40, 32, [20, 20]), (30, 10, [7, 7, 8, 8])):
        made = pack(tasks_of([(0, 0)] * count), lambda client: 10, width)
        assert sorted(map(len, made)) == blocks

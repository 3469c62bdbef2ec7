"""A block of replies folded at once, against the same replies folded one by one."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.aggregators import each, krum, mean
from coterie.algorithms import Local, fedasync
from coterie.backends.site import unstacked
from coterie.core import Lost, NonFinite, OutOfRange, Task, derive, exact, fold_task, rng, trees
from coterie.core.gather import Gathered, accept, accept_block, below, empty, fold_request, folded
from coterie.core.types import Replies
from coterie.schedules.reasons import why

AGGREGATORS = {
    "mean": lambda: each(delta=mean(), buffers=mean()),
    "whole": mean,
    "uniform": lambda: each(delta=mean(uniform=True), buffers=mean()),
    "krum": lambda: krum(byzantine=0),
}


def block_of(n, *, seed=0, weights=None, dtype=torch.float32):
    draw = rng(derive(31, "block", seed))
    ups = {
        "delta": {
            "w": torch.from_numpy(draw.normal(size=(n, 4, 3)) * 10.0 ** draw.integers(-4, 3)).to(dtype),
            "b": torch.from_numpy(draw.normal(size=(n, 2))).to(dtype),
            "none": torch.zeros(n, 0),
        },
        "buffers": {"steps": torch.from_numpy(draw.integers(0, 90, size=n))},
    }
    tasks = [Task(100 * seed + i, f"c{100 * seed + i}", 3, 3, None) for i in range(n)]
    weights = weights or draw.uniform(0.1, 900, size=n).tolist()
    metrics = {"loss": draw.normal(size=n).tolist(), "kept": draw.uniform(size=n).tolist()}
    return Replies(tasks, ups, weights, metrics, draw.integers(1, 99, size=n).tolist())


def one_by_one(aggregator, blocks, on_nan="stop"):
    got = Gathered(empty(aggregator))
    for block in blocks:
        for reply in unstacked(block):
            accept(got, aggregator, reply, on_nan)
    return got


def at_once(aggregator, blocks, on_nan="stop"):
    got = Gathered(empty(aggregator))
    for block in blocks:
        accept_block(got, aggregator, block, on_nan)
    return got


def same(one, other, aggregator):
    assert one.accepted == other.accepted
    assert one.fold.metrics == other.fold.metrics  # exact fractions
    assert (one.fold.replies, one.fold.samples, one.fold.bytes_up) == (
        other.fold.replies,
        other.fold.samples,
        other.fold.bytes_up,
    )
    assert one.fold.lost == other.fold.lost
    if one.fold.replies:
        ours, theirs = (
            aggregator.finish(copy.deepcopy(one.fold.acc)),
            aggregator.finish(copy.deepcopy(other.fold.acc)),
        )
        assert trees.digest(ours[0]) == trees.digest(theirs[0])
        assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_block_is_what_its_replies_are(name, dtype):
    aggregator = AGGREGATORS[name]()
    for sizes in ([7], [3, 1, 5]) if name == "krum" else ([1], [7], [3, 1, 5]):
        blocks = [block_of(n, seed=i, dtype=dtype) for i, n in enumerate(sizes)]
        same(at_once(aggregator, blocks), one_by_one(aggregator, blocks), aggregator)


def test_a_model_mixed_in_as_it_arrives():
    aggregator = fedasync(Local()).aggregator
    block = block_of(4)
    block = block._replace(ups={"model": {"params": block.ups["delta"], "buffers": block.ups["buffers"]}})
    same(at_once(aggregator, [block]), one_by_one(aggregator, [block]), aggregator)


@pytest.mark.parametrize("bad", [None, math.nan, 1e12])
def test_a_parameter_without_a_dimension(bad):
    """A temperature, say: [n] in a block."""
    aggregator, block = AGGREGATORS["mean"](), block_of(4)
    block.ups["delta"]["b"] = torch.tensor([1.0, 2.0, 0.5 if bad is None else bad, -3.0])
    same(at_once(aggregator, [block], "drop"), one_by_one(aggregator, [block], "drop"), aggregator)


def test_nesting_changes_no_bit():
    """Blocks cut anywhere, into partial folds merged in any order."""
    aggregator, block = AGGREGATORS["mean"](), block_of(9)
    whole = at_once(aggregator, [block])
    for cuts in ([0, 4, 9], [0, 1, 2, 9], [0, 8, 9]):
        parts = [
            Replies(
                block.tasks[a:b], trees.map_tree(lambda leaf: leaf[a:b], block.ups), block.weights[a:b],  # noqa: B023
                {name: values[a:b] for name, values in block.metrics.items()}, block.samples[a:b],
            )
            for a, b in pairwise(cuts)
        ]  # fmt: skip
        same(at_once(aggregator, parts), whole, aggregator)
        got = Gathered(empty(aggregator))
        for number, part in enumerate(parts[::-1]):  # as a relay's answers
            task = fold_request(1000 + number, "relay", part.tasks, timer=2000 + number)
            accept(got, aggregator, folded(task, at_once(aggregator, [part])), "stop")
        assert dict(sorted(got.accepted.items())) == dict(sorted(whole.accepted.items()))
        assert got.fold.metrics == whole.fold.metrics
        assert trees.digest(aggregator.finish(got.fold.acc)[0]) == trees.digest(
            aggregator.finish(at_once(aggregator, [block]).fold.acc)[0]
        )


def spoil(block, row, how):
    """A copy of the block with one row made bad."""
    block = copy.deepcopy(block)
    w, weights = block.ups["delta"]["w"], list(block.weights)
    metrics = {name: list(values) for name, values in block.metrics.items()}
    if how in ("nan", "inf", "-inf"):
        w[row, 2, 1] = float(how)
    elif how == "elsewhere":
        block.ups["delta"]["b"][row, 1] = math.nan
    elif how == "diverged":
        w[row, 0, 0] = -2e10
        weights[row] = 500.0
    elif how == "huge":
        w[row, 0, 0] = 3.5e10
        weights[row] = 0.25
    elif how.startswith("weight"):
        weights[row] = float(how.split()[1])
    else:
        metrics[how.split()[0]][row] = float(how.split()[1])
    return block._replace(weights=weights, metrics=metrics)


SPOILED = [
    "nan", "inf", "-inf", "elsewhere", "diverged", "huge", "weight nan", "weight inf", "weight -1", "loss nan",
    "kept inf",
]  # fmt: skip


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("rows", [[0], [4], [1, 3], [0, 1, 2, 3, 4]])
def test_bad_rows_are_dropped_alone_for_the_same_reasons(how, rows):
    aggregator, blocks = AGGREGATORS["mean"](), [block_of(5), block_of(3, seed=1)]
    for row in rows:
        blocks[0] = spoil(blocks[0], row, how)
    dropped, reference = at_once(aggregator, blocks, "drop"), one_by_one(aggregator, blocks, "drop")
    assert len(dropped.fold.lost) == len(rows)
    assert why(dropped.fold.lost) == {"not finite": len(rows)}
    same(dropped, reference, aggregator)


@pytest.mark.parametrize("how", SPOILED)
def test_the_first_bad_row_stops_the_run_with_the_same_words(how):
    aggregator, block = AGGREGATORS["mean"](), spoil(spoil(block_of(5), 3, how), 1, how)
    with pytest.raises(NonFinite) as ours:
        at_once(aggregator, [block])
    with pytest.raises(NonFinite) as theirs:
        one_by_one(aggregator, [block])
    assert ours.value.args == theirs.value.args
    assert "client c1, version 3" in str(ours.value)


def test_several_faults_of_one_row_are_told_by_the_first_as_ever():
    aggregator = AGGREGATORS["mean"]()
    block = block_of(2)
    for how in ("nan", "elsewhere", "loss nan", "weight -1"):
        block = spoil(block, 1, how)
        same(at_once(aggregator, [block], "drop"), one_by_one(aggregator, [block], "drop"), aggregator)


def test_what_is_bad_changes_nothing_that_was_there():
    aggregator = AGGREGATORS["mean"]()
    got = at_once(aggregator, [block_of(3)])
    before = trees.digest(aggregator.finish(copy.deepcopy(got.fold.acc))[0])
    with pytest.raises(NonFinite):
        accept_block(got, aggregator, spoil(block_of(3, seed=1), 2, "nan"), "stop")
    assert trees.digest(aggregator.finish(copy.deepcopy(got.fold.acc))[0]) == before
    assert set(got.accepted) == {"c0", "c1", "c2"}


def test_one_large_update_among_small_ones_is_within_the_range_of_sums():
    """The sum is 1e9 + 39 * 1, whoever adds it; the range ends at 3.4e10."""
    aggregator, n = mean(), 40
    up = torch.ones(n, 2)
    up[7, 0] = 1e9
    block = Replies([Task(i, f"c{i}", 0, 0, None) for i in range(n)], {"w": up}, [1.0] * n, {}, [1] * n)
    same(at_once(aggregator, [block]), one_by_one(aggregator, [block]), aggregator)


def test_the_range_of_sums_ends_at_the_same_place():
    aggregator, n = mean(), 40
    block = Replies(
        [Task(i, f"c{i}", 0, 0, None) for i in range(n)],
        {"w": torch.full((n, 2), 1e9)},
        [1.0] * n,
        {},
        [1] * n,
    )
    for fold in (at_once, one_by_one):
        with pytest.raises(OutOfRange):
            fold(aggregator, [block])


@given(
    values=st.lists(
        st.tuples(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e300)), max_size=20
    )
)
def test_exact_dot(values):
    from fractions import Fraction

    a, b = [v for v, _ in values], [w for _, w in values]
    assert exact.dot(a) == sum(map(Fraction, a), Fraction(0))
    assert exact.dot(a, b) == sum((Fraction(x) * Fraction(y) for x, y in values), Fraction(0))


@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_stacked_sums_are_the_sums_of_each(weights, seed):
    draw = rng(derive(31, "stacked", seed))
    up = {
        "w": torch.from_numpy(draw.normal(size=(len(weights), 3, 2)) * 10.0 ** draw.integers(-9, 3)),
        "i": torch.from_numpy(draw.integers(-9, 9, size=len(weights))),
    }
    at_once, each_alone = exact.add(None, up, weights), None
    for row, weight in enumerate(weights):
        each_alone = exact.add(each_alone, trees.map_tree(lambda leaf: leaf[row], up), weight)  # noqa: B023
    limbs = [trees.digest({"hi": acc["hi"]}) for acc in (at_once, each_alone)]
    assert limbs[0] == limbs[1]
    assert torch.equal(at_once["lo"]["w"], each_alone["lo"]["w"])
    assert (at_once["weight"], at_once["count"]) == (each_alone["weight"], each_alone["count"])


@pytest.mark.parametrize("count", [exact.CARRY_EVERY - 1, exact.CARRY_EVERY, 2 * exact.CARRY_EVERY + 7])
def test_stacks_longer_than_a_carry(count):
    value = 2.0**-17 - 2.0**-50
    acc = exact.add(
        exact.add(None, torch.full((5, 2), value).double(), [1.0] * 5),
        torch.full((count, 2), value).double(),
        [1.0] * count,
    )
    assert float(acc["lo"].abs().max()) < 2.0**-3
    aggregate, weight, total = exact.mean(acc)
    assert (weight, total) == (count + 5, count + 5)
    torch.testing.assert_close(aggregate, torch.full((2,), value).double(), rtol=0, atol=2.0**-57)


def test_a_stack_may_be_any_view():
    """What a trainer gives is cut, transposed and channels-last."""
    whole = torch.from_numpy(rng(derive(31, "views")).normal(size=(6, 4, 3, 5, 5)))
    weights = [1.0, 2.0, 0.5]
    plain = whole.transpose(0, 1)[:3].contiguous()
    views = [
        whole.transpose(0, 1)[:3],
        plain.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    ]
    reference = trees.digest(exact.mean(exact.add(None, plain, weights))[0])
    for view in views:
        assert trees.digest(exact.mean(exact.add(None, view, weights))[0]) == reference


def test_a_fold_request_names_the_same_tasks_below():
    down, config = {"x": torch.ones(2)}, {"lr": 0.1}
    tasks = [Task(7 + i, f"c{i}", 4, 4, down, config=config, memory=i or None) for i in range(3)]
    request = fold_request(70, "relay", tasks, timer=71, enough=2, deadline=1.5)
    assert (request.kind, request.client, request.version, request.round) == ("fold", "relay", 4, 4)
    for made, task in zip(below(request), tasks, strict=True):
        for name in ("id", "client", "version", "round", "kind", "memory", "thread"):
            assert getattr(made, name) == getattr(task, name)
        assert made.config == task.config
        assert made.down is task.down


def test_a_relays_answer_is_what_was_gathered():
    tasks = [Task(i, f"c{i}", 0, 0, None) for i in range(3)]
    request = fold_request(70, "relay", tasks, timer=71)
    aggregator, block = AGGREGATORS["mean"](), block_of(3)
    got = at_once(aggregator, [block])
    got = Gathered(got.fold._replace(lost=("x: gone",)), got.accepted)
    answer = folded(request, got)
    again = Gathered(empty(aggregator))
    accept(again, aggregator, answer, "stop")
    same(again, got, aggregator)
    plan = fold_task(request, aggregator)
    next(plan)
    replies = [*unstacked(block)]
    for task in tasks[:-1]:
        plan.send(Lost(task, "gone"))
    with pytest.raises(StopIteration) as stop:
        plan.send(replies[2])
    assert stop.value.value.answers == (("c2", 2),)

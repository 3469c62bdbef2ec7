"""The exact weighted mean as a monoid, against rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.aggregators import each, mean
from coterie.core.errors import RunError
from coterie.core.trees import digest

FINITE = {"allow_nan": False, "allow_infinity": False}
WEIGHTS = st.floats(0, 1e3, **FINITE) | st.just(0.0)
REPLIES = st.lists(
    st.tuples(st.lists(st.floats(-1, 1, **FINITE), min_size=3, max_size=3), WEIGHTS), min_size=1, max_size=8
).filter(lambda replies: any(weight > 1e-3 for _, weight in replies))
# Around each of the two grids: where sums stand in the one, in the other, and across both.
UPDATES = st.builds(
    lambda replies, scale: [([scale * value for value in values], weight) for values, weight in replies],
    REPLIES,
    st.sampled_from([1e4, 1.0, 1e-9]),
)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def update(values, dtype=torch.float64):
    return {"a": torch.tensor(values[:2], dtype=dtype), "b": {"c": torch.tensor(values[2], dtype=dtype)}}


def flat(tree):
    return [*tree["a"].tolist(), tree["b"]["c"].item()]


def nested(aggregator, replies, draw):
    """Fold replies in a random order and a random nesting."""
    folds = []
    for index in draw.permutation(len(replies)):
        up, weight = replies[index]
        if folds and draw.random() < 0.5:
            folds[-1] = aggregator.add(folds[-1], up, weight)
        else:
            folds.append(aggregator.add(aggregator.init(), up, weight))
        if draw.random() < 0.2:
            folds.append(aggregator.init())
    while len(folds) > 1:
        left, right = folds.pop(draw.integers(len(folds))), folds.pop(draw.integers(len(folds)))
        folds.append(aggregator.merge(left, right))
    return folds[0]


@QUICK
@given(UPDATES, st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64]))
def test_order_and_nesting_do_not_change_a_bit(replies, seed, dtype):
    both = each(delta=mean(), control=mean(uniform=True))
    ups = [
        ({"delta": update(values, dtype), "control": update(values[::-1], dtype)}, w) for values, w in replies
    ]
    draw = np.random.default_rng(seed)
    first, weight, count = both.finish(nested(both, ups, draw))
    again, again_weight, again_count = both.finish(nested(both, ups, draw))
    assert digest(first) == digest(again)
    assert (
        (weight, count)
        == (again_weight, again_count)
        == (float(sum(Fraction(w) for _, w in replies)), len(replies))
    )


@QUICK
@given(UPDATES, st.booleans())
def test_is_the_rational_mean_within_the_stated_bound(replies, uniform):
    """A product is rounded once, loses 2^-57 on the grid; the sum, the weight and the quotient once each."""
    aggregator = mean(uniform=uniform)
    acc = aggregator.init()
    for values, weight in replies:
        acc = aggregator.add(acc, update(values), weight)
    got, _, _ = aggregator.finish(acc)
    pairs = [
        ([Fraction(v) for v in values], Fraction(1 if uniform else weight)) for values, weight in replies
    ]
    total = sum(weight for _, weight in pairs)
    for i, value in enumerate(flat(got)):
        exact = sum(weight * values[i] for values, weight in pairs) / total
        products = sum(abs(weight * values[i]) for values, weight in pairs)
        bound = (len(pairs) * Fraction(2) ** -57 + products * Fraction(2) ** -53) / total
        bound = bound * (1 + Fraction(2) ** -50) + 3 * abs(exact) * Fraction(2) ** -53
        assert abs(Fraction(value) - exact) <= bound


@pytest.mark.parametrize("aggregator", [mean(), mean(uniform=True), each(a=mean(), b=mean(uniform=True))])
def test_stacked_updates_are_single_ones(aggregator):
    draw = np.random.default_rng(0)
    ups = {
        "a": torch.from_numpy(draw.normal(size=(5, 3, 2))),
        "b": {"c": torch.from_numpy(draw.normal(size=5))},
    }
    weights = [2.0, 0.5, 0.0, 3.0, 1.0]
    one = aggregator.init()
    for row, weight in enumerate(weights):
        one = aggregator.add(one, {"a": ups["a"][row], "b": {"c": ups["b"]["c"][row]}}, weight)
    one, weight, count = aggregator.finish(one)
    for given_weights in (weights, torch.tensor(weights)):
        stacked = aggregator.finish(aggregator.add(aggregator.init(), ups, given_weights))
        assert (digest(stacked[0]), *stacked[1:]) == (digest(one), weight, count)


def test_a_weight_of_zero_counts_as_a_reply_but_adds_nothing():
    aggregator = mean()
    acc = aggregator.add(aggregator.init(), update([1.0, 2.0, 3.0]), 2.0)
    acc = aggregator.add(acc, update([9.0, 9.0, 9.0]), 0.0)
    got, weight, count = aggregator.finish(acc)
    assert (flat(got), weight, count) == ([1.0, 2.0, 3.0], 2.0, 2)


def test_means_of_nothing_are_refused():
    aggregator = mean()
    with pytest.raises(RunError, match="no updates"):
        aggregator.finish(aggregator.init())
    with pytest.raises(RunError, match="weight 0"):
        aggregator.finish(aggregator.add(aggregator.init(), update([1.0, 2.0, 3.0]), 0.0))
    aggregator = mean(uniform=True)
    got, weight, count = aggregator.finish(aggregator.add(aggregator.init(), update([1.0, 2.0, 3.0]), 0.0))
    assert (flat(got), weight, count) == ([1.0, 2.0, 3.0], 1.0, 1)


def test_a_product_has_the_weight_of_its_first_part_and_knows_its_keys():
    both = each(x=mean(uniform=True), y=mean())
    acc = both.init()
    for value, weight in ((1.0, 3.0), (5.0, 1.0)):
        acc = both.add(acc, {"x": torch.tensor([value]), "y": torch.tensor([value])}, weight)
    got, weight, count = both.finish(acc)
    assert (got["x"].item(), got["y"].item(), weight, count) == (3.0, 2.0, 2.0, 2)
    with pytest.raises(ValueError, match=r"\['x'\].*\['x', 'y'\]"):
        both.add(both.init(), {"x": torch.zeros(1)}, 1.0)
    assert both.linear


def test_integers_are_averaged_by_count():
    aggregator = mean()
    acc = aggregator.init()
    for steps, weight in ((3, 100.0), (4, 1.0), (6, 1.0)):
        acc = aggregator.add(acc, {"steps": torch.tensor(steps)}, weight)
    got, _, _ = aggregator.finish(acc)
    assert got["steps"].dtype == torch.int64
    assert got["steps"].item() == round((3 + 4 + 6) / 3)


def test_takes_memory_for_one_model_however_many_replies():
    aggregator, acc, sizes = mean(), None, set()
    for _ in range(50):
        acc = aggregator.add(acc, {"a": torch.ones(1000)}, 1.0)
        sizes.add(sum(acc[limb]["a"].untyped_storage().nbytes() for limb in ("hi", "lo")))
    assert sizes == {16 * 1000}

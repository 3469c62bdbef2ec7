"""Law 2 at its root: sums whose bits do not depend on order or nesting, within the stated error."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.core import derive, exact, native, rng, trees
from coterie.core.errors import NonFinite, OutOfRange, RunError


def updates(count, shape=(7, 3), seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    ups = [
        {"w": torch.randn(shape, generator=draw) * scale * 10.0 ** (i % 5 - 3), "n": torch.tensor(3 * i)}
        for i in range(count)
    ]
    return ups, [random.Random(seed).uniform(0.1, 700) for _ in range(count)]


def folded(ups, weights, order, draw=None):
    """Add in this order; with `draw`, into random sub-accumulators that are merged at random."""
    if draw is None:
        acc = None
        for i in order:
            acc = exact.add(acc, ups[i], weights[i])
        return acc
    groups = [None] * draw.randint(1, 4)
    for i in order:
        slot = draw.randrange(len(groups))
        groups[slot] = exact.add(groups[slot], ups[i], weights[i])
    while len(groups) > 1:
        left = groups.pop(draw.randrange(len(groups)))
        right = groups.pop(draw.randrange(len(groups)))
        groups.append(exact.merge(left, right))
    return groups[0]


def test_bits_do_not_depend_on_order_or_nesting():
    ups, weights = updates(23)
    order = list(range(23))
    reference = trees.digest(exact.mean(folded(ups, weights, order))[0])
    naive = set()
    for trial in range(200):
        draw = random.Random(trial)
        draw.shuffle(order)
        assert trees.digest(exact.mean(folded(ups, weights, order, draw))[0]) == reference
        total = torch.zeros(7, 3, dtype=torch.float64)
        for i in order:
            total += ups[i]["w"].double() * weights[i]
        naive.add(trees.digest({"w": total}))
    assert len(naive) > 1, "plain float64 sums agree too: this test cannot tell exact from lucky"


def test_the_exact_value_itself_does_not_depend_on_order_or_nesting():
    """Down to the last bit of the limbs, which the rounding of a float32 mean would hide."""
    ups, weights = updates(40)
    ups = [
        up["w"].double() / 3 * 10.0 ** -(4 * (i % 3)) for i, up in enumerate(ups)
    ]  # bits far below the grid
    values = set()
    for trial in range(40):
        draw = random.Random(trial)
        order = list(range(40))
        draw.shuffle(order)
        acc = folded(ups, weights, order, draw)
        limbs = zip(acc["hi"].flatten().tolist(), acc["lo"].flatten().tolist(), strict=True)
        values.add(tuple(Fraction(hi) + Fraction(lo) for hi, lo in limbs))
    assert len(values) == 1


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(2**-20, 1e4)), min_size=1, max_size=40)
)
def test_error_is_within_the_stated_bound(rows):
    acc = None
    for value, weight in rows:
        acc = exact.add(acc, torch.tensor([value], dtype=torch.float64), weight)
    truth = sum(Fraction(value) * Fraction(weight) for value, weight in rows)
    # the rounding of each product, then 2^-57 a reply for the grid
    allowed = sum(Fraction(abs(value * weight)) / 2**53 + Fraction(1, 2**57) for value, weight in rows)
    assert abs(Fraction(float(acc["hi"])) + Fraction(float(acc["lo"])) - truth) <= allowed
    assert acc["weight"] == sum(Fraction(weight) for _, weight in rows)


def test_lo_is_carried_before_it_overflows():
    value, count = 2.0**-17 - 2.0**-50, 3 * exact.CARRY_EVERY + 5
    acc = None
    for _ in range(count):
        acc = exact.add(acc, torch.full((2,), value, dtype=torch.float64), 1.0)
    assert float(acc["lo"].abs().max()) < 2.0**-3
    kept = Fraction(value).limit_denominator(2**56)  # what one reply is rounded to on the fine grid
    assert Fraction(float(acc["hi"][0])) + Fraction(float(acc["lo"][0])) == kept * count


def test_carry_in_merge_keeps_the_value():
    ups, weights = updates(6)
    halves = [folded(ups, weights, range(3)), folded(ups, weights, range(3, 6))]
    before = [Fraction(float(h["hi"]["w"][0, 0])) + Fraction(float(h["lo"]["w"][0, 0])) for h in halves]
    merged = exact.merge(*halves)
    assert Fraction(float(merged["hi"]["w"][0, 0])) + Fraction(float(merged["lo"]["w"][0, 0])) == sum(before)


def test_memory_is_16_bytes_a_parameter_whatever_the_cohort():
    ups, weights = updates(50, shape=(1000,))
    sizes = {
        trees.nbytes({k: folded(ups, weights, range(n))[k]["w"] for k in ("hi", "lo")}) for n in (1, 7, 50)
    }
    assert sizes == {16 * 1000}


def test_stacked_equals_one_by_one():
    ups, weights = updates(5)
    stacked = trees.map_tree(lambda *leaves: torch.stack(leaves), *ups)
    one_by_one = exact.mean(folded(ups, weights, range(5)))
    at_once = exact.mean(exact.add(None, stacked, weights))
    assert trees.digest(at_once[0]) == trees.digest(one_by_one[0])
    assert at_once[1:] == one_by_one[1:]


def test_large_leaves_cross_chunks():
    big = torch.randn(2 * exact.CHUNK + 3, generator=torch.Generator().manual_seed(1))
    aggregate, _, _ = exact.mean(exact.add(exact.add(None, big, 1.0), -2 * big, 1.0))
    torch.testing.assert_close(aggregate, -big / 2, rtol=0, atol=2**-57)


def test_integers_are_summed_exactly_and_averaged_by_count():
    big = torch.tensor(2**53 + 1)
    acc = exact.add(exact.add(None, big, 5.0), torch.tensor(1), 1.0)
    assert int(acc["hi"]) == 2**53 + 2
    aggregate, _, _ = exact.mean(exact.add(exact.add(None, torch.tensor(4), 9.0), torch.tensor(8), 1.0))
    assert (int(aggregate), aggregate.dtype) == (6, torch.int64)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name_and_changes_nothing(bad):
    ups, weights = updates(2)
    acc = exact.add(None, ups[0], weights[0])
    before = trees.digest(exact.mean(acc)[0])
    hostile = {"w": ups[1]["w"].clone(), "n": ups[1]["n"]}
    hostile["w"][3, 1] = bad
    with pytest.raises(NonFinite, match="w holds NaN or infinity"):
        exact.add(acc, hostile, 1.0)
    with pytest.raises(NonFinite, match="weight"):
        exact.add(acc, ups[1], bad)
    with pytest.raises(NonFinite, match="weight"):
        exact.add(acc, ups[1], -1.0)
    assert trees.digest(exact.mean(acc)[0]) == before


def test_out_of_range_is_refused():
    with pytest.raises(OutOfRange, match="beyond the exact range"):
        exact.add(None, torch.tensor([1e9]), 100.0)
    with pytest.raises(OutOfRange):
        exact.add(None, torch.tensor([1e308, 1.5e308], dtype=torch.float64), 1e10)
    acc = exact.add(None, torch.tensor([2.0**33]), 3.0)
    with pytest.raises(OutOfRange):
        exact.merge(acc, exact.add(None, torch.tensor([2.0**33]), 3.0))


@pytest.mark.parametrize("other", [torch.zeros(3, 7), torch.zeros(7, 3).double()])
def test_misshapen_updates_are_refused(other):
    acc = exact.add(None, {"w": torch.zeros(7, 3)}, 1.0)
    with pytest.raises(ValueError, match="an update of"):
        exact.add(acc, {"w": other}, 1.0)


def test_nothing_and_weightless_have_no_mean():
    with pytest.raises(RunError, match="no updates"):
        exact.mean(None)
    with pytest.raises(RunError, match="weight 0"):
        exact.mean(exact.add(None, torch.ones(2), 0.0))


def test_updates_are_not_aliased():
    up = torch.ones(4)
    acc = exact.add(None, up, 1.0)
    up.fill_(7)
    assert exact.mean(acc)[0].tolist() == [1.0] * 4


@pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")
@pytest.mark.parametrize("replies", [1, 2, 37])
def test_the_kernel_makes_the_bits_of_the_plain_sums(replies, monkeypatch):
    draw = rng(derive(4, "kernel", replies))
    for size in (1, 15, 1024, 2050):
        ups = torch.from_numpy(
            draw.normal(size=(replies, size)) * 10.0 ** draw.uniform(-9, 6, size=size)
        ).float()
        weights = (10.0 ** draw.uniform(-3, 2, size=replies)).tolist()
        made = exact.add(exact.add(None, {"a": ups}, weights), {"a": ups.flip(0)}, weights)
        largest = trees.largest(ups)
        with monkeypatch.context() as patch:
            patch.setattr(native, "fits", lambda *_: False)
            plain = exact.add(exact.add(None, {"a": ups}, weights), {"a": ups.flip(0)}, weights)
            assert torch.equal(largest, trees.largest(ups))
        for limb in ("hi", "lo"):
            assert torch.equal(made[limb]["a"], plain[limb]["a"])
    for bad in (math.nan, math.inf, -math.inf):
        ups[-1, 7] = bad
        assert not math.isfinite(trees.largest(ups)[-1])
        assert torch.isfinite(trees.largest(ups)[:-1]).all()

"""Clipping: norms by brute force in float64, NaN, and the adaptive norm's closed form."""

import math

import numpy as np
import pytest
import torch

from coterie.core import ConfigError, Task, trees
from coterie.transforms import adaptive_clip, clip
from coterie.transforms.clip import clipped

UPS = {"a": torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)), "b": torch.ones(5, 2)}


def rows(tree):
    return np.concatenate([leaf.double().reshape(len(leaf), -1).numpy() for leaf in trees.leaves(tree)], 1)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("norm", [0.5, 3.0, 1e6])
def test_a_row_is_scaled_to_the_norm_or_left_as_it_was(order, norm):
    before, after = rows(UPS), rows(clip(norm=norm, order=order).encode(UPS, None, []))
    for was, now in zip(before, after, strict=True):
        size = np.linalg.norm(was, order)
        np.testing.assert_allclose(now, was * min(1.0, norm / size), rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_layers_share_the_norm(order):
    after = rows(clipped(trees.scale(UPS, 1e3), 2.0, order, "layer"))
    np.testing.assert_allclose(np.linalg.norm(after, order, axis=1), 2.0, rtol=1e-6)


def test_what_is_not_finite_stays_so():
    for bad in (math.nan, math.inf):
        ups = {"a": UPS["a"].clone()}
        ups["a"][2, 0, 0] = bad
        after = clipped(ups, 1.0)["a"]
        assert after[2].isnan().any()
        assert after[[0, 1, 3, 4]].isfinite().all()


def test_the_adaptive_norm_moves_to_the_quantile_as_in_andrew_et_al():
    """One noise on (u / C, bit) splits as in theorem 1; without noise the step is that of algorithm 1."""
    multiplier, bits, cohort = 1.2, 0.9, 5
    made = adaptive_clip(multiplier=multiplier, cohort=cohort, initial=2.0, quantile=0.5, lr=0.2, noise=bits)
    state = made.init()
    ups = made.encode(UPS, made.hint(state), [Task(i, "", 0, 0, {}) for i in range(5)])
    assert np.linalg.norm(rows(ups), axis=1).max() <= 1 + 1e-6
    mean = trees.map_tree(lambda leaf: leaf.double().sum(0) / cohort, ups)
    back, moved = made.close(mean, state)
    within = (np.linalg.norm(rows(UPS), axis=1) <= 2.0).mean()
    assert float(moved["norm"]) == pytest.approx(2.0 * math.exp(-0.2 * (within - 0.5)))
    expected = rows(clipped(UPS, 2.0)).mean(0)
    found = np.concatenate([leaf.reshape(-1).numpy() for leaf in trees.leaves(back)])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # the same noise of `multiplier` on every coordinate: on the update, in units of C, sigma_update; on the
    # sum of bits, sigma_bit
    unit = 1 / float(ups["within"].abs().max()) / 2  # of a bit, in the vector sent
    assert multiplier * unit == pytest.approx(bits)
    whole = 1 / math.sqrt(1 - float(ups["within"].abs().max()) ** 2)
    assert (multiplier * whole) ** -2 == pytest.approx(multiplier**-2 - (2 * bits) ** -2)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_a_norm_that_bounds_nothing_is_refused(norm):
    with pytest.raises(ConfigError, match="norm"):
        clip(norm=norm)


def test_a_bit_that_spends_more_than_all_is_refused():
    with pytest.raises(ConfigError, match="the bit alone"):
        adaptive_clip(multiplier=1.0, cohort=10, initial=1.0, quantile=0.5, lr=0.2, noise=0.4)

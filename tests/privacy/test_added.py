"""Noise as a transform: integer norms by brute force, closed forms, variances, and three broken versions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.core import NonFinite, Task, derive, trees
from coterie.privacy import added
from coterie.privacy.added import grid, noise, truncated
from coterie.transforms.clip import clipped

KEY = derive(1, "noise")
TASKS = [Task(i, f"c{i}", 0, 0, {}) for i in range(3)]


def summed(made, ups, tasks=TASKS):
    """What the server makes of the clients' updates [n, ...] in one round."""
    ups = made.encode(ups, None, tasks)
    return made.close(trees.map_tree(lambda leaf: leaf.sum(0), ups), made.init())[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=6),
    st.floats(1e-3, 1e3),
    st.sampled_from([1, 2]),
)
def test_no_integer_vector_is_above_the_bound(values, norm, order):
    """In integers of any size, for vectors on and around the edge after float32 clipping."""
    lattice = grid(norm, order)
    ups = clipped({"u": torch.tensor([values], dtype=torch.float32)}, norm, order)
    whole = [int(x) for x in truncated(ups, lattice)["u"].reshape(-1)]
    assert sum(abs(x) ** order for x in whole) * Fraction(lattice.step) ** order <= Fraction(norm) ** order


def test_a_client_that_skipped_the_clip_is_refused():
    with pytest.raises(NonFinite, match="not clipped"):
        truncated({"u": torch.full((2, 3), 5.0)}, grid(1.0))
    with pytest.raises(NonFinite, match="not clipped"):  # a sum of squares beyond 64 bits
        truncated({"u": torch.full((1, 20_000), 1.0)}, grid(1.0))
    with pytest.raises(NonFinite, match="not finite"):
        truncated({"u": torch.tensor([[0.0, float("nan")]])}, grid(1.0))


@pytest.mark.parametrize("at", ["server", "client", "shares"])
@pytest.mark.parametrize("protected", [True, False])
def test_without_noise_it_is_the_sum_over_the_expected_cohort(at, protected):
    ups = clipped({"u": torch.randn(3, 20, generator=torch.Generator().manual_seed(0))}, 1.5)
    made = noise(at=at, multiplier=1e-12, norm=1.5, cohort=7, protected=protected, key=KEY, least=3)
    step = grid(1.5).step
    torch.testing.assert_close(summed(made, ups)["u"], ups["u"].double().sum(0) / 7, rtol=0, atol=3 * step)


CASES = [
    ("server", "gaussian", 1.0), ("server", "laplace", 2.0), ("client", "gaussian", 3.0),
    ("client", "laplace", 6.0), ("shares", "gaussian", 1.0), ("shares", "skellam", 1.0),
]  # fmt: skip


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize(("at", "mechanism", "variance"), CASES)
def test_the_sum_has_the_wanted_variance(at, mechanism, variance, protected):
    """variance: over (multiplier norm)^2, of 3 clients. 60,000 draws: 5 sd, a false alarm in a million."""
    if mechanism == "skellam" and not protected:
        pytest.skip("refused: integer noise alone")
    made = noise(
        at=at, mechanism=mechanism, multiplier=0.7, norm=1.5, order=1 if mechanism == "laplace" else 2,
        cohort=1, protected=protected, key=KEY, least=3 if at == "shares" else None,
    )  # fmt: skip
    drawn = summed(made, {"u": torch.zeros(3, 60_000)})["u"].numpy() / (0.7 * 1.5)
    kurtosis = 6.0 if mechanism == "laplace" else 3.0
    assert abs(drawn.var() - variance) < 5 * variance * np.sqrt((kurtosis - 1) / len(drawn))


def test_halved_noise_would_be_noticed(monkeypatch):
    real = added.discrete_gaussian
    monkeypatch.setattr(added, "discrete_gaussian", lambda shape, sigma: real(shape, sigma / 2))
    with pytest.raises(AssertionError):
        test_the_sum_has_the_wanted_variance("server", "gaussian", 1.0, protected=True)


def test_protected_noise_is_never_the_same_twice_and_simulated_noise_is():
    ups = {"u": torch.zeros(3, 50)}
    for protected in (True, False):
        made = noise(at="server", multiplier=1.0, norm=1.0, cohort=1, protected=protected, key=KEY)
        assert torch.equal(summed(made, ups)["u"], summed(made, ups)["u"]) is not protected

"""Probabilities in closed form, the promised inequalities in exact numbers, and draws at a false alarm of 1e-7.

Draws are from `insecure_source` with fixed seeds.
"""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coterie.core.errors import ConfigError
from coterie.privacy import mechanisms, noise
from coterie.privacy.mechanisms import exponential, frequencies, private_histogram, randomised_response

FALSE_ALARM = 1e-7
SLACK = 1 + Fraction(1, 2**140)
scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


def e(epsilon):
    """e^epsilon as a fraction, from another library."""
    with mpmath.workprec(600):
        return Fraction(int(mpmath.floor(mpmath.exp(mpmath.mpf(epsilon)) * mpmath.mpf(2) ** 500)), 2**500)


def chances(values, epsilon, sensitivity, monotonic=False):
    """P(i), exactly, of the mechanism's own integers."""
    rate = Fraction(epsilon) / Fraction(sensitivity) / (1 if monotonic else 2)
    weights = mechanisms._weights(values, rate)
    return [Fraction(each, sum(weights)) for each in weights]


# --- the exponential mechanism


@given(scores, st.floats(0.01, 20), st.floats(0.001, 100))
def test_exponential_is_its_formula(values, epsilon, sensitivity):
    with mpmath.workprec(600):
        exact = [
            mpmath.exp(
                max(-256, mpmath.mpf(epsilon) * (mpmath.mpf(v) - max(values)) / (2 * mpmath.mpf(sensitivity)))
            )
            for v in values
        ]
        for found, weight in zip(chances(values, epsilon, sensitivity), exact, strict=True):
            right = weight / sum(exact)
            assert abs(mpmath.mpf(found.numerator) / found.denominator / right - 1) < mpmath.mpf(2) ** -138


@given(scores, st.floats(0.01, 20), st.integers(1, 8), st.booleans(), st.data())
def test_exponential_is_private_and_of_bounded_range(values, epsilon, sensitivity, monotonic, data):
    """For neighbours, moved by exact amounts: each ratio is at most e^epsilon, and so is the ratio of any two."""
    whole = [round(v) for v in values]
    least = 0 if monotonic else -sensitivity
    moves = data.draw(st.lists(st.integers(least, sensitivity), min_size=len(whole), max_size=len(whole)))
    one = chances(whole, epsilon, sensitivity, monotonic)
    two = chances([v + m for v, m in zip(whole, moves, strict=True)], epsilon, sensitivity, monotonic)
    ratios = [a / b for a, b in zip(one, two, strict=True)]
    assert max(ratios) <= e(epsilon) * SLACK
    assert min(ratios) >= 1 / (e(epsilon) * SLACK)
    assert max(ratios) / min(ratios) <= e(epsilon) * SLACK


def test_the_inequality_is_tight_and_a_mechanism_without_the_two_fails_it():
    one, two = [0, 0], [1, -1]
    right = [a / b for a, b in zip(chances(one, 8, 1), chances(two, 8, 1), strict=True)]
    wrong = [a / b for a, b in zip(chances(one, 8, 1, True), chances(two, 8, 1, True), strict=True)]
    assert e(7) < max(right) / min(right) <= e(8) * SLACK
    assert max(wrong) > e(8)


def test_floats_would_give_a_hopeless_candidate_away():
    """exp(-800) is 0 in float64: that it is never chosen would tell a neighbour at -740 from it."""
    assert math.exp(-800) == 0 < math.exp(-740)
    ratio = chances([0, -1600], 120, 60)[1] / chances([0, -1480], 120, 60)[1]
    assert 1 / e(120) <= ratio <= 1


@pytest.mark.parametrize("monotonic", [False, True])
def test_exponential_draws_fit(monotonic):
    values, n = torch.tensor([0.0, 1.0, 2.5, -1.0]), 4000
    weights = torch.softmax(values * (1 if monotonic else 0.5) * 1.2 / 0.8, 0).double()
    source = noise.insecure_source(5)
    drawn = [
        exponential(values, epsilon=1.2, sensitivity=0.8, monotonic=monotonic, source=source)
        for _ in range(n)
    ]
    counts = torch.bincount(torch.tensor(drawn), minlength=4).numpy()
    expected = (weights / weights.sum() * n).numpy()
    assert stats.chisquare(counts, expected).pvalue > FALSE_ALARM
    other = torch.softmax(values * (0.5 if monotonic else 1) * 1.2 / 0.8, 0).double()
    assert stats.chisquare(counts, (other / other.sum() * n).numpy()).pvalue < FALSE_ALARM


def test_large_integers_keep_all_their_bits():
    assert exponential([0, 10**400], epsilon=1.0, sensitivity=1.0) == 1
    near = [2**60, 2**60 + 1]  # equal as floats
    assert chances(near, 2, 1)[1] / chances(near, 2, 1)[0] > e(0.99)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([], {}),
        ([1.0, float("nan")], {}),
        ([float("inf")], {}),
        ([1.0], {"epsilon": 0}),
        ([1.0], {"epsilon": float("inf")}),
        ([1.0], {"sensitivity": -1}),
        ([1.0], {"sensitivity": float("nan")}),
    ],
)
def test_selections_that_cannot_be_are_refused(values, named):
    with pytest.raises(ConfigError, match="must be"):
        exponential(values, **{"epsilon": 1.0, "sensitivity": 1.0, **named})


# --- randomised response


@pytest.mark.parametrize("categories", [2, 3, 10, 1000])
@pytest.mark.parametrize("epsilon", [1e-3, 0.5, 1.0, 4.0, 32.0])
def test_a_response_is_private_exactly_and_hardly_less_true_than_it_may_be(epsilon, categories, monkeypatch):
    seen = []
    monkeypatch.setattr(
        noise,
        "draw",
        lambda tables, shape, source: seen.extend(tables) or torch.zeros(shape, dtype=torch.int64),
    )
    randomised_response(torch.zeros(1, dtype=torch.int64), epsilon=epsilon, categories=categories)
    (table,) = seen
    cells, full = len(table.entries), 1 << noise.CELL
    mass = [0] * cells
    for cell, (entry, rest) in enumerate(zip(table.entries.tolist(), table.rest.tolist(), strict=True)):
        edge = (entry >> 16 << 64) | rest
        mass[cell] += edge
        mass[entry & 0xFFFF] += full - edge
    truth, lies = mass[0], set(mass[1:categories])
    assert set(mass[categories:]) <= {0}
    assert len(lies) == 1
    ratio = Fraction(truth, *lies)
    assert e(epsilon) * (1 - Fraction(1, 2**40)) < ratio <= e(epsilon)


@pytest.mark.parametrize(("categories", "epsilon"), [(2, 1.0), (5, 0.7)])
def test_frequencies_are_unbiased_in_closed_form(categories, epsilon):
    """The estimate is linear in the shares of reports, so its mean is the estimate of their means."""
    n = 10_000
    keep = math.exp(epsilon) / (math.exp(epsilon) + categories - 1)
    lie = (1 - keep) / (categories - 1)
    counts = [n // 2, n - n // 2] + [0] * (categories - 2)
    means = [keep * c / n + lie * (n - c) / n for c in counts]
    whole = [round(m * 1_000_000) for m in means]
    reports = torch.repeat_interleave(torch.arange(categories), torch.tensor(whole))
    found = frequencies(reports, epsilon=epsilon, categories=categories)
    assert torch.allclose(found, torch.tensor(counts).double() / n, atol=1e-5)
    assert abs(float(found.sum()) - 1) < 1e-12


def test_responses_fit_and_a_mechanism_that_is_truer_is_caught():
    n, k, epsilon = 200_000, 4, 1.0
    values = torch.tensor([0, 1, 1, 2]).repeat(n // 4)
    reports = randomised_response(values, epsilon=epsilon, categories=k, source=noise.insecure_source(2))
    keep = math.exp(epsilon) / (math.exp(epsilon) + k - 1)
    true = int((reports == values).sum())
    assert stats.binomtest(true, n, keep).pvalue > FALSE_ALARM
    assert stats.binomtest(true, n, keep + 0.01).pvalue < FALSE_ALARM
    away = torch.bincount((reports - values) % k, minlength=k)[1:]
    assert stats.chisquare(away.numpy()).pvalue > FALSE_ALARM
    found = frequencies(reports, epsilon=epsilon, categories=k)
    spread = math.sqrt(k - 2 + math.exp(epsilon)) / (math.exp(epsilon) - 1) / math.sqrt(n)
    assert abs(float(found[3])) < 5.4 * spread
    assert torch.allclose(found, torch.tensor([0.25, 0.5, 0.25, 0.0]).double(), atol=5.4 * 1.5 * spread)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (torch.tensor([0.5]), {}),
        (torch.tensor([2]), {}),
        (torch.tensor([-1]), {}),
        (torch.tensor([1]), {"epsilon": 0.0}),
        (torch.tensor([1]), {"epsilon": 33.0}),
        (torch.tensor([0]), {"categories": 1}),
        (torch.tensor([0]), {"categories": 65537}),
    ],
)
@pytest.mark.parametrize("asked", [randomised_response, frequencies])
def test_responses_that_cannot_be_are_refused(asked, values, named):
    with pytest.raises(ConfigError, match="must be"):
        asked(values, **{"epsilon": 1.0, **named})


def test_shapes_stay_and_no_reports_are_refused():
    assert randomised_response(torch.tensor([[True, False]]), epsilon=1.0).shape == (1, 2)
    with pytest.raises(ConfigError, match="no reports"):
        frequencies(torch.zeros(0, dtype=torch.int64), epsilon=1.0)


# --- histograms


@pytest.mark.parametrize(
    ("named", "alike"),
    [
        ({"epsilon": 0.5}, lambda source: noise.discrete_laplace(1000, 2, source)),
        ({"epsilon": 0.5, "sensitivity": 3}, lambda source: noise.discrete_laplace(1000, 6, source)),
        ({"multiplier": 4.0}, lambda source: noise.discrete_gaussian(1000, 4, source)),
        ({"multiplier": 4.0, "sensitivity": 2}, lambda source: noise.discrete_gaussian(1000, 8, source)),
    ],
)
def test_a_histogram_gets_the_noise_it_asks_for(named, alike):
    counts = torch.arange(1000, dtype=torch.int32) % 3
    noisy = private_histogram(counts, **named, source=noise.insecure_source(1))
    assert noisy.dtype == torch.int64
    assert torch.equal(noisy - counts, alike(noise.insecure_source(1)))
    raised = private_histogram(counts, **named, nonnegative=True, source=noise.insecure_source(1))
    assert torch.equal(raised, noisy.clamp(min=0))
    assert noisy.min() < 0


@pytest.mark.parametrize(
    ("counts", "named", "why"),
    [
        (torch.ones(3), {"epsilon": 1.0}, "must be integers"),
        (torch.ones(3).long(), {}, "one of the two"),
        (torch.ones(3).long(), {"epsilon": 1.0, "multiplier": 1.0}, "one of the two"),
        (torch.ones(3).long(), {"epsilon": -1.0}, "epsilon must be"),
        (torch.ones(3).long(), {"multiplier": 0.0}, "multiplier must be"),
        (torch.ones(3).long(), {"epsilon": 1.0, "sensitivity": 0}, "sensitivity must be"),
        (torch.ones(3).long(), {"epsilon": 1e-300}, "scale must be"),
    ],
)
def test_histograms_that_cannot_be_are_refused(counts, named, why):
    with pytest.raises(ConfigError, match=why):
        private_histogram(counts, **named)

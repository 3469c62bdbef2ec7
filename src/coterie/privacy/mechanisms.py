"""Selection and response under differential privacy: exponential mechanism, randomised response, histograms.

Each is drawn by `noise` with integers alone, so that no rounding of floats can be told from its output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from coterie.core.errors import ConfigError
from coterie.privacy import noise
from coterie.privacy.noise import Source

FLOOR = 256  # exp(-256) = 10^-111: no candidate is less likely than that, compared with the best
BITS = 512  # of the weights: exp(-256) still has 142 of them
STEEPEST = 32  # epsilon of a randomised response: a table holds exp(-32) / 2^16 to 50 bits


def exponential(
    scores: Tensor | Sequence[float],
    *,
    epsilon: float,
    sensitivity: float,
    monotonic: bool = False,
    source: Source | None = None,
) -> int:
    """Choose i with P(i) proportional to exp(epsilon * scores[i] / (2 sensitivity)) (McSherry, Talwar 2007).

    sensitivity: how much any one score may differ between neighbours, roundings of its computation included.
    monotonic: neighbours move all scores the same way (counts do): then the factor 2 is dropped.
    Gives epsilon-DP and is epsilon-bounded-range (Dong, Durfee, Rogers 2020, arXiv:1909.13830): compose it as
    such. Floats are taken as the rational numbers they are and weights are integers of 512 bits, so that
    ratios of probabilities are right within a factor 1 +- 2^-140 (the attack that this ends, and a version
    in base 2: Ilvento 2020, arXiv:1912.04222). Weights below exp(-256) of the best are raised to that: at
    both neighbours by the same rule, which keeps both properties. Protected is what comes out and not how
    long it takes: every candidate costs one exponential and one comparison, but of large integers.
    Raises ConfigError.
    """
    values = torch.as_tensor(scores, dtype=torch.float64).flatten()
    if not len(values) or not torch.isfinite(values).all():
        raise ConfigError(f"exponential(scores={values.tolist()}): scores must be finite, one at least")
    rate = Fraction(_positive("exponential", "epsilon", epsilon))
    rate /= Fraction(_positive("exponential", "sensitivity", sensitivity)) * (1 if monotonic else 2)
    exact = [Fraction(each) for each in values.tolist()]
    best = max(exact)
    sums = list(
        accumulate(noise.exp_fixed(min(rate * (best - each), Fraction(FLOOR)), BITS) for each in exact)
    )
    drawn = noise.integer_below(sums[-1], source)
    return sum(drawn >= each for each in sums)


def randomised_response(
    values: Tensor, *, epsilon: float, categories: int = 2, source: Source | None = None
) -> Tensor:
    """Report each value as it is with probability e^epsilon / (e^epsilon + k - 1), else as another one.

    values: integers in [0, k), one a person, k = `categories` <= 2^16. Warner 1965 for k = 2; Kairouz, Oh,
    Viswanath 2014, arXiv:1407.1338 for more. Returns int64 of the same shape. Gives epsilon-DP to each
    person by itself (local DP): the table is rounded towards less truth. Count with `frequencies`.
    Raises ConfigError.
    """
    other = _lying("randomised_response", epsilon, categories)
    if values.is_floating_point() or (values.numel() and not 0 <= values.min() <= values.max() < categories):
        raise ConfigError(
            f"randomised_response: {values.dtype} values that are not all in [0, {categories})",
            "number the answers from 0",
        )
    full = 1 << noise.CELL
    table = noise.tabulate([full - (categories - 1) * other, *[other] * (categories - 1)])
    return (values.long() + noise.draw((table,), values.shape, source)) % categories


def frequencies(reports: Tensor, *, epsilon: float, categories: int = 2) -> Tensor:
    """Estimate the share of each category from reports of `randomised_response`, without bias.

    Returns float64 [categories]; sums to 1, single entries may be below 0 or above 1. The standard deviation
    of a rare one is about sqrt((k - 2 + e^epsilon) / n) / (e^epsilon - 1). Raises ConfigError.
    """
    lie = _lying("frequencies", epsilon, categories) / (1 << noise.CELL)
    if not reports.numel():
        raise ConfigError("frequencies of no reports are not defined")
    shares = torch.bincount(reports.flatten(), minlength=categories).double() / reports.numel()
    return (shares - lie) / (1 - categories * lie)


def private_histogram(
    counts: Tensor,
    *,
    epsilon: float | None = None,
    sigma: float | None = None,
    sensitivity: int = 1,
    nonnegative: bool = False,
    source: Source | None = None,
) -> Tensor:
    """Add independent integer noise to every count, of empty cells too; int64 of the same shape.

    counts: integers, over cells that are fixed without looking at the data.
    epsilon: discrete Laplace of scale sensitivity / epsilon, epsilon-DP; `sensitivity` is in L1: the most that
    one person's coming or going changes (1 for one record each; 2 where a record may be changed instead).
    sigma: discrete Gaussian, (sensitivity^2 / (2 sigma^2))-zCDP; `sensitivity` is in L2. Give one of the two.
    nonnegative: raise counts below 0 to 0, which costs no privacy but makes small counts too large on average.
    Raises ConfigError.
    """
    if counts.is_floating_point() or counts.is_complex():
        raise ConfigError(f"private_histogram of {counts.dtype} counts: they must be integers")
    if (epsilon is None) == (sigma is None):
        raise ConfigError(
            f"private_histogram(epsilon={epsilon}, sigma={sigma}): give one of the two",
            "epsilon for discrete Laplace noise, sigma for discrete Gaussian noise",
        )
    by = Fraction(_positive("private_histogram", "sensitivity", sensitivity))
    if epsilon is not None:
        scale = by / Fraction(_positive("private_histogram", "epsilon", epsilon))
        drawn = noise.discrete_laplace(counts.shape, scale, source)
    else:
        drawn = noise.discrete_gaussian(counts.shape, sigma or 0, source)
    noisy = counts.long() + drawn
    return noisy.clamp(min=0) if nonnegative else noisy


def _lying(where: str, epsilon: float, categories: int) -> int:
    """The probability of each wrong category, in units of 2^-112, rounded up."""
    if not 2 <= categories <= noise.MOST_CELLS:
        raise ConfigError(f"{where}(categories={categories}): must be in [2, {noise.MOST_CELLS}]")
    if _positive(where, "epsilon", epsilon) > STEEPEST:
        raise ConfigError(f"{where}(epsilon={epsilon}): must be at most {STEEPEST}", "that protects nobody")
    odds = noise.exp_fixed(Fraction(epsilon)) + 2  # so that it is not below e^-epsilon
    return -(-(odds << noise.CELL) // ((1 << noise.BITS) + (categories - 1) * odds))


def _positive(where: str, name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{where}({name}={value}): {name} must be a finite number above 0")
    return value

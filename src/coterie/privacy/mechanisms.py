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
    values = scores.flatten().tolist() if isinstance(scores, Tensor) else list(scores)
    if not values or not all(-math.inf < each < math.inf for each in values):
        raise ConfigError(
            f"exponential(scores={values}): scores must be finite, and there must be one at least"
        )
    rate = noise.positive("exponential", "epsilon", epsilon)
    rate /= noise.positive("exponential", "sensitivity", sensitivity) * (1 if monotonic else 2)
    sums = list(accumulate(_weights(values, rate)))
    drawn = noise.integer_below(sums[-1], source)
    return sum(drawn >= each for each in sums)


def _weights(scores: Sequence[float], rate: Fraction) -> list[int]:
    best = Fraction(max(scores))
    below = (min(rate * (best - Fraction(each)), Fraction(FLOOR)) for each in scores)
    return [noise.exp_fixed(each, BITS) for each in below]


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
    known = _answers("randomised_response", values, categories)
    full = 1 << noise.CELL
    table = noise.tabulate([full - (categories - 1) * other, *[other] * (categories - 1)])
    return (known + noise.draw((table,), values.shape, source)) % categories


def frequencies(reports: Tensor, *, epsilon: float, categories: int = 2) -> Tensor:
    """Estimate the share of each category from reports of `randomised_response`, without bias.

    Returns float64 [categories]; sums to 1, single entries may be below 0 or above 1. The standard deviation
    of a rare one is about sqrt((k - 2 + e^epsilon) / n) / (e^epsilon - 1). Raises ConfigError.
    """
    lie = _lying("frequencies", epsilon, categories) / (1 << noise.CELL)
    known = _answers("frequencies", reports, categories).flatten()
    if not len(known):
        raise ConfigError("frequencies of no reports are not defined")
    shares = torch.bincount(known, minlength=categories).double() / len(known)
    return (shares - lie) / (1 - categories * lie)


def private_histogram(
    counts: Tensor,
    *,
    epsilon: float | None = None,
    multiplier: float | None = None,
    sensitivity: float = 1,
    nonnegative: bool = False,
    source: Source | None = None,
) -> Tensor:
    """Add independent integer noise to every count, of empty cells too; int64 of the same shape.

    counts: integers, over cells that are fixed without looking at the data. Give one of
    epsilon: discrete Laplace of scale sensitivity / epsilon; epsilon-DP for a sensitivity in L1.
    multiplier: discrete Gaussian of sigma = multiplier * sensitivity; (1 / (2 multiplier^2))-zCDP, L2.
    sensitivity: how far one person's coming or going moves the counts: 1 for one record each; where a record
    may be changed instead, 2 in L1 and sqrt(2), rounded up, in L2.
    nonnegative: raise counts below 0 to 0; costs no privacy, but small counts are then too large on average.
    Raises ConfigError.
    """
    if counts.is_floating_point() or counts.is_complex():
        raise ConfigError(f"private_histogram of {counts.dtype} counts: they must be integers")
    by = noise.positive("private_histogram", "sensitivity", sensitivity)
    if epsilon is not None and multiplier is None:
        scale = by / noise.positive("private_histogram", "epsilon", epsilon)
        drawn = noise.discrete_laplace(counts.shape, scale, source)
    elif multiplier is not None and epsilon is None:
        sigma = by * noise.positive("private_histogram", "multiplier", multiplier)
        drawn = noise.discrete_gaussian(counts.shape, sigma, source)
    else:
        raise ConfigError(
            f"private_histogram(epsilon={epsilon}, multiplier={multiplier}): give one of the two",
            "epsilon for discrete Laplace noise, multiplier for discrete Gaussian noise",
        )
    noisy = counts.long() + drawn
    return noisy.clamp(min=0) if nonnegative else noisy


def _answers(where: str, values: Tensor, categories: int) -> Tensor:
    known = values.long()
    if values.is_floating_point() or (known.numel() and not 0 <= known.min() <= known.max() < categories):
        rule = f"answers must be integers in [0, {categories})"
        raise ConfigError(f"{where} of {values.dtype} answers: {rule}", "number them from 0")
    return known


def _lying(where: str, epsilon: float, categories: int) -> int:
    """The probability of each wrong category, in units of 2^-112, rounded up."""
    if not 2 <= categories <= noise.MOST_CELLS:
        raise ConfigError(f"{where}(categories={categories}): must be in [2, {noise.MOST_CELLS}]")
    exact = noise.positive(where, "epsilon", epsilon, STEEPEST, "more than that protects nobody")
    odds = noise.exp_fixed(exact) + 2  # so that it is not below e^-epsilon
    return -(-(odds << noise.CELL) // ((1 << noise.BITS) + (categories - 1) * odds))

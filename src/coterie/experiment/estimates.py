"""A mean over a few repetitions, and how far the true mean may lie from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean of n values; half: the half-width of its 95 % confidence interval, None for a single value."""

    mean: float
    half: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean with its 95 % interval, t * s / sqrt(n) either way (Student 1908); None without values.

    It takes the values for independent draws of one normal distribution, as seeds' results nearly are.
    """
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, n)
    s = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, student_t(n - 1) * s / math.sqrt(n), n)


def student_t(freedom: int, inside: float = 0.95) -> float:
    """The t with P(|T| <= t) = inside, T with so many degrees of freedom (a whole number >= 1).

    The distribution is a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), found here by
    bisection over theta = atan(t / sqrt(freedom)). Cost: O(freedom).
    """
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, freedom) < inside else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(theta: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) * tan(theta))."""
    cos, odd = math.cos(theta), freedom % 2
    term = cos if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total

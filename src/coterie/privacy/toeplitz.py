"""Lower-triangular Toeplitz matrices by their first column: what a strategy costs and how it errs.

A matrix mechanism (Li et al. 2015; Denisov et al. 2022, arXiv:2202.08312) releases every prefix sum of
x_1 ... x_T as A x + B z with A = B C, A the lower triangle of ones and z independent Gaussian: that is
A (x + C^-1 z), so round t adds w_t = (C^-1 z)_t to its sum. Privacy pays for the one release C x + z.
Everything here is float64, differentiable, and takes O(T log T) time and O(T) memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def square_root(rounds: int) -> Tensor:
    """The column of the square root of A, 1, 1/2, 3/8, ...: float64 [rounds].

    Of all Toeplitz strategies it has the least worst error for one participation (Fichtenberger,
    Henzinger, Upadhyay 2023, arXiv:2202.11205; Dvijotham et al. 2024, arXiv:2404.16706).
    """
    k = torch.arange(1, rounds, dtype=torch.float64)
    return torch.cat([k.new_ones(1), torch.cumprod((2 * k - 1) / (2 * k), 0)])


def buffered(scales: Tensor, decays: Tensor, rounds: int) -> Tensor:
    """The column of a buffered strategy: 1, then sum_i scales_i * decays_i^(t - 1). float64 [rounds]."""
    powers = decays ** torch.arange(rounds - 1, dtype=torch.float64)[:, None]
    rest: Tensor = powers @ scales
    return torch.cat([scales.new_ones(1), rest])


def inverse(column: Tensor, rounds: int) -> Tensor:
    """The column of the inverse, [rounds], by Newton's iteration g <- g (2 - c g) on power series."""
    column = fit(column, rounds)
    found = 1 / column[:1]
    while len(found) < rounds:
        size = min(2 * len(found), rounds)
        two = pad(found.new_full((1,), 2.0), (0, size - 1))
        found = product(fit(found, size), two - product(column[:size], fit(found, size)))
    return found


def product(left: Tensor, right: Tensor) -> Tensor:
    """The column of the product of two matrices of one size."""
    size = len(left)
    found: Tensor = torch.fft.irfft(
        torch.fft.rfft(left, 2 * size) * torch.fft.rfft(right, 2 * size), 2 * size
    )
    return found[:size]


def variances(column: Tensor, rounds: int) -> Tensor:
    """The variance of each prefix sum's noise, by that of z: the squared row norms of B, [rounds]."""
    return inverse(column, rounds).cumsum(0).square().cumsum(0)


def squared_sensitivity(column: Tensor, rounds: int, separation: int, participations: int) -> Tensor:
    """The largest |C u|^2 over all u that are 1 in at most `participations` rounds, `separation` apart.

    It is met by taking part as early and as often as may be, for columns that are non-negative and do not
    increase (Kalinin, Lampert 2024, arXiv:2405.13763, theorem 2), and for columns of at most `separation`
    bands: then no two rounds of one participant overlap, and later columns are cut, never longer. The
    caller sees to it that the column is one of these. Contributions may be any vectors of norm at most 1 in
    place of the ones: inner products of columns are non-negative, so none does worse than all alike.
    """
    blocks = -(-rounds // separation)
    sums = fit(column, blocks * separation).view(blocks, separation).cumsum(0)
    most = min(participations, blocks)
    sums = torch.cat([sums[:most], sums[most:] - sums[: blocks - most]])
    return sums.flatten()[:rounds].square().sum()


def fit(column: Tensor, size: int) -> Tensor:
    """The first `size` entries, with zeros below what there is."""
    return pad(column[:size], (0, max(0, size - len(column))))

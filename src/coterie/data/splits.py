"""The global test split of sets that come without one, and the scaling of inputs."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from coterie.core.errors import ConfigError
from coterie.core.seeds import derive, rng
from coterie.data.types import Column, Floats, Rows


def split_rows(y: Column, fraction: float, *, seed: int = 0, stratify: bool = True) -> tuple[Rows, Rows]:
    """Return training rows and test rows, sorted; with stratify each value of y gives its share, rounded.

    Raises ConfigError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"test_fraction={fraction}: must be at least 0 and below 1", "0 keeps no test set")
    rows = rng(derive(seed, "test split")).permutation(len(y))
    groups = [rows[y[rows] == value] for value in np.unique(y)] if stratify else [rows]
    held_out = np.zeros(len(y), dtype=bool)
    for group in groups:
        held_out[group[: int(len(group) * fraction + 0.5)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def moments(x: Floats) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of each column of x [n, features]; a constant column has 1."""
    constant = x.min(axis=0) == x.max(axis=0)
    return np.where(constant, x[0], x.mean(axis=0)), np.where(constant, 1, x.std(axis=0))


def normalise(x: Tensor, *, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std as float32; mean and std are broadcast, in the units that x is stored in."""
    return x.float().sub(mean.to(x.device)).div_(std.to(x.device))


def as_float(x: Tensor) -> Tensor:
    """Return x as float32, unscaled."""
    return x.float()

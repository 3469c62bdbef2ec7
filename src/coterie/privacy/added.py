"""Noise as a transform: added once at the server, by each client, or by each client as a share of the sum's.

Protected noise is integer noise on integers. A clipped update is truncated towards zero on a grid whose step
is a power of two: that enlarges no coordinate, and that its norm is within the bound is then checked, and
made so, in integers. So the sensitivity that is accounted for holds exactly, rounding included. The noise
comes from the operating system's generator and is kept nowhere.

Simulated noise is float noise on floats from the run's seed, for research: it repeats with the seed and
protects nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from coterie.core import trees
from coterie.core.errors import ConfigError, NonFinite
from coterie.core.seeds import Key, derive, rng
from coterie.core.types import Task, Transform, Tree
from coterie.privacy.noise import discrete_gaussian, discrete_laplace, skellam

At = Literal["server", "client", "shares"]
Mechanism = Literal["gaussian", "laplace", "skellam"]
BITS, FEW_BITS = 24, 12  # the norm is 2^24 to 2^25 grid steps; with Skellam noise, whose cost grows with it
WIDE = (torch.float32, torch.float64)
PIECE = 2**16  # numbers of a row at a time, which stay in the cache
UNCLIPPED = "an update that is not finite, or was not clipped before it met the grid"


class Grid(NamedTuple):
    """Integers that stand for multiples of `step`, of a norm of at most `bound` steps."""

    step: float  # a power of two
    bound: Fraction
    order: int


def noise(
    *,
    at: At,
    mechanism: Mechanism = "gaussian",
    multiplier: float | None,
    norm: float,
    order: int = 2,
    cohort: int,
    protected: bool = True,
    key: Key,
    least: int | None = None,
) -> Transform:
    """Sum the updates, add noise, divide by the expected cohort.

    multiplier: the noise of the sum (of each update at "client") over the clipping norm: standard deviation
    of a Gaussian or Skellam, scale of a Laplace; None at a client of noise that only the server adds. norm,
    order: what updates were clipped to before. cohort: the expected number of clients in a round, which
    divides, whoever replied. least: "shares" add up to the
    wanted variance once so many honest clients replied. key: of simulated noise. Raises ConfigError.
    """
    if at == "shares" and mechanism == "laplace":
        raise ConfigError("laplace noise does not come in shares", 'mechanism = "gaussian" or "skellam"')
    if mechanism == "skellam" and at != "shares":
        raise ConfigError(f"skellam noise at the {at}", 'mechanism = "gaussian", or at = "shares"')
    if mechanism == "skellam" and not protected:
        raise ConfigError("skellam noise is integer noise", 'mechanism = "gaussian", or protected = true')
    if multiplier is None and at != "server":
        raise ConfigError(
            f"noise at the {at} without its multiplier: a budget is not calibrated where only the config is "
            "known",
            "set multiplier, as calibrated for the budget, beside it",
        )
    lattice = grid(norm, order, bits(mechanism))
    sigma = Fraction(multiplier or 0) * lattice.bound  # of the sum, in steps
    shares = (least or 1) if at == "shares" else 1

    def drawn(leaf: Tensor) -> Tensor:
        """One party's integer noise."""
        if mechanism == "laplace":
            return discrete_laplace(leaf.shape, sigma)
        if mechanism == "skellam":
            return skellam(leaf.shape, sigma**2 / 2 / shares)
        return discrete_gaussian(leaf.shape, _root(sigma**2 / shares))

    def simulated(tree: Tree, *path: str | int) -> Tree:
        """A tree with one party's float noise."""
        generator, scale = rng(derive(key, *path)), float(multiplier or 0) * norm / math.sqrt(shares)
        draw: Callable[..., object] = generator.laplace if mechanism == "laplace" else generator.normal
        return trees.map_tree(
            lambda leaf: leaf + torch.as_tensor(draw(0.0, scale, leaf.shape)).to(leaf.dtype), tree
        )

    def encode(ups: Tree, hint: Tree, tasks: Sequence[Task]) -> Tree:
        del hint
        if protected:
            ups = truncated(ups, lattice)
            return ups if at == "server" else trees.map_tree(lambda leaf: leaf.long() + drawn(leaf), ups)
        if at == "server":
            return ups
        rows = [
            simulated(trees.map_tree(lambda leaf, row=row: leaf[row], ups), task.round, task.client)
            for row, task in enumerate(tasks)
        ]
        return trees.map_tree(lambda *leaves: torch.stack(leaves), *rows)

    def close(total: Tree, state: Tree) -> tuple[Tree, Tree]:
        assert multiplier, "a sum without noise is never released"
        if at == "server":
            total = (
                trees.map_tree(lambda leaf: leaf + drawn(leaf), total)
                if protected
                else simulated(total, state["rounds"])
            )
        unit = (lattice.step if protected else 1.0) / cohort
        return trees.map_tree(lambda leaf: leaf.double() * unit, total), {"rounds": state["rounds"] + 1}

    return Transform(encode, close, init=lambda: {"rounds": 0}, cohort=cohort)


def bits(mechanism: Mechanism) -> int:
    """The grid's for a mechanism."""
    return FEW_BITS if mechanism == "skellam" else BITS


def grid(norm: float, order: int = 2, bits: int = BITS) -> Grid:
    """The grid on which a norm is at least 2^bits and less than 2^(bits + 1) steps."""
    step = 2.0 ** (math.frexp(norm)[1] - 1 - bits)
    return Grid(step, Fraction(norm) / Fraction(step), order)


def truncated(ups: Tree, grid: Grid) -> Tree:
    """Clipped updates [n, ...] as int32 on the grid, none of a norm above its bound.

    Truncation alone keeps the bound but where rounding left the clipped norm above it; such a row is scaled
    down until it is kept. Raises NonFinite for NaN or infinity, and for a row that was never clipped.
    """
    leaves = [leaf.reshape(len(leaf), -1) for leaf in trees.leaves(ups)]
    limit = grid.bound**grid.order
    for leaf in leaves:
        if leaf.numel() and not (trees.largest(leaf) <= 1.01 * float(grid.bound) * grid.step).all():
            raise NonFinite(UNCLIPPED)
    # times a power of two is exact, and so is the cut of what is below a step
    whole = [(leaf if leaf.dtype in WIDE else leaf.float()).mul(1 / grid.step).int() for leaf in leaves]
    for row in (_power(whole, grid.order) > math.floor(limit)).nonzero().flatten().tolist():
        fitted = _fitted([leaf[row : row + 1].double() / grid.step for leaf in leaves], limit, grid.order)
        for part, leaf in zip(whole, fitted, strict=True):
            part[row : row + 1] = leaf
    parts = iter(whole)
    return trees.map_tree(lambda leaf: next(parts).reshape(leaf.shape), ups)


def _fitted(row: list[Tensor], limit: Fraction, order: int) -> list[Tensor]:
    """One row, in steps, scaled down until its integers are within the limit."""
    scale = 1.0
    for attempt in range(64):
        whole = [(leaf * scale).int() for leaf in row]
        size = int(_power(whole, order))
        if size <= limit:
            return whole
        if size > 1.01 * float(limit):
            raise NonFinite(UNCLIPPED)
        scale *= 1 - 2.0 ** (attempt - 40)
    raise NonFinite("an update cannot be brought within its clipping norm")


def _power(whole: Sequence[Tensor], order: int) -> Tensor:
    """Sum of |x|^order over each row of int32 leaves [n, d]; squares in float64, exact up to 2^53."""
    if order == 1:
        return torch.stack([part.abs().sum(1) for part in whole]).sum(0)
    rows = [
        [
            float(piece.dot(piece))
            for part in whole
            for piece in map(Tensor.double, torch.split(part[row], PIECE))
        ]
        for row in range(len(whole[0]))
    ]
    return torch.tensor([sum(row) for row in rows], dtype=torch.float64)


def _root(variance: Fraction) -> Fraction:
    """A square root that is not below the true one."""
    scaled = variance.numerator << 128
    return Fraction(math.isqrt(scaled // variance.denominator) + 1, 1 << 64)

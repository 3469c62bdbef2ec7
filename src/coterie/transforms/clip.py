"""Clipping: what one client can change is bounded, by the norm of its whole update.

L2 clipping is McMahan, Ramage, Talwar, Zhang 2018, arXiv:1710.06963; per layer, the norm is split over the
leaves so that the whole stays below it. The adaptive norm follows a quantile of the clients' norms (Andrew,
Thakkar, McMahan, Ramaswamy 2021, arXiv:1905.03871).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from coterie.core import trees
from coterie.core.errors import ConfigError
from coterie.core.types import Task, Transform, Tree


def clip(*, norm: float, order: Literal[1, 2] = 2, per: Literal["update", "layer"] = "update") -> Transform:
    """Scale an update down to the norm if it is above.

    order: 2, or 1 (for Laplace noise). per: "layer" clips each of the L leaves to norm / sqrt(L), or norm / L
    in L1. Norms are taken in float64; the result may exceed the norm by the rounding of the update's type. An
    update that is not finite stays so, and is refused where it arrives. Raises ConfigError.
    """
    _positive("norm", norm)

    def encode(ups: Tree, hint: Tree, tasks: Sequence[Task]) -> Tree:
        del hint, tasks
        return clipped(ups, norm, order, per)

    return Transform(encode)


def clipped(ups: Tree, norm: float, order: int = 2, per: str = "update") -> Tree:
    """The updates, leaves [n, ...], each within the norm."""
    leaves = trees.leaves(ups)
    if per == "layer":
        share = norm / (math.sqrt(len(leaves)) if order == 2 else len(leaves))
        return trees.map_tree(lambda leaf: _scaled(leaf, share / norms([leaf], order)), ups)
    factor = norm / norms(leaves, order)
    return trees.map_tree(lambda leaf: _scaled(leaf, factor), ups)


def norms(leaves: Sequence[Tensor], order: int = 2) -> Tensor:
    """The norm of each row over all leaves [n, ...]: float64 [n]."""
    parts = [
        torch.linalg.vector_norm(leaf.reshape(len(leaf), -1), order, dim=1, dtype=torch.float64)
        for leaf in leaves
    ]
    return torch.linalg.vector_norm(torch.stack(parts), order, dim=0)  # type: ignore[no-any-return]


def adaptive_clip(
    *,
    multiplier: float | None,
    cohort: int,
    initial: float,
    quantile: float,
    lr: float,
    noise: float | None = None,
) -> Transform:
    """Clip in L2 to a norm that moves to a quantile of the clients' norms, and send whether it was below.

    Update and bit leave as one vector of norm <= 1: (u / C, s (b - 1/2)) / sqrt(1 + s^2 / 4), C the norm of
    the round, s = sigma_update / sigma_bit. So one noise protects both, and the split is that of Andrew et
    al., theorem 1: 1 / multiplier^2 = 1 / sigma_update^2 + 1 / (2 sigma_bit)^2. Then C <- C exp(-lr (mean of
    b - quantile)), algorithm 1.

    multiplier: of the noise on the whole vector; None at a client, whom the server tells s. cohort: the
    expected number of clients, which divides. noise: sigma_bit, on the sum of the bits (None: cohort / 20,
    section 3.2, but at least the multiplier).
    Raises ConfigError.
    """
    _positive("adaptive.initial", initial)
    _positive("adaptive.lr", lr)
    if not 0 < quantile < 1:
        raise ConfigError(f"adaptive.quantile = {quantile}: must be in (0, 1)", "0.5 is the median")
    spread = math.nan if multiplier is None else _spread(multiplier, cohort, noise)
    whole = math.sqrt(1 + spread**2 / 4)

    def encode(ups: Tree, hint: Tree, tasks: Sequence[Task]) -> Tree:
        del tasks
        most, spread = float(hint["norm"]), float(hint["spread"])
        whole = math.sqrt(1 + spread**2 / 4)  # whatever the server says, the vector's norm is <= 1
        found = norms(trees.leaves(ups))
        within = (found <= most).double()
        factor = torch.minimum(most / found, torch.ones_like(found)) / (most * whole)
        update = trees.map_tree(lambda leaf: (leaf * _column(factor, leaf)).to(leaf.dtype), ups)
        return {"update": update, "within": spread * (within - 0.5) / whole}

    def close(aggregate: Tree, state: Tree) -> tuple[Tree, Tree]:
        most = float(state["norm"])
        within = float(aggregate["within"]) * whole / spread + 0.5
        moved = most * math.exp(-lr * (within - quantile))
        update = trees.map_tree(lambda leaf: leaf * (most * whole), aggregate["update"])
        return update, {"norm": torch.tensor(moved, dtype=torch.float64)}

    return Transform(
        encode,
        close,
        init=lambda: {"norm": torch.tensor(initial, dtype=torch.float64)},
        hint=lambda state: {**state, "spread": torch.tensor(spread, dtype=torch.float64)},
    )


def _spread(multiplier: float, cohort: int, noise: float | None) -> float:
    """sigma_update / sigma_bit."""
    bit_noise = max(cohort / 20, multiplier) if noise is None else noise
    if not bit_noise > multiplier / 2:
        raise ConfigError(
            f"adaptive.noise = {noise}: with noise multiplier {multiplier:.4g} the bit alone spends more",
            f"set it above {multiplier / 2:.4g}, half the multiplier; a twentieth of the cohort is usual",
        )
    return 1 / math.sqrt(multiplier**-2 - (2 * bit_noise) ** -2) / bit_noise


def _scaled(leaf: Tensor, factor: Tensor) -> Tensor:
    """Rows [n, ...] times their factors [n], none above 1. NaN in a row makes all of it NaN."""
    return (leaf * _column(factor.clamp(max=1.0), leaf)).to(leaf.dtype)


def _column(factor: Tensor, leaf: Tensor) -> Tensor:
    return factor.to(leaf.dtype).reshape(-1, *[1] * (leaf.dim() - 1))


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} = {value}: must be a finite number > 0", "1.0 is a usual clipping norm")

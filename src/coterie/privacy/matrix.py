"""Correlated noise for training without amplification by sampling: tree aggregation, BandMF, BLT.

Each round adds to its sum x_t a noise w_t that partly cancels the noise before it, so that sums over many
rounds, which is what a model is made of, carry far less noise than by independent draws. w = C^-1 z, with z
independent draws of one standard deviation (see `toeplitz`), is made one round at a time.

- `tree`: z_t belongs to a node of a binary tree. Sums and differences alone, so integers stay integers.
- `banded`: C has few non-zero diagonals; the state holds the last bands - 1 noises. In integers too.
- `blt`: C's column is a sum of a few geometric series; the state holds one buffer for each. Floats alone.

In integers, z is discrete noise in units of 2^-bits of the grid of x; so is w, and 2^bits x_t + w_t is what
is released. That is an exact function of the integers 2^bits C x + z, so nothing leaks through low bits:
`banded` rounds C's entries to multiples of 2^-bits, and what a round takes from past noises to whole units.
As 2^bits (C x)_t is whole, to round before x's share is in is to round after it.

Privacy: the whole run is one Gaussian release, of noise multiplier
std(z) / (sensitivity * clipping norm), whatever each round's x_t made of the rounds before it (Denisov et al.
2022, arXiv:2202.08312); with discrete Gaussian z it is that in zCDP. The relation is
add or remove (a participant's x_t becomes 0 in all its rounds); to replace one costs twice the sensitivity.
It holds if the schedule keeps participations `separation` rounds apart and at most `participations` in
number: that is the schedule's promise, and none of it can be seen here.

The state is SECRET. Who has it can subtract the noise from sums already released. It must be stored, or a
resumed run would lose the cancellation and its accounting: keep it in the server's checkpoints alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from coterie.core.errors import ConfigError
from coterie.core.trees import extent, leaves, map_tree, zeros_like
from coterie.core.types import Tree
from coterie.privacy import toeplitz

Objective = Literal["max", "mean"]
PIECE = 1 << 18  # elements that stay in the cache while all noises pass by: a third of the time
BITS = 12  # of a band's entry in integers: 64 bands err 1e-7 more than at full precision
LARGEST = 2**44  # of z in integers: sums of 2^BITS * w over all bands stay inside int64
Step = Callable[[Tree, Tree, int], tuple[Tree, Tree]]  # z, memory, t (from 1) -> w, memory


@dataclass(frozen=True, slots=True)
class Correlated:
    """A stream of correlated noise over a fixed number of rounds.

    init() -> state. next(state, z) -> w, state: w is like z, a tree of tensors. The state given stays as it
    was; the new one shares memory with z and w, so change neither in place. Raises ConfigError after the last
    round, and for integer z where `bits` is None, or not int64, or not below 2^44.

    sensitivity: L2, of all that one participant changes in C x, at clipping norm 1.
    max_error, mean_error: of the prefix sums, the worst standard deviation of the noise and the root of its
    mean square, at noise multiplier 1 and clipping norm 1 (sensitivity included): the smaller the better.
    """

    init: Callable[[], Tree]  # -> state: SECRET, see above
    next: Callable[[Tree, Tree], tuple[Tree, Tree]]  # state, z -> w, state
    sensitivity: float
    max_error: float
    mean_error: float
    bits: int | None  # integer z and w are in units of 2^-bits of the grid of x; None: z must be floats


def correlated(
    mechanism: str,
    rounds: int,
    *,
    separation: int | None = None,
    participations: int | None = None,
    objective: Objective = "max",
    bands: int | None = None,
    buffers: int = 4,
) -> Correlated:
    """The noise of a config: mechanism "tree", "banded" or "blt", over `rounds` rounds.

    separation: two rounds of one participant differ by at least this; None: nobody takes part twice.
    participations: of one participant at most; None: as many as `separation` allows.
    objective: which error `banded` and `blt` are optimised for.
    bands: of `banded`, at most `separation`; None: that many, but at most 64 (memory: bands - 1 models).
    buffers: of `blt` (memory: that many models).
    Raises ConfigError.
    """
    separation = rounds if separation is None else separation
    participations = rounds if participations is None else participations
    bands = min(separation, rounds, 64) if bands is None else bands
    counts = {"rounds": rounds, "separation": separation, "participations": participations}
    for name, value in {**counts, "bands": bands, "buffers": buffers}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{mechanism}({name}={value!r}): {name} must be a whole number of at least 1")
    if objective not in ("max", "mean"):
        raise ConfigError(f"{mechanism}(objective={objective!r}): objective must be 'max' or 'mean'")
    separation = min(separation, rounds)
    if mechanism == "tree":
        return tree(rounds, separation, participations)
    if mechanism == "banded":
        return banded(rounds, separation, participations, bands, objective)
    if mechanism == "blt":
        return blt(rounds, separation, participations, buffers, objective)
    raise ConfigError(f"mechanism={mechanism!r}: there is 'tree', 'banded' and 'blt'")


def tree(rounds: int, separation: int, participations: int) -> Correlated:
    """Tree aggregation (Kairouz et al. 2021, arXiv:2103.00039; Dwork et al. 2010; Chan et al. 2011).

    Round t completes one node, over the last 2^r rounds, with 2^r the largest power of two that divides t;
    the prefix sum up to t is that of its popcount(t) nodes. Right children are in no prefix sum, and are
    neither drawn nor paid for. Memory: at most log2(rounds) + 1 models.
    """

    def step(z: Tree, nodes: Tree, t: int) -> tuple[Tree, Tree]:
        covered = (t & -t).bit_length() - 1  # the nodes, newest first, that this round's node replaces
        return _minus(z, nodes[:covered], [1] * covered), (z, *nodes[covered:])

    sensitivity = math.sqrt(_tree_squared_sensitivity(rounds, separation, participations))
    errors = [t.bit_count() for t in range(1, rounds + 1)]
    return _stream(step, rounds, sensitivity, max(errors), sum(errors) / rounds, bits=0)


def banded(
    rounds: int, separation: int, participations: int, bands: int, objective: Objective = "max"
) -> Correlated:
    """BandMF with a Toeplitz strategy (Choquette-Choo et al. 2023, arXiv:2306.08153), optimised.

    w_t = z_t - sum_j c_j w_(t-j), with c_0 = 1, all c_j multiples of 2^-12. One band is independent noise.
    Raises ConfigError for more bands than `separation`: sensitivity would no longer be known exactly.
    """
    if bands > separation:
        raise ConfigError(
            f"banded(bands={bands}): at most {separation} bands, the rounds between two participations",
            "use fewer bands, or a schedule that keeps participations further apart",
        )

    def column(raw: Tensor) -> Tensor:
        return torch.cat([raw.new_ones(1), raw])

    strategy = Strategy(column, rounds, separation, participations)
    whole = torch.round(strategy.optimised(toeplitz.square_root(bands)[1:], objective) * 2**BITS)
    in_units, weights = whole.long().tolist(), (whole / 2**BITS).tolist()

    def step(z: Tree, past: Tree, _t: int) -> tuple[Tree, Tree]:
        if leaves(z)[0].is_floating_point():
            w = _minus(z, past, weights)
        else:
            taken = _minus(zeros_like(z), past, in_units)
            w = map_tree(lambda z, taken: z + (taken + 2 ** (BITS - 1) >> BITS), z, taken)
        return w, (w, *past)[: bands - 1]

    return _stream(step, rounds, *strategy.worth(column(whole / 2**BITS)), bits=BITS)


def blt(
    rounds: int, separation: int, participations: int, buffers: int = 4, objective: Objective = "max"
) -> Correlated:
    """Buffered linear Toeplitz strategy (Dvijotham et al. 2024, arXiv:2404.16706), optimised.

    For several participations as in McMahan et al. 2024, arXiv:2408.08868: w_t = z_t - sum_i scale_i s_i,
    then s_i <- decay_i s_i + w_t. Scales are positive and add up to less than 1, decays are in (0, 1): so C's
    column decreases, which makes its sensitivity known and its inverse stable.
    """

    def parameters(raw: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(raw[: buffers + 1], 0)[1:], torch.sigmoid(raw[buffers + 1 :])

    def column(raw: Tensor) -> Tensor:
        return toeplitz.buffered(*parameters(raw), rounds)

    # t^(-1/2) is an integral of exp(-s t) s^(-1/2) ds: a sum over a geometric grid of rates s
    rates = rounds ** (-(torch.arange(buffers, dtype=torch.float64) + 0.5) / buffers)
    start = torch.cat([rates.sqrt().sum().log().view(1), rates.sqrt().log(), torch.logit(1 - rates)])
    strategy = Strategy(column, rounds, separation, participations)
    raw = strategy.optimised(start, objective)
    scales, decays = (found.tolist() for found in parameters(raw))

    def step(z: Tree, sums: Tree, _t: int) -> tuple[Tree, Tree]:
        w = _minus(z, sums, scales)
        if not sums:
            return w, (w,) * buffers
        return w, tuple(_minus(w, (old,), (-decay,)) for old, decay in zip(sums, decays, strict=True))

    return _stream(step, rounds, *strategy.worth(column(raw)))


@dataclass(frozen=True, slots=True)
class Strategy:
    """A family of Toeplitz strategies, and how participants take part."""

    column: Callable[[Tensor], Tensor]  # free parameters -> C's first column
    rounds: int
    separation: int
    participations: int

    def worth(self, column: Tensor) -> tuple[float, float, float]:
        """Sensitivity, worst and mean squared error for z of unit variance."""
        variances = toeplitz.variances(column, self.rounds)
        squared = toeplitz.squared_sensitivity(column, self.rounds, self.separation, self.participations)
        return math.sqrt(float(squared)), float(variances[-1]), float(variances.mean())

    def optimised(self, raw: Tensor, objective: Objective) -> Tensor:
        """The parameters with the least error at equal privacy, by L-BFGS from `raw`."""
        if not len(raw) or self.rounds == 1:
            return raw
        raw = raw.clone().requires_grad_()
        search = torch.optim.LBFGS([raw], max_iter=500, history_size=20, tolerance_grad=1e-9,
                                   tolerance_change=1e-12, line_search_fn="strong_wolfe")  # fmt: skip

        def loss() -> Tensor:
            search.zero_grad()
            column = self.column(raw)
            squared = toeplitz.squared_sensitivity(column, self.rounds, self.separation, self.participations)
            variances = toeplitz.variances(column, self.rounds)
            value = squared.log() + (variances[-1] if objective == "max" else variances.mean()).log()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        search.step(loss)  # type: ignore[no-untyped-call]
        return raw.detach()


def _tree_squared_sensitivity(rounds: int, separation: int, participations: int) -> int:
    """Bound the sum over nodes of n_v^2, n_v the number of one participant's rounds under node v.

    n_v is at most m_v = min(participations, ceil(size_v / separation)), so the sum is at most that of
    n_v m_v, which is a sum over the participant's rounds; its maximum is found from the last round to the
    first (VecSens, algorithm 3 of Choquette-Choo et al. 2023, arXiv:2306.08153).
    """
    most = min(participations, -(-rounds // separation))
    cost = np.zeros(rounds, dtype=np.int64)  # of a round: the sum of m_v over the nodes above it
    for size in (1 << height for height in range(rounds.bit_length())):
        for start in range(0, rounds - size + 1, 2 * size):
            cost[start : start + size] += min(most, -(-size // separation))
    best = np.zeros(rounds + separation, dtype=np.int64)  # [i]: from round i on
    for _ in range(most):
        best[:rounds] = np.maximum.accumulate((cost + best[separation:])[::-1])[::-1]
    return int(best[0])


def _stream(
    step: Step, rounds: int, sensitivity: float, worst: float, mean: float, *, bits: int | None = None
) -> Correlated:
    """Count the rounds around a step, and state errors at multiplier 1."""

    def init() -> Tree:
        return {"round": 0, "noise": ()}

    def after(state: Tree, z: Tree) -> tuple[Tree, Tree]:
        t = state["round"] + 1
        if t > rounds:
            raise ConfigError(
                f"round {t}: this noise was made for {rounds} rounds, and its privacy holds for no more",
                "start with more rounds",
            )
        for leaf in leaves(z):
            if not leaf.is_floating_point():
                _check_integers(leaf, bits)
        w, noise = step(z, state["noise"], t)
        return w, {"round": t, "noise": noise}

    return Correlated(
        init, after, sensitivity, sensitivity * math.sqrt(worst), sensitivity * math.sqrt(mean), bits
    )


def _check_integers(z: Tensor, bits: int | None) -> None:
    """Refuse integer noise that this mechanism cannot keep exact."""
    if bits is None:
        raise ConfigError(
            "integer noise: 'blt' works in floats alone", "use 'tree' or 'banded', or protected = false"
        )
    if z.dtype != torch.int64 or (z.numel() and max(map(abs, extent(z))) >= LARGEST):
        raise ConfigError(f"integer noise of {z.dtype}: must be int64 below 2^44", "use a coarser grid")


def _minus(z: Tree, noises: Sequence[Tree], weights: Sequence[float]) -> Tree:
    """z - sum_j weights_j * noises_j, with as many terms as there are noises."""

    def leaf(z: Tensor, *noises: Tensor) -> Tensor:
        out = z.clone(memory_format=torch.contiguous_format)
        pieces = (torch.split(whole.reshape(-1), PIECE) for whole in (out, *noises))  # views of `out`
        for part, *parts in zip(*pieces, strict=True):
            for noise, weight in zip(parts, weights, strict=False):
                part.sub_(noise, alpha=weight)
        return out

    return map_tree(leaf, z, *noises)

"""Canaries: rows or updates of the auditor's own, each put in by a coin, then guessed from what came out.

A run with canaries: `coins` say which are in; train or release; score each canary (`matched` for updates,
minus the loss for examples); `one_run` turns scores and coins into an Audit. Where a mechanism is cheap to
run thousands of times, `many_runs` audits one canary, which finds faults that hit few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from coterie.core import trees
from coterie.core.errors import ConfigError
from coterie.core.seeds import Key, rng
from coterie.core.types import Tree
from coterie.privacy.audits import bounds
from coterie.privacy.audits.bounds import Curve
from coterie.privacy.audits.record import Audit

CALLED = (0.1, 1 / 3, 0.8)  # parts of the coins
COINS = "each canary was in by a fair coin of its own, and the scores know nothing of the coins"


def coins(canaries: int, key: Key) -> Tensor:
    """Whether each canary is in: bool [canaries], independent and fair."""
    return torch.from_numpy(rng(key).random(canaries) < 0.5)


def directions(canaries: int, size: int, key: Key) -> Tensor:
    """Random unit vectors [canaries, size]: updates of clients that do not exist (Andrew et al. 2023).

    arXiv:2302.03098. Any two have a cosine of about 1 / sqrt(size), to each other and to all honest updates:
    up to about `size` of them can be told apart in one run. Multiply by the clipping norm.
    """
    drawn = torch.from_numpy(rng(key).standard_normal((canaries, size), dtype=np.float32))
    return torch.nn.functional.normalize(drawn, dim=1)


def flat(update: Tree) -> Tensor:
    """The float leaves of a tree as one vector, sorted by name."""
    parts = [leaf.reshape(-1) for _, leaf in trees.named_leaves(update) if leaf.is_floating_point()]
    return torch.cat(parts)


def like(vector: Tensor, update: Tree) -> Tree:
    """A vector as a tree of this form: what a canary's client sends. The inverse of `flat`."""
    named = [(name, leaf) for name, leaf in trees.named_leaves(update) if leaf.is_floating_point()]
    pieces = torch.split(vector, [leaf.numel() for _, leaf in named])
    of = {id(leaf): piece for (_, leaf), piece in zip(named, pieces, strict=True)}
    return trees.map_tree(lambda leaf: of[id(leaf)].reshape(leaf.shape) if id(leaf) in of else leaf, update)


def matched(releases: Tensor, vectors: Tensor, sent: Tensor | None = None) -> Tensor:
    """How much of each canary is in what was released: scores [canaries], larger for more.

    releases: [rounds, size], what was published in each round, or [size] of one. vectors: [canaries, size].
    sent: [canaries, rounds], how often each canary is in each round if its coin says so (None: in all).
    A matched filter: the rounds are weighed by the inverse of the covariance that their releases show. With
    independent noise that is a dot product with the sum; where noise repeats or cancels between rounds (a
    seed used twice), the filter finds the combination in which it does.
    """
    seen = releases.double().reshape(-1, releases.shape[-1])
    rounds, size = seen.shape
    by = torch.ones(len(vectors), rounds) if sent is None else sent
    covariance = seen @ seen.T / size
    ridge = 1e-9 * covariance.diagonal().mean().clamp(min=1e-300)
    weights = torch.linalg.solve(covariance + ridge * torch.eye(rounds).double(), by.double().T)
    return torch.einsum("cs,rs,rc->c", vectors.double(), seen, weights)


def guess(scores: Tensor, guesses: int) -> Tensor:
    """Call the guesses / 2 highest scores in (1), as many of the lowest out (-1), the rest not at all (0)."""
    order, half = scores.argsort(stable=True), guesses // 2
    called = torch.zeros(len(scores), dtype=torch.int8)
    called[order[len(scores) - half :]] = 1
    called[order[: guesses - half]] = -1
    return called


def one_run(
    scores: Tensor,
    included: Tensor,
    *,
    delta: float,
    promised: float | None = None,
    curve: Curve | None = None,
    guesses: Sequence[int] = (),
    confidence: float = 0.95,
    unit: str = "example",
) -> Audit:
    """Audit one run: the epsilon at `delta` that is refuted by how many coins the scores tell.

    scores, included: [m], of the canaries. promised: epsilon at `delta`. curve: the promise as a whole, such
    as `gaussian(1 / noise multiplier)` or `approximate(*pairs of a profile)`: a far sharper test than one
    epsilon. guesses: how many coins to call, fixed beforehand; several share the error (default: 4/5, 1/3 and
    1/10 of them; to call all would be wrong wherever heads and tails are not as many). Raises ConfigError.
    """
    m = len(scores)
    if included.shape != scores.shape or not m:
        raise ConfigError(f"{m} scores and coins of shape {list(included.shape)}: one of each for a canary")
    tries = sorted({min(m, k) for k in guesses or [math.ceil(m * part) for part in CALLED]})
    each = 1 - (1 - confidence) / len(tries)
    lower = mu = 0.0
    false = False
    measures: dict[str, float] = {"canaries": m}
    for count in tries:
        called = guess(scores, count)
        right = int(((called == 1) & included).sum() + ((called == -1) & ~included).sum())
        lower = max(lower, bounds.one_run(m, count, right, delta=delta, confidence=each))
        if bounds.refuted(bounds.gaussian(mu), m, count, right, each):  # else this count proves no more
            mu = bounds.tradeoff_bound(bounds.gaussian, m, count, right, confidence=each)
        false = false or (curve is not None and bounds.refuted(curve, m, count, right, each))
        measures[f"right of {count}"] = right / count
    measures["mu at least, if Gaussian"] = mu
    if delta:
        measures["epsilon at least, if Gaussian"] = bounds.epsilon_of(mu, delta)
    return Audit(
        kind="canaries",
        unit=unit,
        promised=promised,
        lower_bound=lower,
        delta=delta,
        confidence=confidence,
        refuted=false,
        measures=measures,
        assumptions=(COINS,),
    )


def many_runs(
    present: Tensor,
    absent: Tensor,
    *,
    delta: float,
    promised: float | None = None,
    mu: float | None = None,
    confidence: float = 0.95,
    unit: str = "client",
) -> Audit:
    """Audit by one canary's scores in independent runs with it and without it: [n] and [n'].

    promised: epsilon at `delta`; mu: the promise of a Gaussian mechanism, 1 / noise multiplier. The threshold
    is chosen on every second run and judged on the others. Raises ConfigError.
    """
    lower, found = bounds.separated(present, absent, delta=delta, confidence=confidence)
    return Audit(
        kind="canary in many runs",
        unit=unit,
        promised=promised,
        lower_bound=lower,
        delta=delta,
        confidence=confidence,
        refuted=mu is not None and found > mu,
        measures={"runs": len(present) + len(absent), "mu at least, if Gaussian": found},
        assumptions=("the runs are independent",),
    )

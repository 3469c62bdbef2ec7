"""Membership inference: was this row trained on? Scores that tell, and how well they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.core.errors import ConfigError
from coterie.privacy.audits import bounds
from coterie.privacy.audits.record import Audit

LOW = (0.001, 0.01, 0.1)  # rates of false positives at which an attack is judged
INDEPENDENT = "members and others are draws from one population, and each counts as an independent trial"
LEAST = 1e-9  # of a variance


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """log(p / (1 - p)) of the true class [n], from logits [n, classes]; about normal (LiRA, equation 3)."""
    true = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels[:, None], True)
    others = logits.double().masked_fill(true, -torch.inf)
    return logits.double()[true] - others.logsumexp(1)


def likelihood_ratio(target: Tensor, shadows: Tensor, included: Tensor, *, shared: bool = False) -> Tensor:
    """LiRA scores [n] of n rows: log of how much likelier the target is with each row than without it.

    Carlini et al. 2022 (arXiv:2112.03570), Algorithm 1. target: `confidence` of the attacked model [n];
    shadows: of models that the attacker trained [k, n]; included: whether each of these had each row [k, n].
    Normal distributions are fitted to both sides; shared: one variance for all rows, better below about 64
    shadows. Where no shadow had any row: how many standard deviations
    the confidence is above that without it (Algorithm 2).
    Raises ConfigError where a row was in all shadows, or in all but one.
    """
    if shadows.shape != included.shape or shadows.shape[1:] != target.shape:
        shapes = f"{list(target.shape)}, {list(shadows.shape)} and {list(included.shape)}"
        raise ConfigError(f"likelihood_ratio of shapes {shapes}: they must be [n], [k, n] and [k, n]")
    values, inside = shadows.double(), included.bool()
    if int((~inside).sum(0).min()) < 2:
        raise ConfigError(
            "likelihood_ratio: a row was left out by fewer than 2 shadows",
            "leave each row out of about half of them",
        )
    mean, variance = _fitted(values, ~inside, shared)
    without = (target.double() - mean) / variance.sqrt()
    if not inside.any():
        return without
    mean_in, variance_in = _fitted(values, inside, shared)
    within = (target.double() - mean_in) / variance_in.sqrt()
    return (without**2 - within**2 + variance.log() - variance_in.log()) / 2


def _fitted(values: Tensor, chosen: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of the chosen values of each column."""
    count = chosen.sum(0)
    mean = (values * chosen).sum(0) / count
    squares = ((values - mean) ** 2 * chosen).sum(0)
    variance = squares.sum() / (count - 1).sum() if shared else squares / (count - 1)
    return mean, variance.expand_as(mean).clamp(min=LEAST)


def auc(members: Tensor, others: Tensor) -> float:
    """Probability that a member scores above another, ties half (Mann, Whitney 1947)."""
    ordered = others.double().sort().values
    below = torch.searchsorted(ordered, members.double(), right=False)
    up_to = torch.searchsorted(ordered, members.double(), right=True)
    return float((below + up_to).double().mean() / (2 * len(others)))


def true_positives(members: Tensor, others: Tensor, rate: float) -> tuple[int, float]:
    """How many members score above the smallest threshold with at most this rate of false positives.

    Returns that number and the threshold; scores must be above it.
    """
    ordered = others.double().sort(descending=True).values
    at = ordered[int(rate * len(others))] if rate < 1 else torch.tensor(-torch.inf)
    return int((members.double() > at).sum()), float(at)


def membership(
    members: Tensor,
    others: Tensor,
    *,
    delta: float,
    promised: float | None = None,
    confidence: float = 0.95,
    rates: Sequence[float] = LOW,
    unit: str = "example",
) -> Audit:
    """Judge scores [n] of rows that were trained on and [n'] of rows that were not; larger: rather a member.

    For minus the loss this is the attack of Yeom et al. 2018 (arXiv:1709.01604), for `likelihood_ratio` LiRA.
    Measured: AUC; advantage (the largest TPR - FPR); TPR at low FPR with Clopper-Pearson limits. The lower
    bound of epsilon takes the threshold from every second row and the rates from the others. It is only as
    good as its assumption: rows of one run are not independent, canaries are. Raises ConfigError.
    """
    if min(len(members), len(others)) < 2:
        raise ConfigError(f"{len(members)} members and {len(others)} others: 2 or more of each are needed")
    measures = {"AUC": auc(members, others), "advantage": _advantage(members, others)}
    for rate in rates:
        if rate * len(others) < 1:
            continue  # fewer rows than such a rate needs
        hits, _ = true_positives(members, others, rate)
        low, high = bounds.clopper_pearson(hits, len(members), confidence)
        name = f"TPR at FPR {rate:g}"
        measures |= {name: hits / len(members), f"{name}, low": low, f"{name}, high": high}
    return Audit(
        kind="membership",
        unit=unit,
        promised=promised,
        lower_bound=bounds.separated(members, others, delta=delta, confidence=confidence)[0],
        delta=delta,
        confidence=confidence,
        measures=measures,
        assumptions=(INDEPENDENT,),
    )


def _advantage(members: Tensor, others: Tensor) -> float:
    every = torch.cat([members, others]).double()
    mine, theirs = (
        torch.searchsorted(x.double().sort().values, every, right=True).double() / len(x)
        for x in (members, others)
    )
    return max(0.0, float((theirs - mine).max()))

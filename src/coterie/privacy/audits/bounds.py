"""From guesses to bounds on epsilon: what right guesses prove about a mechanism, at a stated confidence.

Two games. In one run of the mechanism, each of m canaries is in by a coin of its own and the attacker guesses
some coins (`one_run`, `tradeoff_bound`). In many runs there is one canary, and rates of right and wrong
alarms are estimated (`repeated_runs`). Both are for neighbours that differ in one canary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import torch
from scipy import special  # type: ignore[import-untyped]
from torch import Tensor

from coterie.core.errors import ConfigError

NORMAL = NormalDist()
STEPS = 24  # of bisection
LARGEST = 2**20  # epsilon or mu: more is not told apart from no privacy
Curve = Callable[[float], float]  # rate of true positives -> the least possible rate of false positives


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Limits of a probability that came true in `hits` of `trials` independent draws (Clopper, Pearson 1934).

    Each side is wrong with probability at most (1 - confidence) / 2. Raises ConfigError.
    """
    _checked(trials, trials, hits, confidence)
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(hits, trials - hits + 1, tail)) if hits else 0.0
    high = float(special.betaincinv(hits + 1, trials - hits, 1 - tail)) if hits < trials else 1.0
    return low, high


def p_value(canaries: int, guesses: int, correct: int, *, epsilon: float, delta: float) -> float:
    """How probable so many correct guesses are at most, if the mechanism is (epsilon, delta)-DP.

    Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846), Corollary 5.4: with W ~ Binomial(guesses, q) and
    q = 1 / (1 + e^-epsilon), it is P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i.
    """
    rate = special.expit(epsilon)
    beta = special.betainc(correct, guesses - correct + 1, rate) if correct else 1.0  # P[W >= correct]
    worst = 0.0
    if delta and correct:
        below = np.arange(correct - 1, -1, -1)  # W = correct - 1, correct - 2, ..., 0
        log = special.xlogy(below, rate) + special.xlogy(guesses - below, special.expit(-epsilon))
        log += (
            special.gammaln(guesses + 1) - special.gammaln(below + 1) - special.gammaln(guesses - below + 1)
        )
        worst = float((np.cumsum(np.exp(log)) / np.arange(1, correct + 1)).max())
    return min(1.0, float(beta) + 2 * canaries * delta * worst)


def one_run(canaries: int, guesses: int, correct: int, *, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that is refuted: the mechanism is not (epsilon, delta)-DP. 0: nothing is refuted.

    canaries: m, each in by a fair coin of its own; guesses: how many of the coins the attacker called after
    seeing the output and nothing of the coins; correct: how many of these were right. Raises ConfigError.
    """
    _checked(canaries, guesses, correct, confidence)
    return _largest(
        lambda epsilon: p_value(canaries, guesses, correct, epsilon=epsilon, delta=delta) < 1 - confidence
    )


def refuted(curve: Curve, canaries: int, guesses: int, correct: int, confidence: float = 0.95) -> bool:
    """Whether so many right guesses in one run refute a whole trade-off curve, as for `one_run`.

    Mahloujifar, Melis, Chaudhuri 2024 (arXiv:2410.22235), Theorem 6 and Algorithm 3 with guesses <= m.
    Let p_j = P[j right], r_j = sum_{i >= j} i p_i / m and h_j = sum_{i >= j} (g - i) p_i / m. Flip the
    coin of a canary that is right among j + 1 or more: it is wrong among j or more, so h_j >= curve(r_{j+1}).
    Suppose P[correct or more] = 1 - confidence: if that needs more mass below than there is, it is refuted.
    """
    _checked(canaries, guesses, correct, confidence)
    share = guesses / canaries
    right = (1 - confidence) * correct / canaries
    wrong = (1 - confidence) * share - right
    for j in range(correct - 1, -1, -1):
        least = max(wrong, curve(right))
        right += j / (guesses - j) * (least - wrong)
        wrong = least
        if right + wrong > share:
            return True
    return False


def tradeoff_bound(
    family: Callable[[float], Curve],
    canaries: int,
    guesses: int,
    correct: int,
    *,
    confidence: float = 0.95,
) -> float:
    """The largest parameter of a family of curves that is `refuted`: mu of `gaussian`, for example.

    family: parameter -> curve, less private for a larger one. Raises ConfigError.
    """
    return _largest(lambda at: refuted(family(at), canaries, guesses, correct, confidence))


def gaussian(mu: float) -> Curve:
    """The curve of mu-GDP: telling N(0, 1) from N(mu, 1) (Dong, Roth, Su 2019, arXiv:1905.02383).

    A Gaussian mechanism of noise multiplier sigma has mu = 1 / sigma; T of them, sqrt(T) / sigma.
    """

    def curve(rate: float) -> float:
        if not 0 < rate < 1:
            return float(rate >= 1)
        return NORMAL.cdf(NORMAL.inv_cdf(rate) - mu)

    return curve


def approximate(*pairs: tuple[float, float]) -> Curve:
    """The curve of a mechanism that is (epsilon, delta)-DP for each pair: a profile of its accountant."""
    known = [(math.exp(min(epsilon, 700)), math.exp(-epsilon), delta) for epsilon, delta in pairs]

    def curve(rate: float) -> float:
        each = (max((rate - delta) * less, 1 - delta - (1 - rate) * more) for more, less, delta in known)
        return max(0.0, *each)

    return curve


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon for which mu-GDP is (epsilon, delta)-DP; 0 < delta < 1 (Balle, Wang 2018, Theorem 8).

    delta = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu).
    """
    if not 0 < delta < 1:
        raise ConfigError(
            f"epsilon_of(delta={delta:g}): must be in (0, 1)", "mu-GDP has no epsilon at delta 0"
        )
    if mu <= 0:
        return 0.0

    def exceeds(epsilon: float) -> bool:
        first, second = (special.log_ndtr(sign * mu / 2 - epsilon / mu) for sign in (1, -1))
        return bool(math.exp(first) - math.exp(epsilon + second) > delta)

    return _root(exceeds)


def mu_of(epsilon: float, delta: float) -> float:
    """The mu of the Gaussian mechanism that has this epsilon at this delta: the inverse of `epsilon_of`."""
    return _root(lambda mu: epsilon_of(mu, delta) < epsilon)


def repeated_runs(
    hits: int, members: int, alarms: int, others: int, *, delta: float, confidence: float = 0.95
) -> float:
    """Epsilon that independent runs prove: `hits` alarms of `members` runs with the canary, and without it.

    (1 - beta) <= e^epsilon alpha + delta, and the same of the complement, with the Clopper-Pearson limits of
    both rates (Jagielski, Ullman, Oprea 2020, arXiv:2006.07709). The threshold must not have been chosen on
    these runs. Raises ConfigError.
    """
    (hit, _), (_, alarm) = _limits(hits, members, alarms, others, confidence)
    return max(0.0, _log_ratio(hit - delta, alarm), _log_ratio(1 - alarm - delta, 1 - hit))


def repeated_runs_mu(hits: int, members: int, alarms: int, others: int, *, confidence: float = 0.95) -> float:
    """The mu-GDP that independent runs prove, as in `repeated_runs` (Nasr et al. 2023, arXiv:2302.07956)."""
    (hit, _), (_, alarm) = _limits(hits, members, alarms, others, confidence)
    return max(0.0, NORMAL.inv_cdf(hit) - NORMAL.inv_cdf(alarm)) if hit > 0 and alarm < 1 else 0.0


def separated(
    present: Tensor, absent: Tensor, *, delta: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Epsilon at `delta` and mu that a threshold on scores proves: [n] with the canary and [n'] without it.

    The threshold that proves the most on every second score is judged on the others. Raises ConfigError.
    """
    if min(len(present), len(absent)) < 2:
        raise ConfigError(
            f"{len(present)} scores with and {len(absent)} without: 2 or more of each are needed"
        )

    def counted(at: Tensor, half: int) -> tuple[int, int, int, int]:
        here, gone = present[half::2], absent[half::2]
        return int((here > at).sum()), len(here), int((gone > at).sum()), len(gone)

    every = torch.cat([present[::2], absent[::2]]).sort().values
    tried = every[torch.linspace(0, len(every) - 1, min(len(every), 200)).long()]
    best = max(tried, key=lambda at: repeated_runs_mu(*counted(at, 0), confidence=confidence))
    rates = counted(best, 1)
    return (
        repeated_runs(*rates, delta=delta, confidence=confidence),
        repeated_runs_mu(*rates, confidence=confidence),
    )


def _limits(
    hits: int, members: int, alarms: int, others: int, confidence: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Each of the two limits that count is wrong with probability (1 - confidence) / 2."""
    return clopper_pearson(hits, members, confidence), clopper_pearson(alarms, others, confidence)


def _log_ratio(above: float, below: float) -> float:
    return math.log(above / below) if above > 0 and below > 0 else 0.0


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest x at which a monotonous `holds` is true, from below; 0 if it is not true there."""
    return _root(holds) if holds(0.0) else 0.0


def _root(below: Callable[[float], bool]) -> float:
    """Where `below` turns false, found from below and so never too large."""
    low, high = 0.0, 1.0
    while high < LARGEST and below(high):
        high *= 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low


def _checked(canaries: int, guesses: int, correct: int, confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence = {confidence:g}: must be in (0, 1)", "0.95 is usual")
    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise ConfigError(
            f"{correct} right of {guesses} guesses about {canaries} canaries: each must be at most the next"
        )

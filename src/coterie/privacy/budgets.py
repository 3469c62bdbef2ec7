"""How much noise a budget of (epsilon, delta) needs, and how many steps fit into it.

Both are found by search over what `accounting` says, and every answer has passed it. Where the accountant
is pld, the search starts from rdp's answer, which takes a tenth of the time and is rarely a third off, and
goes on over a coarse grid of losses (an eighth of the time, some 0.1% off) before it takes the fine one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from coterie.core.errors import ConfigError
from coterie.core.guarantees import Guarantees, Sampling
from coterie.privacy.accounting import Accountant, Neighbours, Release, bound, chosen, supported, under

TOLERANCE = 1e-6
ROUGH, COARSE = 1e-3, 8  # at a tolerance of so much, a grid that is so many times wider will do
MOST_NOISE = 1e9
MOST_STEPS = 10**7


def calibrate(
    release: Release,
    *,
    epsilon: float,
    delta: float,
    accountant: Accountant | None = None,
    neighbours: Neighbours | None = None,
    before: Sequence[Release] = (),
    tolerance: float = TOLERANCE,
) -> float:
    """The least `noise` with which the release stays within (epsilon, delta), after those `before` it.

    Spends at most epsilon, always; the least noise is above the result / (1 + tolerance), but for the coarse
    grid's error where the tolerance is 0.001 or more. The search starts from the release's own noise, which
    the answer does not depend on otherwise.
    Raises ConfigError, also where `before` leaves nothing to spend.
    """
    _budget(epsilon)

    def spends(noise: float, by: Accountant | None = accountant, coarse: int = 1) -> float:
        made = (*before, replace(release, noise=noise))
        return bound(made, delta=delta, accountant=by, neighbours=neighbours, coarse=coarse).epsilon

    start, known = release.noise, (*before, release)
    if not delta or (accountant or chosen(known, delta)) == "rdp":
        return _least(spends, epsilon, start, 2.0, tolerance)
    if supported("rdp", known):
        start = _least(lambda noise: spends(noise, "rdp"), epsilon, start, 2.0, 0.01)
    near = _least(lambda noise: spends(noise, coarse=COARSE), epsilon, start, 1.25, max(tolerance, ROUGH))
    return near if tolerance >= ROUGH else _least(spends, epsilon, near, 1.003, tolerance)


def most_steps(
    release: Release,
    *,
    epsilon: float,
    delta: float,
    accountant: Accountant | None = None,
    neighbours: Neighbours | None = None,
    before: Sequence[Release] = (),
    most: int = MOST_STEPS,
) -> int:
    """How many steps of the release stay within (epsilon, delta), after those `before` it; `most` at most.

    The release's own steps are not looked at. Raises ConfigError.
    """
    _budget(epsilon)

    def spends(steps: int, by: Accountant | None = accountant, coarse: int = 1) -> float:
        made = (*before, replace(release, steps=steps))
        return bound(made, delta=delta, accountant=by, neighbours=neighbours, coarse=coarse).epsilon

    start, known = 1, (*before, release)
    if not delta or (accountant or chosen(known, delta)) == "rdp":
        return _most(spends, epsilon, start, 2.0, most)
    if supported("rdp", known):
        start = _most(lambda steps: spends(steps, "rdp"), epsilon, start, 2.0, most)
    start = _most(lambda steps: spends(steps, coarse=COARSE), epsilon, max(start, 1), 1.25, most)
    return _most(spends, epsilon, max(start, 1), 1.003, most)


class Plan(NamedTuple):
    """What a budget comes to, in rounds of clients whose clipped updates are summed under Gaussian noise."""

    epsilon: float
    cohort: int
    rounds: int
    noise_multiplier: float
    noise_std: float  # on each parameter of the mean update
    signal_to_noise: float  # L2 norm of a mean of updates that all agree, over that of the noise


def plan(
    *,
    epsilons: Sequence[float],
    cohorts: Sequence[int],
    rounds: Sequence[int],
    population: int,
    parameters: int,
    delta: float,
    norm: float = 1.0,
    sampling: Sampling = "poisson",
    accountant: Accountant | None = None,
) -> list[Plan]:
    """The noise and the signal for each budget, cohort and number of rounds; multipliers within 0.2%.

    norm: of clipping, in L2. signal_to_noise = cohort / (noise_multiplier sqrt(parameters)): at best, as
    updates neither agree nor are all as long as the norm. Raises ConfigError.
    """
    for name, values in (("cohort", cohorts), ("rounds", rounds), ("parameters", [parameters])):
        for value in values:
            if value < 1 or (name == "cohort" and value > population):
                most = f", at most the population of {population}" if name == "cohort" else ""
                raise ConfigError(f"{name} = {value}: must be at least 1{most}")
    if not 0 < norm < math.inf:
        raise ConfigError(f"norm = {norm}: must be a finite number > 0", "1.0 is a usual clipping norm")
    if not 0 < delta < 1 / population:
        raise ConfigError(
            f"delta = {delta}: must be in (0, 1 / population = {1 / population:.3g}); else to give one "
            "client's data away would be allowed",
            f"{0.1 / population:.0e} is a tenth of that",
        )
    made = []
    for epsilon, cohort, count in itertools.product(epsilons, cohorts, rounds):
        told = Guarantees(sampling=sampling, population=population, cohort=cohort, rounds=count)
        release = under(Release(mechanism="gaussian", noise=1.0), told)
        noise = calibrate(release, epsilon=epsilon, delta=delta, accountant=accountant, tolerance=ROUGH)
        signal = cohort / (noise * math.sqrt(parameters))
        made.append(Plan(epsilon, cohort, count, noise, noise * norm / cohort, signal))
    return made


def _least(
    spends: Callable[[float], float], epsilon: float, start: float, factor: float, tolerance: float
) -> float:
    """The least noise that spends at most epsilon, or up to 1 + tolerance times as much."""
    low = high = start
    within = over = spends(start)
    while within > epsilon:
        low, over, high = high, within, high * factor
        if high > MOST_NOISE:
            raise ConfigError(
                f"epsilon = {epsilon}: no amount of noise keeps within it",
                "raise epsilon: what was released before has spent it, or the grid is too coarse",
            )
        within, factor = spends(high), min(factor**2, 16.0)
    while over <= epsilon:
        high, within, low = low, over, low / factor
        if low < 1 / MOST_NOISE:
            return high
        over, factor = spends(low), min(factor**2, 16.0)
    for turn in itertools.count(1):
        if high <= low * (1 + tolerance):
            break
        noise = _guess(low, high, over, within, epsilon, turn, tolerance / 3)
        spent = spends(noise)
        if spent <= epsilon:
            high, within = noise, spent
        else:
            low, over = noise, spent
    return high


def _most(spends: Callable[[int], float], epsilon: float, start: int, factor: float, most: int) -> int:
    """The most steps, in [0, most], that spend at most epsilon."""
    low, within, high = 0, 0.0, min(start, most)
    while (over := spends(high)) <= epsilon:
        low, within, high = high, over, min(math.ceil(high * factor), most)
        if low == most:
            return most
    for turn in itertools.count(1):
        if high - low <= 1:
            break
        steps = round(_guess(max(low, 1), high, within, over, epsilon, turn, 0.5 / high))
        steps = min(max(steps, low + 1), high - 1)
        spent = spends(steps)
        if spent <= epsilon:
            low, within = steps, spent
        else:
            high, over = steps, spent
    return low


def _guess(
    low: float, high: float, at_low: float, at_high: float, target: float, turn: int, aside: float
) -> float:
    """Between low and high: where a power law meets the target, a little to either side; or the middle."""
    middle = math.sqrt(low * high)
    if turn % 3 == 0 or not (0 < at_low < math.inf and 0 < at_high < math.inf and at_low != at_high):
        return middle
    share = math.log(target / at_low) / math.log(at_high / at_low)
    guess = low * (high / low) ** share * (1 + aside) ** (1 if turn % 3 == 1 else -1)
    return guess if low < guess < high else middle


def _budget(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"epsilon = {epsilon}: must be a finite number > 0", "1 is strong, 8 is usual")

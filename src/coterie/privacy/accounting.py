"""What noisy releases add up to: (epsilon, delta) by dp-accounting, or a refusal where it is not justified.

A `Release` says what is released how often; `account` says what several spend (how much noise a budget needs
is in `budgets`). Two accountants:

- pld: privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022,
  arXiv:2207.04380), rounded against us on a grid of losses. Gaussians without sampling have a closed form
  (Balle, Wang 2018, arXiv:1805.06530), which takes its place. The default where it knows the releases.
- rdp: Renyi divergences (Mironov 2017, arXiv:1702.07476), for the rest: selection by the exponential
  mechanism, Skellam noise, and cohorts of a fixed size (Wang, Balle, Kasiviswanathan 2019, arXiv:1808.00087).
- at delta 0: the sum of the epsilons, each amplified by itself (Balle, Barthe, Gaboardi 2018,
  arXiv:1807.01647, theorems 8 and 9).

Neighbours: sensitivities and multipliers are those of one record being there or not ("add/remove"; the rest
of the cohorts stays as it is). Exchanging a record for another ("replace-one") moves a sum twice as far, and
then counts so. dp-accounting is imported where it is used, for it takes a second.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from coterie.core.errors import ConfigError
from coterie.core.guarantees import Guarantees, Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent  # type: ignore[import-untyped]

Mechanism = Literal[
    "gaussian", "laplace", "exponential", "pure", "discrete_gaussian", "discrete_laplace", "skellam"
]
Accountant = Literal["pld", "rdp"]
Neighbours = Literal["add/remove", "replace-one"]

MECHANISMS: tuple[Mechanism, ...] = get_args(Mechanism)
NORMAL = ("gaussian", "discrete_gaussian")  # accounted as Gaussian
PURE = ("laplace", "exponential", "pure", "discrete_laplace")  # 1 / noise is their epsilon at delta 0
KNOWN: dict[tuple[str, str], tuple[str, ...]] = {  # what dp-accounting has events for
    ("pld", "none"): (*NORMAL, "laplace", "pure", "discrete_laplace"),
    ("pld", "poisson"): (*NORMAL, "laplace"),
    ("pld", "fixed"): (),
    ("rdp", "none"): MECHANISMS,
    ("rdp", "poisson"): NORMAL,
    ("rdp", "fixed"): NORMAL,
}
WHOLE_ORDERS = (*range(2, 65), 128, 256, 512, 1024)
INTERVAL = 1e-4  # of the grid of losses, up to epsilon = 5
LEAST_DELTA = 1e-12  # below, the rounding of pld's Fourier transforms may count
HIDDEN = 4  # variance, in squared steps of the grid, that makes a Gaussian discrete


@dataclass(frozen=True, kw_only=True)
class Release:
    """Noisy releases of one kind: `steps` of them, each of what `sampling` at `rate` lets in.

    noise, by mechanism, with sensitivities of adding or removing one record; more is more private:
    gaussian, discrete_gaussian, skellam: standard deviation / L2 sensitivity, the noise multiplier.
    laplace, discrete_laplace: scale / L1 sensitivity. exponential: 1 / epsilon of a selection (with the
    bounded range of `mechanisms.exponential`). pure: 1 / epsilon of anything else of pure privacy.

    repeats: how often one record may be in one release.
    The discrete ones need their sensitivity in steps of the grid, the dimension (coordinates of a release),
    and where the noise is a sum of independent equal ones, how many honest `shares` it has at least.
    total_variation: distance of a step's real noise from the ideal one (`noise.total_variation`).
    Raises ConfigError.
    """

    mechanism: Mechanism
    noise: float
    steps: int = 1
    sampling: Sampling = "none"
    rate: float = 1.0
    repeats: int = 1
    sensitivity: float | None = None
    dimension: int | None = None
    shares: int = 1
    total_variation: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _one_of("mechanism", self.mechanism, MECHANISMS)
        _one_of("sampling", self.sampling, get_args(Sampling))
        if not 0 < self.noise < math.inf:
            raise ConfigError(
                f"noise = {self.noise}: must be a finite number > 0", "without noise, no privacy"
            )
        for name in ("steps", "repeats", "shares", "dimension"):
            value = getattr(self, name)
            least = 0 if name == "steps" else 1
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ConfigError(f"{name} = {value}: must be a whole number >= {least}")
        if not 0 <= self.total_variation <= 1:
            raise ConfigError(f"total_variation = {self.total_variation}: must be in [0, 1]")
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate = {self.rate}: must be in (0, 1]", "it is cohort / population")
        if self.sampling == "none" and self.rate != 1:
            raise ConfigError(
                f"rate = {self.rate} without sampling: nothing would be credited for it",
                'say which sampling it is: "poisson" or "fixed"',
            )
        if self.mechanism not in ("discrete_gaussian", "discrete_laplace", "skellam"):
            return
        if self.sensitivity is None or not 1 <= self.sensitivity < math.inf or self.dimension is None:
            raise ConfigError(
                f"{self.mechanism}(sensitivity={self.sensitivity}, dimension={self.dimension}): "
                "noise on a grid needs both, the sensitivity in steps of the grid and at least 1",
            )

    def distance(self) -> float:
        """Of a step, in total variation, from the noise that it is accounted as.

        A discrete Gaussian of variance v is a continuous one of variance v - t^2 that is rounded at random to
        a discrete Gaussian of variance t^2 around it: what the rounding adds is independent of the data, so
        all that holds for the continuous one holds here, with sampling too and in any dimension. Their laws
        agree up to 5 exp(-2 pi^2 t^2) < 2^-110 a coordinate for t = 2 (Peikert 2010, eprint 2010/088,
        theorem 3.1; the Renyi divergences of Canonne, Kamath, Steinke 2020, arXiv:2004.00010, are even those
        of v itself). A sum of n shares of variance s^2 each is discrete Gaussian up to
        10 sum_(k<n) exp(-2 pi^2 s^2 k / (k + 1)) a coordinate (Kairouz, Liu, Steinke 2021, arXiv:2102.06387).
        """
        if self.mechanism != "discrete_gaussian":
            return self.total_variation
        variance = self.variance() / self.shares
        if variance < 1 or self.variance() < 2 * HIDDEN:
            return 1.0
        last = min(self.shares, 1000)  # the terms fall: those after it count as it does
        sums = [math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, last)]
        apart = 10 * (sum(sums) + (self.shares - last) * min(sums, default=0))
        return self.total_variation + (self.dimension or 1) * (2.0**-110 + apart)

    def variance(self) -> float:
        """Of discrete noise, in squared steps of the grid."""
        return (self.noise * (self.sensitivity or 1)) ** 2


@dataclass(frozen=True)
class Spent:
    """What releases spend, for which neighbours, by which accountant, and what that rests on."""

    epsilon: float
    delta: float
    accountant: Literal["pld", "rdp", "pure"]
    neighbours: Neighbours
    assumptions: tuple[str, ...]


def under(release: Release, guarantees: Guarantees, rounds: int | None = None) -> Release:
    """The release in so many rounds (None: all) of a schedule, credited with what the schedule guarantees.

    `most_steps` of it counts participations: times `guarantees.separation`, these are rounds.
    """
    return replace(
        release,
        steps=guarantees.participations(rounds),
        sampling=guarantees.sampling,
        rate=guarantees.rate,
        repeats=guarantees.repeats,
    )


def account(
    releases: Sequence[Release],
    *,
    delta: float,
    accountant: Accountant | None = None,
    neighbours: Neighbours | None = None,
) -> Spent:
    """What the releases spend together, in any order, each chosen in the light of those before.

    accountant: None takes pld, or rdp where pld does not know the releases. neighbours: None takes
    "replace-one" for cohorts of a fixed size, else "add/remove". Real noise that is not quite ideal adds
    (1 + e^epsilon) times its distance to delta. delta may be 0 for pure mechanisms.
    Raises ConfigError, also where no finite epsilon holds.
    """
    spent = bound(releases, delta=delta, accountant=accountant, neighbours=neighbours)
    if spent.epsilon == math.inf:
        distance = sum(each.steps * each.distance() for each in releases)
        raise ConfigError(
            f"no finite epsilon holds at delta = {delta}"
            + (f": the noise is {distance:.2g} away from ideal noise" if distance else ""),
            "use more noise, fewer steps or a larger delta" + (", or a finer grid" if distance else ""),
        )
    return spent


def bound(
    releases: Sequence[Release],
    *,
    delta: float,
    accountant: Accountant | None = None,
    neighbours: Neighbours | None = None,
    coarse: int = 1,
) -> Spent:
    """As `account`, but with an infinite epsilon where no finite one holds: what a search goes by.

    coarse: how many times wider pld's grid may be (a power of two), which is quicker and against us.
    """
    if not 0 <= delta < 1:
        raise ConfigError(f"delta = {delta}: must be in (0, 1)", "well below 1 / clients, for example 1e-5")
    fixed = any(each.sampling == "fixed" for each in releases)
    between = neighbours or ("replace-one" if fixed else "add/remove")
    _one_of("neighbours", between, get_args(Neighbours))
    if fixed != (between == "replace-one") and any(each.sampling != "none" for each in releases):
        raise ConfigError(
            f"neighbours = {between!r}: poisson sampling is accounted for add/remove, sampling of a fixed "
            "size for replace-one",
            "leave neighbours out",
        )
    if any(each.sampling == "poisson" for each in releases) and fixed:
        raise ConfigError("poisson and fixed sampling together: no accountant adds them up", 'credit "none"')
    live = [each for each in releases if each.steps]
    distance = sum(each.steps * each.distance() for each in live)
    told = _assumptions(live, between, distance)
    if delta == 0:
        return Spent(_pure(live, between, distance), 0.0, "pure", between, told)
    name = accountant or chosen(live, delta)
    _refuse_unknown(name, live, delta)

    def at(delta: float) -> float:
        return _pld(live, between, delta, coarse) if name == "pld" else _rdp(live, between, delta)

    return Spent(at(delta) if not distance else _apart(at, delta, distance), delta, name, between, told)


def together(*multipliers: float) -> float:
    """The multiplier of several Gaussian releases of one sample, as one."""
    return 1 / math.sqrt(sum(each**-2 for each in multipliers))


def besides_bits(multiplier: float, bits: float) -> float:
    """The multiplier of the update under adaptive clipping, if all of a round is to have `multiplier`.

    bits: standard deviation of the noise on the sum of the bits b - 1/2, whose sensitivity is 1/2. From
    multiplier^-2 = z^-2 + (2 bits)^-2 (Andrew et al. 2021, arXiv:1905.03871, theorem 1).
    Raises ConfigError where the bits alone spend more.
    """
    if not 2 * bits > multiplier > 0:
        raise ConfigError(
            f"bits = {bits}: at noise multiplier {multiplier} the clipped-or-not bits alone would spend more",
            f"more than {multiplier / 2:.4g}; a twentieth of the cohort is usual",
        )
    return 1 / math.sqrt(multiplier**-2 - (2 * bits) ** -2)


def _pld(releases: Sequence[Release], between: Neighbours, delta: float, coarse: int) -> float:
    from dp_accounting import dp_event, get_epsilon_gaussian, pld  # noqa: PLC0415

    if _closed(releases):
        precision = sum(each.steps * _multiplier(each, _by(each, between)) ** -2 for each in releases)
        return float(get_epsilon_gaussian(precision**-0.5, delta)) if precision else 0.0
    known = [each for each in releases if supported("rdp", (each,))]
    rest = [each for each in releases if each not in known]
    rough = _rdp(known, between, delta, WHOLE_ORDERS) + _pure(rest, between)
    wider = coarse * 2.0 ** math.floor(math.log2(min(max(rough / 2.5, 1), 2.0**20)))
    found = pld.PLDAccountant(value_discretization_interval=INTERVAL * wider)
    for each in releases:
        by = _by(each, between)
        event: DpEvent
        if each.mechanism == "laplace":
            event = dp_event.LaplaceDpEvent(each.noise / by)
        elif each.mechanism in NORMAL:
            event = dp_event.GaussianDpEvent(_multiplier(each, by))
        else:
            event = dp_event.DiscreteLaplaceDpEvent(*_geometric(each, by))
        if each.sampling == "poisson":
            event = dp_event.PoissonSampledDpEvent(each.rate, event)
        found.compose(event, each.steps)
    return float(found.get_epsilon(delta))


def _rdp(
    releases: Sequence[Release], between: Neighbours, delta: float, orders: Sequence[float] | None = None
) -> float:
    from dp_accounting import NeighboringRelation, dp_event, rdp  # noqa: PLC0415

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of each order that it safely leaves out
    fixed = any(each.sampling == "fixed" for each in releases)
    found = rdp.RdpAccountant(
        WHOLE_ORDERS if any(each.mechanism == "skellam" for each in releases) else orders,
        NeighboringRelation.REPLACE_ONE if fixed else NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    for each in releases:
        by = _by(each, between)
        event: DpEvent
        if each.mechanism == "laplace":
            event = dp_event.LaplaceDpEvent(each.noise / by)
        elif each.mechanism in NORMAL:
            event = dp_event.GaussianDpEvent(_multiplier(each, by))
        elif each.mechanism == "exponential":  # Cesar, Rogers 2021, arXiv:2004.07223: bounded range
            event = dp_event.ZCDpEvent((by / each.noise) ** 2 / 8)
        elif each.mechanism == "skellam":
            event = dp_event.ZCDpEvent(*_skellam(each, by))
        else:  # Bun, Steinke 2016, arXiv:1605.02065, proposition 1.4
            event = dp_event.ZCDpEvent((by / each.noise) ** 2 / 2)
        if each.sampling == "poisson":
            event = dp_event.PoissonSampledDpEvent(each.rate, event)
        elif each.sampling == "fixed":  # only the ratio counts; multipliers are those of replace-one already
            size, among = each.rate.as_integer_ratio()
            event = dp_event.SampledWithoutReplacementDpEvent(among, size, event)
        found.compose(event, each.steps)
    return float(found.get_epsilon(delta))


def _pure(releases: Sequence[Release], between: Neighbours, distance: float = 0.0) -> float:
    """The sum of the epsilons at delta 0."""
    rest = [each.mechanism for each in releases if each.mechanism not in PURE]
    if rest or distance:
        raise ConfigError(
            f"delta = 0: {rest[0] if rest else 'real noise, which is not quite ideal,'} needs a delta > 0",
            "well below 1 / clients, for example 1e-5",
        )

    def once(each: Release) -> float:
        epsilon = _by(each, between) / each.noise
        if each.rate == 1 or epsilon > 700:
            return epsilon
        return math.log1p(each.rate * math.expm1(epsilon))

    return sum(each.steps * once(each) for each in releases)


def _by(release: Release, between: Neighbours) -> int:
    """How many times the sensitivity a release may move."""
    return release.repeats * (2 if between == "replace-one" else 1)


def _multiplier(release: Release, by: int) -> float:
    """Of the continuous Gaussian that a release is at least as private as."""
    if release.mechanism == "gaussian":
        return release.noise / by
    return release.noise * math.sqrt(1 - HIDDEN / release.variance()) / by


def _geometric(release: Release, by: int) -> tuple[float, int]:
    """Parameter and sensitivity, on a grid of at most 1024 steps.

    Noise on a fine grid is that on a coarser one and digits of its own (a geometric variable is made of
    independent digits), so it is at least as private; one step of sensitivity is the worst of pure privacy.
    """
    if release.mechanism == "pure":
        return by / release.noise, 1
    sensitivity = math.ceil(release.sensitivity or 1)
    step = math.ceil(by * sensitivity / 1024)
    return step / (release.noise * sensitivity), math.ceil(by * sensitivity / step)


def _skellam(release: Release, by: int) -> tuple[float, float]:
    """(rho, xi): the divergence of each whole order a is at most xi + rho a.

    Agarwal, Kairouz, Liu 2021, arXiv:2110.04995, theorem 3.5, for a variance v:
    a D2^2 / 2v + min(((2a - 1) D2^2 + 6 D1) / 4v^2, 3 D1 / 2v). Sums of shares are Skellam too.
    """
    norm = (release.sensitivity or 1) * by
    variance = release.variance()
    sum_of = min(math.sqrt(release.dimension or 1) * norm, norm**2)  # L1, of whole numbers
    near = norm**2 / (2 * variance)
    finer = near + near / variance, max(6 * sum_of - norm**2, 0) / (4 * variance**2)
    return min(finer, (near, 3 * sum_of / (2 * variance)), key=lambda it: it[1] + 16 * it[0])


def _apart(at: Callable[[float], float], delta: float, distance: float) -> float:
    """Epsilon at delta, where part of delta goes to noise that is not ideal; as small a part as will do."""
    for part in (1e-9, 1e-6, 1e-3, 0.1, 0.5):
        if 2 * distance <= delta * part:  # else no epsilon will do
            epsilon = at(delta * (1 - part))
            if epsilon < 700 and (1 + math.exp(epsilon)) * distance <= delta * part:
                return epsilon
    return math.inf


def supported(accountant: Accountant, releases: Sequence[Release]) -> bool:
    """Does the accountant know all of these?"""
    return all(each.mechanism in KNOWN[accountant, each.sampling] for each in releases)


def chosen(releases: Sequence[Release], delta: float) -> Accountant:
    """The accountant that None stands for."""
    fine = delta >= LEAST_DELTA or _closed(releases)
    return "pld" if fine and supported("pld", releases) else "rdp"


def _closed(releases: Sequence[Release]) -> bool:
    """Are they one Gaussian together?"""
    return all(each.mechanism in NORMAL and each.sampling == "none" for each in releases)


def _refuse_unknown(accountant: Accountant, releases: Sequence[Release], delta: float) -> None:
    _one_of("accountant", accountant, get_args(Accountant))
    for each in releases:
        if each.mechanism in KNOWN[accountant, each.sampling]:
            continue
        others = [name for name in get_args(Accountant) if each.mechanism in KNOWN[name, each.sampling]]
        raise ConfigError(
            f"accountant = {accountant!r}: it has no event for {each.mechanism} with "
            f"{'no' if each.sampling == 'none' else each.sampling} sampling",
            f"use accountant = {others[0]!r}" if others else 'sampling = "none" credits no amplification',
        )
    if accountant == "pld" and delta < LEAST_DELTA and not _closed(releases):
        raise ConfigError(
            f"delta = {delta}: below {LEAST_DELTA} the rounding of pld's sums may count",
            "use accountant = 'rdp'",
        )


def _assumptions(releases: Sequence[Release], between: Neighbours, distance: float) -> tuple[str, ...]:
    told = {
        "add/remove": "neighbours differ in one record being there or not; all else about the cohorts stays",
        "replace-one": "neighbours differ in one record being exchanged for another",
    }[between]
    made = [told]
    for kind in sorted({each.sampling for each in releases}):
        made.append(
            {
                "none": "no amplification by sampling is credited: a record may be in every step",
                "poisson": "each record is in each step independently with the sampling rate, and how many "
                "are stays secret",
                "fixed": "each step's cohort is drawn anew, uniformly among all of its size",
            }[kind]
        )
    if any(each.sampling != "none" for each in releases):
        made.append("who is in a step stays secret: whoever knows the seed of the draws knows it")
    if any(each.mechanism == "exponential" for each in releases):
        made.append("selections have bounded range, as the exponential mechanism has")
    if any(each.shares > 1 for each in releases):
        made.append("the honest shares all arrive, and only their sum is seen")
    if distance:
        made.append(f"real noise is {distance:.2g} from ideal in total variation, which delta includes")
    return tuple(made)


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(known)}")

"""What releases spend. Oracles: published numbers, closed forms, exact laws summed point by point, float64."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from coterie.core import ConfigError
from coterie.core.guarantees import Guarantees
from coterie.privacy import accounting
from coterie.privacy.accounting import KNOWN, MECHANISMS, Release, account, besides_bits, together, under
from coterie.privacy.budgets import calibrate, most_steps
from coterie.privacy.noise import total_variation

MNIST = Release(mechanism="gaussian", noise=1.1, steps=14062, sampling="poisson", rate=256 / 60000)
SMALL = replace(MNIST, steps=100, rate=0.05)
ONE = Release(mechanism="gaussian", noise=1.0)
GRID = {"sensitivity": 1000, "dimension": 10**6}


def spent(*releases, delta=1e-5, **options):
    return account(releases, delta=delta, **options).epsilon


def example(mechanism, **more):
    grid = (
        {"sensitivity": 100, "dimension": 1000} if "discrete" in mechanism or mechanism == "skellam" else {}
    )
    return Release(**{"mechanism": mechanism, "noise": 2.0, "steps": 10, **grid} | more)


def gaussian_delta(epsilon, multiplier):
    """Balle and Wang 2018, theorem 8, written anew."""
    a = 1 / multiplier
    return stats.norm.cdf(a / 2 - epsilon / a) - math.exp(epsilon) * stats.norm.cdf(-a / 2 - epsilon / a)


def hockey_stick(p, q, epsilon):
    """The least delta for two laws on the same points, in both directions."""
    one, other = np.maximum(p - math.exp(epsilon) * q, 0), np.maximum(q - math.exp(epsilon) * p, 0)
    return max(one.sum(), other.sum())


def exact_epsilon(p, q, delta):
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if hockey_stick(p, q, middle) > delta else (low, middle)
    return high


def discrete_gaussian(points, sigma, centre=0):
    weights = np.exp(-((points - centre) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("release", "accountant", "known"),
    [
        (MNIST, "rdp", 2.59656),
        (MNIST, "pld", 2.38169),
        (Release(mechanism="laplace", noise=2, steps=30), "rdp", 12.7016),
        (Release(mechanism="laplace", noise=2, steps=30), "pld", 12.2049),
        (Release(mechanism="exponential", noise=1 / 0.5, steps=30), None, 6.81),
        (Release(mechanism="pure", noise=1 / 0.5, steps=30), None, 12.98),
    ],
)
def test_known_answers(release, accountant, known):
    places = len(str(known).partition(".")[2])
    assert abs(spent(release, accountant=accountant) - known) <= 0.5001 * 10**-places


def test_the_known_multiplier_of_one_gaussian():
    assert calibrate(ONE, epsilon=1, delta=1e-5) == pytest.approx(3.73063, abs=6e-6)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("noise", [0.6, 3.0])
def test_gaussians_without_sampling_are_one_gaussian(noise, steps):
    """Closed form; the grid of dp-accounting's losses, and Renyi divergences, come to more, but hardly."""
    from dp_accounting import dp_event, pld

    release = replace(ONE, noise=noise, steps=steps)
    epsilon = spent(release)
    assert gaussian_delta(epsilon, noise / math.sqrt(steps)) == pytest.approx(1e-5, rel=1e-6)
    numeric = pld.PLDAccountant().compose(dp_event.GaussianDpEvent(noise), steps).get_epsilon(1e-5)
    assert epsilon <= numeric * (1 + 1e-9) < epsilon * 1.001
    assert epsilon < spent(release, accountant="rdp") < 1.2 * epsilon


def test_pure_privacy_adds_up_at_delta_0():
    b = 3.0
    laplace = Release(mechanism="laplace", noise=b)
    assert spent(laplace, delta=0) == 1 / b
    assert spent(
        replace(laplace, steps=5), Release(mechanism="exponential", noise=4), delta=0
    ) == pytest.approx(5 / b + 0.25)
    sampled = replace(laplace, sampling="poisson", rate=0.1)
    assert spent(sampled, delta=0) == pytest.approx(math.log(1 + 0.1 * (math.exp(1 / b) - 1)))
    assert account([laplace], delta=0).accountant == "pure"
    assert spent(replace(laplace, noise=1e-4, sampling="poisson", rate=0.5), delta=0) == 1e4  # no overflow


def test_without_sampling_nothing_is_credited():
    everyone, few = replace(SMALL, sampling="none", rate=1.0), replace(SMALL, rate=0.01)
    assert spent(few) < spent(SMALL) < spent(everyone)
    assert spent(everyone) == pytest.approx(spent(replace(ONE, noise=0.11)))
    all_in = replace(SMALL, rate=1.0)  # everybody, for certain
    assert spent(all_in, accountant="rdp") == pytest.approx(spent(everyone, accountant="rdp"))


POINTS = np.linspace(-60, 60, 400_001)


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.2), (2.0, 0.5)])
def test_an_exchanged_record_moves_a_sum_twice_as_far(noise, rate):
    """One of n records is 1 or -1, the others 0: the exact laws of a cohort's noisy sum, as a lower bound."""

    def law(record):
        density = (1 - rate) * stats.norm.pdf(POINTS, 0, noise) + rate * stats.norm.pdf(POINTS, record, noise)
        return density * (POINTS[1] - POINTS[0])

    fixed = Release(mechanism="gaussian", noise=noise, sampling="fixed", rate=rate)
    least = exact_epsilon(law(1.0), law(-1.0), 1e-5)
    made = account([fixed], delta=1e-5)
    assert (made.accountant, made.neighbours) == ("rdp", "replace-one")
    assert least < made.epsilon < 4 * least
    whole = replace(fixed, rate=1.0, steps=3)
    assert spent(whole) == pytest.approx(spent(replace(ONE, noise=noise / 2, steps=3), accountant="rdp"))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_replace_one_and_repeats_are_twice_the_sensitivity(mechanism):
    once = example(mechanism, noise=4.0, steps=3)
    twice = spent(once, neighbours="replace-one")
    assert twice == pytest.approx(spent(replace(once, repeats=2)))
    assert twice > spent(once)
    if mechanism not in ("discrete_gaussian", "discrete_laplace", "skellam"):
        assert twice == pytest.approx(spent(replace(once, noise=2.0)))
    assert spent(replace(once, repeats=2), neighbours="replace-one") > twice


@settings(max_examples=25, deadline=None)
@given(
    mechanism=st.sampled_from(MECHANISMS),
    accountant=st.sampled_from(["pld", "rdp"]),
    noise=st.floats(1.5, 8.0),  # e^epsilon is at most 10^13, say: times 10^-27 it does not matter
    steps=st.integers(1, 40),
    delta=st.floats(1e-8, 1e-3),
)
def test_more_noise_fewer_steps_and_more_delta_spend_less(mechanism, accountant, noise, steps, delta):
    if mechanism not in KNOWN[accountant, "none"]:
        return
    here = example(mechanism, noise=noise, steps=steps)
    options = {"accountant": accountant}
    epsilon = spent(here, delta=delta, **options)
    slack = 1 + 1e-3  # of the grid
    assert spent(replace(here, noise=noise * 1.3), delta=delta, **options) <= epsilon * slack
    assert spent(replace(here, steps=steps + 3), delta=delta, **options) * slack >= epsilon
    assert spent(here, delta=delta * 2, **options) <= epsilon * slack
    assert spent(replace(here, steps=0), delta=delta, **options) == 0


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_the_order_of_composition_does_not_matter(accountant):
    few = replace(SMALL, noise=3.0, rate=0.01)
    parts = (few, replace(ONE, noise=5.0), Release(mechanism="laplace", noise=4), example("pure", noise=9))
    found = [spent(*order, accountant=accountant) for order in (parts, parts[::-1])]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    split = [replace(few, steps=40), *parts[1:], replace(few, steps=60)]
    assert spent(*split, accountant=accountant) == pytest.approx(found[0], rel=1e-6)
    assert found[0] > spent(*parts[1:], accountant=accountant)


@pytest.mark.parametrize(
    ("release", "epsilon", "delta"),
    [
        (ONE, 0.3, 1e-6),
        (replace(ONE, steps=50), 8.0, 1e-5),
        (replace(SMALL, steps=10), 2.0, 1e-5),
        (replace(SMALL, sampling="fixed", steps=20), 4.0, 1e-5),
        (Release(mechanism="laplace", noise=1, steps=10), 2.0, 0.0),
        (Release(mechanism="laplace", noise=1, steps=10), 2.0, 1e-6),
        (example("exponential"), 1.0, 1e-6),
        (example("discrete_gaussian", shares=20, total_variation=total_variation(1000)), 2.0, 1e-5),
        (example("skellam"), 2.0, 1e-5),
        (example("discrete_laplace"), 2.0, 1e-5),
    ],
)
def test_calibrated_noise_is_enough_and_no_less_would_be(release, epsilon, delta):
    noise = calibrate(release, epsilon=epsilon, delta=delta, tolerance=9e-4)
    assert spent(replace(release, noise=noise), delta=delta) <= epsilon
    assert spent(replace(release, noise=noise / 1.0011), delta=delta) > epsilon


@pytest.mark.parametrize("start", [1e-3, 1.0, 300.0])
def test_where_the_search_starts_does_not_matter(start):
    release = replace(ONE, steps=50, noise=start)
    assert calibrate(release, epsilon=1.0, delta=1e-5) == pytest.approx(3.730632 * math.sqrt(50), rel=2e-6)


@pytest.mark.parametrize(
    "release", [replace(SMALL, noise=3.0), replace(ONE, noise=8.0), example("exponential", noise=6.0)]
)
def test_most_steps_fit_and_one_more_does_not(release):
    before = [replace(ONE, noise=6.0)]
    steps = most_steps(release, epsilon=2.0, delta=1e-5, before=before)
    assert (
        spent(*before, replace(release, steps=steps))
        <= 2.0
        < spent(*before, replace(release, steps=steps + 1))
    )
    assert most_steps(release, epsilon=2.0, delta=1e-5, before=before, most=3) == 3
    spent_already = [replace(ONE, noise=1.0)]
    assert most_steps(release, epsilon=2.0, delta=1e-5, before=spent_already) == 0
    with pytest.raises(ConfigError, match="no amount of noise"):
        calibrate(release, epsilon=2.0, delta=1e-5, before=spent_already)


@pytest.mark.parametrize(("sigma", "sensitivity"), [(6.0, 3), (12.0, 20), (40.0, 7)])
@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_discrete_gaussians_spend_what_their_exact_law_does(sigma, sensitivity, rate):
    """At most a little more, and not less; with Poisson sampling too, where Renyi arguments would not do."""
    points = np.arange(-900, 901)
    base = discrete_gaussian(points, sigma)
    with_it = (1 - rate) * base + rate * discrete_gaussian(points, sigma, sensitivity)
    exact = exact_epsilon(with_it, base, 1e-5)
    kind = {"sampling": "poisson" if rate < 1 else "none", "rate": rate, "dimension": 1}
    made = Release(mechanism="discrete_gaussian", noise=sigma / sensitivity, sensitivity=sensitivity, **kind)
    assert exact * (1 - 1e-9) <= spent(made) <= exact * (1 + 6 / sigma**2) + 2e-3


@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_a_gaussian_rounded_at_random_is_a_discrete_one(centre):
    """Peikert's theorem at t = 2, by the trapezoidal rule: the step that accounting a grid rests on."""
    sigma, t, step = 5.0, 2.0, 1 / 64
    fine = np.arange(-60, 60, step)
    density = stats.norm.pdf(fine, 3, math.sqrt(sigma**2 - t**2)) * step
    points = np.arange(-60, 61)
    law = np.exp(-((points[:, None] - fine - centre) ** 2) / (2 * t**2))
    rounded = (law / law.sum(0)) @ density
    assert abs(rounded - discrete_gaussian(points, sigma, 3 + centre)).sum() < 1e-14


@pytest.mark.parametrize(("sigma", "shares"), [(1.0, 8), (1.1, 7), (1.3, 5)])
def test_sums_of_shares_are_as_near_to_one_discrete_gaussian_as_stated(sigma, shares):
    points = np.arange(-80, 81)
    law = discrete_gaussian(points, sigma)
    summed = np.array([1.0])
    for _ in range(shares):
        summed = np.convolve(summed, law)
    wide = np.arange(-80 * shares, 80 * shares + 1)
    apart = abs(summed - discrete_gaussian(wide, sigma * math.sqrt(shares))).sum() / 2
    release = Release(
        mechanism="discrete_gaussian",
        noise=sigma * math.sqrt(shares) / 4, sensitivity=4, dimension=1, shares=shares,
    )  # fmt: skip
    stated = release.distance()
    assert 1e-12 < apart < stated


def test_more_draws_of_a_coarse_grid_cost_more_and_too_coarse_ones_are_refused():
    fine = example("discrete_gaussian", noise=2.0, sensitivity=1000, dimension=10**6)
    assert spent(fine) == pytest.approx(spent(replace(ONE, noise=2.0, steps=10)), rel=1e-5)
    shared = replace(fine, sensitivity=10.0, shares=100)  # 2 steps of the grid each
    assert spent(shared) > spent(replace(shared, shares=1))
    with pytest.raises(ConfigError, match=r"no finite epsilon .* away from ideal noise"):
        spent(replace(shared, shares=400))


@pytest.mark.parametrize(("epsilon", "sensitivity"), [(0.5, 1), (1.0, 3), (2.0, 1500), (0.7, 5000)])
def test_discrete_laplace_spends_what_its_exact_law_does(epsilon, sensitivity):
    scale = sensitivity / epsilon
    points = np.arange(-int(40 * scale) - 2, int(40 * scale) + sensitivity + 2)
    base, moved = (np.exp(-abs(points - at) / scale) for at in (0, sensitivity))
    exact = exact_epsilon(base / base.sum(), moved / moved.sum(), 1e-3)
    made = example("discrete_laplace", noise=1 / epsilon, sensitivity=sensitivity, dimension=1, steps=1)
    assert exact * (1 - 1e-9) <= spent(made, delta=1e-3) <= exact * 1.002 + 1e-4
    assert spent(made, delta=0) == pytest.approx(epsilon)


@pytest.mark.parametrize("variance", [3.0, 40.0, 2000.0])
@pytest.mark.parametrize("shift", [1, 4])
def test_skellam_divergences_are_below_the_stated_ones(variance, shift):
    """Of whole orders, summed over the exact law (Bessel functions)."""
    points = np.arange(-1200, 1201)
    with np.errstate(divide="ignore"):
        log_p = np.log(special.ive(abs(points), variance))
        log_q = np.log(special.ive(abs(points - shift), variance))
    seen = np.isfinite(log_p) & np.isfinite(log_q)
    release = example("skellam", noise=math.sqrt(variance) / shift, sensitivity=shift, dimension=1)
    rho, xi = accounting._skellam(release, 1)
    for order in (2, 3, 5, 9):
        summed = special.logsumexp(order * log_p[seen] + (1 - order) * log_q[seen])
        square, first = shift**2, shift  # the theorem, of which one of two bounds is taken for all orders
        finer = ((2 * order - 1) * square + 6 * first) / (4 * variance**2)
        stated = order * square / (2 * variance) + min(finer, 3 * first / (2 * variance))
        assert summed / (order - 1) <= stated <= xi + rho * order + 1e-12


def test_noise_that_is_not_ideal_takes_its_part_of_delta():
    distance = 5e-8
    epsilon = spent(replace(ONE, total_variation=distance))
    total = gaussian_delta(epsilon, 1.0) + (1 + math.exp(epsilon)) * distance
    assert 0.4e-5 < total <= 1e-5
    assert spent(replace(ONE, total_variation=total_variation(10**9))) == pytest.approx(spent(ONE), rel=1e-6)
    with pytest.raises(ConfigError, match="1e-05 away from ideal noise"):
        spent(replace(ONE, total_variation=1e-5))
    with pytest.raises(ConfigError, match="not quite ideal"):
        spent(Release(mechanism="laplace", noise=1, total_variation=1e-20), delta=0)


def test_adaptive_clipping_splits_a_round_between_update_and_bits():
    z, bits = 1.1, 5.0
    update = besides_bits(z, bits)
    assert update > z
    assert together(update, 2 * bits) == pytest.approx(z)
    two = [replace(ONE, noise=update, steps=9), replace(ONE, noise=2 * bits, steps=9)]
    assert spent(*two) == pytest.approx(spent(replace(ONE, noise=z, steps=9)))
    with pytest.raises(ConfigError, match="bits = 0"):
        besides_bits(1.1, 0.5)


def test_a_schedule_is_credited_with_what_it_guarantees():
    poisson = Guarantees(sampling="poisson", population=1000, cohort=50, rounds=200)
    assert under(ONE, poisson) == replace(ONE, steps=200, sampling="poisson", rate=0.05)
    assert under(ONE, poisson, rounds=7).steps == 7
    fixed = Guarantees(sampling="fixed", population=1000, cohort=50, rounds=200)
    assert spent(under(ONE, fixed)) > spent(under(ONE, poisson))
    nothing = Guarantees(sampling="none", population=1000, cohort=50, rounds=200, repeats=10)
    assert under(ONE, nothing) == replace(ONE, steps=200, repeats=10)
    cyclic = Guarantees(sampling="none", population=1000, cohort=50, rounds=41, separation=20)
    assert under(ONE, cyclic) == replace(ONE, steps=3)
    assert [cyclic.participations(rounds) for rounds in (0, 1, 20, 21, 40)] == [0, 1, 1, 2, 2]


def test_every_answer_says_what_it_rests_on():
    made = account([MNIST], delta=1e-5, accountant="rdp")
    assert made.neighbours == "add/remove"
    assert any("independently" in line for line in made.assumptions)
    assert any("secret" in line for line in made.assumptions)
    none = account([example("exponential")], delta=1e-5)
    assert any("no amplification" in line for line in none.assumptions)
    assert any("bounded range" in line for line in none.assumptions)


@pytest.mark.parametrize("wrong", [
    {"noise": 0}, {"noise": -1.0}, {"noise": math.nan}, {"noise": math.inf}, {"steps": -1}, {"steps": 1.5},
    {"rate": 0.0}, {"rate": 1.01}, {"rate": math.nan}, {"rate": -0.1}, {"repeats": 0}, {"shares": 0},
    {"steps": math.nan}, {"total_variation": math.nan}, {"total_variation": -1e-9}, {"mechanism": "gauss"}, {"sampling": "uniform"}, {"sampling": "none", "rate": 0.5},
])  # fmt: skip
def test_releases_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"^{[*wrong][-1]} = "):
        replace(MNIST, **wrong)


@pytest.mark.parametrize(("options", "message"), [
    ({"delta": 1.0}, "delta = 1.0: must be in"),
    ({"delta": -1e-5}, "delta = -1e-05: must be in"),
    ({"delta": math.nan}, "delta = nan: must be in"),
    ({"delta": 0}, "delta = 0: gaussian needs"),
    ({"delta": 1e-13, "accountant": "pld"}, "below 1e-12"),
    ({"accountant": "moments"}, "accountant = 'moments': must be one of pld, rdp"),
    ({"neighbours": "replace-one"}, "neighbours = 'replace-one': poisson"),
    ({"neighbours": "zero-out"}, "neighbours = 'zero-out': must be one of"),
])  # fmt: skip
def test_questions_without_an_answer_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        account([SMALL], **{"delta": 1e-5} | options)


def test_what_an_accountant_does_not_know_is_refused_and_the_other_named():
    fixed = replace(SMALL, sampling="fixed")
    with pytest.raises(ConfigError, match="no event for gaussian with fixed sampling") as caught:
        spent(fixed, accountant="pld")
    assert caught.value.hint == "use accountant = 'rdp'"
    laplace = Release(mechanism="laplace", noise=1, sampling="poisson", rate=0.1)
    with pytest.raises(ConfigError, match="no event for laplace with poisson") as caught:
        spent(laplace, accountant="rdp")
    assert caught.value.hint == "use accountant = 'pld'"
    with pytest.raises(ConfigError, match="no event for exponential with poisson") as caught:
        spent(replace(laplace, mechanism="exponential"))
    assert "credits no amplification" in caught.value.hint
    with pytest.raises(ConfigError, match="poisson and fixed sampling together"):
        spent(SMALL, fixed)
    with pytest.raises(ConfigError, match="needs both"):
        Release(mechanism="skellam", noise=1.0)
    with pytest.raises(ConfigError, match="epsilon = 0"):
        calibrate(ONE, epsilon=0, delta=1e-5)
    with pytest.raises(ConfigError, match="epsilon = nan"):
        most_steps(ONE, epsilon=math.nan, delta=1e-5)


def test_sampled_noise_of_two_kinds_is_added_by_the_one_that_knows_both():
    laplace = Release(mechanism="laplace", noise=8, sampling="poisson", rate=0.01)
    assert spent(SMALL) < spent(SMALL, laplace) < spent(SMALL, replace(laplace, rate=0.5))


def test_small_deltas_go_to_the_accountant_that_can():
    assert account([SMALL], delta=1e-13).accountant == "rdp"
    assert account([Release(mechanism="laplace", noise=1)], delta=1e-13).accountant == "rdp"
    assert account([ONE], delta=1e-15).accountant == "pld"  # the closed form


def test_nothing_that_starts_loads_the_accountants():
    code = (
        "import coterie, sys, coterie.cli, coterie.privacy.budgets; sys.exit('dp_accounting' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

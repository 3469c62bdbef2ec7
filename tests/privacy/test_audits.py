"""Oracles: published values, exact binomials, brute force, linear programs, closed forms, broken mechanisms.

False alarms: at 95 % an honest audit says "broken" once in 20 at most. Here the numbers are of fixed seeds, and
for the Gaussian mechanism of epsilon 1 the chance is computed in the test that relies on it: below 1e-9.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from coterie.core import derive, seeded
from coterie.core.errors import ConfigError
from coterie.privacy.audits import (
    Audit,
    bounds,
    canaries,
    deep_leakage,
    gradient_of,
    images,
    infer_label,
    inverting,
    label_counts,
    likelihood_ratio,
    linear_inputs,
    many_runs,
    membership,
    one_run,
    to_html,
)
from coterie.privacy.audits.membership import confidence

DELTA = 1e-5
KEY = derive(7, "audits")


# --- bounds


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "printed"), [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)]
)
def test_one_run_bound_is_what_its_paper_prints(m, r, v, delta, printed):
    """Steinke et al. 2023, appendix D and section 7 (which truncates 2.6758)."""
    assert bounds.one_run(m, r, v, delta=delta) == pytest.approx(printed, abs=1e-3)


@pytest.mark.parametrize(("r", "v", "epsilon"), [(20, 15, 0.0), (100, 90, 1.5), (7, 7, 3.0), (50, 0, 1.0)])
def test_p_value_without_delta_is_the_binomial_tail(r, v, epsilon):
    q = 1 / (1 + math.exp(-epsilon))
    exact = math.fsum(math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(v, r + 1))
    assert bounds.p_value(100, r, v, epsilon=epsilon, delta=0.0) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("delta", [1e-3, 0.01])
def test_p_value_with_delta_is_its_formula(delta):
    m, r, v, epsilon = 60, 40, 33, 0.8
    q = 1 / (1 + math.exp(-epsilon))
    pmf = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    worst = max(math.fsum(pmf[v - i : v]) / i for i in range(1, v + 1))
    exact = math.fsum(pmf[v:]) + 2 * m * delta * worst
    assert bounds.p_value(m, r, v, epsilon=epsilon, delta=delta) == pytest.approx(exact, rel=1e-12)


def chances(m: int, epsilon: float, delta: float) -> list[float]:
    """P[j right], by playing the game out: each coin goes through a randomised response with a leak.

    With probability delta the output is the coin itself, marked; else it is flipped with odds e^-epsilon.
    """
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    outputs = {True: {"0": (1 - delta) * (1 - q), "1": (1 - delta) * q, "!1": delta}}
    outputs[False] = {"1": (1 - delta) * (1 - q), "0": (1 - delta) * q, "!0": delta}
    right = [0.0] * (m + 1)
    for coins in itertools.product((False, True), repeat=m):
        for seen in itertools.product(*(outputs[coin].items() for coin in coins)):
            hits = sum((name[-1] == "1") == coin for (name, _), coin in zip(seen, coins, strict=True))
            right[hits] += math.prod(p for _, p in seen) / 2**m
    return right


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (1.0, 0.05), (2.0, 0.2)])
@pytest.mark.parametrize("m", [1, 3, 5])
def test_no_attack_beats_either_bound_in_a_game_played_out(m, epsilon, delta):
    right = chances(m, epsilon, delta)
    assert math.fsum(right) == pytest.approx(1)
    for v in range(1, m + 1):
        tail = math.fsum(right[v:])
        p = bounds.p_value(m, m, v, epsilon=epsilon, delta=delta)
        assert tail <= p + 1e-12
        if not delta:  # randomised response is the worst there is
            assert tail == pytest.approx(p, rel=1e-12)
        confidence = 1 - tail * (1 - 1e-9)
        if 0 < confidence < 1:  # what happens this often refutes nothing
            assert not bounds.refuted(bounds.approximate((epsilon, delta)), m, m, v, confidence)


@pytest.mark.parametrize(("m", "g", "v"), [(6, 6, 5), (8, 5, 4), (10, 10, 8), (12, 6, 6), (9, 9, 5)])
@pytest.mark.parametrize("pairs", [((0.7, 0.0),), ((0.3, 0.05),), ((0.2, 0.1), (1.0, 0.01))])
def test_the_recursion_refutes_what_a_linear_program_finds_impossible(m, g, v, pairs):
    """The most P[v or more right] over all p with h_j >= curve(r_{j+1}): the paper's constraints, no recursion."""
    at = np.arange(g + 1)
    rows, limits = [], []
    for j in range(g):
        r, h = np.where(at > j, at, 0) / m, np.where(at >= j, g - at, 0) / m
        for epsilon, delta in pairs:
            rows += [r * math.exp(-epsilon) - h, r * math.exp(epsilon) - h]
            limits += [delta * math.exp(-epsilon), delta - 1 + math.exp(epsilon)]
    found = optimize.linprog(
        -(at >= v).astype(float), A_ub=rows, b_ub=limits, A_eq=[np.ones(g + 1)], b_eq=[1.0], bounds=(0, 1)
    )
    most, curve = -found.fun, bounds.approximate(*pairs)
    if most < 0.999:
        assert bounds.refuted(curve, m, g, v, 1 - 1.001 * most)
    assert not bounds.refuted(curve, m, g, v, 1 - 0.999 * most)


def test_gaussian_epsilons_are_those_of_dp_accounting():
    from dp_accounting.pld import privacy_loss_distribution as pld

    for sigma in (0.15, 0.7, 3.73063):
        exact = pld.from_gaussian_mechanism(sigma, value_discretization_interval=1e-4)
        assert bounds.epsilon_of(1 / sigma, DELTA) == pytest.approx(
            exact.get_epsilon_for_delta(DELTA), abs=1e-3
        )
    assert 1 / bounds.mu_of(1.0, DELTA) == pytest.approx(3.73063, abs=1e-5)
    assert bounds.epsilon_of(bounds.mu_of(1000.0, DELTA), DELTA) == pytest.approx(1000, rel=1e-6)


def test_a_gaussian_curve_touches_its_own_profile():
    """f is the upper envelope of its (epsilon, delta) lines (Dong, Roth, Su 2019, Proposition 2.12)."""
    mu = 1.3
    profile = [
        (e, float(special.ndtr(mu / 2 - e / mu) - math.exp(e) * special.ndtr(-mu / 2 - e / mu)))
        for e in np.linspace(0, 12, 2001)
    ]
    for rate in (0.01, 0.2, 0.5, 0.9, 0.999):
        assert bounds.approximate(*profile)(rate) == pytest.approx(bounds.gaussian(mu)(rate), abs=1e-5)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (497, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_clopper_pearson_is_scipys(hits, trials, confidence):
    exact = stats.binomtest(hits, trials).proportion_ci(confidence, method="exact")
    assert bounds.clopper_pearson(hits, trials, confidence) == pytest.approx((exact.low, exact.high))


def test_repeated_runs_without_an_error_prove_what_the_rule_of_three_does():
    low = 0.025 ** (1 / 500)  # the Clopper-Pearson limit of 500 of 500
    assert bounds.repeated_runs(500, 500, 0, 500, delta=0.0) == pytest.approx(math.log(low / (1 - low)))
    assert bounds.repeated_runs(250, 500, 250, 500, delta=0.0) == 0.0
    assert bounds.repeated_runs(10, 500, 490, 500, delta=0.0) == 0.0  # wrong-way scores prove nothing
    mu = stats.norm.ppf(low) - stats.norm.ppf(1 - low)
    assert bounds.repeated_runs_mu(500, 500, 0, 500) == pytest.approx(mu)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: bounds.one_run(10, 11, 3, delta=0.0),
        lambda: bounds.one_run(10, 5, 6, delta=0.0),
        lambda: bounds.one_run(10, 5, 5, delta=0.0, confidence=1.0),
        lambda: bounds.clopper_pearson(3, 2),
        lambda: bounds.epsilon_of(1.0, 0.0),
        lambda: bounds.separated(torch.ones(1), torch.ones(5), delta=0.0),
        lambda: one_run(torch.ones(3), torch.ones(4, dtype=torch.bool), delta=0.0),
        lambda: membership(torch.ones(1), torch.ones(4), delta=0.0),
        lambda: likelihood_ratio(torch.ones(3), torch.ones(4, 2), torch.ones(4, 2)),
        lambda: likelihood_ratio(torch.ones(3), torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool)),
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


# --- canaries in one run, and in many


SIGMA = 3.73063  # of the Gaussian mechanism of sensitivity 1 with epsilon 1 at DELTA
PROMISE = {"promised": 1.0, "delta": DELTA, "curve": bounds.gaussian(1 / SIGMA)}


def gaussian_mechanism(m: int, sigma: float, key) -> tuple[torch.Tensor, torch.Tensor]:
    """m orthogonal canaries, each in by a coin, their sum with noise: what comes out and the coins."""
    included = canaries.coins(m, derive(key, "coins"))
    noise = torch.from_numpy(np.random.default_rng(list(key[:8])).standard_normal(m))
    return included.double() + sigma * noise, included


def audited(m: int, sigma: float, seed: int) -> Audit:
    released, included = gaussian_mechanism(m, sigma, derive(seed, "mechanism"))
    return one_run(canaries.matched(released, torch.eye(m)) if m < 2000 else released, included, **PROMISE)


def test_without_noise_the_lower_bound_is_above_five():
    assert audited(1000, 1e-3, 0).lower_bound > 5
    assert audited(1000, 1e-3, 0).violated


def test_an_honest_mechanism_of_epsilon_one_stays_below_its_promise_over_20_seeds():
    """Each audit may be wrong once in 20; of 10,000 canaries about once in 10^8, once in 5 million for all 20.

    An alarm needs 721 right of the 1,000 extreme guesses; 632 +- 16 are. The other counts are further away.
    """
    found = [audited(10_000, SIGMA, seed) for seed in range(20)]
    assert [each.violated for each in found] == [False] * 20
    assert all(0 < each.lower_bound < 1 for each in found)
    assert all(each.measures["mu at least, if Gaussian"] < 1 / SIGMA for each in found)


def test_halved_noise_is_caught():
    """By the curve of the promise, in 995 of 1,000 audits; the bound of epsilon at one delta hardly reaches 1."""
    found = [audited(10_000, SIGMA / 2, seed) for seed in range(5)]
    assert [each.verdict for each in found] == ["the promise is broken"] * 5


def released_sums(
    runs: int, update: torch.Tensor, others: torch.Tensor, skip: bool, seed: int
) -> torch.Tensor:
    """Sums of clipped updates with noise [runs, size]; skip: the first client's is not clipped (the fault)."""
    clipped = [u * (1 / u.norm()).clamp(max=1) for u in (update, *others)]
    total = torch.stack([update, *clipped[1:]] if skip else clipped).sum(0)
    return total + SIGMA * torch.from_numpy(np.random.default_rng(seed).standard_normal((runs, len(update))))


def test_one_client_that_is_not_clipped_is_caught_by_its_own_canary():
    size, runs = 20, 2000
    others = canaries.directions(5, size, KEY).double()
    mine = 10 * canaries.directions(1, size, derive(KEY, 1))[0].double()
    absent = released_sums(runs, torch.zeros(size).double() + 1e-12, others, False, 1) @ mine
    verdicts = {}
    for skip in (False, True):
        present = released_sums(runs, mine, others, skip, 2) @ mine
        verdicts[skip] = many_runs(present, absent, promised=1.0, delta=DELTA, mu=1 / SIGMA)
    assert not verdicts[False].violated
    assert verdicts[True].refuted
    assert verdicts[True].lower_bound > 1


def test_halved_noise_is_caught_by_one_canary_in_many_runs():
    rng = np.random.default_rng(3)
    for factor, broken in ((1.0, False), (0.5, True)):
        absent, present = (torch.from_numpy(at + factor * SIGMA * rng.standard_normal(6000)) for at in (0, 1))
        assert many_runs(present, absent, promised=1.0, delta=DELTA, mu=1 / SIGMA).refuted is broken


@pytest.mark.parametrize("reused", [False, True])
def test_a_seed_that_is_used_twice_is_caught(reused):
    """Canaries are in the first of three rounds; the third repeats its noise, so a difference shows them all."""
    m = 1000
    first, included = gaussian_mechanism(m, SIGMA, KEY)
    second, third = SIGMA * torch.from_numpy(np.random.default_rng(11).standard_normal((2, m)))
    if reused:
        third = first - included.double()
    sent = torch.tensor([[1.0, 0.0, 0.0]]).expand(m, 3)
    audit = one_run(
        canaries.matched(torch.stack([first, second, third]), torch.eye(m), sent), included, **PROMISE
    )
    assert audit.violated is reused
    assert audit.lower_bound > 5 if reused else audit.lower_bound < 1


def test_the_filter_on_one_release_ranks_as_dot_products_do():
    released = torch.from_numpy(np.random.default_rng(0).standard_normal(50))
    vectors = canaries.directions(9, 50, KEY)
    assert vectors.norm(dim=1) == pytest.approx(torch.ones(9))
    assert torch.equal(canaries.matched(released, vectors).argsort(), (vectors.double() @ released).argsort())


def test_canaries_of_clients_are_told_from_the_aggregate_of_a_federation():
    """Andrew et al. 2023: cosines of absent canaries have variance 1 / size; without noise all are told apart."""
    model = {"w": torch.zeros(100, 99), "b": torch.zeros(100), "seen": torch.tensor(3)}
    size, m = 10_000, 300
    vectors, included = canaries.directions(m, size, KEY), canaries.coins(m, KEY)
    sent = [canaries.like(vector, model) for vector in vectors[included]]
    assert sent[0]["seen"] == 3
    honest = {
        name: torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)) * 1e-3
        for name, leaf in model.items()
        if name != "seen"
    }
    total = {name: honest[name] + sum(each[name] for each in sent) for name in honest}
    scores = canaries.matched(canaries.flat(total), vectors)
    assert torch.equal(canaries.flat(canaries.like(vectors[0], model)), vectors[0])
    assert float(scores[included].min()) > float(scores[~included].max())
    pairs = vectors @ vectors.T - torch.eye(m)
    assert float(pairs.var() * size) == pytest.approx(1, abs=0.05)
    assert one_run(scores, included, delta=DELTA, unit="client").lower_bound > 3.5  # all of 240 right: 4.1


def test_guesses_are_the_extremes():
    scores = torch.tensor([0.3, -2.0, 5.0, 0.1, -0.4])
    assert canaries.guess(scores, 2).tolist() == [0, -1, 1, 0, 0]
    assert canaries.guess(scores, 5).abs().sum() == 5
    assert canaries.guess(scores, 0).tolist() == [0] * 5


# --- membership


def test_auc_and_rates_are_scikit_learns():
    from sklearn.metrics import roc_auc_score, roc_curve

    rng = np.random.default_rng(4)
    members, others = (torch.from_numpy(rng.normal(at, 1, n).round(1)) for at, n in ((0.6, 700), (0.0, 900)))
    scores, truth = torch.cat([members, others]), [1] * 700 + [0] * 900  # rounded: with ties
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    found = membership(members, others, delta=0.0, rates=(0.01, 0.1))
    assert found.measures["AUC"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert found.measures["advantage"] == pytest.approx((tpr - fpr).max(), abs=1e-12)
    for rate in (0.01, 0.1):
        assert found.measures[f"TPR at FPR {rate:g}"] == pytest.approx(tpr[fpr <= rate].max(), abs=1e-12)
        low, high = (found.measures[f"TPR at FPR {rate:g}, {side}"] for side in ("low", "high"))
        assert low < tpr[fpr <= rate].max() < high


def test_scores_that_say_nothing_prove_nothing_and_perfect_ones_prove_much():
    rng = np.random.default_rng(5)
    a, b = (torch.from_numpy(rng.standard_normal(2000)) for _ in range(2))
    nothing, all_of_it = membership(a, b, delta=DELTA), membership(a + 20, b, delta=DELTA, promised=2.0)
    assert nothing.lower_bound < 0.2
    assert nothing.measures["AUC"] == pytest.approx(0.5, abs=0.04)  # 4 standard deviations
    low = 0.025 ** (1 / 1000)  # of 1,000 right of 1,000
    assert all_of_it.lower_bound == pytest.approx(math.log((low - DELTA) / (1 - low)), abs=0.01)
    assert all_of_it.verdict == "the promise is broken"


def test_confidences_are_logits_of_the_true_class():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(1)[torch.arange(6), labels]
    assert confidence(logits, labels) == pytest.approx((p / (1 - p)).log())
    assert confidence(torch.tensor([[1000.0, 0.0]]), torch.tensor([0])).item() == 1000  # where p rounds to 1


@pytest.mark.parametrize("shared", [False, True])
def test_the_likelihood_ratio_is_that_of_fitted_normals(shared):
    rng = np.random.default_rng(6)
    inside = rng.random((40, 25)) < 0.5
    shadows, target = rng.normal(inside * 2.0, 1.5), rng.normal(size=25)
    found = likelihood_ratio(*map(torch.from_numpy, (target, shadows, inside)), shared=shared)
    pools = [
        [column[chosen] for column, chosen in zip(shadows.T, side.T, strict=True)]
        for side in (inside, ~inside)
    ]
    logs = []
    for pool in pools:
        each = [column.var(ddof=1) for column in pool]
        one = np.average(each, weights=[len(column) - 1 for column in pool])
        logs.append(
            [
                stats.norm.logpdf(t, c.mean(), math.sqrt(one if shared else v))
                for t, c, v in zip(target, pool, each, strict=True)
            ]
        )
    assert found == pytest.approx(torch.tensor(logs[0]) - torch.tensor(logs[1]))


def test_the_offline_ratio_needs_no_shadow_with_the_row():
    shadows = torch.tensor([[0.0, 1.0], [2.0, 1.5], [4.0, 0.5]])
    found = likelihood_ratio(torch.tensor([4.0, 1.0]), shadows, torch.zeros(3, 2, dtype=torch.bool))
    assert found == pytest.approx(torch.tensor([1.0, 0.0]))


# --- a real training: 64 -> 128 -> 10 on scikit-learn's digits


def network(params, x):
    return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def trained(x, y, *, steps, lr, sigma=None, seed=0):
    """Full-batch descent from zero-mean weights; with sigma: gradients clipped to 1 each, and noise."""
    g = torch.Generator().manual_seed(seed)
    params = {"w1": torch.randn(64, 128, generator=g) / 8, "b1": torch.zeros(128)}
    params |= {"w2": torch.randn(128, 10, generator=g) / 11, "b2": torch.zeros(10)}
    if sigma is None:
        params = {name: value.requires_grad_() for name, value in params.items()}
        adam = torch.optim.Adam(params.values(), lr=lr)
        for _ in range(steps):
            adam.zero_grad()
            cross_entropy(network(params, x), y).backward()
            adam.step()
        return {name: value.detach() for name, value in params.items()}

    def loss(params, x, y):
        return cross_entropy(network(params, x), y)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    for _ in range(steps):
        grads = each(params, x, y)
        norms = torch.stack([leaf.flatten(1).norm(dim=1) for leaf in grads.values()]).norm(dim=0)
        factor = (1 / norms).clamp(max=1)
        for name, leaf in grads.items():
            total = torch.einsum("n...,n->...", leaf, factor)
            total += sigma * torch.randn(leaf.shape[1:], generator=g)
            params[name] = params[name] - lr * total / len(y)
    return params


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])


@pytest.mark.parametrize("private", [False, True])
def test_canaries_of_a_real_training(digits, private):
    """1,000 digits with wrong labels, each in by a coin: a plain training gives them away, DP-SGD does not."""
    x, y = digits
    m, steps = 1000, 20
    rng = np.random.default_rng(1)
    wrong = y.clone()
    wrong[:m] = (y[:m] + torch.from_numpy(rng.integers(1, 10, m))) % 10
    included = canaries.coins(m, KEY)
    rows = torch.cat([included, torch.ones(len(y) - m, dtype=torch.bool)])
    mu = bounds.mu_of(1.0, DELTA)
    how = (
        {"steps": steps, "lr": 2.0, "sigma": math.sqrt(steps) / mu} if private else {"steps": 200, "lr": 0.03}
    )
    params = trained(x[rows], wrong[rows], **how)
    scores = -cross_entropy(network(params, x[:m]), wrong[:m], reduction="none")
    found = one_run(scores, included, promised=1.0, delta=DELTA, curve=bounds.gaussian(mu))
    assert found.violated is not private
    assert found.lower_bound < 1 if private else found.lower_bound > 3


def test_likelihood_ratios_find_more_members_than_losses_do(digits):
    """Of a model that overfits 800 of 1,600 digits. Carlini et al. 2022: most so at low rates of false alarms."""
    x, y = (each[:1600] for each in digits)
    inside = torch.from_numpy(np.random.default_rng(2).random((13, 1600)).argsort(0) < 6)
    logits = [
        network(trained(x[rows], y[rows], steps=60, lr=0.03, seed=k), x) for k, rows in enumerate(inside)
    ]
    values = torch.stack([confidence(each, y) for each in logits])
    ratio = likelihood_ratio(values[0], values[1:], inside[1:], shared=True)
    loss = -cross_entropy(logits[0], y, reduction="none")
    by_ratio, by_loss = (membership(s[inside[0]], s[~inside[0]], delta=DELTA) for s in (ratio, loss))
    assert by_ratio.measures["AUC"] > by_loss.measures["AUC"] > 0.5
    assert by_ratio.measures["TPR at FPR 0.01"] > 2 * by_loss.measures["TPR at FPR 0.01"]


# --- the last layer, and inversion


def test_a_linear_layer_with_a_bias_gives_its_input_away_exactly():
    """Phong et al. 2017: dL/dW = dL/db x^T."""
    x = torch.randn(1, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = torch.nn.Linear(30, 5).double()
    cross_entropy(layer(x), torch.tensor([3])).backward()
    assert linear_inputs(layer.weight.grad, layer.bias.grad) == pytest.approx(x[0], rel=1e-12)
    assert infer_label(layer.bias.grad) == 3


def test_label_counts_are_exact_where_the_predictions_are_known():
    g = torch.Generator().manual_seed(2)
    for classes, batch in ((10, 32), (3, 7), (100, 1)):
        logits = torch.randn(batch, classes, generator=g).requires_grad_()
        y = torch.randint(classes, (batch,), generator=g)
        (slope,) = torch.autograd.grad(cross_entropy(logits, y), logits)
        found = label_counts(slope.sum(0), batch, logits.detach().softmax(1).mean(0))
        assert found.tolist() == torch.bincount(y, minlength=classes).tolist()


def test_label_counts_of_a_real_client_before_training(digits):
    """A client's first gradient from a model that predicts about uniformly: at most one row in eight is wrong."""
    x, y = digits
    params = {name: value.requires_grad_() for name, value in trained(x, y, steps=0, lr=0.1).items()}
    for k in range(5):
        rows = slice(64 * k, 64 * k + 64)
        (slope,) = torch.autograd.grad(cross_entropy(network(params, x[rows]), y[rows]), params["b2"])
        apart = label_counts(slope, 64) - torch.bincount(y[rows], minlength=10)
        assert int(apart.abs().sum()) / 2 <= 8


@pytest.fixture(scope="module")
def attacked(real_data):
    """A digit of MNIST, a small smooth network before training, and the gradient that its client sends."""
    from coterie.data import DATASETS

    train = DATASETS["mnist"](folders=(real_data,)).train
    x, y = train.x[:1].float() / 255, train.y[:1]
    with seeded(KEY):
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 5, 2, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(1568, 10)
        )
    gradient = gradient_of(
        lambda params, inputs, labels: cross_entropy(functional_call(net, params, (inputs,)), labels),
        dict(net.named_parameters()),
    )
    return x, y, gradient, {name: leaf.detach() for name, leaf in gradient(x, y).items()}


def protected(sent, epsilon):
    """One update, clipped to norm 1 and noised for this epsilon at DELTA."""
    vector, g = canaries.flat(sent), torch.Generator().manual_seed(3)
    noise = torch.randn(vector.shape, generator=g) / bounds.mu_of(epsilon, DELTA)
    return canaries.like(vector / vector.norm().clamp(min=1) + noise, sent)


def test_a_digit_comes_out_of_an_unprotected_gradient(attacked):
    x, y, gradient, sent = attacked
    leaked = deep_leakage(gradient, sent, x.shape, 10, key=KEY)
    assert leaked.labels.argmax(1).tolist() == y.tolist()
    assert images.psnr(leaked.inputs, x) > 40
    label = torch.tensor([infer_label(sent["3.bias"])])
    assert label.tolist() == y.tolist()
    turned = inverting(gradient, sent, x.shape, label, key=KEY, steps=150)
    assert images.psnr(turned.inputs, x) > 25
    assert images.ssim(turned.inputs, x) > 0.9


@pytest.mark.parametrize("epsilon", [1, 8])
def test_no_digit_comes_out_of_a_clipped_and_noised_update(attacked, epsilon):
    """Even told the label: below 10 dB nothing is to be seen; an all-grey image has 7."""
    x, y, gradient, sent = attacked
    noised = protected(sent, epsilon)
    leaked = deep_leakage(gradient, noised, x.shape, 10, key=KEY, labels=y, steps=3)
    turned = inverting(gradient, noised, x.shape, y, key=KEY, steps=150)
    for found in (leaked, turned):
        assert images.psnr(found.inputs.clamp(0, 1), x) < 10
        assert images.ssim(found.inputs.clamp(0, 1), x) < 0.3


def test_clipping_alone_hides_nothing_from_the_cosine(attacked):
    x, y, gradient, sent = attacked
    clipped = {name: leaf * 0.01 for name, leaf in sent.items()}
    assert images.psnr(inverting(gradient, clipped, x.shape, y, key=KEY, steps=100).inputs, x) > 20


# --- images and records


def test_psnr_and_ssim_in_closed_form():
    a, b = torch.full((1, 16, 16), 0.3), torch.full((1, 16, 16), 0.5)
    assert images.psnr(a, a) == math.inf
    assert images.psnr(a, b) == pytest.approx(10 * math.log10(1 / 0.2**2), abs=1e-5)
    assert images.ssim(a, a) == pytest.approx(1)
    assert images.ssim(a, b) == pytest.approx((2 * 0.15 + 1e-4) / (0.09 + 0.25 + 1e-4), abs=1e-6)
    board = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).double()[None]
    assert images.ssim(board, 1 - board) == pytest.approx(-(0.5 - 9e-4) / (0.5 + 9e-4), abs=1e-3)


def test_a_png_is_read_back_by_another_library():
    from matplotlib.image import imread

    image = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    read = imread(io.BytesIO(images.png(image)))
    assert torch.from_numpy(read) == pytest.approx(
        torch.cat(list(image), 2).permute(1, 2, 0), abs=0.5 / 255 + 1e-6
    )
    assert imread(io.BytesIO(images.png(image[0, :1]))).shape == (5, 7)


def test_a_record_is_plain_json_and_html():
    audit = Audit(
        kind="canaries<", promised=1.0, lower_bound=2.5, delta=DELTA, measures={"AUC": 0.9, "PSNR": math.inf}
    )
    told = json.loads(json.dumps(audit.to_json(), allow_nan=False))
    assert told["verdict"] == "the promise is broken"
    assert (told["promised"], told["lower_bound"], told["measures"]) == (1.0, 2.5, {"AUC": 0.9, "PSNR": None})
    page = to_html([audit, Audit(kind="labels")], {"a digit": torch.rand(1, 8, 8)})
    assert "canaries&lt;" in page
    assert "data:image/png;base64," in page
    assert Audit(kind="labels").verdict == "nothing was promised"
    assert Audit(kind="x", promised=3.0, lower_bound=2.9).verdict == "no violation found"
    assert Audit(kind="x", promised=3.0, lower_bound=0.1, refuted=True).violated
    ElementTree.fromstring(f"<div>{page}</div>")

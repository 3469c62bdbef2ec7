"""What audits find in honest and in broken mechanisms, and what inversion rebuilds, in full.

    python benchmarks/audit.py [seeds]

Needs MNIST in COTERIE_DATA for the last part.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from coterie.core import derive, seeded
from coterie.data import DATASETS
from coterie.privacy.audits import (
    Audit,
    bounds,
    canaries,
    deep_leakage,
    gradient_of,
    infer_label,
    inverting,
    many_runs,
    one_run,
)
from coterie.privacy.audits.images import psnr, ssim

torch.set_num_threads(1)  # the tensors are small
SEEDS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
DELTA, M, RUNS, DIGITS = 1e-5, 10_000, 10_000, 5


def gauss(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def simple(factor: float) -> Callable[[float, int], Audit]:
    """The sum of M orthogonal canaries with `factor` of the noise that was promised."""

    def audit(epsilon: float, seed: int) -> Audit:
        mu = bounds.mu_of(epsilon, DELTA)
        included = canaries.coins(M, derive(seed, "coins"))
        released = included.double() + factor / mu * gauss(seed, M)
        curve = bounds.gaussian(mu)
        return one_run(released, included, promised=epsilon, delta=DELTA, curve=curve)

    return audit


def reused(epsilon: float, seed: int) -> Audit:
    """Three rounds, canaries in the first, the noise of the first again in the third."""
    mu = bounds.mu_of(epsilon, DELTA)
    included = canaries.coins(1000, derive(seed, "coins"))
    noise = gauss(seed, 3, 1000) / mu
    noise[2] = noise[0]
    released = noise + torch.stack([included, included & False, included & False]).double()
    scores = canaries.matched(released, torch.eye(1000), torch.tensor([[1.0, 0, 0]]).expand(1000, 3))
    return one_run(scores, included, promised=epsilon, delta=DELTA, curve=bounds.gaussian(mu))


def single(norm: float, factor: float = 1.0) -> Callable[[float, int], Audit]:
    """One canary of this norm after what should have clipped it to 1, in RUNS runs with it and without."""

    def audit(epsilon: float, seed: int) -> Audit:
        mu = bounds.mu_of(epsilon, DELTA)
        absent, present = factor / mu * gauss(seed, 2, RUNS)
        return many_runs(norm + present, absent, promised=epsilon, delta=DELTA, mu=mu)

    return audit


AUDITS: dict[str, Callable[[float, int], Audit]] = {
    "one run, honest": simple(1.0),
    "one run, noise off": simple(0.0),
    "one run, noise halved": simple(0.5),
    "one run, seed reused": reused,
    "many runs, honest": single(1.0),
    "many runs, noise halved": single(1.0, 0.5),
    "many runs, clip skipped": single(10.0),
}
print(
    f"{SEEDS} seeds; confidence 95 %; delta {DELTA:g}; {M:,} canaries, or {RUNS:,} runs with and without one"
)
print(f"{'mechanism':26}{'promised':>9}{'at least (median, most)':>26}{'if Gaussian':>13}{'caught':>9}")
for name, audit in AUDITS.items():
    for epsilon in (1.0, 4.0, 8.0):
        found = [audit(epsilon, seed) for seed in range(SEEDS)]
        lower = [each.lower_bound or 0.0 for each in found]
        by_mu = [bounds.epsilon_of(each.measures["mu at least, if Gaussian"], DELTA) for each in found]
        caught = sum(each.violated for each in found)
        print(
            f"{name:26}{epsilon:9g}{statistics.median(lower):18.2f}{max(lower):8.2f}"
            f"{statistics.median(by_mu):13.2f}{caught:6}/{SEEDS}"
        )

train = DATASETS["mnist"]().train
with seeded(derive(0, "network")):
    net = nn.Sequential(nn.Conv2d(1, 8, 5, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(1568, 10))
gradient = gradient_of(
    lambda params, inputs, labels: cross_entropy(functional_call(net, params, (inputs,)), labels),
    dict(net.named_parameters()),
)
print(f"\n{'MNIST, one update of n rows':34}{'attack':>10}{'PSNR median, dB':>17}{'SSIM':>7}{'labels':>9}")
for rows, epsilon in ((1, math.inf), (4, math.inf), (1, 1000.0), (1, 100.0), (1, 8.0), (1, 1.0)):
    quality: dict[str, list[tuple[float, float]]] = {"DLG": [], "cosine": []}
    right = 0
    for k in range(DIGITS):
        x, y = train.x[k * rows : (k + 1) * rows].float() / 255, train.y[k * rows : (k + 1) * rows]
        sent = {each: leaf.detach() for each, leaf in gradient(x, y).items()}
        if epsilon < math.inf:
            vector = canaries.flat(sent)
            noise = gauss(k, len(vector)).float() / bounds.mu_of(epsilon, DELTA)
            sent = canaries.like(vector / vector.norm().clamp(min=1) + noise, sent)
        right += rows == 1 and infer_label(sent["3.bias"]) == int(y)
        key = derive(k, "attack")
        steps = 20 if epsilon == math.inf else 5
        leaked = deep_leakage(gradient, sent, tuple(x.shape), 10, key=key, labels=y, steps=steps)
        turned = inverting(gradient, sent, tuple(x.shape), y, key=key, steps=200)
        for attack, got in (("DLG", leaked.inputs.clamp(0, 1)), ("cosine", turned.inputs)):
            quality[attack].append((psnr(got, x), ssim(got, x)))
    what = f"n = {rows}, " + (
        "unprotected" if epsilon == math.inf else f"clip and noise, epsilon {epsilon:g}"
    )
    for attack, pairs in quality.items():
        decibel, alike = (statistics.median(each) for each in zip(*pairs, strict=True))
        labels = f"{right}/{DIGITS}" if rows == 1 else ""
        print(f"{what:34}{attack:>10}{decibel:17.1f}{alike:7.2f}{labels:>9}")

"""Gradient inversion: search for the inputs whose gradient is the one that was sent.

An attack takes `gradient(inputs, labels) -> Params`, differentiable once more (`gradient_of` makes one), and
what a client sent, in the same form: params named as the model's. It knows the model, as the server does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softmax

from coterie.core.seeds import Key, derive, rng
from coterie.core.types import Params

Gradient = Callable[[Tensor, Tensor], Params]  # inputs [n, ...], labels [n] or probabilities [n, classes]


class Reconstruction(NamedTuple):
    """inputs [n, ...]; labels: indices [n], or probabilities [n, classes]; distance: what was minimised."""

    inputs: Tensor
    labels: Tensor
    distance: float


def gradient_of(loss: Callable[[Params, Tensor, Tensor], Tensor], params: Params) -> Gradient:
    """The gradient of a mean loss(params, inputs, labels) with respect to params, itself differentiable."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}

    def gradient(inputs: Tensor, labels: Tensor) -> Params:
        made = torch.autograd.grad(loss(leaves, inputs, labels), list(leaves.values()), create_graph=True)
        return dict(zip(leaves, made, strict=True))

    return gradient


def squared(found: Params, sent: Params) -> Tensor:
    """Squared distance of two gradients, of deep leakage from gradients."""
    return torch.stack([((found[name] - sent[name]) ** 2).sum() for name in sent]).sum()


def cosine(found: Params, sent: Params) -> Tensor:
    """1 - cosine of two gradients, of inverting gradients: the norm, which training lowers, says nothing."""
    pairs = [(found[name], sent[name]) for name in sent]
    inner, left, right = (
        torch.stack([(x * y).sum() for x, y in each]).sum()
        for each in (pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs])
    )
    return 1 - inner / (left * right).clamp(min=1e-30).sqrt()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, across plus down; images [..., H, W]."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def deep_leakage(
    gradient: Gradient,
    sent: Params,
    shape: tuple[int, ...],
    classes: int,
    *,
    key: Key,
    labels: Tensor | None = None,
    steps: int = 20,
    restarts: int = 1,
) -> Reconstruction:
    """Deep leakage from gradients (Zhu, Liu, Han 2019, arXiv:1906.08935): L-BFGS on inputs and soft labels.

    shape: [n, ...] of the inputs. labels: class indices [n] where known (iDLG), else they are searched for
    too. Needs a loss that is smooth twice (sigmoid, tanh, GELU). The best of the restarts. steps: of L-BFGS,
    each with up to 20 gradients.
    """
    tries = (_leaked(gradient, sent, shape, classes, derive(key, i), labels, steps) for i in range(restarts))
    return min(tries, key=lambda found: found.distance)


def _leaked(
    gradient: Gradient,
    sent: Params,
    shape: tuple[int, ...],
    classes: int,
    key: Key,
    labels: Tensor | None,
    steps: int,
) -> Reconstruction:
    inputs = _start(shape, key, sent).requires_grad_()
    soft = _start((shape[0], classes), derive(key, "labels"), sent).requires_grad_()
    free = [inputs] if labels is not None else [inputs, soft]
    search = torch.optim.LBFGS(free, lr=1.0, max_iter=20, line_search_fn="strong_wolfe")

    def distance() -> Tensor:
        found = squared(gradient(inputs, softmax(soft, dim=-1) if labels is None else labels), sent)
        for leaf, slope in zip(free, torch.autograd.grad(found, free), strict=True):
            leaf.grad = slope
        return found.detach()

    last = float("inf")
    for _ in range(steps):
        last = float(search.step(distance))  # type: ignore[no-untyped-call]
    return Reconstruction(inputs.detach(), softmax(soft, -1).detach() if labels is None else labels, last)


def inverting(
    gradient: Gradient,
    sent: Params,
    shape: tuple[int, ...],
    labels: Tensor,
    *,
    key: Key,
    variation: float = 1e-3,
    steps: int = 500,
    lr: float = 0.1,
    box: tuple[float, float] = (0.0, 1.0),
    restarts: int = 1,
) -> Reconstruction:
    """Inverting gradients (Geiping et al. 2020, arXiv:2003.14053): Adam on signs, cosine and total variation.

    labels: class indices [n], from `infer_label` or `label_counts`. variation: weight of the total variation.
    box: inputs are kept within these limits. The rate falls tenfold after 3/8, 5/8 and 7/8 of the steps.
    """

    def tried(key: Key) -> Reconstruction:
        inputs = _start(shape, key, sent).mul(0.1).add(sum(box) / 2).clamp(*box).requires_grad_()
        search = torch.optim.Adam([inputs], lr=lr * (box[1] - box[0]))
        marks = [steps * k // 8 for k in (3, 5, 7)]
        falling = torch.optim.lr_scheduler.MultiStepLR(search, marks, 0.1)
        best, least = inputs.detach().clone(), float("inf")
        for _ in range(steps):
            apart = cosine(gradient(inputs, labels), sent) + variation * total_variation(inputs)
            if apart.item() < least:
                best, least = inputs.detach().clone(), apart.item()
            inputs.grad = torch.autograd.grad(apart, inputs)[0].sign()
            search.step()
            falling.step()
            with torch.no_grad():
                inputs.clamp_(*box)
        return Reconstruction(best, labels, least)

    return min((tried(derive(key, i)) for i in range(restarts)), key=lambda found: found.distance)


def _start(shape: tuple[int, ...], key: Key, sent: Params) -> Tensor:
    some = next(iter(sent.values()))
    return torch.from_numpy(rng(key).standard_normal(shape)).to(some)

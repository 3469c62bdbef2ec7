"""Functional optimisers, for clients and servers alike: a pure `init` and `update` over trees.

`updates` are added to the params, so they already carry the minus sign. Nothing here branches on a
tensor's value, so one `update` runs under `torch.func.vmap` for many clients at once, and `lr` may be a
0-d tensor with another value for each of them (checking that one is left to its maker).

The server optimisers of FedOpt (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2) are `adagrad`, `adam`
and `yogi` with `eps=tau`, `initial=tau**2` and `bias_correction=False`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coterie.core.errors import ConfigError
from coterie.core.trees import leaves, map_tree, zeros_like
from coterie.core.types import Optimizer, Params, Tree

_RANGES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "lr": (lambda x: x >= 0, ">= 0", "0.1 is a common start for sgd, 0.001 for the adaptive ones"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)", "0.9 is common, 0 turns it off"),
    "beta1": (lambda x: 0 <= x < 1, "in [0, 1)", "0.9 is common, 0 turns momentum off"),
    "beta2": (lambda x: 0 <= x < 1, "in [0, 1)", "0.999 is common, 0.99 on a server"),
    "eps": (lambda x: x >= 0, ">= 0", "on a server this is tau, and 0.001 is common"),
    "initial": (lambda x: x >= 0, ">= 0", "on a server this is tau ** 2"),
    "weight_decay": (lambda x: x >= 0, ">= 0", "0 turns it off, 0.0001 is mild"),
}


def _check(optimizer: str, **options: float | Tensor) -> None:
    for name, value in options.items():
        if isinstance(value, Tensor):
            continue
        fits, rule, hint = _RANGES[name]
        if not (isinstance(value, int | float) and math.isfinite(value) and fits(value)):
            raise ConfigError(f"{optimizer}({name}={value!r}): {name} must be a number {rule}", hint)


def _in_type_of(leaf: Tensor, factor: float | Tensor) -> float | Tensor:
    """Keep a 0-d factor from promoting 0-d leaves."""
    return factor.to(leaf.dtype) if isinstance(factor, Tensor) else factor


def _decayed(grads: Params, params: Params, weight_decay: float) -> Params:
    """Gradient of the loss plus weight_decay / 2 * |params|^2."""
    return map_tree(lambda g, x: g + weight_decay * x, grads, params) if weight_decay else grads


def sgd(
    lr: float | Tensor, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Stochastic gradient descent, as torch.optim.SGD without dampening.

    b <- momentum * b + g, starting from b = g; then x <- x - lr * b, or for Nesterov (Sutskever et al.
    2013) x <- x - lr * (g + momentum * b). Raises ConfigError for a value out of range.
    """
    _check("sgd", lr=lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and not momentum:
        raise ConfigError(
            "sgd(nesterov=True, momentum=0): nesterov looks ahead along the momentum", "0.9 is common"
        )

    def init(params: Params) -> Tree:
        return {"momentum": zeros_like(params)} if momentum else {}

    def update(grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        step = grads = _decayed(grads, params, weight_decay)
        if momentum:
            step = buffer = map_tree(lambda b, g: momentum * b + g, state["momentum"], grads)
            state = {"momentum": buffer}
            if nesterov:
                step = map_tree(lambda g, b: g + momentum * b, grads, buffer)
        return map_tree(lambda s: -_in_type_of(s, lr) * s, step), state

    return Optimizer(init, update)


def _adaptive(
    name: str,
    second_moment: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    eps: float,
    initial: float,
    beta2: float = 0.0,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    bias_correction: bool = False,
) -> Optimizer:
    """m <- beta1 m + (1 - beta1) g;  v <- second_moment(v, g);  x <- x - lr m / (sqrt(v) + eps).

    bias_correction: divide m and v by 1 - beta ** steps (Kingma & Ba 2015, section 3).
    decoupled: shrink the params by lr * weight_decay instead of adding the decay to g (AdamW).
    """
    _check(name, lr=lr, beta1=beta1, beta2=beta2, eps=eps, initial=initial, weight_decay=weight_decay)

    def init(params: Params) -> Tree:
        state = {"v": map_tree(lambda x: torch.full_like(x, initial), params)}
        if beta1:
            state["m"] = zeros_like(params)
        if bias_correction:
            device = next((leaf.device for leaf in leaves(params)), None)
            state["steps"] = torch.zeros((), dtype=torch.int64, device=device)
        return state

    def update(grads: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        if not decoupled:
            grads = _decayed(grads, params, weight_decay)
        after = {"v": map_tree(second_moment, state["v"], grads)}
        m = grads
        if beta1:
            m = after["m"] = map_tree(lambda m, g: torch.lerp(m, g, 1 - beta1), state["m"], grads)
        m_factor: float | Tensor = 1.0
        v_factor: float | Tensor = 1.0
        if bias_correction:
            steps = after["steps"] = state["steps"] + 1
            exponent = steps.double()  # in float32 the first 1 - 0.999 ** steps lose four digits
            m_factor, v_factor = 1 - beta1**exponent, torch.sqrt(1 - beta2**exponent)

        def step(m: Tensor, v: Tensor, x: Tensor) -> Tensor:
            rate = _in_type_of(x, lr)
            scale = torch.sqrt(v) / _in_type_of(x, v_factor) + eps
            moved = -rate / _in_type_of(x, m_factor) * m / scale
            return moved - rate * weight_decay * x if decoupled else moved

        return map_tree(step, m, after["v"], params), after

    return Optimizer(init, update)


def _moving_square(beta2: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda v, g: torch.lerp(v, g * g, 1 - beta2)


def adam(
    lr: float | Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    initial: float = 0.0,
) -> Optimizer:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1), as torch.optim.Adam.

    v <- beta2 v + (1 - beta2) g^2, starting from `initial`; weight_decay * params is added to g.
    Raises ConfigError for a value out of range.
    """
    return _adaptive(
        "adam",
        _moving_square(beta2),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        initial=initial,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
    )


def adamw(
    lr: float | Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    initial: float = 0.0,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101), as torch.optim.AdamW.

    Each step also takes lr * weight_decay * params away. Raises ConfigError for a value out of range.
    """
    return _adaptive(
        "adamw",
        _moving_square(beta2),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        initial=initial,
        weight_decay=weight_decay,
        decoupled=True,
        bias_correction=bias_correction,
    )


def adagrad(
    lr: float | Tensor,
    *,
    eps: float = 1e-10,
    initial: float = 0.0,
    weight_decay: float = 0.0,
    beta1: float = 0.0,
) -> Optimizer:
    """Adagrad (Duchi et al. 2011), as torch.optim.Adagrad without lr decay: v <- v + g^2.

    beta1: momentum on the gradient, which FedAdagrad has and Adagrad has not.
    Raises ConfigError for a value out of range.
    """
    return _adaptive(
        "adagrad",
        lambda v, g: v + g * g,
        lr=lr,
        beta1=beta1,
        eps=eps,
        initial=initial,
        weight_decay=weight_decay,
    )


def yogi(
    lr: float | Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-3,
    initial: float = 1e-6,
    bias_correction: bool = True,
) -> Optimizer:
    """Yogi (Zaheer et al. 2018, "Adaptive Methods for Nonconvex Optimization", Algorithm 2).

    v <- v - (1 - beta2) sign(v - g^2) g^2: a step moves v by at most (1 - beta2) g^2, however large v is. The
    paper's algorithm has no bias correction; implementations commonly add Adam's.
    Raises ConfigError for a value out of range.
    """

    def second_moment(v: Tensor, g: Tensor) -> Tensor:
        square = g * g
        return v - (1 - beta2) * torch.sign(v - square) * square

    return _adaptive(
        "yogi",
        second_moment,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        initial=initial,
        bias_correction=bias_correction,
    )


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "adagrad": adagrad,
    "yogi": yogi,
}

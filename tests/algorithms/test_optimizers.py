import math

import numpy as np
import pytest
import torch
from torch.func import vmap

from coterie.algorithms.optimizers import OPTIMIZERS, adagrad, adam, adamw, sgd, yogi
from coterie.core.errors import ConfigError
from coterie.core.seeds import derive, rng
from coterie.core.trees import leaves, map_tree

STEPS = 100


def problem(dtype=torch.float64):
    """A linear regression over a nested tree: start, and a function params -> gradient."""
    draw = rng(derive(3, "optimizer-problem"))
    inputs = torch.tensor(draw.normal(size=(20, 6)), dtype=dtype)
    targets = torch.tensor(draw.normal(size=(20, 2)), dtype=dtype)
    start = {
        "layer": {"weight": torch.tensor(draw.normal(size=(6, 2)), dtype=dtype)},
        "bias": torch.tensor(draw.normal(size=2), dtype=dtype),
    }

    def gradient(params):
        error = (inputs @ params["layer"]["weight"] + params["bias"] - targets) / len(inputs)
        return {"layer": {"weight": inputs.T @ error}, "bias": error.sum(0)}

    return start, gradient


def descend(optimizer, params, gradient, steps=STEPS):
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(gradient(params), state, params)
        params = map_tree(torch.add, params, updates)
    return params


def descend_torch(make, params, gradient):
    params = map_tree(lambda leaf: torch.nn.Parameter(leaf.clone()), params)
    optimizer = make(leaves(params))
    for _ in range(STEPS):
        grads = gradient(map_tree(torch.Tensor.detach, params))
        for leaf, grad in zip(leaves(params), leaves(grads), strict=True):
            leaf.grad = grad
        optimizer.step()
    return map_tree(torch.Tensor.detach, params)


def assert_close(ours, theirs, relative):
    flat, expected = (torch.cat([leaf.reshape(-1) for leaf in leaves(tree)]) for tree in (ours, theirs))
    assert flat.dtype == expected.dtype
    assert torch.linalg.norm(flat - expected) <= relative * torch.linalg.norm(expected)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (sgd, torch.optim.SGD, {"lr": 0.1}),
        (sgd, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02}),
        (sgd, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        (sgd, torch.optim.SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
        (adam, torch.optim.Adam, {"lr": 0.01}),
        (adam, torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}),
        (adam, torch.optim.Adam, {"lr": 0.01, "betas": (0.0, 0.9)}),
        (adamw, torch.optim.AdamW, {"lr": 0.01}),
        (adamw, torch.optim.AdamW, {"lr": 0.02, "betas": (0.5, 0.99), "weight_decay": 0.3}),
        (adagrad, torch.optim.Adagrad, {"lr": 0.1}),
        (adagrad, torch.optim.Adagrad, {"lr": 0.1, "initial": 0.3, "eps": 1e-3, "weight_decay": 0.05}),
    ],
)
def test_follows_torch_optim(ours, theirs, options, dtype, relative):
    start, gradient = problem(dtype)
    named = dict(options)
    if "betas" in named:
        named["beta1"], named["beta2"] = named.pop("betas")
    reference = dict(options)
    if "initial" in reference:
        reference["initial_accumulator_value"] = reference.pop("initial")
    expected = descend_torch(lambda params: theirs(params, **reference), start, gradient)
    assert_close(descend(ours(**named), start, gradient), expected, relative)


def numpy_problem():
    start, gradient = problem()
    shapes = [leaf.shape for leaf in leaves(start)]
    x = np.concatenate([leaf.numpy().ravel() for leaf in leaves(start)])

    def flat_gradient(x):
        split = np.split(x, [math.prod(shapes[0])])
        weight, bias = (
            torch.from_numpy(part).reshape(shape) for part, shape in zip(split, shapes, strict=True)
        )
        return np.concatenate(
            [g.numpy().ravel() for g in leaves(gradient({"layer": {"weight": weight}, "bias": bias}))]
        )

    return x, flat_gradient


@pytest.mark.parametrize("bias_correction", [False, True])
def test_yogi_follows_the_paper(bias_correction):
    lr, beta1, beta2, eps, initial = 0.02, 0.9, 0.99, 1e-3, 1e-6
    x, gradient = numpy_problem()
    m, v = np.zeros_like(x), np.full_like(x, initial)
    for t in range(1, STEPS + 1):
        g = gradient(x)
        m = beta1 * m + (1 - beta1) * g
        v = v - (1 - beta2) * np.sign(v - g**2) * g**2
        m_hat = m / (1 - beta1**t) if bias_correction else m
        v_hat = v / (1 - beta2**t) if bias_correction else v
        x = x - lr * m_hat / (np.sqrt(v_hat) + eps)
    ours = descend(
        yogi(lr, beta1=beta1, beta2=beta2, eps=eps, initial=initial, bias_correction=bias_correction),
        *problem(),
    )
    np.testing.assert_allclose(torch.cat([leaf.reshape(-1) for leaf in leaves(ours)]), x, rtol=1e-10)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("rule", ["adagrad", "adam", "yogi"])
def test_fedopt_follows_algorithm_2(rule, beta1):
    eta, beta2, tau = 0.03, 0.99, 1e-2
    x, gradient = numpy_problem()
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for _ in range(STEPS):
        delta = -gradient(x)  # the server's pseudo-gradient is -delta
        m = beta1 * m + (1 - beta1) * delta
        if rule == "adagrad":
            v = v + delta**2
        elif rule == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + eta * m / (np.sqrt(v) + tau)
    options = {} if rule == "adagrad" else {"beta2": beta2, "bias_correction": False}
    server = OPTIMIZERS[rule](eta, eps=tau, initial=tau**2, beta1=beta1, **options)
    ours = descend(server, *problem())
    np.testing.assert_allclose(torch.cat([leaf.reshape(-1) for leaf in leaves(ours)]), x, rtol=1e-10)


VARIANTS = {
    "momentum": lambda lr: sgd(lr, momentum=0.9, nesterov=True),
    "server-adam": lambda lr: adam(lr, beta1=0.0, bias_correction=False, eps=1e-2, initial=1e-4),
    "adagrad-momentum": lambda lr: adagrad(lr, beta1=0.5),
    **OPTIMIZERS,
}


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_vmap_over_clients_equals_a_loop(make):
    start, gradient = problem(torch.float32)
    rates = torch.tensor([0.01, 0.02, 0.05], dtype=torch.float64)  # another precision than the leaves
    clients = map_tree(
        lambda leaf: torch.stack([leaf, -leaf, 2 * leaf]), start | {"scale": torch.tensor(1.5)}
    )

    def with_scale(params):
        return gradient(params) | {"scale": params["scale"]}

    together = vmap(lambda params, lr: descend(make(lr), params, with_scale, 10))(clients, rates)
    for i, lr in enumerate(rates):
        alone = descend(make(float(lr)), map_tree(lambda leaf, i=i: leaf[i], clients), with_scale, 10)
        assert_close(map_tree(lambda leaf, i=i: leaf[i], together), alone, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_is_pure_and_keeps_the_type(make, rate, dtype):
    params = {"matrix": torch.ones(2, 3, dtype=dtype), "scalar": torch.ones((), dtype=dtype)}
    grads = map_tree(lambda leaf: 0.5 * leaf, params)
    optimizer = make(rate)
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params)
    before = map_tree(torch.clone, (grads, state, params))
    first, after = optimizer.update(grads, state, params)
    assert all(map(torch.equal, leaves((grads, state, params)), leaves(before)))
    again, _ = optimizer.update(grads, state, params)
    assert all(map(torch.equal, leaves(first), leaves(again)))
    assert [leaf.dtype for leaf in leaves(first)] == [dtype, dtype]
    assert [leaf.dtype for leaf in leaves(after)] == [leaf.dtype for leaf in leaves(state)]
    assert all((leaf < 0).all() for leaf in leaves(first))


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (sgd, {"lr": -0.1}, r"sgd\(lr=-0.1\)"),
        (sgd, {"lr": math.nan}, r"sgd\(lr=nan\)"),
        (sgd, {"lr": "0.1"}, r"sgd\(lr='0.1'\)"),
        (sgd, {"lr": 0.1, "momentum": 1.0}, r"sgd\(momentum=1.0\)"),
        (sgd, {"lr": 0.1, "momentum": -0.1}, r"sgd\(momentum=-0.1\)"),
        (sgd, {"lr": 0.1, "nesterov": True}, "nesterov"),
        (adam, {"lr": 0.1, "beta1": 1.0}, r"adam\(beta1=1.0\)"),
        (adam, {"lr": 0.1, "beta2": 1.5}, r"adam\(beta2=1.5\)"),
        (adamw, {"lr": 0.1, "weight_decay": -1}, r"adamw\(weight_decay=-1\)"),
        (adagrad, {"lr": 0.1, "initial": -1}, r"adagrad\(initial=-1\)"),
        (yogi, {"lr": 0.1, "eps": math.inf}, r"yogi\(eps=inf\)"),
    ],
)
def test_refuses_values_out_of_range(make, options, named):
    with pytest.raises(ConfigError, match=named) as caught:
        make(**options)
    assert caught.value.hint

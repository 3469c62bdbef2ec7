"""The GRU's kernels in C, and torch's way to do the same, against nn.GRU in float64, client by client."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from coterie.core import derive, native, rng
from coterie.trainers.layers import Layers
from coterie.trainers.recurrent import gru_backward, gru_forward

CLIENTS = 2
NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
FIRST = {"time": lambda x: x, "batch": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch):
    """Both ways to do it."""
    if request.param == "torch":
        monkeypatch.setattr(native, "fits", lambda *tensors: False)
    elif native.library() is None:
        pytest.skip("there is no C compiler here, or COTERIE_NATIVE=0")
    return request.param


def normal(*shape, seed=0):
    return torch.from_numpy(rng(derive(11, "gru", seed, *shape)).normal(size=shape)).float()


def drawn(size, rows, steps, inputs):
    """x, h, w, u and the biases of all clients."""
    weights = [(3 * size, inputs), (3 * size, size), (3 * size,), (3 * size,)]
    return [
        normal(CLIENTS, steps, rows, inputs),
        normal(CLIENTS, rows, size, seed=1),
        *(normal(CLIENTS, *shape, seed=2 + i) / size**0.5 for i, shape in enumerate(weights)),
    ]


def oracle(given, dhidden):
    """h_t and the gradients of what was given, of each client, by nn.GRU's autograd in float64."""
    made = []
    for x, h, *weights in zip(*(each.double() for each in given), strict=True):
        leaves = [each.clone().requires_grad_() for each in (x, h, *weights)]
        module = nn.GRU(x.shape[-1], h.shape[-1]).double()
        params = dict(zip(NAMES, leaves[2:], strict=True))
        hidden, _ = functional_call(module, params, (leaves[0], leaves[1].unsqueeze(0)))
        grads = torch.autograd.grad(hidden, leaves, dhidden[len(made)].double())
        made.append((hidden.detach(), *grads))
    return [torch.stack(each) for each in zip(*made, strict=True)]


def ours(given, dhidden, needs_x=True):
    hidden, gates = gru_forward(*given)
    return [hidden, *gru_backward(dhidden, hidden, gates, *given[:4], needs_x)]


def close(made, right):
    for one, other in zip(made, right, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=1e-5, atol=1e-5 * max(1, float(other.abs().max()))
        )


SIZES = [
    *itertools.product([128], [1, 10, 13, 32], [7], [8]),
    *itertools.product([5, 33], [1, 10, 13, 32], [1, 7], [8]),
    (128, 10, 1, 8), (128, 10, 20, 8), (33, 3, 60, 1), (16, 100, 2, 17), (33, 13, 7, 40), (64, 2, 3, 64),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_against_autograd_in_float64(way, sizes):
    given = drawn(*sizes)
    size, rows, steps, _ = sizes
    dhidden = normal(CLIENTS, steps, rows, size, seed=7)
    right = oracle(given, dhidden)
    for first, later in itertools.product(FIRST.values(), repeat=2):
        given[0] = first(given[0])
        made = ours(given, later(dhidden))
        close(made, right)
        if rows > 1 and steps > 1:
            assert made[0].stride(1) == given[0].stride(1) // given[0].shape[-1] * size  # in the order of x
            assert made[1].stride() == given[0].stride()


def test_the_gradient_of_the_input_is_made_only_when_asked_for(way):
    given, dhidden = drawn(5, 3, 4, 2), normal(CLIENTS, 4, 3, 5, seed=7)
    asked, not_asked = ours(given, dhidden), ours(given, dhidden, needs_x=False)
    assert not_asked[1].numel() == 0
    for one, other in zip(asked[2:], not_asked[2:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("factor", [30.0, 1e4, 1e30])
def test_saturated_gates_are_finite(way, factor):
    given = drawn(20, 3, 5, 4)
    given[0] *= factor
    hidden, gates = gru_forward(*given)
    right = oracle(given, torch.ones_like(hidden))
    torch.testing.assert_close(hidden.double(), right[0], rtol=1e-4, atol=1e-4)
    assert hidden.abs().max() <= float(given[1].abs().max()) + 1
    assert gates[..., :40].min() >= 0
    assert gates[..., :40].max() <= 1
    for each in gru_backward(torch.ones_like(hidden), hidden, gates, *given[:4], True):
        assert each.isfinite().all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_reaches_all_that_depends_on_it_and_nothing_else(way, wrong):
    given = drawn(20, 3, 5, 4)
    right = ours(given, torch.ones(CLIENTS, 5, 3, 20))
    given[2][0, 45, :] = 0  # of infinity times 0 comes NaN in one unit, and from it in all
    given[0][0, 2, 1, :] = wrong
    hidden, *grads = ours(given, torch.ones(CLIENTS, 5, 3, 20))
    assert hidden[0, 2, 1].isnan().any()
    assert hidden[0, 3:, 1].isnan().all()
    assert hidden[0, :2].isfinite().all()
    assert hidden[0, :, [0, 2]].isfinite().all()
    for name, each, fine in zip(("x", "h", "w", "u", "w_bias", "u_bias"), grads, right[1:], strict=True):
        assert each[0].isnan().any(), name
        torch.testing.assert_close(each[1], fine[1], rtol=0, atol=0)


def test_small_activations_keep_their_digits(way):
    """tanh(x) is x there; a form like 1 - 2 / (e^2x + 1) would lose all but a few digits."""
    given = [each * 1e-5 for each in drawn(20, 3, 5, 4)]
    hidden, _ = gru_forward(*given)
    right = oracle(given, torch.ones_like(hidden))[0]
    torch.testing.assert_close(hidden.double(), right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("asks_x", [True, False])
def test_two_layers_under_vmap(way, batch_first, asks_x):
    module = nn.GRU(3, 20, 2, batch_first=batch_first)
    params = {name: normal(CLIENTS, *p.shape, seed=name) / 4 for name, p in module.named_parameters()}
    x = normal(CLIENTS, 2, 5, 3)
    weights = normal(20)
    layers = Layers()

    def loss(given, x):
        outputs, last = functional_call(module, given["params"], given.get("x", x))
        return (outputs * outputs * weights).sum() + (last * weights).sum()

    def inside(given, x):
        with layers:
            return loss(given, x)

    given = {"params": params, **({"x": x} if asks_x else {})}
    made = vmap(grad(inside))(given, x)
    assert layers.used == {"gru"}
    module.double()
    for i in range(CLIENTS):
        mine = {"params": {name: p[i].double() for name, p in params.items()}}
        right = grad(loss)({**mine, **({"x": x[i].double()} if asks_x else {})}, x[i].double())
        for name, each in right["params"].items():
            torch.testing.assert_close(made["params"][name][i].double(), each, rtol=1e-4, atol=1e-5)
        if asks_x:
            torch.testing.assert_close(made["x"][i].double(), right["x"], rtol=1e-4, atol=1e-5)

"""Each batched layer under vmap of a gradient, against the stock function called client by client."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

from coterie.core import derive, rng
from coterie.trainers.layers import Layers

CLIENTS = 3


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(rng(derive(9, "layers", seed, *shape)).normal(size=shape)).to(dtype)


def results(function, given, cotangent):
    """Output, and the gradients of all floating inputs."""
    floats = {name for name, each in given.items() if each.is_floating_point()}

    def scalar(chosen, rest):
        out = function(**chosen, **rest)
        return (out * cotangent).sum(), out

    chosen = {name: each for name, each in given.items() if name in floats}
    rest = {name: each for name, each in given.items() if name not in floats}
    grads, out = grad(scalar, has_aux=True)(chosen, rest)
    return {"out": out, **grads}


def agree(function, given, *, shared=(), uses=None, tolerance=1e-12):
    """The function over stacked clients inside Layers, and plainly for each; same values, same gradients.

    shared: inputs that all clients have in common, in the batched call (their gradients are each client's).
    """
    rows = [{n: t if n in shared else t[i] for n, t in given.items()} for i in range(CLIENTS)]
    cotangent = normal(*function(**rows[0]).shape, seed=99)
    alone = [results(function, row, cotangent) for row in rows]
    layers = Layers()

    def inside(given):
        with layers:
            return results(function, given, cotangent)

    dims = {name: None if name in shared else 0 for name in given}
    together = vmap(inside, in_dims=(dims,))(given)
    for name, made in together.items():
        torch.testing.assert_close(
            made, torch.stack([each[name] for each in alone]), rtol=tolerance, atol=tolerance
        )
    if uses is not None:
        assert uses in layers.used
    return together


@settings(max_examples=30)
@given(
    n=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    shared=st.sampled_from([(), ("x",), ("w",)]),
)
def test_convolutions(n, stride, padding, dilation, groups, bias, shared):
    conv = F.conv1d if n == 1 else F.conv2d
    lead = {name: () if name in shared else (CLIENTS,) for name in ("x", "w")}
    given = {
        "x": normal(*lead["x"], 2, 4, *[7] * n),
        "w": normal(*lead["w"], 6, 4 // groups, *[3, 2][:n]),
        **({"b": normal(CLIENTS, 6)} if bias else {}),
    }
    agree(
        lambda x, w, b=None: conv(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups),
        given,
        shared=shared,
        uses="conv",
    )


def test_a_convolution_of_data_whose_gradient_nobody_asks_for():
    x, w = normal(CLIENTS, 2, 1, 6, 6), normal(CLIENTS, 3, 1, 3, 3)
    layers = Layers()

    def loss(w, x):
        with layers:
            return torch.tanh(F.conv2d(x, w, padding=1)).sum()

    made = vmap(grad(loss))(w, x)
    for i in range(CLIENTS):
        alone = grad(lambda w: torch.tanh(F.conv2d(x[i], w, padding=1)).sum())(w[i])  # noqa: B023
        torch.testing.assert_close(made[i], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ["same", "valid", (1, 0)])
def test_other_ways_to_pad(padding):
    agree(
        lambda x, w: F.conv2d(x, w, padding=padding),
        {"x": normal(CLIENTS, 2, 3, 6, 5), "w": normal(CLIENTS, 4, 3, 3, 3)},
    )


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 3, 2, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [(), ("x",), ("w",), ("w", "b")])
def test_linear(shape, bias, shared):
    given = {
        "x": normal(*(() if "x" in shared else (CLIENTS,)), *shape),
        "w": normal(*(() if "w" in shared else (CLIENTS,)), 5, 4),
        "b": normal(*(() if "b" in shared else (CLIENTS,)), 5),
    }
    if not bias:
        del given["b"]
    agree(lambda x, w, b=None: F.linear(x, w, b), given, shared=tuple(s for s in shared if s in given))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}])
@pytest.mark.parametrize("shared", [(), ("x",), ("w",)])
def test_embedding(options, shared):
    draw = rng(derive(9, "tokens"))
    given = {
        "x": torch.from_numpy(draw.integers(0, 6, size=(*(() if "x" in shared else (CLIENTS,)), 2, 5))),
        "w": normal(*(() if "w" in shared else (CLIENTS,)), 6, 4),
    }
    agree(lambda x, w: F.embedding(x, w, **options), given, shared=shared)


def assert_refused_or_right(function, given, shared):
    """What vmap has no rule for raises; it is not done wrongly."""
    try:
        layers = Layers()

        def inside(given):
            with layers:
                return results(function, given, 1.0)

        vmap(inside, in_dims=({name: None if name in shared else 0 for name in given},))(given)
    except (RuntimeError, NotImplementedError):
        return
    agree(function, given, shared=shared)


def test_a_row_number_beyond_the_table_is_refused_and_not_read_from_the_next_client():
    x, w = torch.tensor([[0, 1], [2, 6], [0, 0]]), normal(CLIENTS, 6, 4)

    def inside(x, w):
        with Layers():
            return F.embedding(x, w)

    with pytest.raises((IndexError, RuntimeError)):
        vmap(inside)(x, w)


def whole(*shape, seed=0):
    """Small whole numbers: plenty of ties, zeros and windows without a positive number."""
    return torch.from_numpy(rng(derive(9, "whole", seed, *shape)).integers(-3, 2, size=shape)).double()


POOLS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (2, 3), "stride": (2, 1), "ceil_mode": True},
    {"kernel_size": 2, "dilation": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
]


@pytest.mark.parametrize("options", POOLS)
@pytest.mark.parametrize("made", [normal, whole])
@pytest.mark.parametrize(
    "relu", [None, F.relu, torch.relu, lambda x: F.relu(x, inplace=True), nn.ReLU(), nn.ReLU(inplace=True)]
)
def test_max_pool_and_the_relu_before_it(options, made, relu):
    def function(x):
        x = x * 1.0
        return F.max_pool2d(x if relu is None else relu(x), **options)

    agree(function, {"x": made(CLIENTS, 2, 3, 7, 7)}, tolerance=0)


def test_a_relu_that_others_use_too():
    def function(x):
        y = F.relu(x * 1.0)
        return F.max_pool2d(y, 2) + y.mean()

    agree(function, {"x": whole(CLIENTS, 2, 3, 6, 6)})


def test_a_relu_of_one_layer_is_not_taken_for_that_of_another():
    agree(
        lambda x: F.max_pool2d(F.relu(x * 2.0), 2) + F.max_pool2d(F.relu(1 - x), 2) + F.max_pool2d(x, 2),
        {"x": whole(CLIENTS, 2, 3, 6, 6)},
    )


def test_max_pool_of_one_image_and_with_indices():
    agree(lambda x: F.max_pool2d(F.relu(x * 1.0), 2), {"x": whole(CLIENTS, 3, 6, 6)})
    agree(lambda x: F.max_pool2d(x, 2, return_indices=True)[0], {"x": normal(CLIENTS, 2, 3, 6, 6)})


@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 3, 4)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_of_padded_rows_is_batch_norm_of_the_others(shape, affine, tracked):
    """Output, gradients and running statistics; each client lacks other rows, which hold large numbers."""
    features = shape[0]
    counts = [6, 4, 2]
    mask = torch.stack([(torch.arange(6) < count).double() for count in counts])
    mask[1] = mask[1].roll(2)  # padding need not come last
    x = normal(CLIENTS, 6, *shape)
    x[mask == 0] = 1e3
    params = {"w": normal(CLIENTS, features), "b": normal(CLIENTS, features)} if affine else {}
    cotangent = normal(6, *shape, seed=5)
    before = {"m": normal(CLIENTS, features), "v": normal(CLIENTS, features).abs()} if tracked else {}

    def loss(given, after, cotangent):
        out = F.batch_norm(
            given["x"], after.get("m"), after.get("v"), given.get("w"), given.get("b"), True, 0.3, 1e-3
        )
        return (out * cotangent).sum(), (out, after)

    layers = Layers()

    def inside(given, buffers, mask):
        layers.mask = mask
        after = {name: value.clone() for name, value in buffers.items()}
        with layers:
            return grad(loss, has_aux=True)(given, after, cotangent * mask.view(-1, *[1] * len(shape)))

    grads, (out, after) = vmap(inside)({"x": x, **params}, before, mask)
    assert "batch_norm" in layers.used
    for i in range(CLIENTS):
        kept = mask[i] == 1
        given = {"x": x[i][kept], **{name: value[i] for name, value in params.items()}}
        buffers = {name: value[i].clone() for name, value in before.items()}
        theirs, (plain, running) = grad(loss, has_aux=True)(given, buffers, cotangent[kept])
        torch.testing.assert_close(out[i][kept], plain, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(grads["x"][i][kept], theirs["x"], rtol=1e-8, atol=1e-8)
        assert not grads["x"][i][~kept].any()
        for name in params:
            torch.testing.assert_close(grads[name][i], theirs[name], rtol=1e-9, atol=1e-9)
        for name in before:
            torch.testing.assert_close(after[name][i], running[name], rtol=1e-9, atol=1e-9)


def test_batch_norm_in_evaluation_reads_its_running_statistics():
    given = {"x": normal(CLIENTS, 6, 5), "m": normal(CLIENTS, 5), "v": normal(CLIENTS, 5).abs()}
    agree(lambda x, m, v: F.batch_norm(x, m.detach(), v.detach(), training=False), given)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("steps", [1, 5])
def test_gru(depth, batch_first, start, steps):
    module = nn.GRU(3, 4, depth, batch_first=batch_first).double()
    given = {name: normal(CLIENTS, *p.shape, seed=name) / 2 for name, p in module.named_parameters()}
    given["x"] = normal(CLIENTS, *((2, steps, 3) if batch_first else (steps, 2, 3)))
    if start:
        given["h"] = normal(CLIENTS, depth, 2, 4)

    def function(x, h=None, **params):
        outputs, last = functional_call(module, params, (x,) if h is None else (x, h))
        return torch.cat([outputs.flatten(), last.flatten()])

    agree(function, given, uses="gru", tolerance=1e-10)


@pytest.mark.parametrize("options", [{"bias": False}, {"bidirectional": True}])
def test_other_grus_are_left_to_torch_or_refused(options):
    module = nn.GRU(3, 4, **options).double()
    given = {name: normal(CLIENTS, *p.shape, seed=name) / 2 for name, p in module.named_parameters()}
    given["x"] = normal(CLIENTS, 5, 2, 3)
    assert_refused_or_right(lambda x, **params: functional_call(module, params, (x,))[0], given, ())


def kept(seed, *, p=0.5, calls=1, shape=(1, 4096), step=0):
    """Which of some ones survive, in each of several calls: [calls, *shape]."""
    layers = Layers()
    layers.seed = torch.tensor(seed + step)
    with layers:
        return torch.stack([F.dropout(torch.ones(shape), p) for _ in range(calls)]) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_keeps_the_mean(p):
    """5 standard deviations: less than one false alarm in a million."""
    layers = Layers()
    layers.seed = torch.tensor(12345)
    with layers:
        made = F.dropout(torch.ones(200, 1000), p)
    assert abs(float((made == 0).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / 200_000)
    assert set(made.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - p))}


def test_dropout_that_does_nothing_or_everything():
    x, layers = normal(2, 3), Layers()
    layers.seed = torch.tensor(1)
    with layers:
        assert torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.dropout(x, 0.5, training=False), x)
        assert not F.dropout(x, 1.0).any()


def test_draws_of_calls_seeds_and_places_are_unrelated():
    """Correlations of 4,096 coins: 5 standard deviations are 0.078."""
    seeds = [0, 1, 2, 3, 2**40, 2**62, 2**63 - 1]
    series = [each.flatten().double() for seed in seeds for each in kept(seed, calls=3)]
    for a, b in itertools.combinations(series, 2):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.078
    for each in series:  # neighbours too
        assert abs(float(torch.corrcoef(torch.stack([each[1:], each[:-1]]))[0, 1])) < 0.078


def test_draws_are_uniform():
    """The rate is right at every threshold: chi-square over 50 bins, false alarm below 1e-6."""
    survivors = [
        int(sum(kept(7919 * seed, p=p, shape=(1, 2000)).sum() for seed in range(10)))
        for p in np.arange(50) / 50
    ]
    counts = -np.diff([*survivors, 0])  # how many numbers fall in each fiftieth
    assert ((counts - 400) ** 2 / 400).sum() < 120


def test_a_rows_draws_do_not_depend_on_how_many_rows_there_are():
    assert torch.equal(kept(5, shape=(3, 7)), kept(5, shape=(8, 7))[:, :3])


def test_clients_draw_by_their_own_seed_whoever_is_beside_them():
    def inside(seed, x):
        layers = Layers()
        layers.seed = seed
        with layers:
            return F.dropout(x, 0.5)

    x = torch.ones(4, 2, 500)
    made = vmap(inside, randomness="different")(torch.tensor([1, 2, 3, 1]), x)
    assert torch.equal(made[0], made[3])
    assert not torch.equal(made[0], made[1])
    pair = vmap(inside, randomness="different")(torch.tensor([9, 2]), x[:2])
    assert torch.equal(pair[1], made[1])


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (lambda x, w: F.conv2d(x, w, padding=1), {"x": (2, 3, 6, 6), "w": (4, 3, 3, 3)}),
        (lambda x, w: F.linear(x, w, None), {"x": (5, 6), "w": (4, 6)}),
    ],
)
def test_bfloat16_is_near_and_returns_float32(function, given):
    given = {name: normal(CLIENTS, *shape, dtype=torch.float32) for name, shape in given.items()}
    layers = Layers(torch.bfloat16)

    def inside(given):
        with layers:
            return results(function, given, 1.0)

    made = vmap(inside)(given)
    for name, stacked in made.items():
        alone = torch.stack(
            [results(function, {n: t[i] for n, t in given.items()}, 1.0)[name] for i in range(CLIENTS)]
        )
        assert stacked.dtype == torch.float32
        assert 0 < float((stacked - alone).norm() / alone.norm()) < 0.02


@pytest.mark.parametrize(
    "function",
    [
        lambda w: F.linear(torch.tanh(w), w).sum(),
        lambda w: F.conv2d(torch.tanh(w).view(1, 1, 3, 3), w.view(1, 1, 3, 3)).sum(),
        lambda w: (F.embedding(torch.tensor([0, 1]), w) ** 3).sum(),
        lambda w: (F.max_pool2d(w.view(1, 1, 3, 3) ** 3, 2) ** 2).sum(),
    ],
)
def test_second_derivatives_are_refused_or_right(function):
    w = normal(CLIENTS, 3, 3)

    def inside(w):
        with Layers():
            return grad(lambda w: (grad(function)(w) ** 2).sum())(w)

    try:
        made = vmap(inside)(w)
    except (NotImplementedError, RuntimeError):
        return
    for i in range(CLIENTS):
        torch.testing.assert_close(made[i], grad(lambda w: (grad(function)(w) ** 2).sum())(w[i]))


def test_outside_a_function_mode_nothing_is_changed():
    x, w = normal(2, 3), normal(4, 3)
    with Layers() as layers:
        F.linear(x, w)
    before = set(layers.used)
    F.linear(x, w)
    assert layers.used == before == {"linear"}

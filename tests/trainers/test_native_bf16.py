"""The kernels in bfloat16 against float64 on inputs that were rounded to it before, and in training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coterie.algorithms import Local, fedavg
from coterie.core import Task, derive, native, rng, trees
from coterie.data import ClientData
from coterie.trainers import Problem, Vectorised, ops
from coterie.trainers.recurrent import gru_backward, gru_forward

pytestmark = pytest.mark.skipif(
    not native.has("linear_forward_bf16"), reason="no C compiler, or a processor without AVX512_BF16"
)
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def normal(*shape, seed=0):
    return torch.from_numpy(rng(derive(5, "bf16", seed, *shape)).normal(size=shape)).float()


def rounded(*tensors):
    """In float64, after rounding to bfloat16."""
    return [each.bfloat16().double() for each in tensors]


@pytest.mark.parametrize(
    ("clients", "rows", "inputs", "outputs"),
    [
        (1, 1, 1, 1),
        (2, 3, 5, 2),
        (3, 10, 784, 20),
        (2, 11, 33, 17),
        (1, 9, 1100, 27),
        (2, 47, 16, 9),
        (2, 48, 600, 33),
        (1, 131, 8, 65),
        (1, 301, 31, 16),
    ],
)
def test_linear_layers(clients, rows, inputs, outputs):
    x, w, b, dy = (
        normal(clients, rows, inputs),
        normal(clients, outputs, inputs, seed=1) / inputs**0.5,
        normal(clients, outputs, seed=2),
        normal(clients, rows, outputs, seed=3) / rows**0.5,
    )
    wide_x, wide_w, wide_dy = rounded(x, w, dy)
    expected = wide_x @ wide_w.mT + b.double().unsqueeze(1)
    torch.testing.assert_close(ops.linear_forward(x, w, b, False, True).double(), expected, **CLOSE)
    torch.testing.assert_close(ops.linear_forward(x, w, b, True, True).double(), expected.relu(), **CLOSE)
    for tanh in (False, True):
        y, _ = ops.linear_gelu(x, w, b, tanh, True)
        right = F.gelu(expected, approximate="tanh" if tanh else "none")
        torch.testing.assert_close(y.double(), right, **CLOSE)
    no_bias = expected - b.double().unsqueeze(1)
    torch.testing.assert_close(ops.linear_forward(x, w, None, False, True).double(), no_bias, **CLOSE)

    expected_dx, expected_dw = wide_dy @ wide_w, wide_dy.mT @ wide_x
    dx, dw, db = ops.linear_backward(dy, x, w, True, True, False, None, True)
    torch.testing.assert_close(dx.double(), expected_dx, **CLOSE)
    torch.testing.assert_close(dw.double(), expected_dw, **CLOSE)
    torch.testing.assert_close(db.double(), dy.double().sum(1), **CLOSE)  # never rounded
    masked, _, none = ops.linear_backward(dy, x, w, True, False, True, None, True)
    torch.testing.assert_close(masked.double(), expected_dx * (x > 0), **CLOSE)
    assert none.numel() == 0
    slope = normal(*x.shape, seed=4)
    times, _, _ = ops.linear_backward(dy, x, w, True, False, False, slope, True)
    torch.testing.assert_close(times.double(), expected_dx * slope, **CLOSE)

    factor = torch.linspace(-0.1, -0.3, clients).view(-1, 1, 1)
    for needs_x in (True, False):
        held = w.clone()
        dx, same, _ = ops.linear_step_(dy, x, held, needs_x, True, False, factor, None, True)
        assert same is held
        right = w.double() + factor.double() * expected_dw  # the weights themselves keep their digits
        torch.testing.assert_close(held.double(), right, rtol=2e-6, atol=2e-6)
        if needs_x:  # of the weights as they were
            torch.testing.assert_close(dx.double(), expected_dx, **CLOSE)


# image (height, width, channels), out, kernel, stride, padding, pool, pool's stride
IMAGES = {
    "first, 3x3": ((28, 28, 1), 16, (3, 3), (1, 1), (1, 1), (2, 2), (2, 2)),
    "first, 5x5": ((28, 28, 1), 32, (5, 5), (1, 1), (2, 2), (2, 2), (2, 2)),
    "first, no padding": ((11, 13, 1), 6, (2, 4), (1, 1), (0, 0), (3, 2), (4, 2)),
    "second": ((14, 14, 16), 32, (3, 3), (1, 1), (1, 1), (2, 2), (2, 2)),
    "odd": ((13, 11, 5), 7, (3, 2), (1, 1), (0, 2), (2, 3), (1, 2)),
    "colours": ((9, 10, 3), 20, (3, 3), (2, 2), (1, 1), (2, 2), (2, 2)),
    "one channel, stride 2": ((13, 15, 1), 40, (3, 3), (1, 2), (1, 1), (1, 2), (1, 2)),
    "wide": ((6, 40, 2), 17, (1, 7), (1, 3), (0, 3), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("sizes", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("relu", [True, False])
def test_convolution(sizes, relu):
    image, out, kernel, *options = sizes
    x, w, b = normal(2, 3, *image), normal(2, out, *kernel, image[2], seed=1), normal(2, out, seed=2)
    y, at = ops.conv_pool_forward(x, w, b, *options, relu, True)
    dy = normal(*y.shape, seed=3)
    grads = ops.conv_pool_backward(dy, at, x, w, False, True, *options, relu, True)
    for i, (xi, wi, di) in enumerate(zip(*rounded(x, w, dy), strict=True)):
        wi = wi.movedim(-1, 1).requires_grad_()  # noqa: PLW2901
        made = F.conv2d(xi.movedim(-1, 1), wi, b[i].double(), *options[:2])
        made = F.max_pool2d(F.relu(made) if relu else made, *options[2:]).movedim(1, -1)
        torch.testing.assert_close(y[i].double(), made, **CLOSE)
        (right,) = torch.autograd.grad(made, wi, di)
        gap = (grads[1][i].double() - right.movedim(1, -1)).norm() / right.norm()
        assert gap < (1e-6 if "first" in NAME_OF[sizes] else 5e-3)  # others are done in float32
    bias = (dy * (at >= 0)).double().sum((1, 2, 3))
    torch.testing.assert_close(grads[2].double(), bias, **CLOSE)
    if image[2] > 1:
        plain = ops.conv_pool_backward(dy, at, x, w, True, True, *options, relu)
        for mine, its in zip(
            ops.conv_pool_backward(dy, at, x, w, True, True, *options, relu, True), plain, strict=True
        ):
            assert (mine - its).norm() <= 5e-3 * its.norm()


NAME_OF = {sizes: name for name, sizes in IMAGES.items()}


def drawn(size, rows, steps, inputs, clients=2):
    """x, h, w, u and the biases of all clients; and the gradient of what comes out."""
    shapes = [(3 * size, inputs), (3 * size, size), (3 * size,), (3 * size,)]
    weights = [normal(clients, *shape, seed=2 + i) / size**0.5 for i, shape in enumerate(shapes)]
    x, h = normal(clients, steps, rows, inputs), normal(clients, rows, size, seed=1)
    return [x, h, *weights], normal(clients, steps, rows, size, seed=7)


@pytest.mark.parametrize(
    "sizes", [(128, 10, 8), (5, 1, 3), (33, 13, 8), (16, 100, 17), (7, 3, 40), (1, 1, 1)], ids=str
)
def test_a_step_of_the_gru(sizes):
    size, rows, inputs = sizes
    given, dhidden = drawn(size, rows, 1, inputs)
    hidden, gates = gru_forward(*given, True)
    x, h, w, u = rounded(given[0][:, 0], *given[1:4])
    a, b = (v @ m.mT + bias.double()[:, None] for v, m, bias in zip((x, h), (w, u), given[4:], strict=True))
    r, z = ((a + b)[..., : 2 * size].sigmoid()).split(size, -1)
    bn = b[..., 2 * size :]
    n, before, d = torch.tanh(a[..., 2 * size :] + r * bn), given[1].double(), dhidden[:, 0].double()
    torch.testing.assert_close(hidden[:, 0].double(), n + z * (before - n), **CLOSE)
    dn, dz = d * (1 - z) * (1 - n * n), d * (before - n) * z * (1 - z)
    dr = dn * bn * r * (1 - r)
    of_a, of_b = torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1)
    da, db = rounded(of_a, of_b)
    right = (da @ w).unsqueeze(1), d * z + db @ u, da.mT @ x, db.mT @ h, of_a.sum(1), of_b.sum(1)
    for one, other in zip(gru_backward(dhidden, hidden, gates, *given[:4], True, True), right, strict=True):
        assert (one.double() - other).norm() <= 1e-4 * other.norm()  # a slope may round the other way


@pytest.mark.parametrize("sizes", [(33, 3, 60, 8), (6, 1, 90, 3), (20, 13, 7, 5)], ids=str)
def test_steps_of_the_gru_follow_each_other(sizes):
    """All steps at once are the same bits as one by one, and the gradients are those of a chain."""
    given, dhidden = drawn(*sizes)
    (x, h, *weights), steps = given, sizes[2]
    hidden, gates = gru_forward(*given, True)
    made = []
    for t in range(steps):
        made.append((h, *gru_forward(x[:, t : t + 1], h, *weights, True)))
        h = made[-1][1][:, 0]
    assert torch.equal(hidden, torch.cat([each[1] for each in made], 1))
    whole = gru_backward(dhidden, hidden, gates, *given[:4], True, True)
    back, sums, parts = torch.zeros_like(h), [0] * 4, []
    for t in reversed(range(steps)):
        before, after, gate = made[t]
        d = dhidden[:, t : t + 1] + back.unsqueeze(1)
        dx, back, *rest = gru_backward(d, after, gate, x[:, t : t + 1], before, *weights[:2], True, True)
        sums, parts = [a + b for a, b in zip(sums, rest, strict=True)], [dx, *parts]
    for one, other in zip(whole, (torch.cat(parts, 1), back, *sums), strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 9), nn.ReLU(), nn.Linear(9, 3))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(80, 3)
    )


@pytest.mark.parametrize("build", [dense, convolutional])
def test_a_program_is_its_graph_and_near_float32(build, monkeypatch):
    """With features that tell the classes apart: of noise, rounding makes other noise."""
    torch.manual_seed(1)
    problem, algorithm = Problem(build()), fedavg(Local(lr=0.05, batch_size=5))
    down, config = algorithm.broadcast(algorithm.init(problem.model())), algorithm.local(0)
    tasks = [Task(i, str(i), 0, 0, down, config=config) for i in range(3)]
    people = []
    for i in range(3):
        y = torch.arange(20) % 3
        rows = normal(20, 2, 8, 8, seed=i) + 2 * normal(3, 2, 8, 8, seed=9)[y], y
        people.append(ClientData(rows, rows))

    def trained(precision):
        trainer = Vectorised(problem, 1, precision=precision)
        ((block, _),) = trainer.fit_block(algorithm, tasks, [None] * 3, people)
        (stepper,) = trainer.steppers.values()
        return trees.leaves(block.ups), next(iter(stepper.programs.values()))

    def gap(ours, its):
        return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, its, strict=True))

    (narrow, program), (wide, _) = trained("bfloat16"), trained("float32")
    assert program is not None
    assert 1e-5 < gap(narrow, wide) < 0.05
    monkeypatch.setattr("coterie.trainers.vectorised.program", lambda *_: None)
    graph, none = trained("bfloat16")
    assert none is None
    assert gap(narrow, graph) < 1e-3
    assert {leaf.dtype for leaf in narrow} == {torch.float32}


def test_without_instructions_for_it_torch_rounds(monkeypatch):
    """The same, near enough, by torch's operators."""
    x, w = normal(2, 10, 40), normal(2, 7, 40, seed=1)
    monkeypatch.setattr(native, "has", lambda name: False)
    from coterie.trainers.layers import Layers

    def inside(x, w):
        with Layers(torch.bfloat16):
            return F.linear(x, w)

    made = torch.func.vmap(inside)(x, w)
    right = ops.linear_forward(x, w, None, False, True)
    assert 0 < (made - right).norm() < 0.01 * right.norm()  # torch rounds the result, too

"""Embedding, layer norm, GELU and attention in C against float64 torch; models made of them, in programs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from coterie.algorithms import Local, fedavg
from coterie.core import Task, derive, native, rng, trees
from coterie.data import ClientData
from coterie.models import char_gru, transformer
from coterie.trainers import Loop, Problem, Vectorised, attention, ops, sequences
from coterie.trainers.layers import Layers

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")
CLIENTS = 2


def normal(*shape, seed=0):
    return torch.from_numpy(rng(derive(5, "sequences", seed, *shape)).normal(size=shape)).float()


@pytest.fixture(params=["native", "torch"])
def way(request, monkeypatch):
    """Both ways to do it."""
    if request.param == "torch":
        monkeypatch.setattr(native, "fits", lambda *tensors: False)


def agree(function, *given, inputs=(), tolerance=2e-5):
    """The function in Layers, over clients at once, against plain float64 torch for each; and its gradients.

    inputs: numbers and masks, which have no gradient. Returns the layers used.
    """
    layers = Layers()
    places = tuple(range(len(given)))

    def loss(*each, plain=False):
        made = function(*each) if plain else entered(*each)
        return (made * torch.linspace(-1, 1, made.numel(), dtype=made.dtype).view(made.shape)).sum(), made

    def entered(*each):
        with layers:
            return function(*each)

    ours, made = vmap(grad(loss, argnums=places, has_aux=True))(*given, *inputs)
    for i in range(CLIENTS):
        wide = [each[i].double().requires_grad_() for each in given]
        rest = [each[i].double() if each.is_floating_point() else each[i] for each in inputs]
        value, expected = loss(*wide, *rest, plain=True)
        torch.testing.assert_close(made[i].double(), expected.detach(), rtol=tolerance, atol=tolerance)
        for mine, right in zip(ours, torch.autograd.grad(value, wide), strict=True):
            bound = tolerance * max(1, float(right.abs().max()))
            torch.testing.assert_close(mine[i].double(), right, rtol=tolerance, atol=bound)
    return layers.used


@pytest.mark.parametrize("shape", [(1,), (3, 5), (10, 80)])
@pytest.mark.parametrize("size", [1, 8, 33])
def test_embedding(way, shape, size):
    numbers = torch.arange(CLIENTS * math.prod(shape)).view(CLIENTS, *shape) ** 2 % 7  # with repetitions
    assert "embedding" in agree(lambda w, x: F.embedding(x, w), normal(CLIENTS, 7, size), inputs=[numbers])
    shared = torch.arange(5)
    agree(lambda w: F.embedding(shared, w), normal(CLIENTS, 7, size))


@pytest.mark.parametrize("number", [-1, 7])
def test_a_number_of_no_row_is_refused(number):
    with pytest.raises(IndexError, match="1 numbers are not among the 7 rows"):
        sequences.embedding_forward(torch.tensor([[0, number]]), normal(1, 7, 3))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 16), (10, 8, 128), (4, 33)])
def test_layer_norm(shape):
    x, size = 3 * normal(CLIENTS, *shape) + 1, shape[-1:]
    w, b = normal(CLIENTS, *size, seed=1), normal(CLIENTS, *size, seed=2)
    assert "layer_norm" in agree(lambda x, w, b: F.layer_norm(x, size, w, b), x, w, b)
    agree(lambda x: F.layer_norm(x, size, eps=0.1), x)
    agree(lambda x, w: F.layer_norm(x, size, w), x, w)
    agree(lambda x: F.layer_norm(x, shape), x)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("count", [1, 15, 16, 1001])
def test_gelu(approximate, count):
    x = torch.linspace(-9, 9, CLIENTS * count).view(CLIENTS, count)
    assert "gelu" in agree(lambda x: F.gelu(x, approximate=approximate), x, tolerance=1e-6)
    y, slope = sequences.gelu_forward(torch.tensor([[0.0, -100.0, 100.0, math.nan]]), approximate == "tanh")
    assert y[0, :3].tolist() == [0, pytest.approx(0, abs=1e-30), 100]
    assert slope[0, :3].tolist() == pytest.approx([0.5, 0, 1], abs=1e-6)
    assert y[0, 3].isnan()


@pytest.mark.parametrize("rows", [3, 50])
@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_in_the_linear_layer_before_it(rows, tanh):
    x, w, b = normal(CLIENTS, rows, 33), normal(CLIENTS, 37, 33, seed=1), normal(CLIENTS, 37, seed=2)
    y, slope = ops.linear_gelu(x, w, b, tanh)
    wide = (x.double() @ w.double().mT + b.double().unsqueeze(1)).requires_grad_()
    right = F.gelu(wide, approximate="tanh" if tanh else "none")
    torch.testing.assert_close(y.double(), right.detach(), rtol=2e-5, atol=2e-5)
    (expected,) = torch.autograd.grad(right.sum(), wide)
    torch.testing.assert_close(slope.double(), expected, rtol=2e-5, atol=2e-5)
    dy, back = normal(CLIENTS, rows, 5, seed=3), normal(CLIENTS, 5, 37, seed=4)
    dx, _, _ = ops.linear_backward(dy, y, back, True, False, False, slope)
    torch.testing.assert_close(
        dx.double(), (dy.double() @ back.double()) * slope.double(), rtol=2e-5, atol=2e-5
    )


SIZES = [
    (1, 1, 1, 1, 1), (1, 1, 3, 3, 4), (2, 3, 7, 7, 5), (2, 2, 16, 16, 16), (1, 2, 33, 33, 32),
    (2, 4, 80, 80, 32), (1, 1, 3, 50, 20), (2, 1, 50, 3, 33), (1, 1, 101, 97, 8),
]  # fmt: skip


def heads_of(batch, heads, queries, keys, depth):
    """q, k, v"""
    lengths = queries, keys, keys
    return [normal(CLIENTS, batch, heads, n, depth, seed=i) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_attention(way, sizes, causal):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    assert "attention" in agree(attend, *heads_of(*sizes))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_with_masks_and_queries_that_may_see_nothing(way, kind):
    batch, heads, queries, keys, _ = sizes = (2, 3, 21, 18, 5)
    hidden = normal(CLIENTS, batch, 1, queries, keys, seed=9) > 0
    hidden[:, 0, 0, 4], hidden[:, 1, 0, 20] = True, True
    added = normal(CLIENTS, batch, 1, queries, keys, seed=8).masked_fill(hidden, -math.inf)

    def attend(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)

    given = heads_of(*sizes)
    agree(attend, *given, inputs=[~hidden if kind == "bool" else added])
    made, _ = attention.attention_forward(*given, added.expand(-1, -1, heads, -1, -1), False, 0.7)
    assert (made[:, 0, :, 4] == 0).all()


def test_attention_of_a_mask_that_learns_and_of_other_shapes_is_written_out():
    q, k, v = heads_of(2, 3, 6, 6, 4)

    def attend(q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    agree(attend, q, k, v, normal(CLIENTS, 3, 6, 6, seed=7))
    agree(F.scaled_dot_product_attention, q[:, 0], k[:, 0], v[:, 0])  # [B, T, d]


def test_what_is_not_a_number_stays_so_in_attention():
    q, k, v = heads_of(1, 1, 5, 5, 4)
    q[0, 0, 0, 3, 1] = math.nan
    made, _ = attention.attention_forward(q, k, v, None, False, 0.5)
    assert made.isnan().any(-1).nonzero().tolist() == [[0, 0, 0, 3]]


def attend_to(layer):
    def forward(x, *weights, mask=None, hidden=None):
        params = dict(zip(dict(layer.named_parameters()), weights, strict=True))
        given = {"attn_mask": mask, "key_padding_mask": hidden}
        return torch.func.functional_call(layer, params, (x, x, x), given)

    return forward


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(way, batch_first, bias):
    layer = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first)
    weights = [normal(CLIENTS, *each.shape, seed=i) / 4 for i, each in enumerate(layer.parameters())]
    forward, x = attend_to(layer), normal(CLIENTS, 5, 7, 12)
    assert {"multi_head_attention"} <= agree(lambda *given: forward(*given)[0], x, *weights)

    def both(*given):
        out, weights = forward(*given)
        return torch.cat([out.flatten(), weights.flatten()])

    agree(both, x, *weights, tolerance=1e-4)
    length = 7 if batch_first else 5
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    agree(lambda *given: forward(*given, mask=causal)[0], x, *weights)
    hidden = torch.zeros(12 - length, length, dtype=torch.bool)
    hidden[0, -2:] = True
    agree(lambda *given: forward(*given, mask=causal, hidden=hidden)[0], x, *weights)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 6, 4)])
def test_multi_head_attention_to_something_else(sizes):
    width, keys, values = sizes
    layer = nn.MultiheadAttention(width, 2, kdim=keys, vdim=values)
    names = list(dict(layer.named_parameters()))
    weights = [normal(CLIENTS, *each.shape, seed=i) / 4 for i, each in enumerate(layer.parameters())]

    def forward(q, k, v, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (q, k, v))[0]

    given = normal(CLIENTS, 3, 2, width), normal(CLIENTS, 6, 2, keys), normal(CLIENTS, 6, 2, values)
    agree(forward, *given, *weights)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.gelu(x).sum(),
        lambda x: F.layer_norm(x, (4,)).pow(3).sum(),
        lambda x: F.scaled_dot_product_attention(x, x, x).sum(),
        lambda x: F.embedding(torch.tensor([1, 1]), x[0, 0]).pow(2).sum(),
    ],
    ids=["GELU", "layer norm", "attention", "embedding"],
)
def test_second_derivatives_are_refused(function, request):
    layers = Layers()

    def loss(x):
        with layers:
            return function(x)

    with pytest.raises(
        NotImplementedError, match=f"second derivatives of a batched {request.node.callspec.id}"
    ):
        vmap(grad(lambda x: grad(loss)(x).sum()))(normal(CLIENTS, 1, 2, 3, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda: sequences.embedding_forward(torch.zeros(2, 3).int(), normal(2, 5, 4)),
        lambda: sequences.embedding_forward(torch.zeros(3, 3).long(), normal(2, 5, 4)),
        lambda: sequences.embedding_backward(normal(2, 4, 4), torch.zeros(2, 3).long(), 5),
        lambda: sequences.layer_norm_forward(normal(2, 3, 4), normal(2, 5), None, 1e-5),
        lambda: sequences.layer_norm_backward(normal(2, 3, 5), normal(2, 3, 4), normal(2, 3, 2), None, False),
        lambda: attention.attention_forward(
            normal(1, 1, 1, 3, 4), normal(1, 1, 1, 3, 5), normal(1, 1, 1, 3, 4), None, False, 1.0
        ),
        lambda: attention.attention_forward(
            normal(1, 1, 1, 3, 4),
            normal(1, 1, 1, 3, 4),
            normal(1, 1, 1, 3, 4),
            normal(1, 1, 1, 3, 2),
            False,
            1.0,
        ),
        lambda: ops.linear_gelu(normal(2, 3, 5), normal(2, 4, 6), None, False),
        lambda: ops.linear_backward(
            normal(2, 3, 4), normal(2, 3, 5), normal(2, 4, 5), True, True, False, normal(2, 3, 4)
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(RuntimeError, match="needed"):
        call()


class Encoder(nn.Module):
    """A model of torch's own layers, that classifies sequences."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True, **options)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.layer(self.embedding(x), src_mask=causal)[:, -1])


class Heads(nn.Module):
    """nn.MultiheadAttention as it is mostly used."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 12), nn.LayerNorm(12)
        self.heads, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x):
        h = self.norm(self.embedding(x))
        return self.head((h + self.heads(h, h, h)[0]).mean(1))


MODELS = {
    "transformer": lambda: transformer(input_shape=(9,), outputs=11, layers=2, width=8, heads=2),
    "gru": lambda: char_gru(input_shape=(9,), outputs=11, hidden=7, layers=2),
    "heads": Heads,
    "encoder": Encoder,
    "encoder-gelu": lambda: Encoder(activation="gelu", norm_first=True),
}
USED = {
    "transformer": {"attention", "embedding", "layer_norm", "gelu", "linear"},
    "gru": {"embedding", "gru", "linear"},
    "heads": {"embedding", "layer_norm", "linear", "multi_head_attention"},
    "encoder": {"embedding", "layer_norm", "linear", "multi_head_attention"},
    "encoder-gelu": {"embedding", "gelu", "layer_norm", "linear", "multi_head_attention"},
}


def people(name, sizes=(20, 13, 20)):
    made = []
    for i, n in enumerate(sizes):
        x = (normal(n, 9, seed=i) * 100).long() % 11
        rows = x, x.roll(-1, 1) if name in ("transformer", "gru") else x[:, 0] % 3
        made.append(ClientData(rows, rows))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_programs_of_sequences(name):
    torch.manual_seed(2)
    problem, algorithm, all_of_them = (
        Problem(MODELS[name]()),
        fedavg(Local(lr=0.1, batch_size=4)),
        people(name),
    )
    down, config = algorithm.broadcast(algorithm.init(problem.model())), algorithm.local(0)
    tasks = [Task(i, str(i), 0, 0, down, config=config) for i in range(3)]
    trainer, loop = Vectorised(problem, 1), Loop(problem, 1)
    assert trainer.obstacle(algorithm, all_of_them[:2]) is None
    used = {each for path in trainer.paths.values() for each in path.split(", ")}
    assert USED[name] <= used
    ((block, _),) = trainer.fit_block(algorithm, tasks, [None] * 3, all_of_them)
    assert any(any(made is not None for made in each.programs.values()) for each in trainer.steppers.values())
    alone = [loop.fit(algorithm, task, None, all_of_them[int(task.client)])[0].up for task in block.tasks]
    for a, b in trees.rows(block.ups, trees.map_tree(lambda *leaves: torch.stack(leaves), *alone)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
    ((by_itself, _),) = trainer.fit_block(algorithm, tasks[:1], [None], all_of_them[:1])
    for a, b in trees.rows(block.ups, by_itself.ups):
        assert torch.equal(a[0], b[0])


def test_a_program_stops_at_a_character_that_there_is_not():
    bad = people("gru")
    bad[1].train[0][5, 2] = 11
    algorithm, problem = fedavg(Local(lr=0.1, batch_size=4)), Problem(MODELS["gru"]())
    down, config = algorithm.broadcast(algorithm.init(problem.model())), algorithm.local(0)
    tasks = [Task(i, str(i), 0, 0, down, config=config) for i in range(3)]
    with pytest.raises(IndexError, match="not among"):
        Vectorised(problem, 1).fit_block(algorithm, tasks, [None] * 3, bad)

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from coterie.algorithms import Local, fedavg
from coterie.core.errors import ConfigError
from coterie.core.seeds import derive, seeded
from coterie.data import ClientData
from coterie.models import GRU, LSTM, CausalSelfAttention, char_gru, transformer
from coterie.trainers import Loop, Problem
from worlds import first_task

KEY = derive(11, "sequences")
MAKERS = (char_gru, transformer)
LAYERS = ((GRU, nn.GRU), (LSTM, nn.LSTM))
SMALL = {"input_shape": (7,), "outputs": 5}


def build(make, *args, **options):
    with seeded(KEY):
        return make(*args, **options)


def randn(*shape, dtype=torch.float32):
    with seeded(derive(KEY, "randn", *shape)):
        return torch.randn(shape, dtype=dtype)


def characters(*shape, below=5):
    with seeded(derive(KEY, "characters")):
        return torch.randint(below, shape)


def flat(found):
    """The tensors in nested tuples."""
    return [found] if isinstance(found, torch.Tensor) else [leaf for part in found for leaf in flat(part)]


def assert_same(found, expected, tolerance):
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def summed(module, params, x):
    return sum(leaf.square().sum() for leaf in flat(functional_call(module, params, (x,))))


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "batch_first": True}, {"bias": False}])
def test_recurrent_layers_equal_torchs(ours, theirs, dtype, tolerance, options):
    fused = build(theirs, 4, 6, **options).to(dtype)
    plain = ours(4, 6, **options).to(dtype)
    plain.load_state_dict(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    layers = options.get("num_layers", 1)
    x, h, c = randn(3, 9, 4, dtype=dtype), *randn(2, layers, 3, 6, dtype=dtype)
    if not options.get("batch_first"):
        x = x.transpose(0, 1)
    state = h if ours is GRU else (h, c)
    assert_same(plain(x), fused(x), tolerance)
    assert_same(plain(x, state), fused(x, state), tolerance)
    assert_same(plain(x[0]), fused(x[0]), tolerance)
    alone = h[:, 0] if ours is GRU else (h[:, 0], c[:, 0])
    assert_same(plain(x[0], alone), fused(x[0], alone), tolerance)


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_recurrent_gradients_equal_torchs(ours, theirs):
    fused = build(theirs, 4, 6, num_layers=2).double()
    params = {name: value.detach() for name, value in fused.named_parameters()}
    x = randn(5, 3, 4, dtype=torch.float64)
    expected = torch.autograd.grad(
        sum(leaf.square().sum() for leaf in flat(fused(x))), list(fused.parameters())
    )
    plain = ours(4, 6, num_layers=2)
    found = grad(lambda p: summed(plain, p, x))(params)
    assert_same(tuple(found.values()), expected, 1e-12)


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_one_seed_starts_both_at_the_same_parameters(ours, theirs):
    ours, theirs = (build(make, 4, 6, num_layers=2).state_dict() for make in (ours, theirs))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("ours", "theirs"), LAYERS)
def test_recurrent_layers_run_under_vmap_where_torchs_do_not(ours, theirs):
    fused = [theirs(4, 6, batch_first=True) for _ in range(3)]
    params, _ = stack_module_state(fused)
    params = {name: value.detach() for name, value in params.items()}
    x = randn(3, 2, 9, 4)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        vmap(lambda p, x: functional_call(fused[0], p, (x,)))(params, x)
    plain = ours(4, 6, batch_first=True)
    outputs = vmap(lambda p, x: functional_call(plain, p, (x,)))(params, x)
    for i, (model, batch) in enumerate(zip(fused, x, strict=True)):
        assert_same([leaf[i] for leaf in flat(outputs)], flat(model(batch)), 1e-6)
    gradients = vmap(grad(lambda p, x: summed(plain, p, x)))(params, x)
    for i, (model, batch) in enumerate(zip(fused, x, strict=True)):
        alone = grad(lambda p, model=model, batch=batch: summed(model, p, batch))(
            dict(model.named_parameters())
        )
        assert_same([gradients[name][i] for name in alone], list(alone.values()), 1e-4)


@pytest.mark.parametrize("ours", [GRU, LSTM])
@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"bidirectional": True}])
def test_what_the_recurrent_layers_lack_is_refused(ours, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        ours(4, 6, num_layers=2, **options)


def test_attention_equals_torchs():
    ours, theirs = (
        CausalSelfAttention(12, 3).double(),
        nn.MultiheadAttention(12, 3, batch_first=True).double(),
    )
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x, ahead = randn(2, 7, 12, dtype=torch.float64), torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, x, x, attn_mask=ahead, need_weights=False)
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)


def test_char_gru_written_out():
    model = build(char_gru, **SMALL, hidden=6)
    x = characters(3, 7)
    hidden, _ = model.gru(model.embedding.weight[x])
    expected = hidden @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected.transpose(1, 2))


def test_published_sizes():
    """Counted by hand: 65*8 + 3*128*(8+128+2) + 129*65; (65+80)*128 + 2*(12*128**2 + 13*128) + 256 + 129*65."""
    gru, decoder = (make(input_shape=(80,), outputs=65) for make in MAKERS)
    assert sum(p.numel() for p in gru.parameters()) == 520 + 52_992 + 8_385 == 61_897
    assert sum(p.numel() for p in decoder.parameters()) == 18_560 + 396_544 + 256 + 8_385 == 423_745
    assert not list(decoder.buffers())


@pytest.mark.parametrize("make", MAKERS)
def test_no_output_sees_what_it_predicts(make):
    model = build(make, **SMALL)
    x = characters(4, 7)
    for at in range(7):
        changed = x.clone()
        changed[:, at] = (x[:, at] + 1) % 5
        same = (model(x) == model(changed)).all(1).all(0)
        assert same.tolist() == [t < at for t in range(7)]


@pytest.mark.parametrize("make", MAKERS)
def test_logits_are_per_character_and_may_be_shorter(make):
    model = build(make, **SMALL)
    x = characters(4, 7)
    assert model(x).shape == (4, 5, 7)
    torch.testing.assert_close(model(x[:, :3]), model(x)[:, :, :3])


@pytest.mark.parametrize("make", MAKERS)
def test_gradients_under_vmap_equal_each_alone(make):
    models = [build(make, **SMALL)] + [make(**SMALL) for _ in range(2)]
    if make is char_gru:
        for model in models:
            plain = GRU(8, 128, batch_first=True)
            plain.load_state_dict(model.gru.state_dict())
            model.gru = plain
    params, _ = stack_module_state(models)
    x, y = characters(2, 3, 4, 7)

    def loss(params, x, y):
        return functional.cross_entropy(functional_call(models[0], params, (x,)), y)

    params = {name: value.detach() for name, value in params.items()}
    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused one
        together = vmap(grad(loss))(params, x, y)
    for i in range(3):
        alone = grad(loss)({name: value[i] for name, value in params.items()}, x[i], y[i])
        for name, value in alone.items():
            assert value.any(), name
            torch.testing.assert_close(together[name][i], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("make", "lr"), [(char_gru, 1.0), (transformer, 0.1)])
def test_the_loop_trainer_learns_a_cycle(make, lr):
    """abcdeabcde...: the next character follows from the one before, so the loss can go to nearly 0."""
    rows = torch.from_numpy(np.arange(20)[:, None] + np.arange(8)) % 5
    x, y = rows[:, :-1], rows[:, 1:]
    problem = Problem(build(make, **SMALL))
    problem.check(x[:2], y[:2], 5)
    before = problem.measure(problem.model(), x, y)
    assert before["loss"] == pytest.approx(math.log(5), abs=0.6)
    algorithm = fedavg(Local(lr=lr, epochs=20, batch_size=5))
    task = first_task(algorithm, problem.model())
    reply, _ = Loop(problem, 7).fit(algorithm, task, None, ClientData((x, y), (x, y)))
    params = {name: value - reply.up["delta"][name] for name, value in problem.model()["params"].items()}
    after = problem.measure({"params": params, "buffers": {}}, x, y)
    assert reply.samples == 400
    assert after["loss"] < 0.05
    assert after["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (char_gru, {"hidden": 0}, r"char_gru\(hidden=0\)"),
        (char_gru, {"embedding": 1.5}, r"char_gru\(embedding=1.5\)"),
        (char_gru, {"input_shape": (1, 8, 8)}, r"needs sequences"),
        (transformer, {"layers": True}, r"transformer\(layers=True\)"),
        (transformer, {"width": 10, "heads": 3}, r"heads must divide"),
        (transformer, {"input_shape": ()}, r"needs sequences"),
    ],
)
def test_refuses_bad_options(make, options, named):
    with pytest.raises(ConfigError, match=named) as caught:
        make(**(SMALL | options))
    assert caught.value.hint


def test_scores_of_another_shape_than_the_targets_are_refused_before_training():
    """Right number of classes, but one score a row instead of one a character."""
    x, y = characters(2, 7), characters(2, 7)
    with pytest.raises(ConfigError, match=r"gives \(2, 5\)") as caught:
        Problem(nn.Sequential(build(char_gru, **SMALL), nn.Flatten(), nn.Linear(35, 5))).check(x, y, 5)
    assert caught.value.hint == "the last layer must give [batch, 5, 7] scores"

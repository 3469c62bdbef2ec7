import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from coterie.core.errors import ConfigError
from coterie.core.seeds import derive, seeded
from coterie.models import MODELS, cnn, mcmahan_cnn, mlp, niid_cnn, softmax

IMAGES = ("softmax", "mlp", "cnn", "mcmahan_cnn", "niid_cnn")  # what takes them
KEY = derive(11, "networks")


def build(make, **options):
    with seeded(KEY):
        return make(**options)


def inputs(*shape):
    with seeded(derive(KEY, "inputs")):
        return torch.randn(shape)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "published"),
    [(softmax, 7_850), (mlp, 199_210), (mcmahan_cnn, 1_663_370), (niid_cnn, 44_426)],
)
def test_published_sizes(make, published):
    """McMahan et al. 2017 print 199,210 and 1,663,370; the others follow from their layer widths."""
    assert count(make(input_shape=(1, 28, 28), outputs=10)) == published


def test_softmax_is_a_linear_map():
    model = build(softmax, input_shape=(2, 3), outputs=4)
    weight, bias = model.parameters()
    x = inputs(5, 2, 3)
    torch.testing.assert_close(model(x), x.reshape(5, 6) @ weight.T + bias)


@pytest.mark.parametrize(("make", "padding"), [(mcmahan_cnn, 2), (niid_cnn, 0), (cnn, 1)])
def test_convolutional_forward_written_out(make, padding):
    model = build(make, input_shape=(3, 20, 24), outputs=7)
    x = expected = inputs(4, 3, 20, 24)
    parameters = list(model.parameters())
    for weight, bias in zip(parameters[:4:2], parameters[1:4:2], strict=True):
        expected = functional.max_pool2d(functional.conv2d(expected, weight, bias, padding=padding).relu(), 2)
    expected = expected.flatten(1)
    for weight, bias in zip(parameters[4:-2:2], parameters[5:-2:2], strict=True):
        expected = functional.linear(expected, weight, bias).relu()
    torch.testing.assert_close(model(x), functional.linear(expected, *parameters[-2:]))


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 13), (2, 32, 32)])
def test_cnn_takes_any_image_from_8_by_8(shape, norm):
    model = build(cnn, input_shape=shape, outputs=5, channels=[6, 9], hidden=10, norm=norm)
    assert model(inputs(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_norm_stands_between_convolution_and_relu(norm, kind):
    features = cnn(input_shape=(1, 8, 8), outputs=2, norm=norm).features
    assert [type(layer) for layer in features] == [nn.Conv2d, kind, nn.ReLU, nn.MaxPool2d] * 2


def test_building_leaves_running_statistics_untouched():
    buffers = dict(cnn(input_shape=(1, 8, 8), outputs=2, norm="batch").named_buffers())
    assert {int(value) for name, value in buffers.items() if name.endswith("tracked")} == {0}


def test_only_the_seed_decides_the_start():
    first, again = (build(cnn, input_shape=(1, 8, 8), outputs=2).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("name", IMAGES)
def test_vmap_over_clients_equals_each_alone(name):
    models = [MODELS[name](input_shape=(1, 16, 16), outputs=3) for _ in range(3)]
    params, buffers = stack_module_state(models)
    x = inputs(3, 4, 1, 16, 16)
    together = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(params, buffers, x)
    alone = torch.stack([model(x) for model, x in zip(models, x, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", IMAGES)
def test_gradient_descent_fits_a_batch(name):
    model = build(MODELS[name], input_shape=(1, 16, 16), outputs=2)
    x, y = inputs(8, 1, 16, 16), torch.arange(8) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        assert all(parameter.grad.any() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("make", "options", "named"),
    [
        (mlp, {"hidden": (0,)}, r"mlp\(hidden=\(0,\)\)"),
        (mlp, {"hidden": "200"}, r"mlp\(hidden='200'\)"),
        (mlp, {"hidden": [1.5]}, r"mlp\(hidden=\[1.5\]\)"),
        (softmax, {"outputs": 0}, r"softmax\(outputs=0\)"),
        (cnn, {"channels": [8, 0]}, r"cnn\(channels=\[8, 0\]\)"),
        (cnn, {"norm": "layer"}, r"cnn\(norm='layer'\)"),
        (cnn, {"hidden": -1}, r"cnn\(hidden=-1\)"),
        (cnn, {"input_shape": (784,)}, "needs images"),
        (cnn, {"input_shape": (0, 28, 28)}, r"cnn\(input_shape=\(0, 28, 28\)\)"),
        (cnn, {"input_shape": (1, 2, 28)}, "too small"),
        (niid_cnn, {"input_shape": (1, 15, 15)}, "too small"),
    ],
)
def test_refuses_bad_options(make, options, named):
    with pytest.raises(ConfigError, match=named) as caught:
        make(**({"input_shape": (1, 16, 16), "outputs": 2} | options))
    assert caught.value.hint


def test_niid_cnn_takes_its_smallest_image():
    assert niid_cnn(input_shape=(1, 16, 16), outputs=2)(inputs(1, 1, 16, 16)).shape == (1, 2)


def test_one_size_may_stand_alone():
    assert count(mlp(input_shape=(4,), outputs=2, hidden=3)) == 23
    assert count(cnn(input_shape=(1, 2, 2), outputs=2, channels=3, hidden=[4, 5])) == 30 + 16 + 25 + 12

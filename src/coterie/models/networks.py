"""Factories of plain `nn.Sequential` networks; images are [C, H, W], outputs are logits [B, outputs].

Parameters start as torch initialises them, from its global generator: build under `core.seeds.seeded`.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from coterie.core.errors import ConfigError

Sizes = int | Sequence[int]


def softmax(*, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Multinomial logistic regression: one linear layer on the flattened input."""
    return _dense("softmax", input_shape, outputs, ())


def mlp(*, input_shape: tuple[int, ...], outputs: int, hidden: Sizes = (200, 200)) -> nn.Module:
    """A multilayer perceptron; the default is the 2NN of McMahan et al. 2017 (arXiv:1602.05629, section 3).

    hidden: the width of the hidden layer, or of each. Raises ConfigError for a width below 1.
    """
    return _dense("mlp", input_shape, outputs, hidden)


def cnn(
    *,
    input_shape: tuple[int, ...],
    outputs: int,
    channels: Sizes = (16, 32),
    hidden: Sizes = 128,
    norm: str = "none",
) -> nn.Module:
    """For each of `channels` a 3x3 convolution, norm, ReLU and 2x2 max-pool; then `hidden` units.

    norm: "none", "batch", or "group", which keeps no running statistics for non-IID clients to pull apart
    (Hsieh et al. 2020, arXiv:1910.00189); up to 8 groups, as many as divide the channels evenly.
    Raises ConfigError for bad options, or images too small to halve once for each of `channels`.
    """
    if norm not in _NORMS:
        raise ConfigError(f"cnn(norm={norm!r}): no such norm", f"use one of {', '.join(_NORMS)}")
    return _convolutional(
        "cnn", input_shape, outputs, channels=channels, hidden=hidden, kernel=3, padding=1, norm=norm
    )


def mcmahan_cnn(*, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The CNN of McMahan et al. 2017 (arXiv:1602.05629, section 3): 1,663,370 parameters on 1x28x28 and 10.

    Padded 5x5 convolutions of 32 and 64 channels, each with ReLU and 2x2 max-pool; then 512 hidden units.
    """
    return _convolutional(
        "mcmahan_cnn", input_shape, outputs, channels=(32, 64), hidden=(512,), kernel=5, padding=2
    )


def niid_cnn(*, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The CNN of NIID-Bench (Li et al. 2022, arXiv:2102.02079): 44,426 parameters on 1x28x28 and 10.

    Unpadded 5x5 convolutions of 6 and 16 channels, each with ReLU and 2x2 max-pool; then 120 and 84
    hidden units. Raises ConfigError for images below 16x16.
    """
    return _convolutional("niid_cnn", input_shape, outputs, channels=(6, 16), hidden=(120, 84), kernel=5)


_NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "none": lambda _: [],
    "batch": lambda channels: [nn.BatchNorm2d(channels)],
    "group": lambda channels: [nn.GroupNorm(math.gcd(channels, 8), channels)],
}


def _sizes(model: str, option: str, value: Sizes) -> list[int]:
    sizes = list(value) if isinstance(value, Sequence) else [value]
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ConfigError(
            f"{model}({option}={value!r}): needs whole numbers >= 1", "for example 64, or [64, 32]"
        )
    return sizes


def _dense(model: str, input_shape: tuple[int, ...], outputs: int, hidden: Sizes) -> nn.Sequential:
    """Linear layers on the flattened input, with ReLU between them."""
    inputs = math.prod(_sizes(model, "input_shape", input_shape))
    widths = [inputs, *_sizes(model, "hidden", hidden), *_sizes(model, "outputs", outputs)]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convolutional(
    model: str,
    input_shape: tuple[int, ...],
    outputs: int,
    *,
    channels: Sizes,
    hidden: Sizes,
    kernel: int,
    padding: int = 0,
    norm: str = "none",
) -> nn.Sequential:
    """Blocks of convolution, norm, ReLU and max-pool ("features"), then `_dense` ("head")."""
    if len(input_shape) != 3:
        raise ConfigError(
            f"{model}(input_shape={input_shape}): needs images [C, H, W]",
            "use mlp or softmax for other inputs",
        )
    layers: list[nn.Module] = []
    widths = _sizes(model, "channels", channels)
    for before, after in pairwise([_sizes(model, "input_shape", input_shape)[0], *widths]):
        layers += [
            nn.Conv2d(before, after, kernel, padding=padding),
            *_NORMS[norm](after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    features = nn.Sequential(*layers)
    try:
        # on a copy: a dry run through the real layers would count as a batch in BatchNorm's statistics
        shape = copy.deepcopy(features).to("meta")(torch.empty(2, *input_shape, device="meta")).shape[1:]
    except RuntimeError as error:
        raise ConfigError(
            f"{model}(input_shape={input_shape}): images too small to be pooled {len(widths)} times",
            "use mlp, or cnn with fewer channels",
        ) from error
    head = _dense(model, tuple(shape), outputs, hidden)
    return nn.Sequential(OrderedDict(features=features, head=head))

"""The model of experiment.toml."""

import math

from torch import Tensor, nn


class Net(nn.Module):
    """One hidden layer with normalised activations: [b, ...] inputs to [b, outputs] scores."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int, hidden: int = 32) -> None:
        super().__init__()
        inputs = math.prod(input_shape)
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

"""`GRU` and `LSTM` in plain tensor operations: for torch.nn's own where those cannot be vectorised.

torch computes its layers in one fused operation, for which `torch.func.vmap` has no rule. (torch 2.13 on a
CPU: under vmap alone, as in evaluation, it fails; under vmap of a gradient torch takes it apart by itself.)
These take the same arguments, have the same parameters under the same names and give the same outputs, so
one can take the other's `state_dict`.
Not here: dropout between layers, `bidirectional`, `proj_size` and packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from coterie.core.errors import ConfigError

States = tuple[Tensor, ...]  # of one layer: (h,) or (h, c), each [B, hidden]; h is also the output
Cell = Callable[[Tensor, Tensor, States], States]  # what the input adds to the gates, what h adds, states


class GRU(nn.Module):
    """A gated recurrent unit (Cho et al. 2014, arXiv:1406.1078), with torch.nn.GRU's equations.

    x: [T, B, input], with batch_first [B, T, input], or [T, input]; h0: [layers, B, hidden], zeros if left
    out. Returns what torch.nn.GRU does: (outputs [T, B, hidden], h of the last step).
    Raises ConfigError for dropout or bidirectional, which it does not have.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        _refuse("GRU", dropout, bidirectional)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first = bias, batch_first
        _add_parameters(self, 3, input_size, hidden_size, num_layers, bias)

    def forward(self, x: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over all steps."""
        outputs, (h,) = _run(self, x, None if h0 is None else (h0,), _gru, 1)
        return outputs, h


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber 1997), with torch.nn.LSTM's equations.

    x: [T, B, input], with batch_first [B, T, input], or [T, input]; state: (h0, c0), each
    [layers, B, hidden], zeros if left out. Returns what torch.nn.LSTM does: (outputs [T, B, hidden],
    (h, c) of the last step). Raises ConfigError for dropout or bidirectional, which it does not have.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        _refuse("LSTM", dropout, bidirectional)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first = bias, batch_first
        _add_parameters(self, 4, input_size, hidden_size, num_layers, bias)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over all steps."""
        outputs, (h, c) = _run(self, x, state, _lstm, 2)
        return outputs, (h, c)


def _gru(given: Tensor, recalled: Tensor, states: States) -> States:
    (h,) = states
    r, z, n = given.chunk(3, -1)
    r_h, z_h, n_h = recalled.chunk(3, -1)
    z = torch.sigmoid(z + z_h)
    n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
    return ((1 - z) * n + z * h,)


def _lstm(given: Tensor, recalled: Tensor, states: States) -> States:
    _, c = states
    i, f, g, o = (given + recalled).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _run(
    module: GRU | LSTM, x: Tensor, start: States | None, cell: Cell, states: int
) -> tuple[Tensor, States]:
    """Outputs, and the states [layers, B, hidden] after the last step."""
    time = 1 if module.batch_first else 0
    alone = x.dim() == 2
    if alone:
        x = x.unsqueeze(1 - time)
        start = None if start is None else tuple(each.unsqueeze(1) for each in start)
    if start is None:
        start = (x.new_zeros(module.num_layers, x.shape[1 - time], module.hidden_size),) * states
    ends = []
    for layer in range(module.num_layers):
        weight_ih, weight_hh, bias_ih, bias_hh = _parameters(module, layer)
        state, outputs = tuple(each[layer] for each in start), []
        for given in linear(x, weight_ih, bias_ih).unbind(time):
            state = cell(given, linear(state[0], weight_hh, bias_hh), state)
            outputs.append(state[0])
        x = torch.stack(outputs, time)
        ends.append(state)
    last = tuple(torch.stack(each) for each in zip(*ends, strict=True))
    if alone:
        return x.squeeze(1 - time), tuple(each.squeeze(1) for each in last)
    return x, last


def _parameters(module: nn.Module, layer: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    weight_ih, weight_hh, bias_ih, bias_hh = (
        getattr(module, f"{name}_l{layer}", None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    assert weight_ih is not None
    assert weight_hh is not None
    return weight_ih, weight_hh, bias_ih, bias_hh


def _add_parameters(module: nn.Module, gates: int, inputs: int, hidden: int, layers: int, bias: bool) -> None:
    """Add them in torch's order, from torch's distribution: the same seed starts both at the same values."""
    for layer in range(layers):
        shapes = {
            "weight_ih": (gates * hidden, inputs if layer == 0 else hidden),
            "weight_hh": (gates * hidden, hidden),
            **({"bias_ih": (gates * hidden,), "bias_hh": (gates * hidden,)} if bias else {}),
        }
        for name, shape in shapes.items():
            start = torch.empty(shape).uniform_(-(hidden**-0.5), hidden**-0.5)
            module.register_parameter(f"{name}_l{layer}", nn.Parameter(start))


def _refuse(layer: str, dropout: float, bidirectional: bool) -> None:
    if dropout or bidirectional:
        raise ConfigError(
            f"{layer}(dropout={dropout}, bidirectional={bidirectional}): has neither",
            f"put nn.Dropout between several {layer}, or use torch.nn.{layer} and the loop trainer",
        )

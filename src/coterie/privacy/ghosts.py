"""The sum of clipped per-example gradients without those gradients, where the layers allow it.

A zero is added to what each layer with parameters gives. The gradient of the losses' sum with respect to
these zeros (for a convolution, to a copy of its weights for each example, which the trainer's layers know how
to use) is all that the backward pass has to make: from it and from each layer's input follow the norms of the
examples' gradients (Goodfellow 2015, arXiv:1510.01799; Li, Tramer, Liang, Hashimoto 2021, arXiv:2110.05679),
then each layer's clipped sum, as one product (Bu, Wang, Zha, Karypis 2022, arXiv:2210.00038: no second pass).

It holds for layers that treat each example alone; who uses it compares it with `examples.clipped_sum`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coterie.core.types import Batch, Params, Tree

Found = tuple[Tensor, Callable[[Tensor], list[Tensor]]]  # squared norms [B]; factors [B] -> weighted sums


class Use(NamedTuple):
    """A layer's use of its parameters: their names, a ghost, and how to find their gradients from its own."""

    names: list[str]
    ghost: Any  # zeros like the output, or the parameters again for each example
    find: Callable[[Tensor, Any], Found]  # input, gradient of the ghost


def clip_factors(squares: Tensor, mask: Tensor, norm: float) -> Tensor:
    """min(1, norm / ||g||) of each example; 0 where the mask, or a norm that is not finite, leaves it out."""
    factors = norm / squares.sqrt().clamp(min=norm)
    return torch.where((mask > 0) & squares.isfinite(), factors, 0)


def ghost_sum(
    objective: Callable[..., Any], params: Params, batch: Batch, mask: Tensor, carry: Tree, norm: float
) -> tuple[Params, Tensor] | None:
    """The sum of clipped gradients and the losses [B]; None where a parameter is used in other ways."""
    seen = Ghosts(params, len(mask))
    with seen:
        objective(params, batch, carry)
    if not seen.fits or sorted(name for use in seen.uses for name in use.names) != sorted(params):
        return None

    def losses(given: list[Any]) -> tuple[Tensor, tuple[Tensor, list[Tensor]]]:
        with (ghosts := Ghosts(params, len(mask), given)):
            losses, _ = objective(params, batch, carry)
        return losses.sum(), (losses.detach(), ghosts.inputs)

    slopes, (each, inputs) = torch.func.grad(losses, has_aux=True)([use.ghost for use in seen.uses])
    found = [use.find(x.detach(), dz) for use, x, dz in zip(seen.uses, inputs, slopes, strict=True)]
    factors = clip_factors(torch.stack([squares for squares, _ in found]).sum(0), mask, norm).to(each.dtype)
    sums = {
        name: total
        for use, (_, totals) in zip(seen.uses, found, strict=True)
        for name, total in zip(use.names, totals(factors), strict=True)
    }
    return {name: sums[name].reshape(leaf.shape) for name, leaf in params.items()}, each


class Ghosts(TorchFunctionMode):
    """Brings ghosts into layers while it is entered, and notes what these had as input.

    size: of the batch. given: the ghosts, in the order of their use; None for new ones. fits: is no
    parameter used by anything but such a layer?
    """

    def __init__(self, params: Params, size: int, given: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.names = {id(leaf): name for name, leaf in params.items()}
        self.size, self.given, self.fits = size, given, True
        self.uses: list[Use] = []
        self.inputs: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in RULES:
            made = RULES[func](self, func, *args, **kwargs)
            if made is not NotImplemented:
                return made
        given = [*args, *kwargs.values()]
        flat = [each for arg in given for each in (arg if isinstance(arg, list | tuple) else [arg])]
        if func is F.dropout or any(id(each) in self.names for each in flat):
            self.fits = False
        return func(*args, **kwargs)

    def note(self, x: Tensor, ghost: Any, find: Callable[[Tensor, Any], Found], *params: Any) -> Any:
        """Note the use of these parameters (None: there is none), ordered as in `find`; return the ghost."""
        self.uses.append(Use([self.names[id(each)] for each in params if each is not None], ghost, find))
        self.inputs.append(x)
        return ghost if self.given is None else self.given[len(self.uses) - 1]

    def add(self, x: Tensor, y: Tensor, find: Callable[[Tensor, Any], Found], *params: Any) -> Tensor:
        """y, and a ghost."""
        made: Tensor = y + self.note(x, torch.zeros(y.shape, dtype=y.dtype), find, *params)
        return made

    def own(self, x: Tensor, *params: Any) -> bool:
        """Does x have a row for each example, and are these parameters (or None)?"""
        return len(x) == self.size and all(each is None or id(each) in self.names for each in params)


def linear(ghosts: Ghosts, _: Any, x: Tensor, weight: Tensor, bias: Any = None) -> Any:
    """A linear layer on [B, ..., in]."""
    if x.dim() < 2 or not ghosts.own(x, weight, bias):
        return NotImplemented
    y = x.reshape(-1, x.shape[-1]) @ weight.t()
    y = (y if bias is None else y + bias).reshape(*x.shape[:-1], len(weight))

    def find(x: Tensor, dy: Tensor) -> Found:
        return products(
            x.reshape(len(x), -1, x.shape[-1]), dy.reshape(len(x), -1, dy.shape[-1]), bias is not None
        )

    return ghosts.add(x, y, find, weight, bias)


def conv(
    ghosts: Ghosts,
    func: Any,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """A convolution, with weights of every example's own: the trainer's layers know these, torch's do not."""
    two = x.dim() == weight.dim() == 4
    if not two or groups != 1 or isinstance(padding, str) or not ghosts.own(x, weight, bias):
        return NotImplemented

    def each(leaf: Any) -> Any:
        return None if leaf is None else leaf.expand(len(x), *leaf.shape)

    def find(_: Tensor, slopes: tuple[Tensor, ...]) -> Found:
        flat = [slope.flatten(1) for slope in slopes]
        squares = torch.stack([slope.square().sum(1) for slope in flat]).sum(0)
        return squares, lambda factors: [factors @ kept(slope, factors) for slope in flat]

    given = tuple(each(leaf) for leaf in (weight, bias) if leaf is not None)
    own = ghosts.note(x[:0], given, find, weight, bias)
    return func(x, own[0], own[1] if len(own) > 1 else None, stride, padding, dilation)


def products(x: Tensor, dy: Tensor, bias: bool) -> Found:
    """Of a weight whose gradient is the sum over t of dy x^T, and of a bias; x [B, t, in], dy [B, t, out]."""
    t, inside, outside = x.shape[1], x.shape[2], dy.shape[2]
    db = dy.sum(1)
    if t * (inside + outside) <= inside * outside:  # fewer products between places than weights
        whole = (x @ x.transpose(1, 2)) * (dy @ dy.transpose(1, 2))
        squares = whole.sum((1, 2))

        def total(factors: Tensor) -> Tensor:
            left, right = (kept(each, factors).flatten(0, 1) for each in (dy * factors[:, None, None], x))
            return left.t() @ right
    else:
        dw = dy.transpose(1, 2) @ x
        squares = dw.square().sum((1, 2))

        def total(factors: Tensor) -> Tensor:
            return factors @ kept(dw, factors).flatten(1)

    if not bias:
        return squares, lambda factors: [total(factors)]
    return squares + db.square().sum(1), lambda factors: [total(factors), factors @ kept(db, factors)]


def embedding(ghosts: Ghosts, func: Any, x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Any:
    """Rows of a table, [B, ...] numbers; a single dimension may be places, not examples."""
    if (
        x.dim() < 2
        or any(each not in (None, False, 2.0) for each in (*rest, *options.values()))
        or not ghosts.own(x, weight)
    ):
        return NotImplemented
    rows = len(weight)

    def find(x: Tensor, dy: Tensor) -> Found:
        numbers, dy = x.reshape(len(x), -1), dy.reshape(len(x), -1, dy.shape[-1])
        same = (numbers[:, :, None] == numbers[:, None]).to(dy.dtype)

        def total(factors: Tensor) -> list[Tensor]:
            parts = kept(dy * factors[:, None, None], factors).flatten(0, 1)
            return [dy.new_zeros(rows, dy.shape[-1]).index_add(0, numbers.flatten(), parts)]

        return (same * (dy @ dy.transpose(1, 2))).sum((1, 2)), total

    return ghosts.add(x, func(x, weight), find, weight)


def group_norm(
    ghosts: Ghosts,
    func: Any,
    x: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    """GroupNorm on [B, channels, ...]."""
    if weight is None or bias is None or not ghosts.own(x, weight, bias):
        return NotImplemented
    unit, shape = func(x, num_groups, None, None, eps), [-1] + [1] * (x.dim() - 2)
    y = unit * weight.view(shape) + bias.view(shape)
    return ghosts.add(unit, y, lambda x, dy: scales(x.flatten(2), dy.flatten(2), 2), weight, bias)


def layer_norm(
    ghosts: Ghosts, func: Any, x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """LayerNorm over the last dimensions of [B, ...]."""
    if weight is None or bias is None or x.dim() <= len(shape) or not ghosts.own(x, weight, bias):
        return NotImplemented
    unit, last = func(x, shape, None, None, eps), weight.numel()

    def find(x: Tensor, dy: Tensor) -> Found:
        return scales(x.reshape(len(x), -1, last), dy.reshape(len(x), -1, last), 1)

    return ghosts.add(unit, unit * weight + bias, find, weight, bias)


def scales(x: Tensor, dy: Tensor, over: int) -> Found:
    """Of y = w x + b, where w and b are the same along dimension `over`."""
    dw, db = (dy * x).sum(over), dy.sum(over)
    return dw.square().sum(1) + db.square().sum(1), lambda factors: [
        factors @ kept(d, factors) for d in (dw, db)
    ]


def kept(x: Tensor, factors: Tensor) -> Tensor:
    """x [B, ...], with zeros for the examples whose factor is 0: 0 * NaN would be NaN."""
    return torch.where((factors > 0).reshape(-1, *[1] * (x.dim() - 1)), x, 0)


RULES: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.conv2d: conv,
    F.embedding: embedding,
    F.group_norm: group_norm,
    F.layer_norm: layer_norm,
}

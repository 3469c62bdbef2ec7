"""Layers for many clients at once: the ones that the stock operators under `torch.func.vmap` do slowly.

Under vmap every client has weights of its own, so a linear layer is a batched matrix product and a
convolution one with the clients as groups. `Layers` is a torch function mode: while it is entered, the
functions in its table (which modules call too) are done by the versions here, each an autograd Function
with its own batching rule; everything else is left to vmap. It also knows the mask of padded rows, for
BatchNorm, and each client's seed, for dropout. Checked against the plain functions in
tests/trainers/test_layers.py; what each gains is in docs/performance.md.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: ARG001, ARG004
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from coterie.core import native
from coterie.trainers import attention, ops, sequences
from coterie.trainers.recurrent import Gru

WIDE = 24  # input channels from which clients' convolutions are done one after the other
aten = torch.ops.aten
Table = dict[Any, Callable[..., Any]]
Function = torch.autograd.Function


class Layers(TorchFunctionMode):
    """Replaces slow functions while it is entered. `mask` [B] and `seed` (0-d) are of the client at work.

    table: what replaces which function. precision: the type in which convolutions and linear layers
    multiply (None: their own).
    used: the names of functions replaced so far.
    """

    def __init__(self, precision: torch.dtype | None = None, table: Table | None = None) -> None:
        super().__init__()
        self.precision = precision
        self.table = TABLE if table is None else table
        self.mask: Tensor | None = None
        self.seed: Tensor | None = None
        self.used: set[str] = set()
        self.draws = 0
        self._made: dict[int, tuple[Tensor, str, Any]] = {}  # results of ReLUs and convolutions

    def __enter__(self) -> Layers:
        self.draws = 0
        self._made.clear()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._made.clear()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replaced = self.table.get(func)
        if replaced is not None:
            made = replaced(self, *args, **kwargs)
            if made is not NotImplemented:
                self.used.add(replaced.__name__)
                return made
        made = func(*args, **kwargs)
        if func is F.relu and not kwargs.get("inplace") and len(args) == 1:
            self.note(made, "relu", args[0])
        return made

    def bf16(self, *given: Tensor) -> bool:
        """Do the kernels multiply these in bfloat16?"""
        wanted = self.precision is torch.bfloat16
        return wanted and native.fits(*given) and native.has("linear_forward_bf16")

    def note(self, made: Tensor, how: str, of: Any) -> None:
        """Remember how a tensor was made, until the layers are left."""
        self._made[id(made)] = (made, how, of)  # it is held, so its id is not given again

    def made(self, x: Tensor, how: str) -> Any:
        """What x was made from in this way; None if it was not."""
        _, found, of = self._made.get(id(x), (x, "", None))
        return of if found == how else None


def conv(
    layers: Layers,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """A convolution of 1 or 2 dimensions, batched."""
    each = weight.dim() == x.dim() + 1  # weights [B, ...] of every example's own: for per-example gradients
    n = x.dim() - 2
    if not each and weight.dim() != x.dim():
        return NotImplemented
    if isinstance(padding, str) or n not in (1, 2):
        return NotImplemented
    sizes = [_sizes(each, n) for each in (stride, padding, dilation)]
    if layers.precision and x.dtype == torch.float32:
        p = layers.precision
        made = _convolved(x.to(p), weight.to(p), _to(bias, p), *sizes, groups).float()
    else:
        made = _convolved(x, weight, bias, *sizes, groups)
    if n == 2 and groups == 1 and sizes[2] == [1, 1] and native.fits(x, weight):
        layers.note(made, "conv", (x, weight, bias, *sizes[:2]))  # a pooling may want to do it instead
    return made


def _convolved(x: Tensor, weight: Tensor, bias: Any, *options: Any) -> Tensor:
    """A convolution; where weights are the examples' own, these are groups."""
    if weight.dim() == x.dim():
        return _Conv.apply(x, weight, bias, *options)  # type: ignore[no-any-return]
    flat, *sizes, groups = x.reshape(1, -1, *x.shape[2:]), *options
    made = _Conv.apply(
        flat, weight.flatten(0, 1), None if bias is None else bias.flatten(), *sizes, groups * len(x)
    )
    return made.reshape(len(x), -1, *made.shape[2:])  # type: ignore[no-any-return]


def linear(layers: Layers, x: Tensor, weight: Tensor, bias: Any = None) -> Any:
    """A linear layer on [..., in]."""
    if x.dim() < 2 or weight.dim() != 2:
        return NotImplemented
    flat = x.reshape(-1, x.shape[-1])
    bf16 = layers.bf16(x, weight)
    if layers.precision and x.dtype == torch.float32 and not bf16:
        p = layers.precision
        made = _Linear.apply(flat.to(p), weight.to(p), _to(bias, p), False).float()
    else:
        made = _Linear.apply(flat, weight, bias, bf16)
    return made.reshape(*x.shape[:-1], weight.shape[0])


def max_pool(
    layers: Layers,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """2-d max-pooling. A ReLU before it is moved behind it, where there is less to do.

    With the convolution before these it is one kernel; who pools wants no gradient but that of the maxima.
    """
    if return_indices or x.dim() != 4:
        return NotImplemented
    before, kernel = layers.made(x, "relu"), _sizes(kernel_size, 2)
    options = (kernel, _sizes(stride or kernel, 2), _sizes(padding, 2), _sizes(dilation, 2), ceil_mode)
    source = x if before is None else before
    conv = layers.made(source, "conv")
    if conv is not None and options[2:] == ([0, 0], [1, 1], False):
        made = _ConvPool if conv[1].dim() == 4 else _EachConvPool
        return made.apply(*conv, *options[:2], before is not None, layers.bf16(*conv[:2]))[0]
    pooled, _ = _MaxPool.apply(source, *options)
    return pooled if before is None else torch.relu(pooled)


def dropout(layers: Layers, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Dropout whose draws depend on the client's seed alone, not on who shares its block."""
    if not training or p == 0 or layers.seed is None:
        return x
    layers.draws += 1
    keep = _uniform(layers.seed, layers.draws, x) >= p
    return x * keep / (1 - p) if p < 1 else x * 0


def batch_norm(
    layers: Layers,
    x: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """BatchNorm over the rows that the mask keeps."""
    if not training or layers.mask is None:
        return NotImplemented
    over = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    keep = layers.mask.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    count = layers.mask.to(x.dtype).sum() * x[0, 0].numel()
    mean = (x * keep).sum(over) / count
    centred = x - mean.view(shape)
    var = (centred * centred * keep).sum(over) / count
    if running_mean is not None:
        with torch.no_grad():
            running_mean.mul_(1 - momentum).add_(momentum * mean.detach())
            running_var.mul_(1 - momentum).add_(momentum * var.detach() * (count / (count - 1)))
    y = centred * torch.rsqrt(var + eps).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def group_norm(
    layers: Layers, x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """GroupNorm; torch's own asks for a memory format that vmap does not know."""
    groups = x.reshape(x.shape[0], num_groups, -1)
    centred = groups - groups.mean(2, keepdim=True)
    var = (centred * centred).mean(2, keepdim=True)
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = (centred * torch.rsqrt(var + eps)).reshape(x.shape)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def pool_to_one(layers: Layers, x: Tensor, output_size: Any) -> Any:
    """Average pooling of the whole image."""
    return x.mean((-2, -1), keepdim=True) if output_size in (1, (1, 1), [1, 1]) else NotImplemented


def gru(
    layers: Layers,
    x: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    bias: bool,
    depth: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """nn.GRU over padded sequences, [B, T, in] when batch_first, else [T, B, in]."""
    if not bias or bidirectional or (dropout and training) or x.dim() != 3 or len(weights) != 4 * depth:
        return NotImplemented
    y, ends = x.transpose(0, 1) if batch_first else x, []
    for layer in range(depth):
        w_ih, w_hh, b_ih, b_hh = weights[4 * layer : 4 * layer + 4]
        y, _ = Gru.apply(y, h[layer], w_ih, w_hh, b_ih, b_hh, layers.bf16(y, w_hh))
        ends.append(y[-1])
    return y.transpose(0, 1) if batch_first else y, torch.stack(ends)


def cross_entropy(
    layers: Layers,
    x: Tensor,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Losses of scores [B, classes, ...] against numbers of classes [B, ...]."""
    plain = weight is None and reduction == "none" and not label_smoothing and x.dim() == target.dim() + 1 > 1
    plain = plain and target.dtype == torch.int64  # else they are probabilities
    if not plain or not native.fits(x):
        return NotImplemented
    return _CrossEntropy.apply(x.movedim(1, -1), target, ignore_index)[0]


TABLE: Table = {
    torch.conv1d: conv,
    torch.conv2d: conv,
    F.linear: linear,
    F.max_pool2d: max_pool,
    torch.max_pool2d: max_pool,
    F.embedding: sequences.embedding,
    F.layer_norm: sequences.layer_norm,
    F.gelu: sequences.gelu,
    F.scaled_dot_product_attention: attention.attention,
    F.multi_head_attention_forward: attention.multi_head_attention,
    F.dropout: dropout,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.adaptive_avg_pool2d: pool_to_one,
    torch.gru: gru,
    F.cross_entropy: cross_entropy,
}
DRAWS: Table = {F.dropout: dropout}  # all that the reference, plain torch, must share with them


def _to(x: Any, dtype: torch.dtype) -> Any:
    return None if x is None else x.to(dtype)


def _sizes(value: Any, n: int) -> list[int]:
    return [int(each) for each in value] if isinstance(value, Sequence) else [int(value)] * n


def _uniform(seed: Tensor, draw: int, x: Tensor) -> Tensor:
    """A number in [0, 1) for each element of x, a hash of (seed, draw, element): splitmix64's mixer."""
    z = torch.arange(x.numel(), device=x.device).view(x.shape) + (seed + draw * 0x632BE59BD9B4E019 % 2**63)
    z = (z ^ _shift(z, 30)) * -0x40A7B892E31B1A47  # 0xbf58476d1ce4e5b9 as a signed number
    z = (z ^ _shift(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94d049bb133111eb
    return _shift(z ^ _shift(z, 31), 40).float() * 2.0**-24


def _shift(z: Tensor, by: int) -> Tensor:
    """A logical shift to the right."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _grouped(x: Tensor, dim: int | None, clients: int) -> Tensor:
    """[B, channels, ...] of each client -> [B, clients * channels, ...] with channels last in memory."""
    x = x.unsqueeze(1).expand(-1, clients, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
    spatial = list(range(3, x.dim()))
    last = x.permute(0, *spatial, 1, 2)
    merged = last.reshape(*last.shape[:-2], -1)
    return _last(merged.permute(0, merged.dim() - 1, *range(1, merged.dim() - 1)))


class _Conv(Function):
    @staticmethod
    def forward(x, w, b, stride, padding, dilation, groups):
        n = len(stride)
        return aten.convolution(x, w, b, stride, padding, dilation, False, [0] * n, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, b, *options = inputs
        ctx.save_for_backward(x, w)
        ctx.options, ctx.bias = options, b is not None

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        dx, dw, db = _ConvBack.apply(dy, x, w, *ctx.options, needs_x, ctx.bias)
        return dx if needs_x else None, dw, db if ctx.bias else None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, x, w, b, stride, padding, dilation, groups):
        n, none = info.batch_size, [0] * len(stride)
        weight, bias = ops.front(w, in_dims[1], n), ops.front(b, in_dims[2], n)
        if _one_by_one(weight):
            x = ops.front(x, in_dims[0], n)
            made = [
                aten.convolution(_last(x[i]), _last(weight[i]), None if bias is None else bias[i],
                                 stride, padding, dilation, False, none, groups)
                for i in range(n)
            ]  # fmt: skip
            return _stacked(made), 0
        y = aten.convolution(
            _grouped(x, in_dims[0], n), _last(weight.flatten(0, 1)), None if bias is None else bias.flatten(),
            stride, padding, dilation, False, none, n * groups,
        )  # fmt: skip
        return y.unflatten(1, (n, -1)), 1


@ops.last("convolution")
class _ConvBack(Function):
    """dy, x, w -> gradients of x (or an empty tensor), of w and of the bias (or an empty tensor)."""

    @staticmethod
    def forward(dy, x, w, stride, padding, dilation, groups, needs_x, bias):
        mask = [needs_x, True, bias]
        made = aten.convolution_backward(
            dy, x, w, [w.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, mask
        )
        return tuple(g if wanted else dy.new_empty(0) for g, wanted in zip(made, mask, strict=True))

    @staticmethod
    def vmap(info, in_dims, dy, x, w, stride, padding, dilation, groups, needs_x, bias):
        n, none, empty = info.batch_size, [0] * len(stride), dy.new_empty(0)
        weight, mask = ops.front(w, in_dims[2], n), [needs_x, True, bias]
        if _one_by_one(weight):
            dy, x = ops.front(dy, in_dims[0], n), ops.front(x, in_dims[1], n)
            made = [
                aten.convolution_backward(_last(dy[i]), _last(x[i]), _last(weight[i]), [weight.shape[1]],
                                          stride, padding, dilation, False, none, groups, mask)
                for i in range(n)
            ]  # fmt: skip
            dxs, dws, dbs = zip(*made, strict=True)
            dx = _stacked(dxs) if needs_x else empty
            return (dx, torch.stack(dws), torch.stack(dbs) if bias else empty), (
                0 if needs_x else None, 0, 0 if bias else None
            )  # fmt: skip
        dx, dw, db = aten.convolution_backward(
            _grouped(dy, in_dims[0], n), _grouped(x, in_dims[1], n), _last(weight.flatten(0, 1)),
            [weight.shape[0] * weight.shape[1]], stride, padding, dilation, False, none, n * groups, mask,
        )  # fmt: skip
        dx = dx.unflatten(1, (n, -1)) if needs_x else empty
        db = db.unflatten(0, (n, -1)) if bias else empty
        return (dx, dw.unflatten(0, (n, -1)), db), (1 if needs_x else None, 0, 0 if bias else None)


def _one_by_one(weight: Tensor) -> bool:
    """Are one client's channels [clients, out, in, ...] so many that groups only get in each other's way?"""
    return weight.dim() == 5 and weight.shape[2] >= WIDE


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """[B, channels, H, W] of each client -> [clients, B, channels, H, W] with channels last in memory."""
    return torch.stack([each.permute(0, 2, 3, 1) for each in images]).permute(0, 1, 4, 2, 3)


def _last(w: Tensor) -> Tensor:
    return w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w


class _ConvPool(Function):
    """Convolution, max-pool and perhaps ReLU in one; and where the maxima were."""

    @staticmethod
    def forward(x, w, b, *options):
        one = (x.unsqueeze(0), w.unsqueeze(0), None if b is None else b.unsqueeze(0))
        y, at = ops.conv_pool_forward(*map(_pixels, one[:2]), one[2], *options)
        return _planes(y).squeeze(0), at.squeeze(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, b, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], x, w)
        ctx.bias = b is not None

    @staticmethod
    def backward(ctx, dy, _):
        needs_x = ctx.needs_input_grad[0]
        dx, dw, db = _ConvPoolBack.apply(dy, *ctx.saved_tensors, needs_x, ctx.bias, *ctx.options)
        return dx if needs_x else None, dw, db if ctx.bias else None, *[None] * len(ctx.options)

    @staticmethod
    def vmap(info, in_dims, x, w, b, *options):
        x, w, b = (
            ops.front(each, dim, info.batch_size) for each, dim in zip((x, w, b), in_dims, strict=False)
        )
        y, at = ops.conv_pool_forward(_pixels(x), _pixels(w), b, *options)
        return (_planes(y), at), (0, 0)


@ops.last("convolution")
class _ConvPoolBack(Function):
    """dy, where the maxima were, x, w -> gradients of x, w and the bias; an empty tensor if not wanted."""

    @staticmethod
    def forward(dy, at, x, w, *options):
        dx, dw, db = _conv_pool_back(*(each.unsqueeze(0) for each in (dy, at, x, w)), *options)
        return dx.squeeze(0) if options[0] else dx, dw.squeeze(0), db.squeeze(0) if options[1] else db

    @staticmethod
    def vmap(info, in_dims, dy, at, x, w, needs_x, bias, *options):
        given = ops.in_front(info, in_dims, (dy, at, x, w))
        made = _conv_pool_back(*given, needs_x, bias, *options)
        return made, (0 if needs_x else None, 0, 0 if bias else None)


class _EachConvPool(Function):
    """The same with weights and bias [B, ...] of every example's own: as many clients of one row."""

    @staticmethod
    def forward(x, w, b, *options):
        y, at = ops.conv_pool_forward(_pixels(x.unsqueeze(1)), _pixels(w), b, *options)
        return _planes(y).squeeze(1), at.squeeze(1)

    setup_context = staticmethod(_ConvPool.setup_context)

    @staticmethod
    def backward(ctx, dy, _):
        needs_x = ctx.needs_input_grad[0]
        dx, dw, db = _EachConvPoolBack.apply(dy, *ctx.saved_tensors, needs_x, ctx.bias, *ctx.options)
        return dx if needs_x else None, dw, db if ctx.bias else None, *[None] * len(ctx.options)

    @staticmethod
    def vmap(info, in_dims, x, w, b, *options):
        n = info.batch_size
        flat = (
            None if each is None else each.flatten(0, 1) for each in ops.in_front(info, in_dims, (x, w, b))
        )
        made = _EachConvPool.forward(*flat, *options)
        return tuple(each.unflatten(0, (n, -1)) for each in made), (0, 0)


@ops.last("convolution")
class _EachConvPoolBack(Function):
    @staticmethod
    def forward(dy, at, x, w, needs_x, bias, *options):
        rows = (each.unsqueeze(1) for each in (dy, at, x))
        dx, dw, db = _conv_pool_back(*rows, w, needs_x, bias, *options)
        return dx.squeeze(1) if needs_x else dx, dw, db

    @staticmethod
    def vmap(info, in_dims, dy, at, x, w, needs_x, bias, *options):
        n = info.batch_size
        flat = (each.flatten(0, 1) for each in ops.in_front(info, in_dims, (dy, at, x, w)))
        dx, dw, db = _EachConvPoolBack.forward(*flat, needs_x, bias, *options)
        there = (needs_x, True, bias)
        made = (
            each.unflatten(0, (n, -1)) if have else each
            for each, have in zip((dx, dw, db), there, strict=True)
        )
        return tuple(made), tuple(0 if have else None for have in there)


def _conv_pool_back(dy, at, x, w, needs_x, *options):
    dx, dw, db = ops.conv_pool_backward(_pixels(dy), at, _pixels(x), _pixels(w), needs_x, *options)
    return _planes(dx) if needs_x else dx, _planes(dw), db


def _pixels(x: Tensor) -> Tensor:
    """[..., channels, H, W] -> [..., H, W, channels]"""
    return x.movedim(-3, -1)


def _planes(x: Tensor) -> Tensor:
    """[..., H, W, channels] -> [..., channels, H, W]"""
    return x.movedim(-1, -3)


class _Linear(Function):
    @staticmethod
    def forward(x, w, b, bf16):
        return F.linear(x, w, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, b, ctx.bf16 = inputs
        ctx.save_for_backward(x, w)
        ctx.bias = b is not None

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        dx, dw, db = _LinearBack.apply(dy, x, w, needs_x, ctx.bias, ctx.bf16)
        return dx if needs_x else None, dw, db if ctx.bias else None, None

    @staticmethod
    def vmap(info, in_dims, x, w, b, bf16):
        x, w, b = ops.in_front(info, in_dims, (x, w, b))
        if native.fits(x, w):
            return ops.linear_forward(x, w, b, False, bf16), 0
        return torch.bmm(x, w.mT) if b is None else torch.baddbmm(b.unsqueeze(1), x, w.mT), 0


@ops.last("linear layer")
class _LinearBack(Function):
    @staticmethod
    def forward(dy, x, w, needs_x, bias, bf16):
        none = dy.new_empty(0)
        return dy @ w if needs_x else none, dy.mT @ x, dy.sum(0) if bias else none

    @staticmethod
    def vmap(info, in_dims, dy, x, w, needs_x, bias, bf16):
        none = dy.new_empty(0)
        dy, x, w = ops.in_front(info, in_dims, (dy, x, w))
        if native.fits(dy, x, w):
            made = ops.linear_backward(dy, x, w, needs_x, bias, False, None, bf16)
            return made, (0 if needs_x else None, 0, 0 if bias else None)
        made = torch.bmm(dy, w) if needs_x else none, torch.bmm(dy.mT, x), dy.sum(1) if bias else none
        return made, (0 if needs_x else None, 0, 0 if bias else None)


class _MaxPool(Function):
    @staticmethod
    def forward(x, kernel, stride, padding, dilation, ceil):
        return aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1])

    @staticmethod
    def backward(ctx, dy, _):
        return _MaxPoolBack.apply(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, x, *options):
        n = info.batch_size
        if in_dims[0] == 0:
            made = aten.max_pool2d_with_indices(_last(x.flatten(0, 1)), *options)
            return tuple(each.unflatten(0, (n, -1)) for each in made), (0, 0)
        made = aten.max_pool2d_with_indices(_grouped(x, in_dims[0], n), *options)
        return tuple(each.unflatten(1, (n, -1)) for each in made), (1, 1)


@ops.last("max-pool")
class _MaxPoolBack(Function):
    @staticmethod
    def forward(dy, x, index, *options):
        return aten.max_pool2d_with_indices_backward(dy, x, *options, index)

    @staticmethod
    def vmap(info, in_dims, dy, x, index, *options):
        n = info.batch_size
        if in_dims[1] == 0:
            given = ops.in_front(info, in_dims, (dy, x, index))
            dy, x, index = (_last(each.flatten(0, 1)) for each in given)
            return aten.max_pool2d_with_indices_backward(dy, x, *options, index).unflatten(0, (n, -1)), 0
        dy, x, index = (_grouped(each, dim, n) for each, dim in zip((dy, x, index), in_dims, strict=False))
        return aten.max_pool2d_with_indices_backward(dy, x, *options, index).unflatten(1, (n, -1)), 1


class _CrossEntropy(Function):
    """Scores with the classes last -> losses, softmax."""

    @staticmethod
    def forward(x, y, ignored):
        return ops.cross_entropy_forward(x, y, ignored)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], inputs[1])
        ctx.ignored = inputs[2]

    @staticmethod
    def backward(ctx, dl, _):
        return _CrossEntropyBack.apply(dl, *ctx.saved_tensors, ctx.ignored), None, None

    @staticmethod
    def vmap(info, in_dims, x, y, ignored):
        x, y = ops.in_front(info, in_dims, (x, y))
        return ops.cross_entropy_forward(x, y, ignored), (0, 0)


@ops.last("cross-entropy")
class _CrossEntropyBack(Function):
    @staticmethod
    def forward(dl, p, y, ignored):
        return ops.cross_entropy_backward(dl, p, y, ignored)

    @staticmethod
    def vmap(info, in_dims, dl, p, y, ignored):
        given = (
            ops.front(each, dim, info.batch_size) for each, dim in zip((dl, p, y), in_dims, strict=False)
        )
        return ops.cross_entropy_backward(*given, ignored), 0

"""The kernels as torch operators on stacked clients; `trainers.layers` uses them, where `fits` says so.

bf16: round what is multiplied to bfloat16; the processor must have instructions for it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: ARG001
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from coterie.core.native import call

DIRECT: dict[Any, Callable[..., Any]] = {}  # operator -> the function itself, without torch's dispatcher
KERNELS: dict[Callable[..., Any], bool] = {}  # functions that only call kernels; do these know strides?
FINISH = {"RELU": 1, "GELU": 2, "GELU_TANH": 3, "TIMES": 4, "WHERE_POSITIVE": 5}  # as in product.h


def kernel(function: Callable[..., Any], *, strided: bool = False) -> Any:
    """A decorator: the function becomes an operator of torch. strided: its tensors may have gaps."""
    made = custom_op(f"coterie::{function.__name__}", mutates_args=())(function)
    DIRECT[getattr(torch.ops.coterie, function.__name__).default] = function
    KERNELS[function] = strided
    return made


def last(what: str) -> Callable[[type], type]:
    """A class decorator for an autograd Function that is a gradient itself, and has none of its own."""

    def setup_context(ctx, inputs, output):
        pass

    def backward(ctx, *grads):
        raise NotImplementedError(f"second derivatives of a batched {what}")

    def finished(function: type) -> type:
        function.setup_context = staticmethod(setup_context)  # type: ignore[attr-defined]
        function.backward = staticmethod(backward)  # type: ignore[attr-defined]
        return function

    return finished


def front(x: Any, dim: int | None, clients: int) -> Any:
    """x with the clients as its first dimension."""
    if x is None:
        return None
    return x.expand(clients, *x.shape) if dim is None else x.movedim(dim, 0)


def in_front(info: Any, in_dims: Sequence[int | None], given: Sequence[Any]) -> list[Any]:
    """The same of several, in a batching rule; there may be more in_dims than tensors."""
    return [front(each, dim, info.batch_size) for each, dim in zip(given, in_dims, strict=False)]


def one(*given: Any) -> list[Any]:
    """One client's tensors, as the kernels take them."""
    return [each.unsqueeze(0) if isinstance(each, Tensor) else each for each in given]


def lined(x: Tensor) -> Tensor:
    """x with the last dimension's elements side by side, copied if need be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check(name: str, *pairs: tuple[Sequence[int] | None, Sequence[int]]) -> None:
    """Raise RuntimeError, as torch would, where a shape is not the one it must be: a kernel trusts them."""
    for found, wanted in pairs:
        if found is not None and tuple(found) != tuple(wanted):
            raise RuntimeError(f"{name}: a tensor is {tuple(found)} where {tuple(wanted)} is needed")


def _shape(x: Tensor | None) -> Sequence[int] | None:
    return None if x is None else x.shape


@kernel
def linear_forward(x: Tensor, w: Tensor, b: Tensor | None, relu: bool, bf16: bool = False) -> Tensor:
    """x [C, B, in], w [C, out, in], b [C, out] -> x w^T + b [C, B, out], or its ReLU."""
    clients, _, width = x.shape
    check("linear", (w.shape, (clients, w.shape[1], width)), (_shape(b), w.shape[:2]))
    x, w, b = x.contiguous(), w.contiguous(), None if b is None else b.contiguous()
    y = x.new_empty(*x.shape[:2], w.shape[1])
    given = x, w, b, y, None, *_linear_room(x, w, bf16), FINISH["RELU"] if relu else 0
    call(name("linear_forward", bf16), *given, *x.shape, w.shape[1])
    return y


@linear_forward.register_fake
def _(x, w, b, relu, bf16=False):
    return x.new_empty(*x.shape[:2], w.shape[1])


@kernel
def linear_gelu(
    x: Tensor, w: Tensor, b: Tensor | None, tanh: bool, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """GELU of a linear layer, and its slope."""
    clients, _, width = x.shape
    check("linear", (w.shape, (clients, w.shape[1], width)), (_shape(b), w.shape[:2]))
    x, w, b = x.contiguous(), w.contiguous(), None if b is None else b.contiguous()
    y, slope = (x.new_empty(*x.shape[:2], w.shape[1]) for _ in range(2))
    what = FINISH["GELU_TANH" if tanh else "GELU"]
    given = x, w, b, y, slope, *_linear_room(x, w, bf16), what
    call(name("linear_forward", bf16), *given, *x.shape, w.shape[1])
    return y, slope


@linear_gelu.register_fake
def _(x, w, b, tanh, bf16=False):
    return tuple(x.new_empty(*x.shape[:2], w.shape[1]) for _ in range(2))


@kernel
def linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, needs_x: bool, bias: bool, relu: bool, slope: Tensor | None = None,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dy [C, B, out] -> gradients of x, of w and of the bias; an empty tensor for one that is not wanted.

    relu, slope: x comes from a ReLU, or from what has this slope [C, B, in], and the gradient is of what went
    into that.
    """
    w = w.contiguous()
    return _back(dy, x, w, torch.empty_like(w), None, needs_x, bias, relu, slope, bf16)


@linear_backward.register_fake
def _(dy, x, w, needs_x, bias, relu, slope=None, bf16=False):
    return (
        x.new_empty(x.shape if needs_x else 0),
        w.new_empty(w.shape),
        w.new_empty(w.shape[:2] if bias else 0),
    )


def linear_step_(
    dy: Tensor, x: Tensor, w: Tensor, needs_x: bool, bias: bool, relu: bool, factor: Tensor,
    slope: Tensor | None = None, bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `linear_backward`, with w += factor * its gradient in place. factor: [C, 1, 1] or []."""
    factor = factor.expand(len(w), *factor.shape[1:]).reshape(-1).contiguous()
    return _back(dy, x, w, w, factor, needs_x, bias, relu, slope, bf16)


def _back(
    dy: Tensor, x: Tensor, w: Tensor, dw: Tensor, factor: Tensor | None, needs_x: bool, bias: bool,
    relu: bool, slope: Tensor | None, bf16: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    clients, rows, width = x.shape
    check(
        "linear", (w.shape, (clients, w.shape[1], width)), (dy.shape, (clients, rows, w.shape[1])),
        (_shape(slope), x.shape),
    )  # fmt: skip
    dy, x, slope = dy.contiguous(), x.contiguous(), None if slope is None else slope.contiguous()
    dx, db = torch.empty_like(x) if needs_x else None, w.new_empty(w.shape[:2]) if bias else None
    what = FINISH["WHERE_POSITIVE"] if relu else 0 if slope is None else FINISH["TIMES"]
    given = dy, x, w, slope, dw, db, dx, factor, *_linear_room(x, w, bf16), what
    call(name("linear_backward", bf16), *given, *x.shape, w.shape[1])
    none = x.new_empty(0)
    return none if dx is None else dx, dw, none if db is None else db


def _linear_room(x: Tensor, w: Tensor, bf16: bool) -> list[Tensor]:
    """Scratch memory, where a linear layer needs some."""
    return [x.new_empty(call("linear_scratch_bf16", *x.shape[1:], w.shape[1]))] if bf16 else []


def name(kernel: str, bf16: bool) -> str:
    """What the kernel is called."""
    return f"{kernel}_bf16" if bf16 else kernel


@kernel
def cross_entropy_forward(z: Tensor, y: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """z [..., classes], y [...] -> losses [...], softmax [..., classes]. IndexError for a y of no class."""
    check("cross_entropy", (y.shape, z.shape[:-1]))
    if y.dtype != torch.int64:
        raise RuntimeError(f"cross_entropy: targets are {y.dtype}, not torch.int64")
    z, y = z.contiguous(), y.contiguous()
    losses, p = z.new_empty(y.shape), torch.empty_like(z)
    if wrong := call("cross_entropy_forward", z, y, losses, p, ignored, y.numel(), z.shape[-1]):
        raise IndexError(f"{wrong} targets are not among the {z.shape[-1]} classes")
    return losses, p


@cross_entropy_forward.register_fake
def _(z, y, ignored):
    return z.new_empty(y.shape), z.new_empty(z.shape)


@kernel
def cross_entropy_backward(dl: Tensor, p: Tensor, y: Tensor, ignored: int) -> Tensor:
    """The gradient of z, from that of the losses."""
    check("cross_entropy", (dl.shape, p.shape[:-1]), (y.shape, p.shape[:-1]))
    dz = torch.empty_like(p)
    call("cross_entropy_backward", dl.contiguous(), p, y.contiguous(), dz, ignored, y.numel(), p.shape[-1])
    return dz


@cross_entropy_backward.register_fake
def _(dl, p, y, ignored):
    return p.new_empty(p.shape)


@kernel
def conv_pool_forward(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    kernel: Sequence[int], pool_stride: Sequence[int], relu: bool, bf16: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Max-pool of the convolution of x [C, B, H, W, in] with w [C, out, kh, kw, in], b [C, out]; with ReLU?

    Returns y [C, B, PH, PW, out] and, for the way back, where each maximum was.
    """
    check("conv", (w.shape, (x.shape[0], *w.shape[1:4], x.shape[4])), (_shape(b), w.shape[:2]))
    x, w, b = x.contiguous(), w.contiguous(), None if b is None else b.contiguous()
    sizes = _conv_sizes(x, w, stride, padding, kernel, pool_stride, relu)
    y = x.new_empty(_pooled(x, w, stride, padding, kernel, pool_stride))
    at = torch.empty_like(y, dtype=torch.int32)
    scratch = x.new_empty(call(name("conv_pool_scratch", bf16), *sizes))
    call(name("conv_pool_forward", bf16), x, w, b, y, at, scratch, *sizes)
    return y, at


@conv_pool_forward.register_fake
def _(x, w, b, stride, padding, kernel, pool_stride, relu, bf16=False):
    y = x.new_empty(_pooled(x, w, stride, padding, kernel, pool_stride))
    return y, torch.empty_like(y, dtype=torch.int32)


@kernel
def conv_pool_backward(
    dy: Tensor, at: Tensor, x: Tensor, w: Tensor, needs_x: bool, bias: bool, stride: Sequence[int],
    padding: Sequence[int], kernel: Sequence[int], pool_stride: Sequence[int], relu: bool, bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of w and of the bias; an empty tensor for one that is not wanted."""
    pooled = _pooled(x, w, stride, padding, kernel, pool_stride)
    check("conv", (dy.shape, pooled), (at.shape, pooled), (w.shape, (x.shape[0], *w.shape[1:4], x.shape[4])))
    dy, x, w = dy.contiguous(), x.contiguous(), w.contiguous()
    sizes = _conv_sizes(x, w, stride, padding, kernel, pool_stride, relu)
    dx, dw, db = _gradients(x, w, needs_x, bias)
    scratch = x.new_empty(call(name("conv_pool_scratch", bf16), *sizes))
    given = dx if needs_x else None, dw, db if bias else None, scratch
    call(name("conv_pool_backward", bf16), dy, at, x, w, *given, *sizes)
    return dx, dw, db


@conv_pool_backward.register_fake
def _(dy, at, x, w, needs_x, bias, stride, padding, kernel, pool_stride, relu, bf16=False):
    return (
        x.new_empty(x.shape if needs_x else 0),
        w.new_empty(w.shape),
        w.new_empty(w.shape[:2] if bias else 0),
    )


def _conv_sizes(x, w, stride, padding, kernel, pool_stride, relu):
    """What the kernels call clients, batch, H, W, in, out, kh, kw and so on."""
    return *x.shape, w.shape[1], *w.shape[2:4], *stride, *padding, *kernel, *pool_stride, int(relu)


def _pooled(x, w, stride, padding, kernel, pool_stride):
    """The shape of what comes out."""
    size = list(x.shape[2:4])
    for i in range(2):
        size[i] = (size[i] + 2 * padding[i] - w.shape[2 + i]) // stride[i] + 1
        size[i] = (size[i] - kernel[i]) // pool_stride[i] + 1
    if min(size) < 1:
        raise ValueError(f"images of {x.shape[2]}x{x.shape[3]} are too small for this pooling")
    return *x.shape[:2], *size, w.shape[1]


def _gradients(x, w, needs_x, bias):
    """Room for the gradients of x, w and the bias."""
    return (
        x.new_empty(x.shape if needs_x else 0),
        w.new_empty(w.shape),
        w.new_empty(w.shape[:2] if bias else 0),
    )


KERNELS[linear_step_] = False

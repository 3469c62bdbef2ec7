"""Embedding, layer norm and GELU for many clients at once; `layers` hands torch's own to them.

Each is a kernel of core/native where it can be. Where not, embedding is one gather from all clients' tables,
and the others are left to vmap.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: ARG001, ARG004
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coterie.core import native
from coterie.core.native import call
from coterie.trainers import ops

Function = torch.autograd.Function


def embedding(
    layers: Any,
    x: Tensor,
    weight: Tensor,
    padding_idx: Any = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rows of a table."""
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    return _Embedding.apply(x, weight)


def layer_norm(
    layers: Any, x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """LayerNorm over the last dimensions."""
    if not native.fits(x, *(each for each in (weight, bias) if each is not None)):
        return NotImplemented
    if not shape or tuple(x.shape[-len(shape) :]) != tuple(shape):
        return NotImplemented
    given = (None if each is None else each.flatten() for each in (weight, bias))
    return _LayerNorm.apply(x.reshape(-1, math.prod(shape)), *given, eps)[0].reshape(x.shape)


def gelu(layers: Any, x: Tensor, approximate: str = "none") -> Any:
    """GELU, exact or by its approximation with a hyperbolic tangent."""
    if not native.fits(x) or approximate not in ("none", "tanh"):
        return NotImplemented
    return _Gelu.apply(x, approximate == "tanh")[0]


@ops.kernel
def embedding_forward(x: Tensor, w: Tensor) -> Tensor:
    """x [C or 1, ...], w [C, rows, size] -> w's rows [C, ..., size]. IndexError for an x of no row."""
    clients, rows, size = w.shape
    if x.dtype != torch.int64 or len(x) not in (1, clients):
        raise RuntimeError(
            f"embedding: {x.dtype} of {len(x)} clients where torch.int64 of {clients} is needed"
        )
    x, w = x.contiguous(), w.contiguous()
    y = w.new_empty(clients, *x.shape[1:], size)
    if wrong := call("embedding_forward", x, w, y, *_table(x, clients), rows, size):
        raise IndexError(f"{wrong} numbers are not among the {rows} rows of an embedding")
    return y


@embedding_forward.register_fake
def _(x, w):
    return w.new_empty(len(w), *x.shape[1:], w.shape[-1])


@ops.kernel
def embedding_backward(dy: Tensor, x: Tensor, rows: int) -> Tensor:
    """The gradient of w, summed up in the order of x."""
    ops.check("embedding", (x.shape[1:], dy.shape[1:-1]))
    dy, x = dy.contiguous(), x.contiguous()
    clients, size = len(dy), dy.shape[-1]
    dw = dy.new_empty(clients, rows, size)
    call("embedding_backward", dy, x, dw, *_table(x, clients), rows, size)
    return dw


@embedding_backward.register_fake
def _(dy, x, rows):
    return dy.new_empty(len(dy), rows, dy.shape[-1])


def _table(x: Tensor, clients: int) -> tuple[int, int, int]:
    """How far two clients' numbers are apart; clients; numbers of each."""
    many = x[0].numel()
    return many if len(x) > 1 else 0, clients, many


@ops.kernel
def layer_norm_forward(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [C, rows, size], w and b [C, size] -> y, and mean and 1 / deviation of each row [C, rows, 2]."""
    clients, _, size = x.shape
    for each in (w, b):
        ops.check("layer_norm", (None if each is None else each.shape, (clients, size)))
    x, w, b = x.contiguous(), None if w is None else w.contiguous(), None if b is None else b.contiguous()
    y, stats = torch.empty_like(x), x.new_empty(*x.shape[:2], 2)
    call("layer_norm_forward", x, w, b, y, stats, x.new_tensor([eps]), *x.shape)
    return y, stats


@layer_norm_forward.register_fake
def _(x, w, b, eps):
    return x.new_empty(x.shape), x.new_empty(*x.shape[:2], 2)


@ops.kernel
def layer_norm_backward(
    dy: Tensor, x: Tensor, stats: Tensor, w: Tensor | None, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and b; an empty tensor for one that there is not."""
    clients, rows, size = x.shape
    ops.check(
        "layer_norm", (dy.shape, x.shape), (stats.shape, (clients, rows, 2)),
        (None if w is None else w.shape, (clients, size)),
    )  # fmt: skip
    dy, x, w = dy.contiguous(), x.contiguous(), None if w is None else w.contiguous()
    dx = torch.empty_like(x)
    dw, db = (x.new_empty((clients, size) if wanted else 0) for wanted in (w is not None, bias))
    call(
        "layer_norm_backward", dy, x, w, stats, dx, None if w is None else dw, db if bias else None, *x.shape
    )
    return dx, dw, db


@layer_norm_backward.register_fake
def _(dy, x, stats, w, bias):
    shape = x.shape[0], x.shape[2]
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if w is None else shape),
        x.new_empty(shape if bias else 0),
    )


@ops.kernel
def gelu_forward(x: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """GELU and its slope at x."""
    x = x.contiguous()
    y, slope = torch.empty_like(x), torch.empty_like(x)
    call("gelu_forward", x, y, slope, tanh, x.numel())
    return y, slope


@gelu_forward.register_fake
def _(x, tanh):
    return x.new_empty(x.shape), x.new_empty(x.shape)


class _Embedding(Function):
    @staticmethod
    def forward(x, w):
        return w[x]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w = inputs
        ctx.save_for_backward(x)
        ctx.rows = w.shape[0]

    @staticmethod
    def backward(ctx, dy):
        return None, _EmbeddingBack.apply(dy, ctx.saved_tensors[0], ctx.rows)

    @staticmethod
    def vmap(info, in_dims, x, w):
        n = info.batch_size
        w = ops.front(w, in_dims[1], n)
        if native.fits(w) and x.dtype == torch.int64:
            return embedding_forward(_numbers(x, in_dims[0]), w), 0
        return w.flatten(0, 1)[_own_rows(ops.front(x, in_dims[0], n), w.shape[1])], 0


@ops.last("embedding")
class _EmbeddingBack(Function):
    @staticmethod
    def forward(dy, x, rows):
        return dy.new_zeros(rows, dy.shape[-1]).index_add(0, x.flatten(), dy.flatten(0, -2))

    @staticmethod
    def vmap(info, in_dims, dy, x, rows):
        n = info.batch_size
        dy = ops.front(dy, in_dims[0], n)
        if native.fits(dy) and x.dtype == torch.int64:
            return embedding_backward(dy, _numbers(x, in_dims[1]), rows), 0
        index = _own_rows(ops.front(x, in_dims[1], n), rows).flatten()
        made = dy.new_zeros(n * rows, dy.shape[-1]).index_add(0, index, dy.flatten(0, -2))
        return made.unflatten(0, (n, rows)), 0


def _numbers(x: Tensor, dim: int | None) -> Tensor:
    """[C or 1, ...]"""
    return x.unsqueeze(0) if dim is None else x.movedim(dim, 0)


def _own_rows(x: Tensor, rows: int) -> Tensor:
    """Row numbers [clients, ...] in all clients' tables, one after the other; a wrong one is in none."""
    clients = len(x)
    first = (torch.arange(clients, device=x.device) * rows).view(-1, *[1] * (x.dim() - 1))
    return torch.where((x >= 0) & (x < rows), x + first, clients * rows)


class _LayerNorm(Function):
    """x [rows, size], w and b [size] -> y and statistics."""

    @staticmethod
    def forward(x, w, b, eps):
        return tuple(each.squeeze(0) for each in layer_norm_forward(*ops.one(x, w, b), eps))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, b, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1], w)
        ctx.bias = b is not None

    @staticmethod
    def backward(ctx, dy, _):
        dx, dw, db = _LayerNormBack.apply(dy, *ctx.saved_tensors, ctx.bias)
        return dx, None if ctx.saved_tensors[2] is None else dw, db if ctx.bias else None, None

    @staticmethod
    def vmap(info, in_dims, x, w, b, eps):
        return layer_norm_forward(*ops.in_front(info, in_dims, (x, w, b)), eps), (0, 0)


@ops.last("layer norm")
class _LayerNormBack(Function):
    @staticmethod
    def forward(dy, x, stats, w, bias):
        dx, dw, db = layer_norm_backward(*ops.one(dy, x, stats, w), bias)
        return dx.squeeze(0), dw.squeeze(0), db.squeeze(0)

    @staticmethod
    def vmap(info, in_dims, dy, x, stats, w, bias):
        made = layer_norm_backward(*ops.in_front(info, in_dims, (dy, x, stats, w)), bias)
        return made, (0, None if w is None else 0, 0 if bias else None)


class _Gelu(Function):
    """x -> y and its slope."""

    @staticmethod
    def forward(x, tanh):
        return gelu_forward(x, tanh)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], inputs[0])

    @staticmethod
    def backward(ctx, dy, _):
        return _GeluBack.apply(dy, *ctx.saved_tensors), None

    @staticmethod
    def vmap(info, in_dims, x, tanh):
        return gelu_forward(ops.front(x, in_dims[0], info.batch_size), tanh), (0, 0)


@ops.last("GELU")
class _GeluBack(Function):
    """dy, the slope and x, on which it depends -> dx."""

    @staticmethod
    def forward(dy, slope, x):
        return dy * slope

    @staticmethod
    def vmap(info, in_dims, dy, slope, x):
        dy, slope = ops.in_front(info, in_dims, (dy, slope))
        return dy * slope, 0

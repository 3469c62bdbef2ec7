"""Embedding, layer norm, GELU and attention for many clients at once; `layers` hands torch's own to them.

Each is a kernel of core/native where it can be. Where not, embedding is one gather from all clients' tables,
attention is written out in operations that vmap knows, and the others are left to vmap.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: ARG001, ARG004
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
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


def attention(
    layers: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(Q K^T scale + mask) V of [B, (heads,) T, d]."""
    if query.dim() == 3 and attn_mask is None:
        q, k, v = (each.unsqueeze(1) for each in (query, key, value))
        made = attention(layers, q, k, v, None, dropout_p, is_causal, scale, enable_gqa)
        return made if made is NotImplemented else made.squeeze(1)
    if dropout_p or enable_gqa or (is_causal and attn_mask is not None):
        return NotImplemented
    if not (query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2]):
        return NotImplemented
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    mask = attn_mask
    if mask is not None:
        mask = _added(~mask if mask.dtype == torch.bool else mask, query.dtype)
        mask = mask.expand(*query.shape[:3], key.shape[2])
    if native.fits(query, key, value) and not (mask is not None and mask.requires_grad):
        return _Attention.apply(query, key, value, mask, is_causal, scale)[0]
    return weights_of(query, key, mask, is_causal, scale) @ value


def multi_head_attention(
    layers: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    in_weight: Any,
    in_bias: Any,
    bias_k: Any,
    bias_v: Any,
    zeros: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """nn.MultiheadAttention of [T, B, width], as it calls torch: projections, attention, projection."""
    odd = any(each is not None for each in (bias_k, bias_v, static_k, static_v)) or zeros
    if odd or (dropout and training) or query.dim() != 3 or (is_causal and attn_mask is None):
        return NotImplemented
    causal = is_causal and key_padding_mask is None and not need_weights  # then torch trusts the hint
    mask = None if causal or attn_mask is None else _added(attn_mask, query.dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, query.dtype)[:, None, None]
        mask = padding if mask is None else mask + padding
    linear = partial(layers.table[F.linear], layers)
    given = [query, key, value]
    swapped = query.stride(0) < query.stride(1)  # in memory the batch comes first
    if swapped:
        given = [each.transpose(0, 1) for each in given]
    if query is key is value and not use_separate_proj_weight:
        parts = linear(given[0], in_weight, in_bias).chunk(3, -1)
    else:
        own = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = own if use_separate_proj_weight else in_weight.chunk(3)
        biases = (None,) * 3 if in_bias is None else in_bias.chunk(3)
        parts = [linear(*each) for each in zip(given, weights, biases, strict=True)]
    apart_heads = [each.unflatten(-1, (heads, -1)) for each in parts]
    q, k, v = (each.transpose(1, 2) if swapped else each.permute(1, 2, 0, 3) for each in apart_heads)
    mixed = attention(layers, q, k, v, mask, 0.0, causal)
    whole = mixed.transpose(1, 2) if swapped else mixed.permute(2, 0, 1, 3)
    out = linear(whole.flatten(2), out_weight, out_bias)
    out = out.transpose(0, 1) if swapped else out
    if not need_weights:
        return out, None
    weights = weights_of(q, k, mask, causal, q.shape[-1] ** -0.5)
    return out, weights.mean(1) if average_attn_weights else weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores; True hides."""
    return (
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
    )


def weights_of(query: Tensor, key: Tensor, mask: Any, causal: bool, scale: float) -> Tensor:
    """What attention weighs values with [B, heads, T, keys]: 0 for a query that may see none."""
    scores: Tensor = query @ key.mT * scale
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
    if mask is None:
        return scores.softmax(-1)
    scores = scores + mask
    blind = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


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


@partial(ops.kernel, strided=True)
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q, k, v [C, B, heads, T, d], mask [C, B, heads, T, keys], added to the scores.

    Returns what is like q [C, B, heads, T, d of v], in memory [C, B, T, heads, d], and the logarithms of the
    scores' sums [C, B, heads, T].
    """
    _check_attention(q, k, v, mask)
    q, k, v = map(ops.lined, (q, k, v))
    mask = None if mask is None else ops.lined(mask)
    out = _mixed(q, v)
    logs, layout = q.new_empty(q.shape[:4]), _layout(q, k, v, out, mask)
    rest = q.new_tensor([scale]), q.new_empty(call("attention_scratch", layout)), causal, layout
    call("attention_forward", q, k, v, mask, out, logs, *rest, gaps=True)
    return out, logs


@attention_forward.register_fake
def _(q, k, v, mask, causal, scale):
    return _mixed(q, v), q.new_empty(q.shape[:4])


@partial(ops.kernel, strided=True)
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, logs: Tensor,
    causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Gradients of q, k and v in one piece of memory [C, ...], which `apart` takes apart."""
    _check_attention(q, k, v, mask)
    ops.check(
        "attention", (dout.shape, _mixed(q, v).shape), (out.shape, dout.shape), (logs.shape, q.shape[:4])
    )
    dout, q, k, v, out = map(ops.lined, (dout, q, k, v, out))
    mask = None if mask is None else ops.lined(mask)
    made = q.new_empty(len(q), sum(each[0].numel() for each in (q, k, v)))
    grads = apart(made, q.shape, k.shape, v.shape)
    layout = _layout(q, k, v, out, mask, dout, *grads)
    rest = q.new_tensor([scale]), q.new_empty(call("attention_scratch", layout)), causal, layout
    call("attention_backward", dout, q, k, v, mask, out, logs.contiguous(), *grads, *rest, gaps=True)
    return made


@attention_backward.register_fake
def _(dout, q, k, v, mask, out, logs, causal, scale):
    return q.new_empty(len(q), sum(each[0].numel() for each in (q, k, v)))


def apart(made: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """Gradients [C, B, heads, T, d]. If all are alike they lie as a layer that makes all three wants them:

    [C, B, T, 3, heads, d].
    """
    if shapes[0] == shapes[1] == shapes[2]:
        clients, batch, heads, length, depth = shapes[0]
        whole = made.view(clients, batch, length, 3, heads, depth)
        return [whole.select(3, i).transpose(2, 3) for i in range(3)]
    parts = made.split([math.prod(shape[1:]) for shape in shapes], 1)
    return [
        part.view(shape[0], shape[1], shape[3], shape[2], shape[4]).transpose(2, 3)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    lead, keys = q.shape[:3], k.shape[3]
    ops.check(
        "attention", (k.shape, (*lead, keys, q.shape[4])), (v.shape, (*lead, keys, v.shape[4])),
        (None if mask is None else mask.shape, (*lead, q.shape[3], keys)),
    )  # fmt: skip


def _mixed(q: Tensor, v: Tensor) -> Tensor:
    clients, batch, heads, length, _ = q.shape
    return q.new_empty(clients, batch, length, heads, v.shape[4]).transpose(2, 3)


def _layout(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
    """Sizes and steps, as attention.c reads them."""
    steps = [[0] * 4 if each is None else each.stride()[:4] for each in (q, k, v, *rest)]
    steps += [[0] * 4] * (9 - len(steps))
    return torch.tensor([*q.shape[:4], *k.shape[3:], v.shape[4], *(step for each in steps for step in each)])


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


def _one(*given: Any) -> list[Any]:
    """One client's tensors, as the kernels take them."""
    return [each.unsqueeze(0) if isinstance(each, Tensor) else each for each in given]


class _LayerNorm(Function):
    """x [rows, size], w and b [size] -> y and statistics."""

    @staticmethod
    def forward(x, w, b, eps):
        return tuple(each.squeeze(0) for each in layer_norm_forward(*_one(x, w, b), eps))

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
        dx, dw, db = layer_norm_backward(*_one(dy, x, stats, w), bias)
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


class _Attention(Function):
    """q, k, v [B, heads, T, d], mask [B, heads, T, keys] -> [B, heads, T, d] and the sums' logarithms."""

    @staticmethod
    def forward(q, k, v, mask, causal, scale):
        made = attention_forward(*_one(q, k, v, mask), causal, scale)
        return tuple(each.squeeze(0) for each in made)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx, dout, _):
        return *_AttentionBack.apply(dout, *ctx.saved_tensors, *ctx.options), None, None, None

    @staticmethod
    def vmap(info, in_dims, q, k, v, mask, *options):
        return attention_forward(*ops.in_front(info, in_dims, (q, k, v, mask)), *options), (0, 0)


@ops.last("attention")
class _AttentionBack(Function):
    @staticmethod
    def forward(dout, q, k, v, *rest):
        given = _one(dout, q, k, v, *rest)
        made = attention_backward(*given)
        return tuple(each.squeeze(0) for each in apart(made, *(each.shape for each in given[1:4])))

    @staticmethod
    def vmap(info, in_dims, *given):
        *tensors, causal, scale = given
        tensors = ops.in_front(info, in_dims, tensors)
        made = attention_backward(*tensors, causal, scale)
        return tuple(apart(made, *(each.shape for each in tensors[1:4]))), (0, 0, 0)

"""Attention for many clients at once; `layers` hands torch's own and nn.MultiheadAttention to it.

A kernel of core/native does it where it can; where not, it is written out in operations that vmap knows.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: ARG001
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


class _Attention(Function):
    """q, k, v [B, heads, T, d], mask [B, heads, T, keys] -> [B, heads, T, d] and the sums' logarithms."""

    @staticmethod
    def forward(q, k, v, mask, causal, scale):
        made = attention_forward(*ops.one(q, k, v, mask), causal, scale)
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
        given = ops.one(dout, q, k, v, *rest)
        made = attention_backward(*given)
        return tuple(each.squeeze(0) for each in apart(made, *(each.shape for each in given[1:4])))

    @staticmethod
    def vmap(info, in_dims, *given):
        *tensors, causal, scale = given
        tensors = ops.in_front(info, in_dims, tensors)
        made = attention_backward(*tensors, causal, scale)
        return tuple(apart(made, *(each.shape for each in tensors[1:4]))), (0, 0, 0)

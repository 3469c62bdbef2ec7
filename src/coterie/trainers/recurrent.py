"""A GRU layer for many clients at once; `layers` hands nn.GRU to it.

h_t = n_t + z_t (h_{t-1} - n_t) with r, z = sigmoid(a + b), n = tanh(a_n + r b_n), a = W x_t + b_ih and
b = U h_{t-1} + b_hh (Cho et al. 2014, arXiv:1406.1078, in the form of torch.nn.GRU). Done by native/gru.c
where it can be, else by torch, step by step. Sequences are [C, T, B, ...]; in memory the batch may come
before time, and what is made of a sequence has its order.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: ARG001, D102
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from coterie.core import native
from coterie.trainers import ops


@partial(ops.kernel, strided=True)
def gru_forward(
    x: Tensor, h: Tensor, w: Tensor, u: Tensor, w_bias: Tensor, u_bias: Tensor, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """x [C, T, B, in], h [C, B, H], w [C, 3H, in], u [C, 3H, H], biases [C, 3H].

    Returns h_t [C, T, B, H] and, for the way back, r z n b_n [C, T, B, 4H].
    """
    (clients, steps, rows, width), size = x.shape, h.shape[-1]
    three = (clients, 3 * size)
    ops.check(
        "gru", (h.shape, (clients, rows, size)), (w.shape, (*three, width)), (u.shape, (*three, size)),
        (w_bias.shape, three), (u_bias.shape, three),
    )  # fmt: skip
    hidden, gates = _empty(x, size), x.new_empty(clients, steps, rows, 4 * size)
    if native.fits(x, h, w, u, w_bias, u_bias):
        rest = (each.contiguous() for each in (h, w, u, w_bias, u_bias))
        native.call(ops.name("gru_forward", bf16), _dense(x), *rest, _dense(hidden), gates, *_room(x, size))
        return hidden, gates
    a = torch.baddbmm(w_bias.unsqueeze(1), x.flatten(1, 2), w.mT).view(clients, steps, rows, 3 * size)
    for t in range(steps):
        made, (r, z, n, bn) = torch.baddbmm(u_bias.unsqueeze(1), h, u.mT), gates[:, t].split(size, -1)
        rz = gates[:, t, :, : 2 * size]
        torch.add(made[..., : 2 * size], a[:, t, :, : 2 * size], out=rz)
        rz.sigmoid_()
        bn.copy_(made[..., 2 * size :])
        torch.addcmul(a[:, t, :, 2 * size :], r, bn, out=n)
        n.tanh_()
        h = torch.lerp(n, h, z)
        hidden[:, t] = h
    return hidden, gates


@gru_forward.register_fake
def _(x, h, w, u, w_bias, u_bias, bf16=False):
    return _empty(x, h.shape[-1]), x.new_empty(*x.shape[:-1], 4 * h.shape[-1])


@partial(ops.kernel, strided=True)
def gru_backward(
    dhidden: Tensor, hidden: Tensor, gates: Tensor, x: Tensor, h: Tensor, w: Tensor, u: Tensor, needs_x: bool,
    bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (or an empty tensor), h, w, u and the biases."""
    clients, steps, rows, size = hidden.shape
    ops.check(
        "gru", (dhidden.shape, hidden.shape), (gates.shape, (clients, steps, rows, 4 * size)),
        (x.shape, (clients, steps, rows, w.shape[-1])), (h.shape, (clients, rows, size)),
        (w.shape, (clients, 3 * size, x.shape[-1])), (u.shape, (clients, 3 * size, size)),
    )  # fmt: skip
    dh, dw, du, dw_bias, du_bias = (each.new_empty(each.shape) for each in (h, w, u, u[..., 0], u[..., 0]))
    if native.fits(dhidden, hidden, gates, x, h, w, u):
        dx = _empty(x, x.shape[-1]) if needs_x else None
        given = (_dense(_like(dhidden, x)), _dense(_like(hidden, x)), gates.contiguous(), _dense(x))
        rest = (each.contiguous() for each in (h, w, u))
        into = None if dx is None else _dense(dx)
        made = (dh, dw, du, dw_bias, du_bias)
        native.call(ops.name("gru_backward", bf16), *given, *rest, into, *made, *_room(x, size))
        return x.new_empty(0) if dx is None else dx, dh, dw, du, dw_bias, du_bias
    da, db = x.new_empty(2, clients, steps, rows, 3 * size)  # db: of b; as da, but the last third times r
    dh = torch.zeros_like(h)
    before = torch.cat([h.unsqueeze(1), hidden[:, :-1]], 1)
    r, z, n, bn = gates.split(size, -1)
    # what does not depend on the way back, for all steps at once
    to_n = (1 - z).mul_(1 - n * n)
    to_z = (before - n).mul_(z).mul_(1 - z)
    to_r = (1 - r).mul_(r).mul_(bn)
    for t in range(steps - 1, -1, -1):
        dh = dh + dhidden[:, t]
        dr, dz, dn = da[:, t].split(size, -1)
        torch.mul(dh, to_n[:, t], out=dn)
        torch.mul(dh, to_z[:, t], out=dz)
        torch.mul(dn, to_r[:, t], out=dr)
        db[:, t] = da[:, t]
        db[:, t, :, 2 * size :] *= r[:, t]
        dh = torch.baddbmm(dh.mul_(z[:, t]), db[:, t], u)
    da, db, flat = da.flatten(1, 2), db.flatten(1, 2), x.flatten(1, 2)
    dx = _like(torch.bmm(da, w).view(x.shape), x) if needs_x else x.new_empty(0)
    return dx, dh, torch.bmm(da.mT, flat), torch.bmm(db.mT, before.flatten(1, 2)), da.sum(1), db.sum(1)


@gru_backward.register_fake
def _(dhidden, hidden, gates, x, h, w, u, needs_x, bf16=False):
    made = (each.new_empty(each.shape) for each in (h, w, u, u[..., 0], u[..., 0]))
    return _empty(x, x.shape[-1]) if needs_x else x.new_empty(0), *made


class Gru(torch.autograd.Function):
    """A layer of one client: x [T, B, in] and the other arguments of `gru_forward` -> its results.

    Batched over clients under vmap.
    """

    @staticmethod
    def forward(*given):
        *tensors, bf16 = given
        return tuple(made[0] for made in gru_forward(*(each.unsqueeze(0) for each in tensors), bf16))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output, *inputs[:4])
        ctx.bf16 = inputs[-1]

    @staticmethod
    def backward(ctx, dhidden, _):
        needs_x = ctx.needs_input_grad[0]
        dx, *rest = GruBack.apply(dhidden, *ctx.saved_tensors, needs_x, ctx.bf16)
        return dx if needs_x else None, *rest, None

    @staticmethod
    def vmap(info, in_dims, *given):
        *tensors, bf16 = given
        return gru_forward(*ops.in_front(info, in_dims, tensors), bf16), (0, 0)


@ops.last("GRU")
class GruBack(torch.autograd.Function):
    """The way back through time."""

    @staticmethod
    def forward(*given):
        *tensors, needs_x, bf16 = given
        made = gru_backward(*(each.unsqueeze(0) for each in tensors), needs_x, bf16)
        return made[0][0] if needs_x else made[0], *(each[0] for each in made[1:])

    @staticmethod
    def vmap(info, in_dims, *given):
        *tensors, needs_x, bf16 = given
        made = gru_backward(*ops.in_front(info, in_dims, tensors), needs_x, bf16)
        return made, (0 if needs_x else None, 0, 0, 0, 0, 0)


def _batch_first(x: Tensor) -> bool:
    return x.stride(1) < x.stride(2)


def _dense(x: Tensor) -> Tensor:
    """A sequence as it lies in memory, without gaps: [C, B, T, ...] or [C, T, B, ...]."""
    return (x.transpose(1, 2) if _batch_first(x) else x).contiguous()


def _empty(like: Tensor, size: int) -> Tensor:
    """[C, T, B, size], in the order of `like`."""
    clients, steps, rows, _ = like.shape
    if _batch_first(like):
        return like.new_empty(clients, rows, steps, size).transpose(1, 2)
    return like.new_empty(clients, steps, rows, size)


def _like(x: Tensor, other: Tensor) -> Tensor:
    """x in the order of another sequence."""
    return x if _batch_first(x) == _batch_first(other) else _empty(other, x.shape[-1]).copy_(x)


def _room(x: Tensor, size: int) -> tuple[Tensor, int, int, int, int, int, int, int]:
    """Scratch memory; the sizes; how many rows lie between two steps, and between two of the batch."""
    clients, steps, rows, inputs = x.shape
    padded, both = (-(-size // 32) * 32), (-(-size // 32) - (-inputs // 32)) * 32
    order = (1, steps) if _batch_first(x) else (rows, 1)
    return x.new_empty(12 * both * (padded + rows + 80)), clients, steps, rows, inputs, size, *order

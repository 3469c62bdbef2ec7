"""The recurrence of a GRU for many clients at once; `layers` hands nn.GRU to it.

h_t = n_t + z_t (h_{t-1} - n_t) with r, z = sigmoid(a + b), n = tanh(a_n + r b_n), where a = W_ih x + b_ih is
given for all steps and b = W_hh h + b_hh is made here (Cho et al. 2014, arXiv:1406.1078, in the form of
torch.nn.GRU). The gradient of W_hh is one matrix product over all steps, after the way back through time.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# ruff: noqa: ARG001, D102, RUF059
from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op, register_fake


@custom_op("coterie::gru_forward", mutates_args=())
def gru_forward(a: Tensor, h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a [T, C, B, 3H], h [C, B, H], w [C, 3H, H], b [C, 3H] -> h_t [T, C, B, H], r z n b_n [T, C, B, 4H]."""
    steps, clients, rows, _ = a.shape
    size = h.shape[-1]
    hidden, gates = a.new_empty(steps, clients, rows, size), a.new_empty(steps, clients, rows, 4 * size)
    wt, bias = w.mT, b.unsqueeze(1)
    for t in range(steps):
        made, (r, z, n, bn) = torch.baddbmm(bias, h, wt), gates[t].split(size, -1)
        rz = gates[t][..., : 2 * size]
        torch.add(made[..., : 2 * size], a[t][..., : 2 * size], out=rz)
        rz.sigmoid_()
        bn.copy_(made[..., 2 * size :])
        torch.addcmul(a[t][..., 2 * size :], r, bn, out=n)
        n.tanh_()
        torch.lerp(n, h, z, out=hidden[t])
        h = hidden[t]
    return hidden, gates


@register_fake("coterie::gru_forward")
def _(a, h, w, b):
    return a.new_empty(*a.shape[:-1], h.shape[-1]), a.new_empty(*a.shape[:-1], 4 * h.shape[-1])


@custom_op("coterie::gru_backward", mutates_args=())
def gru_backward(
    dhidden: Tensor, hidden: Tensor, gates: Tensor, h: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a [T, C, B, 3H], of the first h [C, B, H], of w [C, 3H, H] and of b [C, 3H]."""
    steps, clients, rows, size = dhidden.shape
    da = dhidden.new_empty(steps, clients, rows, 3 * size)
    db = torch.empty_like(da)  # of W_hh h + b_hh: as da, but the last third times r
    dh = torch.zeros_like(h)
    before = torch.cat([h.unsqueeze(0), hidden[:-1]])
    r, z, n, bn = gates.split(size, -1)
    # what does not depend on the way back, for all steps at once
    to_n = (1 - z).mul_(1 - n * n)
    to_z = (before - n).mul_(z).mul_(1 - z)
    to_r = (1 - r).mul_(r).mul_(bn)
    for t in range(steps - 1, -1, -1):
        dh = dh + dhidden[t]
        dr, dz, dn = da[t].split(size, -1)
        torch.mul(dh, to_n[t], out=dn)
        torch.mul(dh, to_z[t], out=dz)
        torch.mul(dn, to_r[t], out=dr)
        db[t].copy_(da[t])
        db[t][..., 2 * size :].mul_(r[t])
        dh = torch.baddbmm(dh.mul_(z[t]), db[t], w)
    flat = db.transpose(0, 1).reshape(clients, steps * rows, 3 * size)
    dw = torch.bmm(flat.mT, before.transpose(0, 1).reshape(clients, steps * rows, size))
    return da, dh, dw, flat.sum(1)


@register_fake("coterie::gru_backward")
def _(dhidden, hidden, gates, h, w):
    a = dhidden.new_empty(*dhidden.shape[:-1], 3 * h.shape[-1])
    return a, torch.empty_like(h), torch.empty_like(w), w.new_empty(w.shape[:2])


class Recurrence(torch.autograd.Function):
    """a [T, B, 3H], h [B, H], w [3H, H], b [3H] -> h_t [T, B, H], and the gates; batched under vmap."""

    @staticmethod
    def forward(a, h, w, b):
        hidden, gates = gru_forward(a.unsqueeze(1), h.unsqueeze(0), w.unsqueeze(0), b.unsqueeze(0))
        return hidden.squeeze(1), gates.squeeze(1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, h, w, b = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output, h, w)

    @staticmethod
    def backward(ctx, dhidden, _):
        return RecurrenceBack.apply(dhidden, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, a, h, w, b):
        a, h, w, b = _laid_out(info, in_dims, (1, 0, 0, 0), (a, h, w, b))
        return gru_forward(a, h, w, b), (1, 1)


class RecurrenceBack(torch.autograd.Function):
    """The way back through time."""

    @staticmethod
    def forward(dhidden, hidden, gates, h, w):
        sequences = [each.unsqueeze(1) for each in (dhidden, hidden, gates)]
        given = (*sequences, h.unsqueeze(0), w.unsqueeze(0))
        da, *rest = gru_backward(*given)
        return (da.squeeze(1), *(each.squeeze(0) for each in rest))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("second derivatives of a batched GRU")

    @staticmethod
    def vmap(info, in_dims, *given):
        return gru_backward(*_laid_out(info, in_dims, (1, 1, 1, 0, 0), given)), (1, 0, 0, 0)


def _laid_out(info, in_dims, wanted, given):
    """Each tensor with the clients where they are wanted, contiguous."""
    return [
        (each.unsqueeze(to).expand(*each.shape[:to], info.batch_size, *each.shape[to:]) if dim is None
         else each.movedim(dim, to)).contiguous()
        for each, dim, to in zip(given, in_dims, wanted, strict=True)
    ]  # fmt: skip

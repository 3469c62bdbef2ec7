"""Exact sums: a weighted mean whose bits do not depend on the order or the nesting of the additions.

Law 2 rests on this file. Each product x = weight * value (float64) is cut on two fixed grids:
hi = x rounded to a multiple of 2^-16, lo = (x - hi) rounded to a multiple of 2^-56, by the classic
(x + M) - M with M = 1.5 * 2^52 * grid. Sums of multiples of one grid are exact in float64 as long as
they stay below 2^53 grid steps, and exact additions commute and associate. `lo` is carried into `hi`
before it can fill up, which changes neither the exact value of hi + lo nor, therefore, the result:
finishing rounds hi + lo once and divides by the sum of weights, kept as an exact rational.

Error: at most 2^-57 a reply (absolute, on weight * value), plus the one rounding of the product and
the two of finishing. Range: sums of |weight * value| below 2^35 = 3.4e10, else OutOfRange.
Memory: 16 bytes a parameter, whatever the number of replies. Time: about 8 times a float32 axpy, 3
times a float64 one (`benchmarks/exact_sums.py`); for float32 a kernel in C makes the same bits sooner.
NaN and infinity are refused on arrival, by name.

Integer leaves (BatchNorm's step counter) are summed as int64, unweighted, and averaged by count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from coterie.core import native, trees
from coterie.core.errors import NonFinite, OutOfRange, RunError
from coterie.core.types import Tree

HI, LO = 2.0**-16, 2.0**-56
SHIFT_HI, SHIFT_LO = 1.5 * 2**52 * HI, 1.5 * 2**52 * LO
LIMIT = 2**35
CARRY_EVERY = 8192  # |lo| <= 2^-17 a reply, and lo is exact below 2^-3
CHUNK = 1 << 17  # elements: 2^15 took 1.25, 2^21 took 4.5 times as long on 1.7 M parameters


def add(acc: Tree, up: Tree, weight: float | Sequence[float] | Tensor) -> Tree:
    """Return acc + weight * up; `acc` is None at first and its memory is reused afterwards.

    up: a tree of float or integer tensors; or, with n weights, the same with a leading dimension of n.
    Raises NonFinite or OutOfRange (naming the leaf) before anything is added.
    """
    if not isinstance(weight, Tensor | Sequence):
        return add(acc, trees.map_tree(lambda leaf: leaf.unsqueeze(0), up), (float(weight),))
    weights = [float(each) for each in weight]
    for each in weights:
        if not (math.isfinite(each) and each >= 0):
            raise NonFinite(f"weight {each} of an update: weights must be finite and >= 0")
    if len(weights) > CARRY_EVERY:  # more would fill up `lo` between two carries
        half = len(weights) // 2
        acc = add(acc, trees.map_tree(lambda leaf: leaf[:half], up), weights[:half])
        return add(acc, trees.map_tree(lambda leaf: leaf[half:], up), weights[half:])
    if not weights:
        return acc
    if acc is None:
        acc = {
            "hi": trees.map_tree(lambda u: torch.zeros(u.shape[1:], dtype=_limb(u), device=u.device), up),
            "lo": trees.map_tree(lambda u: torch.zeros(_lo_shape(u), dtype=_limb(u), device=u.device), up),
            "like": trees.map_tree(lambda u: torch.empty(0, dtype=u.dtype), up),
            "weight": Fraction(0),
            "count": 0,
            "bound": 0,
        }
    rows = trees.rows(acc["hi"], acc["lo"], acc["like"], up)
    largest = torch.zeros(len(weights), dtype=torch.float64)
    for hi, _, like, u in rows:
        if u.shape != (len(weights), *hi.shape) or u.dtype != like.dtype:
            raise ValueError(
                f"an update of {u.dtype} {tuple(u.shape[1:])} among updates of {like.dtype} {tuple(hi.shape)}"
            )
        if u.is_floating_point() and hi.numel():
            torch.maximum(largest, trees.largest(u), out=largest)
    if not torch.isfinite(largest).all():
        trees.check_finite(up)  # names the leaf
    # integers, so that the bound is the same in any order too
    bounds = (
        math.ceil(min(most * each, 2.0 * LIMIT)) for most, each in zip(largest.tolist(), weights, strict=True)
    )
    total = _checked(acc["bound"] + sum(bounds))
    count = acc["count"] + len(weights)
    if count // CARRY_EVERY != acc["count"] // CARRY_EVERY:
        trees.map_tree(_carry, acc["hi"], acc["lo"])
    scratch = _Scratch()
    for hi, lo, _, u in rows:
        _add_leaf(hi, lo, u.detach(), weights, scratch)
    return {**acc, "weight": acc["weight"] + dot(weights), "count": count, "bound": total}


def merge(left: Tree, right: Tree) -> Tree:
    """Return the accumulator of all that either holds; reuses the memory of `left`."""
    if left is None or right is None:
        return right if left is None else left
    total = _checked(left["bound"] + right["bound"])
    trees.map_tree(lambda a, b: a.add_(b), left["hi"], right["hi"])
    trees.map_tree(lambda a, b: a.add_(b), left["lo"], right["lo"])
    trees.map_tree(_carry, left["hi"], left["lo"])
    return {
        **left,
        "weight": left["weight"] + right["weight"],
        "count": left["count"] + right["count"],
        "bound": total,
    }


def mean(acc: Tree) -> tuple[Tree, float, int]:
    """Return (weighted mean in the dtypes of the updates, sum of weights, number of updates)."""
    if acc is None:
        raise RunError("the mean of no updates is not defined")
    weight, count = float(acc["weight"]), acc["count"]
    if weight == 0:
        raise RunError("all updates have weight 0", "give clients positive weights, or weighting = 'uniform'")

    def leaf(hi: Tensor, lo: Tensor, like: Tensor) -> Tensor:
        if hi.is_floating_point() and native.fits(like):
            made = torch.empty(hi.shape)
            native.call("exact_mean", hi, lo, torch.tensor(weight, dtype=torch.float64), made, hi.numel())
            return made
        if hi.is_floating_point():
            return ((hi + lo) / weight).to(like.dtype)
        return torch.round(hi.double() / count).to(like.dtype)

    return trees.map_tree(leaf, acc["hi"], acc["lo"], acc["like"]), weight, count


def total(acc: Tree) -> tuple[Tree | None, float, int]:
    """Return (sum, sum of weights, number of updates): float64, and int64 of integer leaves; None of none."""
    if acc is None:
        return None, 0.0, 0
    summed = trees.map_tree(lambda hi, lo: hi + lo if hi.is_floating_point() else hi, acc["hi"], acc["lo"])
    return summed, float(acc["weight"]), acc["count"]


def dot(values: Sequence[float], weights: Sequence[float] | None = None) -> Fraction:
    """The exact sum of values * weights (of values, without weights); all must be finite."""
    total, common = (
        0,
        1,
    )  # denominators are powers of two: a shift brings them together, where Fractions take a gcd
    for index, value in enumerate(values):
        top, bottom = float(value).as_integer_ratio()
        if weights is not None:
            by, over = float(weights[index]).as_integer_ratio()
            top, bottom = top * by, bottom * over
        if bottom > common:
            total, common = total * (bottom // common), bottom
        total += top * (common // bottom)
    return Fraction(total, common)


def _limb(u: Tensor) -> torch.dtype:
    if u.is_complex() or u.dtype == torch.bool:
        raise TypeError(f"updates are made of float or integer tensors, not {u.dtype}")
    return torch.float64 if u.is_floating_point() else torch.int64


def _lo_shape(u: Tensor) -> torch.Size:
    return u.shape[1:] if u.is_floating_point() else torch.Size([0])


def _checked(bound: int) -> int:
    if bound >= LIMIT:
        raise OutOfRange(
            f"the sum of |weight * value| may reach {bound:.3g}, beyond the exact range of {LIMIT:.3g}",
            "use weighting = 'uniform', smaller cohorts, or scale the model's buffers down",
        )
    return bound


class _Scratch:
    """Two float64 chunks, reused for every chunk of every leaf: allocation costs more than the sums."""

    def __init__(self) -> None:
        self.chunks: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def of(self, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
        found = self.chunks.get(device)
        if found is None or found[0].numel() < size:
            found = self.chunks[device] = (
                torch.empty(size, dtype=torch.float64, device=device),
                torch.empty(size, dtype=torch.float64, device=device),
            )
        return found[0][:size], found[1][:size]


def _add_leaf(hi: Tensor, lo: Tensor, u: Tensor, weights: Sequence[float], scratch: _Scratch) -> None:
    """Add sum_i weights[i] * u[i] to one leaf. Sums of multiples of one grid are exact in any order."""
    n = len(weights)
    if not u.is_floating_point():
        hi.add_(u.sum(0))
        return
    u, hi, lo = u.reshape(n, -1), hi.view(-1), lo.view(-1)
    size = u.shape[1]
    factors = torch.tensor(weights, dtype=torch.float64, device=u.device).unsqueeze(1)
    if native.fits(u):  # the same sums to the bit, in one pass
        native.call("exact_add", u.contiguous(), factors, hi, lo, n, size, native.threads(u.numel()))
        return
    step = max(CHUNK // n, 1) if u.device.type == "cpu" else max(size, 1)
    for start in range(0, size, step):
        part = slice(start, start + step)
        width = min(step, size - start)
        x, rounded = (each.view(n, width) for each in scratch.of(u.device, n * width))
        torch.mul(u[:, part], factors, out=x)
        torch.add(x, SHIFT_HI, out=rounded).sub_(SHIFT_HI)
        x.sub_(rounded).add_(SHIFT_LO).sub_(SHIFT_LO)
        if n == 1:
            hi[part].add_(rounded[0])
            lo[part].add_(x[0])
        else:
            hi[part].add_(rounded.sum(0))
            lo[part].add_(x.sum(0))


def _carry(hi: Tensor, lo: Tensor) -> None:
    if hi.is_floating_point():
        whole = (lo + SHIFT_HI).sub_(SHIFT_HI)
        hi.add_(whole)
        lo.sub_(whole)

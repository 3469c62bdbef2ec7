"""The convolution with pooling in C against float64 autograd."""

import os
import shutil
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from coterie.core.native import call
from coterie.trainers import ops

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None or os.environ.get("COTERIE_NATIVE") == "0",
    reason="no C compiler, or COTERIE_NATIVE=0",
)


class Shape(NamedTuple):
    """The sizes, in the order of the C functions' arguments."""

    clients: int = 2
    batch: int = 3
    height: int = 13
    width: int = 11
    channels: int = 5
    out: int = 7
    kh: int = 3
    kw: int = 3
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 1
    pad_w: int = 1
    pool_h: int = 2
    pool_w: int = 2
    pool_stride_h: int = 2
    pool_stride_w: int = 2
    relu: int = 1


def image(size, channels, out, kernel, pad, **more):
    return Shape(
        height=size,
        width=size,
        channels=channels,
        out=out,
        kh=kernel,
        kw=kernel,
        pad_h=pad,
        pad_w=pad,
        **more,
    )


SHAPES = {
    "first, 3x3": image(28, 1, 16, 3, 1),
    "second, 3x3": image(14, 16, 32, 3, 1),
    "first, 5x5": image(28, 1, 32, 5, 2),
    "second, 5x5": image(14, 32, 64, 5, 2),
    "first, no padding": image(28, 1, 6, 5, 0),
    "second, no padding": image(12, 6, 16, 5, 0),
    "colours": image(32, 3, 16, 3, 1),
    "odd": Shape(),
    "one of each": Shape(clients=1, batch=1, height=1, width=1, channels=1, out=1, pool_h=1, pool_w=1),
    "3x5 kernel": Shape(kh=3, kw=5, pad_h=0, pad_w=3),
    "7x1 kernel": Shape(kh=7, kw=1, pad_w=0),
    "wide rows": Shape(height=5, width=30, channels=33, kh=1, kw=7, pad_h=0, pad_w=2),
    "blocks of channels": Shape(height=15, width=16, channels=48, out=20, kh=2, kw=11, pad_h=0, pad_w=5),
    "many channels out": Shape(channels=16, out=300, batch=1),
    "stride 2": Shape(stride_h=2, stride_w=2),
    "stride 1 and 3": Shape(stride_h=1, stride_w=3, kh=2, kw=5, channels=4),
    "windows overlap": Shape(pool_h=3, pool_w=3),
    "windows with gaps": Shape(pool_h=2, pool_w=1, pool_stride_h=3, pool_stride_w=2),
    "no pooling": Shape(pool_h=1, pool_w=1, pool_stride_h=1, pool_stride_w=1),
    "no ReLU": Shape(relu=0),
    "no ReLU, windows overlap": Shape(
        relu=0, pool_h=3, pool_w=2, pool_stride_h=1, pool_stride_w=1, channels=1
    ),
}


def draw(shape, *, whole=False):
    """Images, weights, a bias; whole: of small whole numbers, so that windows have ties and sums are exact."""
    seed = torch.Generator().manual_seed(sum(shape))
    sizes = (
        (shape.clients, shape.batch, shape.height, shape.width, shape.channels),
        (shape.clients, shape.out, shape.kh, shape.kw, shape.channels),
        (shape.clients, shape.out),
    )
    if whole:
        return [torch.randint(-1, 2, size, generator=seed).float() for size in sizes]
    return [torch.randn(size, generator=seed) for size in sizes]


def guarded(*size, dtype=torch.float32):
    """A tensor to be filled, not on a line of the cache; and a check that nothing was written around it."""
    room = torch.full((torch.Size(size).numel() + 33,), 77, dtype=dtype)

    def check():
        assert (room[:17] == 77).all()
        assert (room[-16:] == 77).all()

    return room[17:-16].view(size), check


def pooled(shape):
    rows = (shape.height + 2 * shape.pad_h - shape.kh) // shape.stride_h + 1
    cols = (shape.width + 2 * shape.pad_w - shape.kw) // shape.stride_w + 1
    return (rows - shape.pool_h) // shape.pool_stride_h + 1, (cols - shape.pool_w) // shape.pool_stride_w + 1


def run(name, shape, *tensors):
    space, kept = guarded(call("conv_pool_scratch", *shape))
    call(name, *tensors, space.fill_(torch.nan), *shape)
    kept()


def forward(shape, x, w, b):
    size = shape.clients, shape.batch, *pooled(shape), shape.out
    (y, y_kept), (at, at_kept) = guarded(*size), guarded(*size, dtype=torch.int32)
    run("conv_pool_forward", shape, x, w, b, y, at)
    y_kept()
    at_kept()
    return y, at


def backward(shape, dy, at, x, w, *, first=False, bias=True):
    (dx, dx_kept), (dw, dw_kept), (db, db_kept) = (guarded(*t.shape) for t in (x, w, w[:, :, 0, 0, 0]))
    outs = None if first else dx, dw, db if bias else None
    run("conv_pool_backward", shape, dy, at, x, w, *outs)
    dx_kept()
    dw_kept()
    db_kept()
    return outs


def oracle(shape, x, w, b, dy=None):
    """y, and with dy the gradients of x, w and b, by autograd in float64."""
    x, w = (t.double().requires_grad_() for t in (x, w))
    b = torch.zeros(w.shape[:2], dtype=torch.float64) if b is None else b.double()
    b.requires_grad_()
    ys = []
    for xi, wi, bi in zip(x, w, b, strict=True):
        y = F.conv2d(xi.movedim(-1, 1), wi.movedim(-1, 1), bi, shape[8:10], shape[10:12])
        y = F.relu(y) if shape.relu else y
        ys.append(F.max_pool2d(y, shape[12:14], shape[14:16]).movedim(1, -1))
    y = torch.stack(ys)
    return (y.detach(), *(torch.autograd.grad(y, (x, w, b), dy.double()) if dy is not None else ()))


def near(ours, theirs, terms):
    """Equal up to the rounding of a sum of so many terms about as large as 1."""
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6 * max(terms, 10))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_autograd(shape, bias):
    x, w, b = draw(shape)
    b = b if bias else None
    y, at = forward(shape, x, w, b)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    expected, *gradients = oracle(shape, x, w, b, dy)
    near(y, expected, shape.kh * shape.kw * shape.channels)
    for first in (False, True):
        ours = backward(shape, dy, at, x, w, first=first, bias=bias)
        for mine, theirs in zip(ours, gradients, strict=True):
            if mine is not None:
                near(mine, theirs, int(theirs.abs().max()))


@pytest.mark.parametrize("relu", [0, 1])
def test_ties_go_to_the_first(relu):
    shape = Shape(channels=2, kh=2, kw=2, pool_h=3, pool_w=3, pool_stride_h=2, pool_stride_w=2, relu=relu)
    x, w, b = draw(shape, whole=True)
    y, at = forward(shape, x, w, b)
    dy = torch.randint(1, 9, y.shape, generator=torch.Generator().manual_seed(1)).float()
    expected, *gradients = oracle(shape, x, w, b, dy)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0)
    for mine, theirs in zip(backward(shape, dy, at, x, w), gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("relu", [0, 1])
def test_at_is_the_pixel_that_won(relu):
    shape = Shape(relu=relu)
    x, w, b = draw(shape, whole=True)
    y, at = forward(shape, x, w, b)
    for n, (xi, wi, bi) in enumerate(zip(x, w, b, strict=True)):
        conv = F.conv2d(xi.movedim(-1, 1), wi.movedim(-1, 1), bi, padding=1)
        best, where = F.max_pool2d(conv, 2, return_indices=True)
        where[(best <= 0) & bool(relu)] = -1
        assert torch.equal(at[n].long(), where.movedim(1, -1))
        assert torch.equal(y[n], (F.relu(best) if relu else best).movedim(1, -1))


@pytest.mark.parametrize("relu", [0, 1])
def test_nan_and_infinity_are_passed_on(relu):
    shape = Shape(relu=relu)
    x, w, b = draw(shape)
    x[0, 0, 4, 5, 1], x[0, 1, 7, 7, 0] = torch.nan, torch.inf
    w[1, 2, 0, 0, 0] = torch.nan
    y, at = forward(shape, x, w, b)
    (expected,) = oracle(shape, x, w, b)
    assert 0 < expected.isnan().sum() < expected.numel() / 2
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    assert (at[expected.isnan()] >= 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [Shape(relu=0), Shape(relu=0, channels=1)], ids=["rows", "patches"])
def test_a_bad_gradient_reaches_what_it_should_and_no_more(shape, bad):
    x, w, b = draw(shape)
    y, at = forward(shape, x, w, b)
    dy = torch.ones(y.shape)
    dy[1, 2, 3, 2, 4] = bad
    dx, dw, db = backward(shape, dy, at, x, w)
    row, col = divmod(int(at[1, 2, 3, 2, 4]), shape.width)
    touched = torch.zeros(dx.shape, dtype=torch.bool)
    touched[1, 2, max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2] = True
    assert torch.equal(~dx.isfinite(), touched)
    assert db.isfinite().sum() == db.numel() - 1
    assert (
        dw[1, 4].isfinite().sum() == 0 or bad == torch.inf
    )  # infinity * 0 at the margin is a NaN of either's
    assert dw.isfinite().sum() >= dw.numel() - dw[1, 4].numel()


def test_clients_do_not_mix():
    shape = Shape(clients=3)
    x, w, b = draw(shape)
    y, at = forward(shape, x, w, b)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    together = y, at, *backward(shape, dy, at, x, w)
    alone = shape._replace(clients=1)
    for one in (slice(n, n + 1) for n in range(3)):
        yn, atn = forward(alone, x[one], w[one], b[one])
        parts = yn, atn, *backward(alone, dy[one], atn, x[one], w[one])
        for whole, part in zip(together, parts, strict=True):
            assert torch.equal(whole[one], part)


def test_images_without_a_single_window_are_refused():
    with pytest.raises(ValueError, match="images of 3x9 are too small"):
        ops.conv_pool_forward(
            torch.ones(1, 1, 3, 9, 2), torch.ones(1, 1, 3, 3, 2), None, [1, 1], [0, 0], [2, 2], [2, 2], True
        )

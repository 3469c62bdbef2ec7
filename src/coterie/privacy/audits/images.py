"""How alike two images are, and images as PNG."""

from __future__ import annotations

import math
import struct
import zlib

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM, as in its paper


def psnr(image: Tensor, truth: Tensor, *, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in decibels, 10 log10(peak^2 / mean squared error); inf for equal images.

    Above 30 an image is as good as leaked, below 10 it shows nothing.
    """
    error = float(((image.double() - truth.double()) ** 2).mean())
    return 10 * math.log10(peak**2 / error) if error else math.inf


def ssim(image: Tensor, truth: Tensor, *, peak: float = 1.0) -> float:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004): mean over windows, in [-1, 1].

    Images [..., C, H, W] of at least 11 x 11; Gaussian windows of sigma 1.5, no padding.
    """
    x, y = (each.double().reshape(-1, 1, *each.shape[-2:]) for each in (image, truth))
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    bell = torch.exp(-(at**2) / (2 * SIGMA**2))
    window = (bell[:, None] * bell / bell.sum() ** 2)[None, None]
    mean_x, mean_y = conv2d(x, window), conv2d(y, window)
    var_x, var_y = conv2d(x * x, window) - mean_x**2, conv2d(y * y, window) - mean_y**2
    both = conv2d(x * y, window) - mean_x * mean_y
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((above / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def png(image: Tensor) -> bytes:
    """A PNG file of [C, H, W] or, side by side, of [n, C, H, W]; C is 1 or 3, values clamp to [0, 1]."""
    whole = torch.cat(list(image), dim=-1) if image.dim() == 4 else image
    channels, height, width = whole.shape
    levels = (whole.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    lines = b"".join(b"\0" + row.tobytes() for row in levels)
    colour = {1: 0, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

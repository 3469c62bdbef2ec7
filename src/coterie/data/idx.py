"""The IDX format of MNIST and its kin (http://yann.lecun.com/exdb/mnist/): one array of unsigned bytes."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coterie.core.errors import DataError
from coterie.data.sources import read_bytes


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a file of unsigned bytes, gzipped if its name ends in ".gz", in the shape its header names.

    Raises DataError with the byte offset of what is wrong.
    """
    raw = read_bytes(path)
    hint = "the file is damaged, or is not an idx file; get it again"
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or raw[3] == 0:
        raise DataError(
            f"{path}: byte 0: magic number {raw[:4].hex(' ') or '(none)'}, expected 00 00 08 and the rank",
            hint,
        )
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{path}: byte {len(raw)}: the header ends early; it takes {start} bytes", hint)
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"{path}: byte {start}: {len(raw) - start} bytes follow, but the header's shape {list(shape)} "
            f"takes {math.prod(shape)}",
            hint,
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape).copy()

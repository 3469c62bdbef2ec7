"""Time and memory of correlated noise, per parameter and round, beside drawing independent noise.

    python benchmarks/matrix.py [parameters] [rounds]

Nanoseconds of the rounds after the state is full, the least (a quiet machine) and the median.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from coterie.core.trees import nbytes
from coterie.privacy.matrix import correlated

parameters = int(sys.argv[1]) if len(sys.argv) > 1 else 1_660_000
rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2052
WARM, TIMED = 66, 64  # the widest band is full after 63 rounds


def nanoseconds(start: float) -> float:
    """Per parameter, since `start`."""
    return (time.perf_counter() - start) / parameters * 1e9


draws = []
for _ in range(TIMED):
    began = time.perf_counter()
    torch.randn(parameters)
    draws.append(nanoseconds(began))
print(f"{'noise':20} {'least ns':>9} {'median':>9} {'MB':>9} {'worst error':>12} {'found in, s':>12}")
print(f"{'torch.randn alone':20} {min(draws):9.2f} {statistics.median(draws):9.2f}")

for kind, options, integers in [
    ("tree", {}, False), ("tree", {}, True),
    ("blt", {"buffers": 4}, False),
    ("banded", {"bands": 64}, False), ("banded", {"bands": 64}, True),
]:  # fmt: skip
    began = time.perf_counter()
    noise = correlated(kind, rounds, separation=rounds // 6, participations=6, **options)  # type: ignore[arg-type]
    found = time.perf_counter() - began
    z = torch.randint(-(2**30), 2**30, (parameters,)) if integers else torch.randn(parameters)
    state: Any = noise.init()
    times = []
    for _ in range(min(rounds, WARM + TIMED)):
        began = time.perf_counter()
        _, state = noise.next(state, z)
        times.append(nanoseconds(began))
    name = f"{kind}{' of integers' if integers else ''}"
    quiet, usual, size = min(times[WARM:]), statistics.median(times[WARM:]), nbytes(state) / 1e6
    print(f"{name:20} {quiet:9.2f} {usual:9.2f} {size:9.0f} {noise.max_error:12.2f} {found:12.1f}")

"""What the machine can do: matrix products on all cores, float32 and bfloat16, in GFLOP/s.

python on_peak.py WORK '{"threads": 2}'
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import work
from gate import Gate

SIZE, TIMES = 2048, 4


def speed(dtype: torch.dtype) -> float:
    """The best of a few products, GFLOP/s."""
    a, b = (torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    out, best = torch.empty(SIZE, SIZE, dtype=dtype), float("inf")
    for _ in range(TIMES):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best / 1e9


def main() -> None:
    torch.set_num_threads(json.loads(sys.argv[2])["threads"])
    allotments = work.read(Path(sys.argv[1])).allotments
    gate = Gate(allotments)
    for _ in allotments:
        gate.open()
        gate.tell(float32=speed(torch.float32), bfloat16=speed(torch.bfloat16))
    gate.tell()


if __name__ == "__main__":
    main()

"""What order-free sums cost: `core.exact.add` against a float32 axpy and an order-dependent float64 one.

    python benchmarks/exact_sums.py [--parameters 1663370] [--rounds 15]

Cases are interleaved and medians taken, because machines are shared; ratios are what to compare.
"""

import argparse
import statistics
import time

import torch

from coterie.core import exact

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--parameters", type=int, nargs="*", default=[10_000, 1_663_370])
parser.add_argument("--rounds", type=int, default=15)
options = parser.parse_args()
torch.set_num_threads(1)

for count in options.parameters:
    update = {"w": torch.randn(count, generator=torch.Generator().manual_seed(0)) * 1e-2}
    single, double = torch.zeros(count), torch.zeros(count, dtype=torch.float64)
    acc = exact.add(None, update, 600.0)

    def axpy(single=single, update=update):
        single.add_(update["w"], alpha=600.0)

    def axpy64(double=double, update=update):
        double.add_(update["w"].double(), alpha=600.0)

    def order_free(acc=acc, update=update):
        exact.add(acc, update, 600.0)

    def finish(acc=acc):
        exact.mean(acc)

    cases = {"float32 axpy": axpy, "float64 axpy": axpy64, "exact add": order_free, "exact mean": finish}
    times = {name: [] for name in cases}
    repeat = max(1, 2_000_000 // count)
    for _ in range(options.rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            for _ in range(repeat):
                case()
            times[name].append((time.perf_counter() - start) / repeat)
    base = statistics.median(times["float32 axpy"])
    print(f"{count:,} parameters, torch {torch.__version__}, 1 thread, median of {options.rounds}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / median
        print(f"  {name:14s} {median * 1e6:10.1f} us   {median / base:5.1f} x   spread {100 * spread:.0f} %")

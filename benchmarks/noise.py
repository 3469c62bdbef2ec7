"""What protected noise costs: discrete noise against a float Gaussian from torch's generator, and opendp's.

    python benchmarks/noise.py [--count 1663370] [--rounds 9]

The float Gaussian is what research mode adds; it protects nobody who reads bits. Cases are interleaved and
medians taken, because machines are shared; ratios are what to compare. Tables are made before, timed apart.
"""

import argparse
import statistics
import time

import opendp.prelude as dp
import torch

from coterie.core import native
from coterie.privacy import noise

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--count", type=int, default=1_663_370)
parser.add_argument("--rounds", type=int, default=9)
options = parser.parse_args()
torch.set_num_threads(1)
dp.enable_features("contrib")
generator = torch.Generator().manual_seed(0)
FEW = 20_000  # of opendp's, whose time is proportional
gaussian = dp.m.make_gaussian(
    dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="i64"), scale=1000.0
)


def timed(case):
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def without_kernels():
    compiled, native.library = native.library, lambda: None
    try:
        noise.discrete_gaussian(options.count, 1000.0)
    finally:
        native.library = compiled


samplers = [
    (noise.discrete_gaussian, (0.5, 100.0, 1000.0, 4000.0, 2.0**20, 2.0**40)),
    (noise.discrete_laplace, (0.5, 1000.0, 2.0**20)),
    (noise.skellam, (1000.0, 500_000.0, 2.0**23)),
]
asked = [(sampler, scale) for sampler, scales in samplers for scale in scales]
cases = {"torch.randn, float32": lambda: torch.randn(options.count, generator=generator)}
for sampler, scale in asked:
    cases[f"{sampler.__name__} {scale:g}"] = lambda f=sampler, s=scale: f(options.count, s)
cases["discrete_gaussian 1000, numpy"] = without_kernels
scaled = {f"opendp gaussian 1000, from {FEW:,}": (lambda: gaussian([0] * FEW), options.count / FEW)}

native.library()  # compiled before anything is timed
built = {f"{f.__name__} {s:g}": timed(lambda f=f, s=s: f(1, s)) for f, s in asked}
times = {name: [] for name in [*cases, *scaled]}
for _ in range(options.rounds):
    for name, case in cases.items():
        times[name].append(timed(case))
    for name, (case, factor) in scaled.items():
        times[name].append(timed(case) * factor)
base = statistics.median(times["torch.randn, float32"])
print(f"{options.count:,} draws, torch {torch.__version__}, 1 thread, median of {options.rounds}")
for name, seconds in times.items():
    median = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / median
    tables = f"   tables {built[name] * 1e3:5.1f} ms" if name in built else ""
    print(
        f"  {name:36s} {median * 1e3:9.1f} ms   {median / base:6.1f} x   spread {100 * spread:3.0f} %{tables}"
    )

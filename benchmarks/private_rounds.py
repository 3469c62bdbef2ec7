"""What central protected noise costs a round: the McMahan CNN, 20 clients of 100 samples, trained vectorised.

    python benchmarks/private_rounds.py [--rounds 3] [--repeats 3]

Each case is a whole run on made-up MNIST-shaped rows; a round is what all rounds but the first took, over
their number (the first records graphs). Cases are interleaved, and of each the least is taken, because
machines are shared. "clip" is the clipping alone; "private" has clipping, the grid and the noise.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

import coterie as ct
from coterie.data import from_torch
from coterie.experiment import report

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--repeats", type=int, default=3)
options = parser.parse_args()
report.write = lambda folder: folder  # its pictures are no part of a round
CLIENTS, SAMPLES = 20, 100
CLIP = {"kind": "clip", "norm": 1.0}
NOISE = {"kind": "noise", "at": "server", "multiplier": 1.0, "delta": 1e-3}
CASES = {"plain": [], "clip": [CLIP], "private": [CLIP, NOISE]}
made = torch.Generator().manual_seed(0)


def rows(count):
    inputs = torch.randn(count, 1, 28, 28, generator=made)
    return torch.utils.data.TensorDataset(inputs, torch.randint(0, 10, (count,), generator=made))


dataset = from_torch(rows(CLIENTS * SAMPLES), rows(100), name="noise")


def seconds(transforms):
    config = {
        "name": "private-rounds",
        "data": {"partition": {"kind": "iid", "clients": CLIENTS}, "holdout": 0.0},
        "model": {"kind": "mcmahan_cnn"},
        "algorithm": {
            "kind": "fedavg",
            "weighting": "uniform",
            "client": {"lr": 0.05, "batch_size": 10, "epochs": 1},
        },
        "schedule": {"kind": "synchronous", "rounds": options.rounds + 1, "cohort": CLIENTS},
        "backend": {"trainer": "vectorised"},
        "transforms": transforms,
        "run": {"evaluate_clients": 0},
    }
    with tempfile.TemporaryDirectory() as home:
        ct.run(config, out=Path(home) / "run", dataset=dataset)
        told = [json.loads(line)["seconds"] for line in (Path(home) / "run/metrics.jsonl").open()]
    return (told[-1] - told[0]) / options.rounds


best = dict.fromkeys(CASES, float("inf"))
for _ in range(options.repeats):
    for name, transforms in CASES.items():
        best[name] = min(best[name], seconds(transforms))
for name, found in best.items():
    print(f"{name:8} {found:7.3f} s a round, {found / best['plain'] - 1:+.1%}")

"""What a round costs as the population grows: seconds and peak memory for 10^3 to 10^6 clients.

    python benchmarks/population.py [--clients 1000 1000000] [--cohorts 1000] [--rounds 5] [--json FILE]

Softmax regression on MNIST, 100 examples a client (`sampled`: drawn for each client from the training set),
one epoch in batches of 10; with FedAvg, and with SCAFFOLD, whose clients keep 31 kB each from round to round.
Each cell is a run of its own in a process of its own. A round's cost is the median over all but the first.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import coterie as ct

MEGABYTE = 1 << 20
FIELDS = {
    "algorithm": "{:>9}",
    "clients": "{:>9,}",
    "cohort": "{:>7,}",
    "seconds": "{:>9.3f}",
    "slowest": "{:>9.3f}",
    "start": "{:>7.1f}",
    "peak": "{:>8,.0f}",
    "disk": "{:>8,.0f}",
}
HEADS = ("algorithm", "clients", "cohort", "s/round", "slowest", "start s", "peak MB", "disk MB")


def measure(algorithm: str, clients: int, cohort: int, rounds: int, workers: int) -> dict[str, object]:
    """Run one cell here. peak: of this process and, if there are any, the largest of its workers, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "run", time.perf_counter()
        ct.run(
            {
                "name": "population",
                "seed": 1,
                "data": {
                    "dataset": "mnist",
                    "partition": {"kind": "sampled", "clients": clients, "samples": 100},
                },
                "model": {"kind": "softmax"},
                "algorithm": {"kind": algorithm, "client": {"lr": 0.05, "epochs": 1, "batch_size": 10}},
                "schedule": {"kind": "synchronous", "rounds": rounds, "cohort": cohort},
                "backend": {"kind": "inprocess", **({"workers": workers} if workers else {})},
                "run": {"evaluate_clients": False, "evaluate_every": rounds},
            },
            out=out,
        )
        total = time.perf_counter() - started
        ends = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        took = [later - earlier for earlier, later in pairwise(ends)]
        disk = sum(path.stat().st_size for path in (out / "memories").glob("*"))
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "algorithm": algorithm,
        "clients": clients,
        "cohort": cohort,
        "seconds": statistics.median(took),
        "slowest": max(took),
        "start": total - sum(took),  # with the first round and the report
        "peak": sum(peaks) * 1024 / MEGABYTE,
        "disk": disk / MEGABYTE,
    }


def main() -> None:
    """Measure every cell, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="*", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--cohorts", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--algorithms", nargs="*", default=["fedavg", "scaffold"])
    parser.add_argument("--rounds", type=int, default=6, help="at least 2; the first is not counted")
    parser.add_argument("--workers", type=int, default=0, help="processes (0: what the library chooses)")
    parser.add_argument("--json", type=Path, help="also write the cells to this file")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(**json.loads(options.cell))))
        return
    found = []
    print(
        " ".join(f"{head:>{len(FIELDS[name].format(0))}}" for head, name in zip(HEADS, FIELDS, strict=True))
    )
    for algorithm in options.algorithms:
        for cohort in options.cohorts:
            for clients in options.clients:
                if clients < cohort:
                    continue
                cell = {"algorithm": algorithm, "clients": clients, "cohort": cohort}
                cell |= {"rounds": options.rounds, "workers": options.workers}
                command = [sys.executable, __file__, "--cell", json.dumps(cell)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
                print(" ".join(form.format(found[-1][name]) for name, form in FIELDS.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rounds": options.rounds, "cells": found}, indent=1))


if __name__ == "__main__":
    main()

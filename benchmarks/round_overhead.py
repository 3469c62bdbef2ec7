"""What a round costs besides training: clients take no step, and send an update of 10,000 numbers.

    python benchmarks/round_overhead.py

Tasks, the virtual clock, blocks, exact sums and the commit are real; only training is left out. Prints the
median time of a round for several cohorts, and the line through them: so much a round, so much a client.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from coterie.algorithms import Local, fedavg
from coterie.backends import InProcess, Site
from coterie.core import Commit, derive, drive
from coterie.core.types import Replies
from coterie.data import Numbered
from coterie.schedules import Synchronous
from coterie.storage import Memories
from coterie.trainers import Problem

PARAMETERS, ROUNDS = 10_000, 30


class Idle:
    """A trainer of blocks that does nothing and sends zeros."""

    width = 32

    def fit_block(self, algorithm, tasks, memories, datas):  # noqa: ARG002  as trainers have it
        n = len(tasks)
        delta = {"weight": torch.zeros(n, 1, PARAMETERS - 1), "bias": torch.zeros(n, 1)}
        ups = {"delta": delta, "buffers": {}}
        return [(Replies(tasks, ups, [100.0] * n, {"loss": [0.5] * n}, [0] * n), None)]


def seconds(cohort: int, clients: int = 100_000) -> float:
    """The median time of a round."""
    problem = Problem(nn.Linear(PARAMETERS - 1, 1), "regression")
    algorithm = fedavg(Local())
    site = Site(algorithm, Idle(), None, lambda client: None, Memories())
    schedule = Synchronous(rounds=ROUNDS, cohort=cohort, key=derive(1, "schedule"), pooled=True)
    ends: list[float] = []

    def on_commit(commit: Commit) -> None:  # noqa: ARG001
        ends.append(time.perf_counter())

    plan = schedule(algorithm, algorithm.init(problem.model()), Numbered(clients))
    asyncio.run(drive(plan, InProcess(site), on_commit=on_commit))
    return statistics.median(b - a for a, b in pairwise(ends[3:]))


def main() -> None:
    torch.set_num_threads(1)
    cohorts = [10, 30, 100, 300, 1000]
    times = [seconds(cohort) for cohort in cohorts]
    each, fixed = np.polyfit(cohorts, times, 1)
    for cohort, took in zip(cohorts, times, strict=True):
        share = took / (1e-3 + 60e-6 * cohort)
        print(f"{cohort:5d} clients: {took * 1e3:8.3f} ms a round, {share:4.0%} of 1 ms + 60 us a client")
    print(f"{fixed * 1e3:.2f} ms a round + {each * 1e6:.1f} us a client")


if __name__ == "__main__":
    main()

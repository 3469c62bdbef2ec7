"""Rounds between real processes: Coterie's server and sites against Flower's deployment engine, in turn.

Two sites and a model of 11 KB on loopback. Coterie runs as it is deployed: mutual TLS, every reply and round
durable, ledgers, one step of training; Flower without TLS and in memory, its clients add one to each number.
The time of a round is the median of the times between one round's end and the next. The aims: below 50 ms,
and 100 times as fast as Flower.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "simulation")]

from environments import python_of  # noqa: E402

from coterie.experiment.config import load  # noqa: E402
from coterie.experiment.quickstart import quickstart  # noqa: E402

CONFIG = {
    "name": "latency",
    "seed": 1,
    "data": {"dataset": "digits", "partition": {"kind": "iid", "clients": 2}},
    "model": {"kind": "mlp", "hidden": 37},  # 2,785 numbers
    "algorithm": {"kind": "fedavg", "client": {"lr": 0.1, "steps": 1, "batch_size": 32}},
    "schedule": {"kind": "synchronous", "rounds": 20, "cohort": 2},
    "run": {"evaluate_every": 10**6, "evaluate_clients": False},
    "backend": {"trainer": "loop"},
}


def coterie(rounds: int) -> list[float]:
    """Seconds of each round but the first, in which the sites load torch."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        config = {**CONFIG, "schedule": {**CONFIG["schedule"], "rounds": rounds}}  # type: ignore[dict-item]
        quickstart(load(config), sites=2, out=out)
        ends = [json.loads(row)["seconds"] for row in (out / "metrics.jsonl").read_text().splitlines()]
    return [b - a for a, b in pairwise(ends[1:])]


def flower(rounds: int) -> list[float]:
    """Seconds of each round."""
    python = python_of("flwr")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:8000"\ninsecure = true\n'
        )
        env = {
            **os.environ, "FLWR_HOME": folder, "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{python.parent}:{os.environ['PATH']}",
        }  # fmt: skip
        commands = [["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]]
        commands += [
            ["flower-supernode", "--insecure", "--superlink", "127.0.0.1:8000", "--port", str(port)]
            for port in (9094, 9095)
        ]
        started = []
        try:
            for command in commands:
                log = (home / f"{len(started)}.log").open("w")
                started.append(
                    subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
                )
                time.sleep(8)
            out = home / "ends.json"
            asked = f'out="{out}" rounds={rounds}'
            run = ["flwr", "run", str(HERE / "flower_app"), "here", "--stream", "-c", asked]
            subprocess.run(run, env=env, check=True, capture_output=True, timeout=600)
            ends = json.loads(out.read_text())
        finally:
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return [b - a for a, b in pairwise(ends)]


def measure(rounds: int, flower_rounds: int, repeats: int) -> dict[str, Any]:
    """Seconds of each round, in each repetition."""
    found: dict[str, list[list[float]]] = {"coterie": [], "flower": []}
    for number in range(repeats):
        found["coterie"].append(coterie(rounds))
        found["flower"].append(flower(flower_rounds))
        mine, its = (statistics.median(times[-1]) for times in found.values())
        print(f"  {number + 1}/{repeats}: {1000 * mine:.1f} ms against {its:.2f} s", flush=True)
    middles = {name: [statistics.median(each) for each in times] for name, times in found.items()}
    ratios = [its / mine for mine, its in zip(*middles.values(), strict=True)]
    return {
        "seconds": found,
        "median": {name: statistics.median(times) for name, times in middles.items()},
        "times_flower": statistics.median(ratios),
    }

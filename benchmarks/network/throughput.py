"""Updates of many sites at once, against the same durable steps alone and against a bare gRPC stream.

A round is measured in two parts: from a commit until every site has the new model, and from there until all
updates are in the next commit. The second part is what the aims are about: 60 % of the durable steps, 30 % of
a bare stream. The three take turns; while the two floors are measured, server and sites wait.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import federation as f


def measure(sites: int, megabytes: float, repeats: int, *, floors: bool = True) -> dict[str, Any]:
    """floors: False to measure the server alone."""
    config = f.config(sites, megabytes, repeats + 1)  # in the first one the server makes what it keeps
    f.more_files()
    found: dict[str, list[float]] = {"up": [], "down": [], "steps": [], "stream": []}
    began, accepted = time.monotonic(), 0.0
    with f.federation(sites, room=int(2.2e6 * sites * megabytes)) as made:
        update = made.update(config)
        size = (made.keys / "updates" / update).stat().st_size
        with made.server() as server, made.sites(update) as peers:
            made.submit(config)
            for number in range(repeats + 1):
                held = peers.told("held")["at"]
                if number:
                    found["down"].append(sites * size / (held - accepted))
                if number and floors:
                    with tempfile.TemporaryDirectory() as folder:
                        found["steps"].append(_floor("steps", sites, size, Path(folder)))
                    keys = made.home, made.keys / made.names[0]
                    found["stream"].append(_floor("stream", sites, size, *keys))
                cpu, told = server.cpu_seconds(), peers.tell()
                accepted = peers.told("accepted")["at"]
                if number:
                    found["up"].append(sites * size / (accepted - told))
                    said = ", ".join(
                        f"{name} {rates[-1] / 1e6:.0f}" for name, rates in found.items() if rates
                    )
                    cpu = (server.cpu_seconds() - cpu) / (accepted - told)
                    print(
                        f"  {number}/{repeats}, {time.monotonic() - began:.0f} s: MB/s {said}; "
                        f"the server takes {cpu:.2f} cores",
                        flush=True,
                    )
            rounds = server.peak_mb()
            peers.told("closed")
            peak = server.peak_mb()
    middle = {name: statistics.median(rates) for name, rates in found.items() if rates}
    ratios = {f"of_{name}": middle["up"] / middle[name] for name in ("steps", "stream") if name in middle}
    return {
        "sites": sites, "bytes": size, "rates": found, "median": middle, **ratios,
        "peak_mb": {"rounds": rounds, "whole": peak},
    }  # fmt: skip


def _floor(what: str, sites: int, size: int, *folders: Path) -> float:
    command = [sys.executable, f.HERE / "floor.py", what, str(sites), str(size), *folders]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=f.PATIENCE).stdout)

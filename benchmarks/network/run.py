"""The deployment's numbers, on loopback: real processes, mutual TLS, everything durable.

    python benchmarks/network/run.py                                    everything, as the aims are stated
    python benchmarks/network/run.py --only throughput --sites 10 --megabytes 2

latency     rounds of 2 sites with 11 KB, against Flower's deployment engine
throughput  100 sites with 10 MB each, against the same durable steps and against a bare gRPC stream
memory      the server's peak with 50 sites of 100 MB each
idle        CPU time of a server with 1,000 connected sites
recovery    from SIGKILL to serving again

Each part's file says what exactly is measured. The whole takes about half an hour and 11 GB of disk or RAM.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "simulation")]

import idle  # noqa: E402
import latency  # noqa: E402
import recovery  # noqa: E402
import throughput  # noqa: E402

PARTS = ("latency", "throughput", "memory", "idle", "recovery")
MB = 1e6


def measure(
    part: str, given: argparse.Namespace
) -> tuple[dict[str, Any], list[tuple[str, float, str, float]]]:
    """What a part found, and rows: what, value, unit, aim (the most; negative: the least)."""
    repeats = given.repeats
    if part == "latency":
        got = latency.measure(given.rounds, given.flower_rounds, repeats or 3)
        rows = [
            ("a round of 2 sites, 11 KB", 1000 * got["median"]["coterie"], "ms", 50),
            ("times as fast as Flower", got["times_flower"], "", -100),
        ]
    elif part == "throughput":
        got = throughput.measure(given.sites or 100, given.megabytes or 10, repeats or 5)
        rate = got["median"]
        rows = [
            ("updates received", rate["up"] / MB, "MB/s", 0),
            ("models sent", rate["down"] / MB, "MB/s", 0),
            ("durable steps alone", rate["steps"] / MB, "MB/s", 0),
            ("bare gRPC stream", rate["stream"] / MB, "MB/s", 0),
            ("updates, of the durable steps", 100 * got["of_steps"], "%", -60),
            ("updates, of the bare stream", 100 * got["of_stream"], "%", -30),
        ]
    elif part == "memory":
        got = throughput.measure(given.sites or 50, given.megabytes or 100, repeats or 1, floors=False)
        rows = [
            ("peak memory in the rounds", got["peak_mb"]["rounds"], "MB", 900),
            ("peak memory with the final report", got["peak_mb"]["whole"], "MB", 900),
        ]
    elif part == "idle":
        got = idle.measure(given.sites or 1000, given.seconds)
        rows = [(f"{got['sites']} idle sites, of a core", 100 * got["core"], "%", 5)]
    else:
        got = recovery.measure(repeats or 5)
        aims = {"listening": 3, "joined": 3, "committed": 0}
        rows = [
            (f"killed, until {name}", statistics.median(got["seconds"][name]), "s", aim)
            for name, aim in aims.items()
        ]
    return got, rows


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument("--sites", type=int, help="of throughput, memory, idle (default: 100, 50, 1000)")
    parser.add_argument("--megabytes", type=float, help="of throughput, memory (default: 10, 100)")
    parser.add_argument("--repeats", type=int, help="(default: 3, 5, 1, 1, 5)")
    parser.add_argument("--seconds", type=float, default=60, help="of idle")
    parser.add_argument("--rounds", type=int, default=20, help="of Coterie, in latency")
    parser.add_argument("--flower-rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/<date>.json)")
    given = parser.parse_args()
    parts = [part.strip() for part in given.only.split(",") if part.strip()]
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"--only {sorted(unknown)[0]}: no such part; there are: {', '.join(PARTS)}")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    out = given.out or HERE / "results" / f"{date.replace(':', '').partition('+')[0]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"date": date, "machine": machine(), "parts": {}}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, and removes its folders
    table, began = [], time.monotonic()
    for part in parts:
        print(f"{part}:", flush=True)
        report["parts"][part], rows = measure(part, given)
        table += rows
        report["seconds"] = time.monotonic() - began
        out.write_text(json.dumps(report, indent=1))
    print()
    for what, value, unit, aim in table:
        wanted = f"{'at least' if aim < 0 else 'below'} {abs(aim)}" if aim else ""
        print(f"{what:36} {value:10.1f} {unit:5} {wanted}".rstrip())
    print(f"\n{report['seconds']:.0f} s; written to {out}")


if __name__ == "__main__":
    main()

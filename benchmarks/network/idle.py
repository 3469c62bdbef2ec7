"""Sites that are connected and have nothing to do: what they cost the server. The aim: 5 % of a core."""

from __future__ import annotations

import time
from typing import Any

import federation as f

SETTLE = 15.0  # seconds after the last one has joined


def measure(sites: int, seconds: float) -> dict[str, Any]:
    """CPU time of the server while so many sites are connected, and its memory."""
    allowed = f.more_files()
    if allowed < 3 * sites + 100:
        print(f"  only {allowed} files may be open: {(allowed - 100) // 3} sites", flush=True)
        sites = (allowed - 100) // 3
    with f.federation(sites) as made, made.server() as server:
        began = time.monotonic()
        with made.sites():
            joined = time.monotonic() - began
            print(f"  {sites} sites have joined after {joined:.0f} s", flush=True)
            time.sleep(SETTLE)
            before, began = server.cpu_seconds(), time.monotonic()
            time.sleep(seconds)
            taken, passed = server.cpu_seconds() - before, time.monotonic() - began
            peak = server.peak_mb()
    return {"sites": sites, "joined_seconds": joined, "core": taken / passed, "peak_mb": peak}

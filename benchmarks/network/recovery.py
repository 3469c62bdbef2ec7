"""A server that is killed in the middle of a round and started again: when sites are served. Aim: 3 s.

From the start of the new process to: the port it listens on; a first site that has joined again (which waits
for up to a few seconds between its attempts); a round that is committed, by sites that answer at once.
"""

from __future__ import annotations

import time
from typing import Any

import federation as f


def measure(repeats: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"listening": [], "joined": [], "committed": []}
    config = f.config(2, 0.011, 2 * repeats + 2)
    with f.federation(2) as made:
        update, server = made.update(config), made.start()
        try:
            with made.sites(update) as peers:
                made.submit(config)
                for number in range(repeats):
                    peers.told("held")
                    peers.tell()
                    peers.told("accepted")
                    peers.told("held")  # the sites have the model; the answers come while it is dead
                    server.kill()
                    peers.tell()
                    server.end()
                    server = made.start()
                    found["listening"].append(time.monotonic() - server.started)
                    found["joined"].append(peers.told("joined")["at"] - server.started)
                    found["committed"].append(peers.told("accepted")["at"] - server.started)
                    last = ", ".join(f"{name} {times[-1]:.2f}" for name, times in found.items())
                    print(f"  {number + 1}/{repeats}: seconds until {last}", flush=True)
        finally:
            server.end()
    return {"seconds": found}

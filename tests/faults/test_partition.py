"""A partition between network namespaces: packets vanish, nobody is told. COTERIE_PARTITION: its seconds."""

import os
import subprocess
import threading
from contextlib import contextmanager

import pytest

from deployment import LONG, deployed, undisturbed

SECONDS = float(os.environ.get("COTERIE_PARTITION", "4"))
NET = f"10.{200 + os.getpid() % 50}.{os.getpid() % 250}"


def ip(*words):
    made = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if made.returncode:
        raise OSError(f"ip {' '.join(words)}: {made.stderr.strip()}")


@contextmanager
def namespace():
    """One with a cable to this one; (its name, the cable's end here)."""
    name, end = f"coterie-{os.getpid()}", f"c{os.getpid()}"
    try:
        ip("netns", "add", name)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        try:
            ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
        except OSError as error:
            pytest.skip(f"no cable between network namespaces here: {error}")
        ip("addr", "add", f"{NET}.1/24", "dev", end)
        ip("link", "set", end, "up")
        ip("-n", name, "addr", "add", f"{NET}.2/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        yield name, end
    finally:
        ip("netns", "del", name)


def test_a_partition_costs_time_only(tmp_path):
    with namespace() as (name, end), deployed(tmp_path, start=False, host=f"{NET}.1") as federation:
        federation.start("server", "site-1")
        federation.start("site-2", fault={"at": None, "do": ["enter", name]})

        def part(round):
            if round >= 3 and not parted:
                ip("link", "set", end, "down")
                again = threading.Timer(SECONDS, ip, ["link", "set", end, "up"])
                again.start()
                parted.append(again)

        parted = []
        run = federation.submit(LONG)
        assert federation.watch(run, part) == {"status": "finished", "error": ""}
        assert parted
        parted[0].join()
        assert federation.result(run)["model_digest"] == undisturbed(LONG)
    assert federation.orphans() == []

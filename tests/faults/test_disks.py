"""A disk that is full while a run goes on: it says so, and the run goes on from there once there is room."""

import subprocess
import threading
from contextlib import contextmanager, suppress

import pytest

from coterie.backends.network import operators
from deployment import LONG, deployed, undisturbed


@contextmanager
def small_disk(folder, size):
    """A file system of its own, of so many bytes."""
    folder.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no file system may be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(path):
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


@pytest.mark.parametrize("who", ["server", "site-1"])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(tmp_path, who):
    """A server ends, or only the run fails. A site loses its tasks, and ends when its ledger cannot go on."""
    home, seen, filled, code = tmp_path / "there", [], [], None
    with small_disk(home / who, "8m"), deployed(home) as federation:
        filler, party = home / who / "filler", federation.processes[who]
        run = federation.submit(LONG)

        def on_round(round):
            if round >= 3 and not filled:
                filled.append(round)
                fill(filler)

        def watch():
            seen.append(federation.watch(run, on_round))

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        while code is None and (watching.is_alive() or who != "server"):
            with suppress(subprocess.TimeoutExpired):
                code = party.process.wait(0.1)
        assert "disk full" in party.log.read_text()
        assert not [path for path in (home / who).rglob("new-*") if path.is_file()]
        filler.unlink()
        if code is not None:
            assert code == 1
            assert "error: disk full" in party.log.read_text()
            federation.processes.pop(who).end()
            federation.start(who)
        watching.join()
        if seen[0]["status"] == "failed":
            assert "disk full" in seen.pop()["error"]
            with federation.channel() as channel:
                operators.ask(channel, "Resume", operators.Which(run=run))
            seen.append(federation.watch(run))
        assert seen == [{"status": "finished", "error": ""}]
        assert federation.result(run)["model_digest"] == undisturbed(LONG)
    assert federation.orphans() == []

"""A disk that is full while a run goes on: it says so, and the run goes on from there once there is room."""

import subprocess
import threading
from contextlib import contextmanager

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
    """A server that cannot write its lease any more ends; a site that cannot write loses its tasks."""
    home, seen = tmp_path / "there", []
    with small_disk(home / who, "8m"), deployed(home) as federation:
        filler = home / who / "filler"
        run = federation.submit(LONG)

        def watch():
            seen.append(federation.watch(run, lambda round: round < 3 or filler.exists() or fill(filler)))

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        log = federation.processes[who].log
        if who == "server":
            assert federation.processes[who].process.wait(60) == 1
            federation.processes.pop(who).end()
        else:
            watching.join(60)
        assert any(word in log.read_text() for word in ("disk full", "No space left"))
        assert not [path for path in home.rglob("new-*") if path.is_file()]
        filler.unlink()
        if who == "server":
            federation.start("server")
        watching.join(60)
        if seen[0]["status"] == "failed":
            with federation.channel() as channel:
                operators.ask(channel, "Resume", operators.Which(run=run))
            seen[0] = federation.watch(run)
        assert seen == [{"status": "finished", "error": ""}]
        assert federation.result(run)["model_digest"] == undisturbed(LONG)
    assert federation.orphans() == []

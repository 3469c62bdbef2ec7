"""A disk that is full while a run goes on: it says so, and the run goes on from there once there is room."""

import os
import subprocess
from contextlib import contextmanager

import pytest

from coterie.backends.network import operators
from deployment import LONG, deployed, undisturbed


@contextmanager
def small_disk(folder, size):
    """A file system of its own, of so many bytes."""
    folder.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
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
def test_a_full_disk(tmp_path, who):
    home = tmp_path / "there"
    with small_disk(home / who, "8m"), deployed(home) as federation:
        filler = home / who / "filler"
        run = federation.submit(LONG)
        ended = federation.watch(run, lambda round: round < 3 or filler.exists() or fill(filler))
        assert ended["status"] == "failed"
        said = ended["error"] + "".join(p.log.read_text() for p in federation.processes.values())
        assert any(word in said for word in ("disk full", "database or disk is full")), said[-3000:]
        assert not [path for path in home.rglob("new-*") if path.is_file()]
        assert all(each.process.job.exitcode is None for each in federation.processes.values())
        filler.unlink()
        with federation.channel() as channel:
            operators.ask(channel, "Resume", operators.Which(run=run))
        assert federation.watch(run) == {"status": "finished", "error": ""}
        assert federation.result(run)["model_digest"] == undisturbed(LONG)
        os.sync()
    assert federation.orphans() == []

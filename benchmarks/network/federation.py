"""A deployment to measure: a real `coterie server` with certificates, and sites that answer without training.

Each is a process of its own, tied to the standard input that this one holds: they end with it.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coterie import security
from coterie.backends.network import operators
from coterie.core import trees
from coterie.experiment.assemble import assemble
from coterie.experiment.config import load, to_toml
from coterie.experiment.office import expected
from coterie.experiment.quickstart import set_up
from coterie.storage import Blobs

HERE = Path(__file__).resolve().parent
PATIENCE = 300.0  # seconds in which something must be heard of a process
ENDS = 64 + 10 + 3  # numbers of an MLP on 8 x 8 digits with three layers of n units: 2 n^2 + n * ENDS + 10


class Program:
    """A process whose lines are read; its log is a file. Ended at `end`, however it behaves."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log, self.started = log, time.monotonic()
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
                env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
            )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def hear(self, what: str, *, within: float = PATIENCE) -> str:
        """Wait for the line that has this in it; others are dropped."""
        until = time.monotonic() + within
        with suppress(queue.Empty):
            while (line := self.lines.get(timeout=max(until - time.monotonic(), 0.0))) is not None:
                if what in line:
                    return line
            raise SystemExit(f"a process ended before it said {what!r}:\n{self.log.read_text()[-2000:]}")
        raise SystemExit(f"no {what!r} within {within:g} s:\n{self.log.read_text()[-2000:]}")

    def told(self, what: str, *, within: float = PATIENCE) -> dict[str, Any]:
        """Wait for such a message of sites.py."""
        return json.loads(self.hear(f'"what": "{what}"', within=within))  # type: ignore[no-any-return]

    def tell(self) -> float:
        """Send a line; when."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return time.monotonic()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """In good order, else at once."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def peak_mb(self) -> float:
        """The most memory that it ever had (VmHWM)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6

    def cpu_seconds(self) -> float:
        """CPU time that it has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put(None)


@dataclass
class Federation:
    """A server and its sites' folders. keys: of all but the server; home: the server's."""

    keys: Path
    home: Path
    names: list[str]
    port: int = 0

    @contextmanager
    def server(self) -> Iterator[Program]:
        """`coterie server`, listening. The second one listens where the first one did."""
        program = self.start()
        try:
            yield program
        finally:
            program.end()

    def start(self) -> Program:
        """As `server`, for who ends it himself."""
        command = [sys.executable, "-m", "coterie", "server", str(self.home)]
        command += ["--listen", f"127.0.0.1:{self.port}", "--tied"]
        program = Program(command, self.home / "server.log")
        try:
            self.port = int(program.hear("listening on").rpartition(":")[2])
        except BaseException:
            program.end()
            raise
        return program

    @contextmanager
    def sites(self, update: str = "") -> Iterator[Program]:
        """sites.py, all of them connected. update: the digest of the blob in `keys` that they answer with."""
        told = {"keys": str(self.keys), "names": self.names, "update": update, "port": self.port}
        (self.keys / "sites.json").write_text(json.dumps(told))
        command = [sys.executable, str(HERE / "sites.py"), str(self.keys / "sites.json")]
        program = Program(command, self.home / "sites.log")
        try:
            program.told("connected")
            yield program
        finally:
            program.end()

    def submit(self, config: dict[str, Any]) -> str:
        """Submit a run; its id."""
        mine = security.credentials(self.keys / "operator")
        with operators.reached([f"127.0.0.1:{self.port}"], operators.credentials(mine), 60) as channel:
            return operators.submit(channel, to_toml(load(config)), mine)

    def update(self, config: dict[str, Any]) -> str:
        """An update as the run's sites send it, as a blob in `keys`; its digest."""
        form = expected(assemble(load(config)))
        zeros = trees.map_tree(lambda leaf: torch.zeros_like(leaf, device="cpu"), form)
        return Blobs(self.keys / "updates").write(zeros).digest


@contextmanager
def federation(sites: int, room: int = 0) -> Iterator[Federation]:
    """A fresh one. room: bytes that the sites will keep, which lie in memory where there is enough.

    The server's folder is on the disk that temporary files are on; the sites' disks are no part of what is
    measured.
    """
    shared = Path("/dev/shm")
    fits = shared.is_dir() and shutil.disk_usage(shared).free > 2 * room and _available() > 3 * room
    with (
        tempfile.TemporaryDirectory(dir=shared if fits else None, ignore_cleanup_errors=True) as keys,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home,
    ):
        names = [f"site-{number}" for number in range(sites)]
        set_up(Path(keys), names, HERE)
        shutil.move(Path(keys) / "server", Path(home) / "server")
        yield Federation(Path(keys), Path(home) / "server", names)


def config(sites: int, megabytes: float, rounds: int) -> dict[str, Any]:
    """A run in which each of so many sites sends an update of so many megabytes (10^6 bytes)."""
    return {
        "name": "numbers",
        "seed": 1,
        "data": {"dataset": "digits", "partition": {"kind": "iid", "clients": sites}},
        "model": {"kind": "mlp", "hidden": [max(int((ENDS**2 + 2e6 * megabytes) ** 0.5 - ENDS) // 4, 1)] * 3},
        "algorithm": {"kind": "fedavg", "client": {"lr": 0.1, "steps": 1, "batch_size": 32}},
        "schedule": {"kind": "synchronous", "rounds": rounds, "cohort": sites},
        "run": {"evaluate_every": 10**6, "evaluate_clients": False, "keep_checkpoints": 1},
        "backend": {"trainer": "loop"},
    }


def more_files() -> int:
    """Raise the limit of open files, here and for what is started, as far as is allowed; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 0

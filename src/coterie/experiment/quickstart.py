"""A whole federation on one machine, for a trial: server and sites as real processes, with real certificates.

Everything it starts ends with it, however it ends: each process is tied to its standard input.
"""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from coterie import security
from coterie.backends.network import operators
from coterie.core.errors import ConfigError, Interrupted, RunError
from coterie.experiment.code import gathered
from coterie.experiment.config import Config, to_toml
from coterie.experiment.records import Progress
from coterie.storage.files import make_folder

PATIENCE = 120.0  # seconds in which a process must be ready: torch is slow to load on a busy machine
HERE = "127.0.0.1"


def quickstart(
    config: Config,
    *,
    sites: int,
    out: Path,
    data_dir: Path | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Run a config on `sites` processes of this machine; `out` becomes the run's folder.

    Keys, state and logs of all processes are in out/deployment. Raises ConfigError when `out` is in use or
    the config cannot work, RunError when the run or a process fails, Interrupted.
    """
    if sites < 1:
        raise ConfigError(f"--sites {sites}: must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: not an empty folder", "name another")
    home = out / "deployment"
    make_folder(home)
    names = [f"site-{number}" for number in range(1, sites + 1)]
    package = gathered(config) or b""
    set_up(home, names, config.folder, package)
    code = str(config.folder.absolute())
    with ExitStack() as stack:
        server = stack.enter_context(
            _process("server", home, "--listen", f"{HERE}:0", "--code", code, *_data(data_dir))
        )
        address = f"{HERE}:{server.hear('listening on').rpartition(':')[2]}"
        started = [
            stack.enter_context(_process("site", home / name, "--server", address, *_data(data_dir)))
            for name in names
        ]
        for site in started:
            site.hear("is connected")
        folder = _run(config, package, home / "operator", address, watch)
    for path in list(folder.iterdir()):
        shutil.move(path, out / path.name)


def _run(config: Config, package: bytes, keys: Path, address: str, watch: Callable[[Progress], None]) -> Path:
    """Submit the config and wait for its end; return the run's folder."""
    mine = security.credentials(keys)
    with operators.reached([address], operators.credentials(mine), PATIENCE) as channel:
        run = operators.submit(channel, to_toml(config), mine, code=package)
        ended: dict[str, Any] = {}
        for told in operators.stream(channel, "Watch", operators.Which(run=run)):
            if "status" in told:
                ended = told
            else:
                watch(Progress(**{**told, "folder": Path(told["folder"])}))
        (line,) = (each for each in operators.ask(channel, "Runs") if each["run"] == run)
    if ended.get("status") != "finished":
        kind = Interrupted if ended.get("status") in ("stopped", "interrupted") else RunError
        raise kind(f"the run {ended.get('status')}: {ended.get('error')}", f"see the logs in {keys.parent}")
    return Path(line["folder"])


def set_up(home: Path, names: list[str], code: Path, package: bytes = b"") -> None:
    """An authority for a day, and everybody's keys.

    Configs may name what is installed and lies in the folder `code`, and bring this package.
    """
    authority = security.Authority.create(home / "ca", "a trial")

    def party(folder: Path, role: Any, name: str, *hosts: str) -> None:
        pem = authority.issue(security.new_key(folder, name, role), role, name, hosts=hosts, days=1)
        security.install(folder, pem, authority.certificate)

    party(home / "server", "server", "server", HERE, "localhost")
    policy = 'modules = ["*"]\n'
    if package:
        policy += f'code = ["{hashlib.sha256(package).hexdigest()}"]\n'
    (home / "server" / "policy.toml").write_text(policy)
    party(home / "operator", "operator", "operator")
    for name in names:
        party(home / name, "site", name)
        (home / name / "policy.toml").write_text(policy + 'tracebacks = "full"\n')
        (home / name / "site.toml").write_text(f"code = {str(code.absolute())!r}\n")


def _data(data_dir: Path | None) -> list[str]:
    return [] if data_dir is None else ["--data-dir", str(data_dir)]


class Process:
    """A command that runs beside this one. Its log is in its folder."""

    def __init__(self, command: str, folder: Path, *options: str) -> None:
        self.log = folder / f"{command}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603  this very program
                [sys.executable, "-m", "coterie", command, str(folder), *options, "--tied"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def hear(self, what: str) -> str:
        """Wait for the line that says so. Raises RunError with the end of its log when it ends instead."""
        try:
            while (line := self.lines.get(timeout=PATIENCE)) is not None:
                if what in line:
                    return line
        except queue.Empty:
            raise RunError(
                f"{self.log.parent.name} is not ready after {PATIENCE:g} s", f"see {self.log}"
            ) from None
        tail = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-5:])
        raise RunError(f"{self.log.parent.name} ended before it was ready:\n{tail}", f"see {self.log}")

    def end(self) -> None:
        """In good order, else at once."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.listener.join()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line.strip())
        self.lines.put(None)


@contextmanager
def _process(command: str, folder: Path, *options: str) -> Iterator[Process]:
    made = Process(command, folder / "server" if command == "server" else folder, *options)
    try:
        yield made
    finally:
        made.end()

"""A private PostgreSQL for the tests, where its binaries are; as `postgres` where tests run as root."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@contextmanager
def cluster() -> Iterator[str]:
    """Start a server in a temporary folder; its URL, without a database's name."""
    bin = binaries()
    if bin is None:
        pytest.skip("no PostgreSQL here: neither initdb in PATH nor /usr/lib/postgresql/*/bin")
    as_user: dict = {}
    if os.geteuid() == 0:  # PostgreSQL refuses root
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="coterie-pg-", ignore_cleanup_errors=True) as folder:
        if as_user:
            shutil.chown(folder, "postgres")
        data = Path(folder) / "data"

        def tell(name: str, *arguments: str) -> None:
            subprocess.run(
                [str(bin / name), "-D", str(data), *arguments],
                check=True, stdout=subprocess.DEVNULL, cwd=folder, env={"LC_ALL": "C"}, **as_user,
            )  # fmt: skip

        tell("initdb", "-A", "trust", "-U", "coterie", "-N", "-E", "UTF8")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c max_connections=50 -c fsync=off"
        tell("pg_ctl", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://coterie@127.0.0.1:{port}"
        finally:
            tell("pg_ctl", "-m", "immediate", "stop")

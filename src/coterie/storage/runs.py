"""A run's folder: the files that other programs rely on (their names are a contract), and who may write it.

At a commit the order is: memories.commit, append the metrics row, save the checkpoint, memories.prune.
After a kill anywhere, resume from `checkpoints().latest()`; then `truncate` the metrics to its round, and the
memories go `back_to` it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tomli_w

from coterie.core.errors import ConfigError, RunError
from coterie.storage.checkpoints import Checkpoints
from coterie.storage.files import make_folder, remove_temporary, sync_folder, write_atomic, write_error
from coterie.storage.memories import Memories


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run.

    config.toml, metrics.jsonl, clients.json, result.json, run.log, report.html, checkpoints/, memories/.
    """

    path: Path

    @classmethod
    def create(cls, base: Path | None, name: str, out: Path | None = None) -> Self:
        """Make `base`/`name`-<n> with the next free n (base: ./runs by default), or `out`.

        Raises ConfigError when `name` is no plain file name or `out` is in use, RunError when the disk fails.
        """
        if out is not None:
            if out.exists() and (not out.is_dir() or not _unused(out)):
                raise ConfigError(f"--out {out}: not an empty folder", "--resume or another folder")
            make_folder(out)
            return cls(out)
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise ConfigError(
                f"name {name!r} cannot be a folder's name", "use letters, digits, '-', '_', '.'"
            )
        base = base or Path("runs")
        make_folder(base)
        n = max(_numbered(base, name), default=0)
        while True:
            n += 1
            path = base / f"{name}-{n}"
            try:
                path.mkdir()
            except FileExistsError:  # another run took this number just now
                continue
            except OSError as error:
                raise write_error(path, error, 0) from error
            sync_folder(base)
            return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The existing run folder at `path`, to resume or to read. Raises ConfigError when it is none."""
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder", "give a run's folder, such as runs/NAME-1")
        if not (path / "config.toml").is_file():
            raise ConfigError(
                f"{path}: not a run folder, config.toml is missing", "give a folder runs/NAME-N"
            )
        return cls(path)

    @classmethod
    def begun(cls, path: Path) -> Self | None:
        """The run folder at `path`; None when there is nothing, or a run was killed before it had a config.

        Raises ConfigError when something else is there.
        """
        return None if not path.exists() or (path.is_dir() and _unused(path)) else cls.open(path)

    @classmethod
    def latest(cls, base: Path | None, name: str) -> Self | None:
        """The run folder `base`/`name`-<n> with the highest n that holds a config, or None."""
        base = base or Path("runs")
        paths = (base / f"{name}-{n}" for n in sorted(_numbered(base, name), reverse=True))
        return next((cls(path) for path in paths if (path / "config.toml").is_file()), None)

    def checkpoints(self, keep: int = 2) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.path / "checkpoints", keep)

    def memories(self, cache_bytes: int = 256 << 20) -> Memories:
        """The clients' memories; for the process that holds the lock."""
        return Memories(self.path / "memories", cache_bytes)

    @property
    def log(self) -> Path:
        """Where the run's log goes."""
        return self.path / "run.log"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.toml; TOML has no null, so keys that are None are left out."""
        write_atomic(self.path / "config.toml", tomli_w.dumps(_without_none(config)).encode())

    def config(self) -> dict[str, Any]:
        """Read config.toml. Raises ConfigError when it is not TOML."""
        path = self.path / "config.toml"
        try:
            return tomllib.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}", "restore the file or start a new run") from error

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json (design, section 5). NaN and infinities become null."""
        self._write_json("result.json", result)

    def result(self) -> Any:
        """Read result.json; None while the run has not ended."""
        return self._read_json("result.json")

    def write_clients(self, clients: Any) -> None:
        """Write clients.json, what is known of each client. NaN and infinities become null."""
        self._write_json("clients.json", clients)

    def clients(self) -> Any:
        """Read clients.json; None when there is none yet."""
        return self._read_json("clients.json")

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to metrics.jsonl, durably. NaN and infinities become null.

        Raises RunError when the disk is full; then the rows before it stay as they were.
        """
        line = row_text(row).encode() + b"\n"
        path = self.path / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if size == 0:
                sync_folder(self.path)
        except OSError as error:
            written = path.stat().st_size - size if path.exists() else 0
            if path.is_file():
                os.truncate(path, size)
            raise write_error(path, error, written) from error

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows of metrics.jsonl; a last line that a crash cut short is left out.

        Raises RunError when an earlier line is damaged.
        """
        return [row for _, row in self._lines()]

    def write_rows(self, rows: Sequence[str]) -> None:
        """Make metrics.jsonl these rows (`row_text`), atomically."""
        write_atomic(self.path / "metrics.jsonl", "".join(f"{row}\n" for row in rows).encode())

    def truncate(self, after_round: int) -> None:
        """Drop the rows of later rounds ("round" > after_round) and a last line cut short, atomically."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [line for line, row in self._lines() if row.get("round", after_round) <= after_round]
            write_atomic(path, b"".join(kept))

    @contextmanager
    def lock(self, wait: bool = False) -> Iterator[None]:
        """Be the only process that writes this run; what a killed one left half-written is removed.

        The lock ends with the process. Raises RunError when another process holds it, unless told to wait.
        """
        with (self.path / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise RunError(
                    f"{self.path}: another process is writing this run", "wait for it, or stop it and resume"
                ) from error
            for folder in (self.path, self.path / "checkpoints"):
                remove_temporary(folder)
            yield

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        out = []
        for number, line in enumerate(lines, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut short")
                out.append((line, dict(json.loads(line))))
            except (ValueError, TypeError) as error:
                if number < len(lines):
                    raise RunError(
                        f"{path}, line {number} is damaged: {error}", "remove that line"
                    ) from error
        return out

    def _write_json(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, json.dumps(_finite(value), indent=1, allow_nan=False).encode() + b"\n")

    def _read_json(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(path.read_bytes()) if path.exists() else None
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}", "restore the file") from error


def row_text(row: Mapping[str, Any]) -> str:
    """A row of metrics.jsonl: JSON on one line. NaN and infinities become null."""
    return json.dumps(_finite(row), allow_nan=False)


def _unused(folder: Path) -> bool:
    """Is there nothing in the folder but what a run leaves that was killed at its very start?"""
    return all(path.name in ("lock", "run.log") or path.suffix == ".tmp" for path in folder.iterdir())


def _numbered(base: Path, name: str) -> list[int]:
    """The n of every `base`/`name`-<n>."""
    found = (re.fullmatch(re.escape(name) + r"-(\d+)", path.name) for path in base.glob("*"))
    return [int(match[1]) for match in found if match]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

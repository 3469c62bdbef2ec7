"""Files of secrets: only their owner reads them, and they are never half-written nor overwritten."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from coterie.errors import ConfigError, RunError

LIMIT = 1 << 20  # bytes; no certificate, token or policy is longer


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, that only its owner may enter. Raises RunError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror}") from None


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file that must not be there yet, durably and whole or not at all.

    Raises ConfigError when it is there, RunError when it cannot be written.
    """
    _write(path, data, mode, replace=False)


def write_over(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file, durably: a crash leaves the old or the new one. Raises RunError."""
    _write(path, data, mode, replace=True)


def read_bytes(path: Path) -> bytes:
    """What a small file holds. Raises ConfigError when it is missing, unreadable or larger than 1 MiB."""
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "check the path and who may read it") from None
    if len(data) > LIMIT:
        raise ConfigError(f"{path}: larger than {LIMIT} bytes", "is it the right file?")
    return data


def read_text(path: Path) -> str:
    """What a small file of text holds. Raises ConfigError as `read_bytes`, and when it is not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None


def _write(path: Path, data: bytes, mode: int, *, replace: bool) -> None:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # unlike a rename, it fails when the name is taken
        _sync(path.parent)
    except FileExistsError:
        raise ConfigError(f"{path} exists already", "it is never overwritten: move it away first") from None
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}", "check the folder and the disk") from None
    finally:
        temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

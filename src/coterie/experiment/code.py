"""Code that travels with a run: gathered beside its config, and given a place of its own where it may run.

    FOLDER/DIGEST/files    plain files, or
    FOLDER/DIGEST/venv     a virtual environment with the wheel in it

This is order, not a prison: the code runs as the same user of the system as whoever starts it.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from coterie.core.errors import ConfigError, RunError
from coterie.experiment.config import Config
from coterie.security import packages
from coterie.storage.files import make_folder, write_error

KEPT = 10  # packages that stay unpacked though no run uses them now
# What a child is told of the environment: how to compute, in which language and time, and no secret.
TOLD = (
    "PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "CC", "XDG_CACHE_HOME", "COTERIE_DATA",
    "COTERIE_NATIVE",
)  # fmt: skip
TOLD_OF = ("LC_", "OMP_", "MKL_", "OPENBLAS_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_")


@dataclass(frozen=True)
class Environment:
    """Where a package's code runs. folder: where "file.py:Name" starts."""

    digest: str
    folder: Path
    python: str = sys.executable


def gathered(config: Config) -> bytes | None:
    """A package of the files that the config's model and trainer name, with what these import beside them.

    None when they name no file beside the config. Raises ConfigError when there is one that does not exist.
    """
    trainer = config.backend["trainer"]
    named = [config.model.get("kind"), trainer.get("fit") if isinstance(trainer, dict) else None]
    files: dict[str, Path] = {}
    for spec in named:
        module = spec.partition(":")[0] if isinstance(spec, str) and ":" in spec else ""
        if module and not Path(module).is_absolute() and ".." not in Path(module).parts:
            place = config.folder
            if module.endswith(".py") and not (place / module).is_file():
                place = Path.cwd()  # as `parts.load_object` looks
                if not (place / module).is_file():
                    raise ConfigError(f"{spec!r}: there is no file {config.folder / module}")
            _follow([module] if module.endswith(".py") else _beside(module, place), place, files)
    return packages.pack(files) if files else None


def prepared(folder: Path, digest: str) -> Environment | None:
    """The environment of this package in `folder`, if it is there."""
    place = folder / digest
    if place.is_dir():
        os.utime(place)  # the newest stay
    if (place / "files").is_dir():
        return Environment(digest, place / "files")
    if (place / "venv").is_dir():
        return Environment(digest, place / "venv", str(place / "venv" / "bin" / "python"))
    return None


def prepare(folder: Path, package: Path, used: Collection[str] = ()) -> Environment:
    """Make the environment of a package (a file named by its SHA-256), whole or not at all.

    used: digests that must stay; of the others the newest do. Blocks: a wheel takes seconds. Raises Unsafe,
    before anything is unpacked; RunError when a wheel cannot be installed here, or the disk is full.
    """
    digest, data = package.name, package.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise packages.Unsafe(f"package {digest[:12]}: its bytes are not those of its digest")
    wheel = packages.wheel_name(data)
    make_folder(folder)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as scratch:
        made = Path(scratch) / digest
        made.mkdir(mode=0o700)
        try:
            if wheel:
                (Path(scratch) / wheel).write_bytes(data)
                _install(digest, Path(scratch) / wheel, made / "venv")
            else:
                packages.unpack(data, made / "files")
            made.rename(folder / digest)
        except OSError as error:
            raise write_error(folder / digest, error, 0) from error
    idle = [each for each in folder.iterdir() if each.name not in {*used, digest} and each.name[0] != "."]
    for old in sorted(idle, key=lambda each: each.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    ready = prepared(folder, digest)
    assert ready is not None
    return ready


def tidy(folder: Path) -> None:
    """Remove what was half made when its process was killed. Only for the one process that works here."""
    for leftover in folder.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)


def told(home: Path) -> dict[str, str]:
    """The variables of the environment that a package's code may see. home: what it takes for its user's."""
    kept = {name: value for name, value in os.environ.items() if name in TOLD or name.startswith(TOLD_OF)}
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # of compiled kernels
    return {**kept, "HOME": str(home), "XDG_CACHE_HOME": cache, "PYTHONDONTWRITEBYTECODE": "1"}


def _install(digest: str, wheel: Path, place: Path) -> None:
    """Into an environment of its own, from this file alone: nothing is built, fetched or run."""
    venv.create(place, with_pip=False, symlinks=True)
    pip = [
        "-m",
        "pip",
        "--isolated",
        "--disable-pip-version-check",
        "--python",
        str(place / "bin" / "python"),
    ]
    options = ["--no-index", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-compile", "--quiet"]
    done = subprocess.run(  # noqa: S603  this very Python
        [sys.executable, *pip, "install", *options, str(wheel)],
        env={**told(place), "PIP_CONFIG_FILE": os.devnull},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
        raise RunError(
            f"package {digest[:12]}: {wheel.name} cannot be installed here: {said[-1][:500]}",
            "its tags must fit this machine, and this environment needs pip",
        )


def _follow(start: list[str], folder: Path, files: dict[str, Path]) -> None:
    """Add these files of the folder, and those that they import from it."""
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        path = folder / name
        if name in files:
            continue
        files[name] = path
        if name.endswith(".py"):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError) as error:
                raise ConfigError(f"{path}: {error}") from None
            for module in _imported(tree):
                waiting += _beside(module, folder)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def _beside(module: str, folder: Path) -> list[str]:
    """The files of a module that lies in this folder; of a package all of them."""
    top = module.partition(".")[0]
    if (folder / f"{top}.py").is_file():
        return [f"{top}.py"]
    if top.isidentifier() and (folder / top / "__init__.py").is_file():
        found = (folder / top).rglob("*")
        return [
            each.relative_to(folder).as_posix()
            for each in found
            if each.is_file() and "__pycache__" not in each.parts
        ]
    return []

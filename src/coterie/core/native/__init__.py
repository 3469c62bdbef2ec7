"""Kernels in C for what torch's operators do slowly when every client has weights of its own.

The sources beside this file are compiled at first use by the machine's C compiler (`cc`, or what $CC names)
for its own processor, kept in the user's cache folder, and loaded by ctypes. Without a compiler, or with
COTERIE_NATIVE=0, torch's operators do the same work more slowly: `library()` is None.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FLAGS", "HERE", "SECONDS", "WORTH", "address", "call", "fits", "has", "library", "listening", "log",
    "set_threads", "threads",
]  # fmt: skip

_listener: Callable[[str, tuple[Tensor | int | None, ...]], None] | None = None
_threads = 1
log = logging.getLogger("coterie")
HERE = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-pthread")
SECONDS = 300  # that the compiler may take
WORTH = 1 << 20  # numbers that take a few hundred microseconds to read


def fits(*tensors: Tensor) -> bool:
    """Can the kernels do it: is there a library, and is all of it float32 in this machine's memory?"""
    return library() is not None and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)


def set_threads(count: int) -> int:
    """Let kernels whose bits do not depend on it use so many threads from now on; return how many before.

    They are not torch's, whose OpenMP threads spin between its operators and would be in the way of these.
    """
    global _threads
    before, _threads = _threads, count
    return before


def threads(numbers: int | None = None) -> int:
    """How many threads to use; as many as are worth their start, for a kernel that reads so many numbers."""
    return _threads if numbers is None else min(_threads, 1 + numbers // WORTH)


def has(name: str) -> bool:
    """Is there this kernel? Those in bfloat16 need a processor with instructions for it."""
    return hasattr(library(), name)


@cache
def library() -> Any:
    """The kernels as a ctypes library, compiled if need be; None where that is impossible or not wanted."""
    if os.environ.get("COTERIE_NATIVE") == "0":
        return None
    try:
        path = _built()
        return None if path is None else ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning("no kernels in C, torch's operators instead: %s", str(said).strip().splitlines()[-1])
        return None


def _built() -> Path | None:
    """The compiled library, from the cache where it has been made before."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    sources = sorted(HERE.glob("*.[ch]"))
    known = hashlib.sha256(repr((compiler, Path(compiler).stat().st_mtime_ns, FLAGS, _processor())).encode())
    for source in sources:
        known.update(source.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"kernels-{known.hexdigest()[:16]}.so"
    if path.exists():
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            raise OSError(f"{path} belongs to somebody else: remove it, or set XDG_CACHE_HOME")
        return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        log.info("compiling kernels for this processor, once")
        made = Path(scratch) / "kernels.so"
        parts = {str(each): f"{scratch}/{each.stem}.o" for each in sources if each.suffix == ".c"}
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda part: _compile(compiler, "-c", part[0], "-o", part[1]), parts.items()))
        _compile(compiler, "-shared", *parts.values(), "-o", str(made), "-lm")
        made.replace(path)  # whole or not at all, whoever else is compiling
    return path


def _compile(compiler: str, *arguments: str) -> None:
    command = [compiler, *FLAGS, *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)  # noqa: S603  ours


def _processor() -> str:
    """What -march=native depends on."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    lines = told.split("\n\n", 1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU")))


def call(name: str, *args: Tensor | int | None, gaps: bool = False) -> int:
    """Run a kernel. Tensors become pointers, whole numbers int64_t; None is NULL.

    gaps: the kernel knows strides. Raises ValueError for a tensor that is not contiguous otherwise.
    """
    if _listener is not None:
        _listener(name, args)
    for each in () if gaps else args:
        if isinstance(each, Tensor) and not each.is_contiguous():
            raise ValueError(f"{name} needs contiguous tensors, not {tuple(each.shape)} by {each.stride()}")
    return int(_kernel(name)(*map(_c, args)))


@contextmanager
def listening(hear: Callable[[str, tuple[Tensor | int | None, ...]], None]) -> Iterator[None]:
    """Tell `hear` of every call of a kernel meanwhile."""
    global _listener  # noqa: PLW0603
    _listener = hear
    try:
        yield
    finally:
        _listener = None


def address(name: str) -> int:
    """Of a kernel."""
    return int(ctypes.cast(_kernel(name), ctypes.c_void_p).value or 0)


@cache
def _kernel(name: str) -> Any:
    found = getattr(library(), name)
    found.restype = ctypes.c_int64  # of those that return anything
    return found


def _c(value: Tensor | int | None) -> Any:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())

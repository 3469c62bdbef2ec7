"""What the commands that keep running share: their log, their end, and whom they are tied to."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

# of glibc's malloc.h, and values: what is freed is given back, and threads share what they have
_MALLOPT = {-8: 2, -3: 1 << 16, -1: 1 << 20}  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD (bytes)


def serve_until_told(work: Coroutine[Any, Any, None], *, text: bool, tied: bool) -> None:
    """Run until it ends; SIGTERM and Ctrl-C tell it to. tied: so does the end of standard input."""
    from coterie.backends.telemetry import log_to  # noqa: PLC0415

    log_to(as_json=not text)
    give_back_memory()
    if tied:
        threading.Thread(target=_end_with_input, daemon=True).start()
    asyncio.run(work)


def give_back_memory() -> None:
    """Let no thread keep what it has freed, which comes to gigabytes. Only where there is glibc."""
    with suppress(OSError, AttributeError):
        for what, value in _MALLOPT.items():
            ctypes.CDLL("libc.so.6").mallopt(what, value)


def split_addresses(text: str) -> list[str]:
    """ "a:1,b:2" -> ["a:1", "b:2"]. Raises ConfigError."""
    from coterie.errors import ConfigError  # noqa: PLC0415

    found = [each.strip() for each in text.split(",") if each.strip()]
    for each in found or [text]:
        host, _, port = each.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"server {each!r}: must be HOST:PORT", "for example fl.example.org:7443")
    return found


def _end_with_input() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock would be held when the process ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)

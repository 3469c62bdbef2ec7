"""What the commands that keep running share: their log, their end, and whom they are tied to."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine
from typing import Any


def serve_until_told(work: Coroutine[Any, Any, None], *, text: bool, tied: bool) -> None:
    """Run until it ends; SIGTERM and Ctrl-C tell it to. tied: so does the end of standard input."""
    from coterie.backends.telemetry import log_to  # noqa: PLC0415

    log_to(as_json=not text)
    if tied:
        threading.Thread(target=_end_with_input, daemon=True).start()
    asyncio.run(work)


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

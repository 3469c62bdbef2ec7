"""The server of a federation: one process that joins hub, queue, database, ledger and the operators' desk.

    folder:  tls.key tls.crt ca.crt signing.key (`security.pki`)  state.sqlite3  blobs/  runs/  ledger.jsonl

Of several servers on one database one works; the others wait for its lease and then go on with its runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack

from coterie.backends import telemetry
from coterie.core.errors import CoterieError
from coterie.experiment.office import Office, Options
from coterie.storage.database import Database

LEASE = 15.0  # seconds that a lease holds without being renewed
log = logging.getLogger("coterie")


async def serve(options: Options, ready: Callable[[str], None] = lambda said: None) -> None:
    """Be a server until told to stop (SIGTERM, SIGINT). ready: told the addresses it listens on.

    Raises ConfigError, RunError; Fenced when another server has taken over.
    """
    told = asyncio.get_running_loop().create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _settle, told, None)
    async with AsyncExitStack() as stack:
        why = ["starting"]
        if options.metrics:
            endpoint = telemetry.Endpoint(options.metrics, lambda: why[0])
            stack.callback(endpoint.close)
            ready(f"metrics on port {endpoint.port}")
        database = Database(options.database or f"sqlite:///{options.home / 'state.sqlite3'}")
        stack.callback(database.close)
        holder = f"{socket.gethostname()} {os.getpid()}"
        why[0] = "another server holds the lease; this one waits for it"
        if not await _leased(database, holder, told):
            return
        office = Office(options, database)
        stack.callback(office.close)
        port = await office.open(stack)
        renewing = asyncio.ensure_future(_renewing(database, office.look, told))
        stack.callback(renewing.cancel)
        why[0] = ""
        ready(f"listening on {options.listen.rpartition(':')[0]}:{port}")
        await told
        log.info("ending: runs that go on are interrupted, and continue when a server starts")


async def _leased(database: Database, holder: str, told: asyncio.Future[None]) -> bool:
    """Wait for the lease; False when told to stop before."""
    while not told.done():
        if await asyncio.to_thread(database.acquire, holder, LEASE, 2.0):
            return True
    return False


async def _renewing(database: Database, look: Callable[[], None], told: asyncio.Future[None]) -> None:
    try:
        while True:
            await asyncio.sleep(LEASE / 3)
            await asyncio.to_thread(database.renew, LEASE)
            await asyncio.to_thread(look)
    except CoterieError as error:
        if not told.done():
            told.set_exception(error)


def _settle(future: asyncio.Future[None], value: None) -> None:
    if not future.done():
        future.set_result(value)

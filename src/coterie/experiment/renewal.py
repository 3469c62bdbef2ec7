"""A running party's certificate: replaced in good time, and read again when somebody has replaced it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc

from coterie import security
from coterie.core.errors import CoterieError

log = logging.getLogger("coterie")


async def keep_renewed(
    keys: Path, renew: Callable[[bytes], Awaitable[bytes]], renewed: Callable[[], None] = lambda: None
) -> None:
    """Replace a certificate two thirds through its life, again and again.

    renew: signing request -> certificate. renewed: told when there is a new one. What fails is tried again
    after a tenth of the life that is left, an hour at most. Keys that are mounted read-only are for others to
    replace.
    """
    if not os.access(keys, os.W_OK):
        log.info("%s is read-only: its certificate is not renewed from here", keys)
        return
    while True:
        certificate = security.credentials(keys).certificate
        await asyncio.sleep(max((security.renew_at(certificate) - datetime.now(UTC)).total_seconds(), 0))
        try:
            who = security.install(keys, await renew(security.renewal(keys)))
            log.info("the certificate is renewed: serial %x", who.serial)
            renewed()
        except CoterieError as error:
            log.warning("the certificate could not be renewed: %s", error)
            left = (security.expiry(certificate) - datetime.now(UTC)).total_seconds()
            await asyncio.sleep(min(max(left / 10, 1.0), 3600.0))


class Current:
    """A server's credentials as its folder holds them now."""

    def __init__(self, keys: Path) -> None:
        self.keys, self._mine = keys, security.credentials(keys)
        self._seen = self._times()

    def __call__(self) -> security.Credentials:
        """Read the folder again if it has changed; what is damaged or half replaced does not count yet."""
        if (now := self._times()) != self._seen:
            try:
                self._mine, self._seen = security.credentials(self.keys), now
                log.info("serves with the certificate of serial %x", self._mine.identity.serial)
            except CoterieError as error:
                log.warning("goes on with the certificate it has: %s", error)
        return self._mine

    def door(self, *, for_all: bool = False) -> grpc.ServerCredentials:
        """For a port of gRPC, which asks at each handshake. for_all: let in who has no certificate, too."""
        given = self()

        def configuration(mine: security.Credentials) -> grpc.ServerCertificateConfiguration:
            pair = [(mine.key, mine.certificate)]
            return grpc.ssl_server_certificate_configuration(pair, None if for_all else mine.ca)

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            before, given = given, self()
            return None if given is before else configuration(given)

        return grpc.dynamic_ssl_server_credentials(
            configuration(given), changed, require_client_authentication=not for_all
        )

    def _times(self) -> list[int]:
        return [(self.keys / name).stat().st_mtime_ns for name in ("tls.crt", "ca.crt")]

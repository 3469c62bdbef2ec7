"""Who may talk to a server: one-time tokens, certificates, and the sites that have been here.

A token is known by its hash alone. What is revoked stays known for ever.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import insert, select, update

from coterie.core.errors import ConfigError
from coterie.storage.database import Database
from coterie.storage.tables import certificates, sites, tokens


class Token(NamedTuple):
    """What a token allows once: a certificate for this name and role."""

    name: str
    role: str


class Certificate(NamedTuple):
    """A certificate that was issued or revoked; times in seconds since 1970."""

    serial: int
    name: str
    role: str
    expires: float
    revoked: float | None


class SeenSite(NamedTuple):
    """A site: when it last was here, what it can do, and the newest hash of its ledger."""

    name: str
    seen: float
    features: tuple[str, ...]
    ledger: str | None


class Registry:
    """The part of a database that is about parties and not about runs."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add_token(self, hash: str, name: str, role: str, expires: float) -> None:
        """Allow one enrolment to whoever shows the token with this hash, until it expires."""
        with self.database.write() as connection:
            row = {"hash": hash, "name": name, "role": role, "expires": expires}
            connection.execute(insert(tokens).values(row))

    def use_token(self, hash: str) -> Token:
        """Use a token up, and say what it allows. Raises ConfigError when it allows nothing (any more)."""
        now = time.time()
        with self.database.write() as connection:
            row = connection.execute(select(tokens).where(tokens.c.hash == hash)).one_or_none()
            good = (tokens.c.hash == hash) & tokens.c.used.is_(None) & (tokens.c.expires > now)
            if row is None or connection.execute(update(tokens).where(good).values(used=now)).rowcount != 1:
                known = "unknown" if row is None else "expired" if row.used is None else "used already"
                raise ConfigError(f"enrolment token: {known}", "ask the operator for a new one")
        return Token(row.name, row.role)

    def add_certificate(self, serial: int, name: str, role: str, expires: float) -> None:
        """Remember a certificate that was issued."""
        with self.database.write() as connection:
            row = {"serial": f"{serial:x}", "name": name, "role": role, "expires": expires}
            connection.execute(insert(certificates).values(row))

    def certificates(self) -> list[Certificate]:
        """All that were issued or revoked."""
        with self.database.read() as connection:
            found = connection.execute(select(certificates).order_by(certificates.c.name))
            return [Certificate(int(r.serial, 16), r.name, r.role, r.expires, r.revoked) for r in found]

    def revoke(self, serial: int) -> None:
        """Revoke a certificate, known or not (an external authority's)."""
        key, now = f"{serial:x}", time.time()
        mine = certificates.c.serial == key
        with self.database.write() as connection:
            if connection.scalar(select(certificates.c.serial).where(mine)) is None:
                unknown = {"serial": key, "name": "", "role": "", "expires": 0.0}
                connection.execute(insert(certificates).values(unknown))
            connection.execute(
                update(certificates).where(mine & certificates.c.revoked.is_(None)).values(revoked=now)
            )

    def revoked(self) -> frozenset[int]:
        """The serial numbers of all that were revoked."""
        with self.database.read() as connection:
            query = select(certificates.c.serial).where(certificates.c.revoked.is_not(None))
            return frozenset(int(serial, 16) for serial in connection.scalars(query))

    def saw(self, name: str, features: Sequence[str] = (), ledger: str | None = None) -> None:
        """A site is here; ledger: the newest hash of its ledger, None when it told none."""
        told = {"seen": time.time(), "features": json.dumps(list(features))}
        if ledger is not None:
            told["ledger"] = ledger
        with self.database.write() as connection:
            if not connection.execute(update(sites).where(sites.c.name == name).values(told)).rowcount:
                connection.execute(insert(sites).values(name=name, **told))

    def sites(self) -> list[SeenSite]:
        """All sites that were ever here."""
        with self.database.read() as connection:
            found = connection.execute(select(sites).order_by(sites.c.name))
            return [SeenSite(r.name, r.seen, tuple(json.loads(r.features)), r.ledger) for r in found]

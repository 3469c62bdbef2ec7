"""What an authority remembers, in a database: certificates, revocations, enrolment tokens.

All servers on one database share it, and so do operators' commands: each call is a transaction of its own,
and none needs the lease.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Table, select, update
from sqlalchemy.dialects import postgresql, sqlite

from coterie.storage.database import Database
from coterie.storage.tables import certificates, revocations, tokens


class Register:
    """The register in a database (`security.register.Register`). Every call raises RunError when it fails."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def keep(self, serial: int, role: str, name: str, pem: bytes) -> None:
        """Remember a certificate."""
        self._add(certificates, serial=f"{serial:x}", role=role, name=name, pem=pem.decode())

    def certificates(self, role: str | None, name: str | None) -> list[bytes]:
        """Those of a role and name, or of all."""
        query = select(certificates.c.pem)
        for column, wanted in ((certificates.c.role, role), (certificates.c.name, name)):
            query = query if wanted is None else query.where(column == wanted)
        with self.database.read() as connection:
            return [pem.encode() for pem in connection.scalars(query)]

    def revoke(self, serial: int) -> None:
        """Trust it no more."""
        self._add(revocations, serial=f"{serial:x}")

    def revoked(self) -> frozenset[int]:
        """The serial numbers that are trusted no more."""
        with self.database.read() as connection:
            return frozenset(int(serial, 16) for serial in connection.scalars(select(revocations.c.serial)))

    def add_token(self, id: str, record: str) -> None:
        """Remember a token that may be used once."""
        self._add(tokens, id=id, record=record)

    def token(self, id: str) -> tuple[str, str | None] | None:
        """A token's record, and what it was used for."""
        with self.database.read() as connection:
            row = connection.execute(select(tokens).where(tokens.c.id == id)).one_or_none()
        return None if row is None else (row.record, row.used)

    def use_token(self, id: str, record: str, used: str) -> str:
        """Use a token for this, if it was not used yet; return what it is used for now."""
        self.add_token(id, record)
        with self.database.shared() as connection:
            free = (tokens.c.id == id) & tokens.c.used.is_(None)
            connection.execute(update(tokens).where(free).values(used=used))
            return str(connection.scalar(select(tokens.c.used).where(tokens.c.id == id)))

    def _add(self, table: Table, **row: Any) -> None:
        """Add a row, if it is not there."""
        kind = postgresql if self.database.engine.dialect.name == "postgresql" else sqlite
        with self.database.shared() as connection:
            connection.execute(kind.insert(table).values(row).on_conflict_do_nothing())

"""What an authority remembers: the certificates that it signed, revocations, and enrolment tokens.

In a folder (`Files`), in a database that several servers share (`storage.register`), or in both (`Both`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coterie.errors import ConfigError
from coterie.security.certificates import identity_of
from coterie.security.files import make_folder, read_bytes, write_new, write_over

_SERIAL = re.compile(r"[0-9a-f]{1,40}")
_ID = re.compile(r"[0-9a-f]{16}")


class Register(Protocol):
    """Where an authority remembers. Several processes may use one at once."""

    def keep(self, serial: int, role: str, name: str, pem: bytes) -> None:
        """Remember a certificate."""

    def certificates(self, role: str | None, name: str | None) -> list[bytes]:
        """Those of a role and name, or of all (PEM)."""

    def revoke(self, serial: int) -> None:
        """Trust it no more, for good."""

    def revoked(self) -> frozenset[int]:
        """The serial numbers that are trusted no more."""

    def add_token(self, id: str, record: str) -> None:
        """Remember a token that may be used once."""

    def token(self, id: str) -> tuple[str, str | None] | None:
        """A token's record, and what it was used for; None when there is none."""

    def use_token(self, id: str, record: str, used: str) -> str:
        """Use a token for this, if it was not used yet; return what it is used for now."""


@dataclass(frozen=True, slots=True)
class Files:
    """In an authority's folder: issued/ROLE/NAME/SERIAL.crt  revoked/SERIAL  tokens/ID.json, ID.used."""

    folder: Path

    def keep(self, serial: int, role: str, name: str, pem: bytes) -> None:
        """Remember a certificate."""
        folder = self.folder / "issued" / role / name
        make_folder(folder)
        write_new(folder / f"{serial:x}.crt", pem, mode=0o644)

    def certificates(self, role: str | None, name: str | None) -> list[bytes]:
        """Those of a role and name, or of all."""
        paths = sorted((self.folder / "issued").glob(f"{role or '*'}/{name or '*'}/*.crt"))
        return [read_bytes(path) for path in paths]

    def revoke(self, serial: int) -> None:
        """Trust it no more."""
        make_folder(self.folder / "revoked")
        write_over(self.folder / "revoked" / f"{serial:x}", b"")

    def revoked(self) -> frozenset[int]:
        """The serial numbers that are trusted no more; lists one folder."""
        folder = self.folder / "revoked"
        names = os.listdir(folder) if folder.exists() else ()  # noqa: PTH208, Paths would cost more than the listing
        return frozenset(int(name, 16) for name in names if _SERIAL.fullmatch(name))

    def add_token(self, id: str, record: str) -> None:
        """Remember a token."""
        make_folder(self.folder / "tokens")
        write_new(self.folder / "tokens" / f"{id}.json", record.encode())

    def token(self, id: str) -> tuple[str, str | None] | None:
        """A token's record, and what it was used for."""
        path = self.folder / "tokens" / f"{id}.json"
        if not _ID.fullmatch(id) or not path.exists():
            return None
        used = path.with_suffix(".used")
        return read_bytes(path).decode(errors="replace"), read_bytes(used).decode() if used.exists() else None

    def use_token(self, id: str, record: str, used: str) -> str:  # noqa: ARG002  it is there
        """Use a token for this, if it was not used yet."""
        path = self.folder / "tokens" / f"{id}.used"
        try:
            write_new(path, used.encode())
        except ConfigError:  # used before, or by another request at this moment
            return read_bytes(path).decode()
        return used


@dataclass(frozen=True, slots=True)
class Both:
    """A folder, as commands on its machine know it, and a database, which all servers know.

    The database decides whether a token was used. What the folder says of revocations is passed on to it. A
    folder that is mounted read-only stays as it is.
    """

    folder: Files
    shared: Register

    def share(self) -> None:
        """Pass on the certificates that were signed with the folder alone."""
        known = set(self.shared.certificates(None, None))
        for pem in self.folder.certificates(None, None):
            if pem not in known:
                who = identity_of(pem)
                self.shared.keep(who.serial, who.role, who.name, pem)

    def keep(self, serial: int, role: str, name: str, pem: bytes) -> None:
        """Remember a certificate."""
        self.shared.keep(serial, role, name, pem)
        if os.access(self.folder.folder, os.W_OK):
            self.folder.keep(serial, role, name, pem)

    def certificates(self, role: str | None, name: str | None) -> list[bytes]:
        """Those of a role and name, or of all."""
        found = [*self.folder.certificates(role, name), *self.shared.certificates(role, name)]
        return list(dict.fromkeys(found))

    def revoke(self, serial: int) -> None:
        """Trust it no more."""
        self.shared.revoke(serial)
        if os.access(self.folder.folder, os.W_OK):
            self.folder.revoke(serial)

    def revoked(self) -> frozenset[int]:
        """The serial numbers that are trusted no more."""
        here, there = self.folder.revoked(), self.shared.revoked()
        for serial in here - there:
            self.shared.revoke(serial)
        return here | there

    def add_token(self, id: str, record: str) -> None:
        """Remember a token."""
        self.shared.add_token(id, record)

    def token(self, id: str) -> tuple[str, str | None] | None:
        """A token's record, and what it was used for."""
        here, there = self.folder.token(id), self.shared.token(id)
        return here if there is None or (here is not None and here[1] is not None) else there

    def use_token(self, id: str, record: str, used: str) -> str:
        """Use a token for this, if it was not used yet."""
        now = self.shared.use_token(id, record, used)
        if self.folder.token(id) and os.access(self.folder.folder, os.W_OK):
            self.folder.use_token(id, record, now)
        return now

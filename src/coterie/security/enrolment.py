"""Enrolment: a site proves with a one-time token that the certificate it asks for is its own.

The operator makes a token and sends it to the site by a channel both trust. The site gives its secret, with
a certificate signing request, to the server, which keeps the record of the token: a hash, no secret.
The functions are pure; a record fits a row of a database or a file (`Authority` keeps files).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from coterie.errors import ConfigError
from coterie.security.certificates import MAX_PEM, Untrusted, check_name, read_request
from coterie.security.files import read_text

HOURS = 24.0
_Name = Annotated[str, StringConstraints(min_length=1, max_length=300)]
_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class Token(BaseModel):
    """What a site gets: who it will be, where the server is, whom to trust, and the secret. Times: Unix."""

    model_config = _FROZEN
    id: _Name
    site: _Name
    servers: tuple[_Name, ...]  # host:port of the enrolment service
    ca: Annotated[str, StringConstraints(max_length=MAX_PEM)]  # the authority's certificate, PEM
    secret: Annotated[str, StringConstraints(min_length=43, max_length=43)]
    expires: float

    def __repr__(self) -> str:
        return f"Token(id={self.id!r}, site={self.site!r})"

    __str__ = __repr__

    @classmethod
    def load(cls, path: Path) -> Token:
        """Read a token's file. Raises ConfigError, which never shows what is in it."""
        try:
            return cls.model_validate_json(read_text(path), strict=True)
        except (ValidationError, RecursionError):
            hint = "ask the operator for a new one: coterie pki token NAME"
            raise ConfigError(f"{path}: this is no enrolment token", hint) from None


class Record(BaseModel):
    """What the server keeps of a token."""

    model_config = _FROZEN
    id: _Name
    site: _Name
    hash: _Name  # SHA-256 of the secret, in hexadecimal
    expires: float
    used: str | None = None  # SHA-256 of the TLS key that it was redeemed for


def make(
    site: str, servers: tuple[str, ...], ca_pem: bytes, *, now: float, hours: float = HOURS
) -> tuple[Token, Record]:
    """Make a token of 256 random bits for one site, and its record for the server.

    Raises ConfigError for a bad name, server or lifetime.
    """
    check_name(site)
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port[:6]) < 65536 or len(server) > 300:
            raise ConfigError(f"--server {server!r}: must be HOST:PORT", "for example fl.example.org:8444")
    if not servers:
        raise ConfigError("a token names no server", "give --server HOST:PORT")
    if not 0 < hours <= 24 * 365:
        raise ConfigError(f"--hours {hours:g}: must be more than 0 and at most a year")
    id, secret, expires = secrets.token_hex(8), secrets.token_urlsafe(32), now + 3600 * hours
    token = Token(
        id=id, site=site, servers=servers, ca=ca_pem.decode("ascii"), secret=secret, expires=expires
    )
    return token, Record(id=id, site=site, hash=_hash(secret), expires=expires)


def redeem(record: Record | None, secret: str, csr_pem: bytes, *, now: float) -> Record:
    """Return the record as used for this request; the caller stores it, then signs the request.

    A token works once. A request for the same TLS key may come again until the token expires, because an
    answer can be lost on the way. Raises Untrusted; to who does not hold the secret, a token that is not
    known (record None), expired or used looks like any other.
    """
    matches = hmac.compare_digest(_hash(secret), record.hash if record else "0" * 64)
    if record is None or not matches:
        raise Untrusted("the enrolment token is not known here", "ask the operator for a new token")
    if now >= record.expires:
        raise Untrusted(f"the enrolment token of {record.site!r} has expired", "ask for a new token")
    _, tls_key, _ = read_request(csr_pem)
    used = hashlib.sha256(tls_key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)).hexdigest()
    if record.used not in (None, used):
        raise Untrusted(f"the enrolment token of {record.site!r} was used already", "ask for a new token")
    return record.model_copy(update={"used": used})


def _hash(secret: str) -> str:
    # A plain hash is enough: the secret is 256 random bits, not a password that can be guessed.
    return hashlib.sha256(b"coterie/1 enrolment\0" + secret.encode("utf-8", "surrogatepass")).hexdigest()

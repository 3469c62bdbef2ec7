"""Keys and certificates in folders: an authority's, and a party's.

    authority:  ca.key  ca.crt  and what it remembers (`register`)
    party:      tls.key  tls.crt  ca.crt  signing.key  (and tls.key.new while its next certificate is made)

Serial numbers are written in hexadecimal. Every file is written whole or not at all, and several processes
may use a folder at once. An authority folder without ca.key stands for an external authority.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from coterie.errors import ConfigError
from coterie.security import certificates as certs
from coterie.security import enrolment, signing
from coterie.security.certificates import Identity, Role, Untrusted, identity_of, read_certificates
from coterie.security.files import make_folder, read_bytes, write_new, write_over
from coterie.security.register import Both, Files, Register

_SERIAL = re.compile(r"[0-9a-f]{1,40}")
_PARTY = ("tls.key", "tls.crt", "signing.key")
_PRIVATE = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that an authority has signed."""

    identity: Identity
    expires: datetime
    revoked: bool
    pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority in a folder."""

    folder: Path
    certificate: bytes  # PEM; of an external authority perhaps several
    _key: ec.EllipticCurvePrivateKey | None = field(repr=False)
    register: Register

    @classmethod
    def create(cls, folder: Path, name: str = "Coterie", *, now: datetime | None = None) -> Self:
        """Make an authority with a new key. Raises ConfigError when there is one in the folder."""
        key = ec.generate_private_key(ec.SECP256R1())
        pem = certs.self_signed(key, name, now or datetime.now(UTC))
        _refuse(folder, "ca.crt", "ca.key")
        make_folder(folder)
        write_new(folder / "ca.key", key.private_bytes(*_PRIVATE))
        write_new(folder / "ca.crt", pem, mode=0o644)
        return cls(folder, pem, key, Files(folder))

    @classmethod
    def adopt(cls, folder: Path, ca_pem: bytes) -> Self:
        """Trust an external authority, whose key is elsewhere; here one can only list and revoke.

        Raises Untrusted when the PEM holds no certificate, ConfigError when there is an authority already.
        """
        read_certificates(ca_pem)
        _refuse(folder, "ca.crt", "ca.key")
        make_folder(folder)
        write_new(folder / "ca.crt", ca_pem, mode=0o644)
        return cls(folder, ca_pem, None, Files(folder))

    @classmethod
    def open(cls, folder: Path, shared: Register | None = None) -> Self:
        """The authority in a folder. Raises ConfigError when there is none or its files are damaged.

        shared: where it remembers besides, with other servers and commands (`storage.register`).
        """
        if not (folder / "ca.crt").is_file():
            raise ConfigError(f"{folder}: no certificate authority here", f"coterie pki init {folder}")
        pem = read_bytes(folder / "ca.crt")
        path = folder / "ca.key"
        key = _load_tls_key(path) if path.exists() else None
        if key is not None and not _fits(key, pem):
            raise ConfigError(f"{path}: this is not the key of ca.crt", "restore both from the same copy")
        if shared is None:
            return cls(folder, pem, key, Files(folder))
        both = Both(Files(folder), shared)
        both.share()
        return cls(folder, pem, key, both)

    @classmethod
    def elsewhere(cls, shared: Register) -> Self:
        """An authority of which only what it remembers is here; one can list and revoke."""
        return cls(Path(), b"", None, shared)

    @property
    def signs(self) -> bool:
        """Is its key here?"""
        return self._key is not None

    def issue(
        self,
        csr_pem: bytes,
        role: str,
        name: str,
        *,
        hosts: Sequence[str] = (),
        days: float = certs.LEAF_DAYS,
        now: datetime | None = None,
    ) -> bytes:
        """Sign a request; return the certificate (PEM). The caller has made sure who asks.

        hosts: the DNS names and addresses that a server is reached by. Raises Untrusted for a bad request,
        and when the name belongs to another signing key already; ConfigError for bad arguments.
        """
        pem = self._sign(csr_pem, role, name, hosts, days, now)
        self._keep(pem)
        return pem

    def equip(
        self, folder: Path, role: str, name: str, *, hosts: Sequence[str] = (), days: float = certs.LEAF_DAYS
    ) -> Identity:
        """Make the keys and the certificate of a party in one folder. Raises as `new_key` and `issue`.

        Nothing is written when the certificate is refused.
        """
        _refuse(folder, *_PARTY)
        key, signing_key = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
        csr = certs.request(key, signing_key.private_bytes_raw(), role, name)
        pem = self.issue(csr, role, name, hosts=hosts, days=days)
        make_folder(folder)
        write_new(folder / "signing.key", signing_key.private_bytes(*_PRIVATE))
        write_new(folder / "tls.key", key.private_bytes(*_PRIVATE))
        return install(folder, pem, self.certificate)

    def renew(self, csr_pem: bytes, old_pem: bytes, *, days: float = certs.LEAF_DAYS) -> bytes:
        """Sign a new TLS key for whoever holds the old certificate; return the new one (PEM).

        The old one stays valid until it expires, so that nothing stops. Raises as `issue`, and Untrusted when
        the old one is revoked or of another authority, or the signing key changes.
        """
        old = identity_of(old_pem)
        kept = self.register.certificates(old.role, old.name)
        if read_certificates(old_pem)[0] not in (read_certificates(pem)[0] for pem in kept):
            raise Untrusted(f"the certificate of {old} was not signed by this authority")
        if old.serial in self.revoked():
            raise Untrusted(f"the certificate of {old} is revoked (serial {old.serial:x})")
        if certs.read_request(csr_pem)[2] != old.signing_key:
            raise Untrusted(f"the request of {old} has another signing key", "revoke it, then enrol it again")
        return self.issue(csr_pem, old.role, old.name, hosts=certs.hosts_of(old_pem), days=days)

    def token(self, site: str, servers: Sequence[str], *, hours: float = enrolment.HOURS) -> enrolment.Token:
        """Make a one-time enrolment token for a site and keep its record. Raises ConfigError."""
        self._signer()
        token, record = enrolment.make(site, tuple(servers), self.certificate, now=time.time(), hours=hours)
        self.register.add_token(record.id, record.model_dump_json())
        return token

    def enrol(self, id: str, secret: str, csr_pem: bytes) -> bytes:
        """Redeem a token for a site's certificate (PEM). Raises Untrusted."""
        record = enrolment.redeem(self._record(id), secret, csr_pem, now=time.time())
        pem = self._sign(csr_pem, "site", record.site, (), certs.LEAF_DAYS, None)
        assert record.used
        unused = record.model_copy(update={"used": None}).model_dump_json()
        if self.register.use_token(id, unused, record.used) != record.used:  # by another at this moment
            enrolment.redeem(self._record(id), secret, csr_pem, now=time.time())
        self._keep(pem)
        return pem

    def revoke(self, serial: int) -> None:
        """Trust a certificate no more, from now on and for good; also one of an external authority."""
        self.register.revoke(serial)

    def revoked(self) -> frozenset[int]:
        """The serial numbers of all revoked certificates."""
        return self.register.revoked()

    def issued(self, role: str | None = None, name: str | None = None) -> Iterator[Issued]:
        """The certificates signed so far, by role and name; the newest of a party last."""
        revoked, found = self.revoked(), []
        for pem in self.register.certificates(role, name):
            who, dates = identity_of(pem), read_certificates(pem)[0]
            each = Issued(who, dates.not_valid_after_utc, who.serial in revoked, pem)
            found.append(((who.role, who.name, dates.not_valid_before_utc), each))
        yield from (each for _, each in sorted(found, key=lambda item: item[0]))

    def find(self, which: str) -> list[int]:
        """The serial numbers, of certificates still in use, that a name, ROLE/NAME or serial number means.

        Raises ConfigError when it means nobody, or parties of several roles.
        """
        now = datetime.now(UTC)
        valid = [each.identity for each in self.issued() if not each.revoked and each.expires > now]
        named = [each for each in valid if which in (each.name, f"{each.role}/{each.name}")]
        if len(roles := {f"{each.role}/{each.name}" for each in named}) > 1:
            raise ConfigError(f"{which!r} means several parties", f"say which: {', '.join(sorted(roles))}")
        number = which.lower().replace(":", "")
        if not named and _SERIAL.fullmatch(number):
            serial = int(number, 16)
            if self._key is None or serial in {each.serial for each in valid}:
                return [serial]
        if not named:
            raise ConfigError(
                f"{which[:80]!r}: no certificate in use has this name or serial number",
                "coterie pki list shows them",
            )
        return [each.serial for each in named]

    def _sign(
        self, csr_pem: bytes, role: str, name: str, hosts: Sequence[str], days: float, now: datetime | None
    ) -> bytes:
        now = now or datetime.now(UTC)
        pem = certs.signed(
            csr_pem, role, name, self._signer(), self.certificate, hosts=hosts, days=days, now=now
        )
        new = identity_of(pem)
        for each in self.issued(new.role, new.name):
            if not each.revoked and each.expires > now and each.identity.signing_key != new.signing_key:
                raise Untrusted(
                    f"{new} has a certificate with another signing key (serial {each.identity.serial:x})",
                    f"if it is to be replaced, revoke it first: coterie pki revoke {new.role}/{new.name}",
                )
        return pem

    def _keep(self, pem: bytes) -> None:
        who = identity_of(pem)
        self.register.keep(who.serial, who.role, who.name, pem)

    def _signer(self) -> ec.EllipticCurvePrivateKey:
        if self._key is None:
            raise ConfigError(
                f"{self.folder}: the key of this authority is elsewhere",
                "have the external authority sign: coterie pki request, then coterie pki install",
            )
        return self._key

    def _record(self, id: str) -> enrolment.Record | None:
        if (found := self.register.token(id)) is None:
            return None
        try:
            record = enrolment.Record.model_validate_json(found[0], strict=True)
        except ValidationError:
            raise ConfigError(f"token {id}: its record is damaged", "make a new token") from None
        return record.model_copy(update={"used": found[1]})


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a party's folder holds: PEM for TLS, and the 32 bytes of its private signing key."""

    identity: Identity
    certificate: bytes  # then any intermediate ones
    ca: bytes
    key: bytes = field(repr=False)
    signing_key: bytes = field(repr=False)


def new_key(folder: Path, name: str, role: Role) -> bytes:
    """Make a party's keys in a folder; return the request (PEM) for its certificate.

    A signing key that is there is kept. Raises ConfigError when there is a TLS key or a bad name.
    """
    certs.check_name(name)
    certs.check_role(role)
    _refuse(folder, "tls.key", "tls.crt")
    make_folder(folder)
    if not (folder / "signing.key").exists():
        write_new(folder / "signing.key", Ed25519PrivateKey.generate().private_bytes(*_PRIVATE))
    write_new(folder / "tls.key", ec.generate_private_key(ec.SECP256R1()).private_bytes(*_PRIVATE))
    return request_of(folder, name, role)


def request_of(folder: Path, name: str, role: Role) -> bytes:
    """A request (PEM) for the keys in a folder: for who was interrupted between key and certificate."""
    return certs.request(_load_tls_key(folder / "tls.key"), load_signing_key(folder), role, name)


def renewal(folder: Path) -> bytes:
    """Make a party's next TLS key; return the request (PEM). The old key stays in use until `install`."""
    who = credentials(folder).identity  # which also finishes an `install` that was interrupted
    key = ec.generate_private_key(ec.SECP256R1())
    write_over(folder / "tls.key.new", key.private_bytes(*_PRIVATE))
    return certs.request(key, load_signing_key(folder), who.role, who.name)


def install(folder: Path, cert_pem: bytes, ca_pem: bytes | None = None) -> Identity:
    """Put a party's certificate (and any intermediate ones after it) into its folder, once it is found right.

    ca_pem: the authorities to trust; those in the folder's ca.crt when left out. A crash leaves the old pair
    of key and certificate or the new one. Raises Untrusted when it does not hold, fits no key here or names
    somebody else than the one that it replaces.
    """
    trusted = ca_pem if ca_pem is not None else read_bytes(folder / "ca.crt")
    who = certs.verified(cert_pem, trusted)
    paths = [path for path in (folder / "tls.key.new", folder / "tls.key") if path.exists()]
    if not any(_fits(_load_tls_key(path), cert_pem) for path in paths):
        raise Untrusted(f"the certificate of {who} is not for a key in {folder}")
    if who.signing_key not in (b"", signing.public_of(load_signing_key(folder))):
        raise Untrusted(f"the certificate of {who} is not for the signing key in {folder}")
    present = folder / "tls.crt"
    if present.exists():
        before = identity_of(read_bytes(present))
        if (before.role, before.name) != (who.role, who.name):
            raise Untrusted(f"{folder} belongs to {before}; the certificate is that of {who}")
    write_over(folder / "ca.crt", trusted, mode=0o644)
    write_over(folder / "tls.crt", cert_pem, mode=0o644)  # from here on tls.key.new is the key
    credentials(folder)
    return who


def credentials(folder: Path) -> Credentials:
    """Read a party's folder; finishes an `install` that was interrupted.

    Raises ConfigError when a file is missing or damaged, Untrusted when key and certificate do not fit.
    """
    certificate, ca = read_bytes(folder / "tls.crt"), read_bytes(folder / "ca.crt")
    who = identity_of(certificate)
    next_key = folder / "tls.key.new"
    if next_key.exists() and _fits(_load_tls_key(next_key), certificate):
        with suppress(FileNotFoundError):  # another process did it
            next_key.replace(folder / "tls.key")
    key = _load_tls_key(folder / "tls.key")
    if not _fits(key, certificate):
        if read_bytes(folder / "tls.crt") != certificate:  # installed meanwhile by another process
            return credentials(folder)
        raise Untrusted(f"{folder}: tls.key is not the key of tls.crt", "restore both, or enrol again")
    return Credentials(who, certificate, ca, key.private_bytes(*_PRIVATE), load_signing_key(folder))


def load_signing_key(folder: Path) -> bytes:
    """The 32 bytes of the private signing key in a folder. Raises ConfigError, which shows nothing of it."""
    key = _load_key(folder / "signing.key")
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{folder / 'signing.key'}: this is no Ed25519 key in PEM")
    return key.private_bytes_raw()


def _load_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = _load_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: this is no ECDSA key in PEM")
    return key


def _load_key(path: Path) -> object:
    try:
        return serialization.load_pem_private_key(read_bytes(path), None)
    except Exception as error:  # whatever the parser says of it could show parts of the key
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: this is no private key in PEM", "restore it from a copy") from None


def _fits(key: ec.EllipticCurvePrivateKey, cert_pem: bytes) -> bool:
    return certs.key_of(cert_pem) == key.public_key()


def _refuse(folder: Path, *names: str) -> None:
    """Raise ConfigError when one of these files is there, or the folder is none."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder")
    taken: Collection[str] = [name for name in names if (folder / name).exists()]
    if taken:
        raise ConfigError(
            f"{folder}: {' and '.join(taken)} exist already", "keys are never overwritten; use another folder"
        )

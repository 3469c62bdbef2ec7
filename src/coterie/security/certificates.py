"""Certificates: who a party is. Requests, certificates and their verification, as functions of bytes.

A party is named by the one URI of its certificate's subject alternative names that begins with coterie://

    coterie://site/hospital-a        role / name; the role is server, site or operator

TLS uses ECDSA P-256 (gRPC's TLS has no Ed25519). Beside its TLS key a party has an Ed25519 key for what it
signs. The extension `SIGNING_KEY` of its request, which the authority copies into the certificate, is an

    OCTET STRING: the public Ed25519 key, 32 bytes; its signature of the TLS key, 64 bytes
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar, get_args

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, Store, VerificationError

from coterie.errors import ConfigError, RunError
from coterie.security import signing

Role = Literal["server", "site", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)
SIGNING_KEY = x509.ObjectIdentifier("2.25.147695737149861388030878268296855544564")  # a UUID: nobody else's
AUTHORITY_DAYS, LEAF_DAYS = 3650, 90
SKEW = timedelta(minutes=10)  # a peer's clock may be this much behind the authority's
MAX_PEM = 65_536  # bytes
T = TypeVar("T")


class Untrusted(RunError):
    """A certificate, request, token or signature that is not to be trusted, and why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a certificate says its holder is.

    signing_key: the public Ed25519 key, 32 bytes; empty where an external authority left it out.
    """

    name: str
    role: Role
    serial: int
    signing_key: bytes

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


def check_name(name: str) -> None:
    """Raise ConfigError for what cannot be a party's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(
            f"{name[:80]!r} cannot be a party's name",
            "use up to 64 letters, digits, '.', '_' and '-', a letter or digit first",
        )


def check_role(role: str) -> Role:
    """The role of that name. Raises ConfigError."""
    for each in ROLES:
        if each == role:
            return each
    raise ConfigError(f"{role[:80]!r} is no role", f"there are: {', '.join(ROLES)}")


def identity_of(cert_pem: bytes) -> Identity:
    """Who the first certificate in the PEM names; that it can be trusted is for TLS or `verified` to say.

    Raises Untrusted when it cannot be read, or names no party by the rule above.
    """
    return _identity(read_certificates(cert_pem)[0])


def request(key: ec.EllipticCurvePrivateKey, signing_key: bytes, role: str, name: str) -> bytes:
    """A certificate signing request (PEM) for both keys, each of which signs to show that it is here."""
    check_name(name)
    claim = x509.UniformResourceIdentifier(f"coterie://{check_role(role)}/{name}")
    proof = signing.sign(signing_key, _bound(key.public_key()))
    binding = b"\x04\x60" + signing.public_of(signing_key) + proof
    made = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_subject(name, role))
        .add_extension(x509.SubjectAlternativeName([claim]), critical=False)
        .add_extension(x509.UnrecognizedExtension(SIGNING_KEY, binding), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def self_signed(key: ec.EllipticCurvePrivateKey, name: str, now: datetime) -> bytes:
    """The certificate (PEM) of a new authority, which may sign parties but no other authority."""
    if not 0 < len(name) <= 64 or not name.isprintable():
        raise ConfigError(f"--name {name[:80]!r}: must be 1 to 64 printable characters")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    public = key.public_key()
    made = (
        _builder(subject, subject, public, now, now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def signed(
    csr_pem: bytes,
    role: str,
    name: str,
    key: ec.EllipticCurvePrivateKey,
    ca_pem: bytes,
    *,
    hosts: Sequence[str] = (),
    days: float = LEAF_DAYS,
    now: datetime,
) -> bytes:
    """Sign a request: the certificate (PEM) of `role` `name`. The caller has made sure who asks.

    hosts: the DNS names and addresses that a server is reached by. days: lifetime, at most the authority's.
    Raises Untrusted for a request that proves too little or asks for another identity, ConfigError else.
    """
    check_name(name)
    asked, public, _ = read_request(csr_pem)
    binding = _signing_extension(x509.load_pem_x509_csr(csr_pem).extensions)
    role = check_role(role)
    if asked is not None and asked != (role, name):
        raise Untrusted(f"the request is for {' '.join(asked)!r}, not for '{role} {name}'")
    if bool(hosts) != (role == "server"):
        raise ConfigError(
            f"{role} {name}: {'no --host' if role == 'server' else '--host is for servers only'}",
            "a server's certificate names every host and address that sites reach it by",
        )
    if not 0 < days <= AUTHORITY_DAYS:
        raise ConfigError(f"--days {days:g}: must be more than 0 and at most {AUTHORITY_DAYS}")
    (authority,) = read_certificates(ca_pem)[:1]
    end = min(now + timedelta(days=days), authority.not_valid_after_utc)
    if end <= now:
        raise ConfigError("the authority's own certificate has expired", "make a new one: coterie pki init")
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    names = [x509.UniformResourceIdentifier(f"coterie://{role}/{name}"), *map(_host, hosts)]
    made = (
        _builder(_subject(name, role), authority.subject, public, now, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(_issued_by(authority), critical=False)
        .add_extension(x509.UnrecognizedExtension(SIGNING_KEY, binding), critical=False)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def verified(
    cert_pem: bytes,
    ca_pem: bytes,
    *,
    role: str | None = None,
    name: str | None = None,
    revoked: Collection[int] = (),
    now: datetime | None = None,
) -> Identity:
    """Who a certificate names, once all of it holds: chain, dates, revocation, role and name.

    cert_pem: the party's certificate, then any intermediate ones. ca_pem: the authorities that are trusted.
    Raises Untrusted with the first thing that is wrong.
    """
    leaf, *between = read_certificates(cert_pem)
    trusted, now = read_certificates(ca_pem), now or datetime.now(UTC)
    found = _identity(leaf)
    if leaf.issuer == leaf.subject:
        raise Untrusted(f"the certificate of {found} is self-signed", "have the authority sign it")
    if leaf.serial_number in revoked:
        raise Untrusted(f"the certificate of {found} is revoked (serial {leaf.serial_number:x})")
    for certificate in (leaf, *between):
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        whose = f"the certificate of {found}" if certificate is leaf else "an intermediate certificate"
        if now > end:
            raise Untrusted(f"{whose} expired on {end:%Y-%m-%d %H:%M} UTC", "rotate it: coterie pki rotate")
        if now < start:
            hint = "is this machine's clock right?"
            raise Untrusted(f"{whose} is valid only from {start:%Y-%m-%d %H:%M} UTC on", hint)
    if all(now > each.not_valid_after_utc for each in trusted):
        raise Untrusted("the certificate of the authority that is trusted here has expired")
    authorities = ExtensionPolicy.webpki_defaults_ca()
    verifier = (
        PolicyBuilder()
        .store(Store(trusted))
        .time(now)
        .extension_policies(ca_policy=authorities, ee_policy=ExtensionPolicy.permit_all())
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf, between)
    except (VerificationError, ValueError):
        signer = leaf.issuer.rfc4514_string()[:200]
        raise Untrusted(
            f"the certificate of {found} was not signed by an authority trusted here; its issuer: {signer!r}"
        ) from None
    _check_purpose(leaf, found)
    if role is not None and found.role != role:
        raise Untrusted(f"{found} is a {found.role}; a {role} is asked for here")
    if name is not None and found.name != name:
        raise Untrusted(f"the certificate is that of {found}, not of {name!r}")
    return found


def read_certificates(pem: bytes) -> list[x509.Certificate]:
    """The certificates of a PEM, at least one. Raises Untrusted."""

    def read() -> list[x509.Certificate]:
        found = x509.load_pem_x509_certificates(pem)
        for each in found:  # the fields are parsed when first asked for, so that is done here
            _ = (
                each.issuer,
                each.subject,
                each.extensions,
                each.not_valid_before_utc,
                each.not_valid_after_utc,
            )
        return found

    if len(pem) <= MAX_PEM and (found := _readable(read)):
        return found
    raise Untrusted("this is no certificate in PEM")


def key_of(cert_pem: bytes) -> object:
    """The public key of the first certificate; None when it is of an unknown kind. Raises Untrusted."""
    return _readable(read_certificates(cert_pem)[0].public_key)


def read_request(csr_pem: bytes) -> tuple[tuple[str, str] | None, ec.EllipticCurvePublicKey, bytes]:
    """What a request asks for: (role, name) where it says, the TLS key and the signing key, both proved.

    Raises Untrusted.
    """

    def read() -> tuple[x509.CertificateSigningRequest, x509.Extensions, bool, object] | None:
        csr = x509.load_pem_x509_csr(csr_pem)
        return csr, csr.extensions, csr.is_signature_valid, csr.public_key()

    found = _readable(read) if len(csr_pem) <= MAX_PEM else None
    if found is None:
        raise Untrusted("this is no certificate signing request in PEM")
    _, extensions, valid, public = found
    if not valid:
        raise Untrusted("the request is not signed by the key that it is for")
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise Untrusted("the request's key is not ECDSA P-256", "make it with: coterie pki request")
    binding = _signing_extension(extensions)
    if not binding:
        raise Untrusted("the request carries no signing key", "make it with: coterie pki request")
    return _claim(extensions), public, _proved(binding, public)


def hosts_of(cert_pem: bytes) -> tuple[str, ...]:
    """The DNS names and addresses of a certificate. Raises Untrusted."""
    certificate = read_certificates(cert_pem)[0]
    _identity(certificate)  # which finds the extension readable
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def renew_at(cert_pem: bytes) -> datetime:
    """When a certificate should be rotated: two thirds through its life. Raises Untrusted."""
    certificate = read_certificates(cert_pem)[0]
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return start + (end - start) * 2 / 3


def expiry(cert_pem: bytes) -> datetime:
    """When a certificate ends. Raises Untrusted."""
    return read_certificates(cert_pem)[0].not_valid_after_utc


def _identity(certificate: x509.Certificate) -> Identity:
    claim = _claim(certificate.extensions)
    if claim is None:
        raise Untrusted(
            "the certificate names no party",
            "it needs one URI such as coterie://site/NAME among its subject alternative names",
        )
    binding = _signing_extension(certificate.extensions)
    signing_key = _proved(binding, _readable(certificate.public_key)) if binding else b""
    role, name = claim
    return Identity(name, check_role(role), certificate.serial_number, signing_key)


def _claim(extensions: x509.Extensions) -> tuple[str, str] | None:
    """The (role, name) of the one coterie:// URI; None when there is none."""
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    every = names.get_values_for_type(x509.UniformResourceIdentifier)
    ours = [uri for uri in every if uri.lower().startswith("coterie:")]
    if not ours:
        return None
    found = re.fullmatch(r"coterie://(server|site|operator)/([A-Za-z0-9][A-Za-z0-9._-]{0,63})", ours[0])
    if len(ours) > 1 or not found:
        raise Untrusted("the certificate or request must name one party, as in coterie://site/NAME")
    return found[1], found[2]


def _check_purpose(leaf: x509.Certificate, who: Identity) -> None:
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if who.role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    try:
        allowed = purpose in leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        authority = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound as missing:
        allowed, authority = missing.oid != x509.ExtendedKeyUsage.oid, False
    if authority or not allowed:
        raise Untrusted(f"the certificate of {who} is not for a {who.role}: wrong key usage")


def _readable(read: Callable[[], T]) -> T | None:
    """What a parser finds; None for whatever it cannot read."""
    try:
        return read()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion):
        return None
    except x509.UnsupportedGeneralNameType:
        return None


def _signing_extension(extensions: x509.Extensions) -> bytes:
    found = [each.value for each in extensions if each.oid == SIGNING_KEY]
    return found[0].value if found and isinstance(found[0], x509.UnrecognizedExtension) else b""


def _proved(binding: bytes, public: object) -> bytes:
    """The signing key of an extension, which must have signed the TLS key. Raises Untrusted."""
    key, proof = binding[2:34], binding[34:]
    ours = isinstance(public, ec.EllipticCurvePublicKey) and signing.verify(key, _bound(public), proof)
    if binding[:2] != b"\x04\x60" or not ours:
        raise Untrusted("the signing key did not sign the TLS key beside it")
    return key


def _bound(public: ec.EllipticCurvePublicKey) -> bytes:
    """What the signing key signs to be bound to a TLS key."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return b"coterie/1 tls key\0" + public.public_bytes(serialization.Encoding.DER, form)


def _subject(name: str, role: str) -> x509.Name:
    names = (NameOID.ORGANIZATIONAL_UNIT_NAME, role), (NameOID.COMMON_NAME, name)
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in names])


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(end)
    )


def _issued_by(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    key = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key)


def _usage(*which: str) -> x509.KeyUsage:
    kinds = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment")
    kinds += ("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # type: ignore[assignment]
    return x509.KeyUsage(**{kind: kind in which for kind in kinds})


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        label = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
        if len(host) > 253 or not re.fullmatch(rf"(\*\.)?{label}(\.{label})*", host):
            raise ConfigError(f"--host {host[:80]!r}: no DNS name or IP address") from None
        return x509.DNSName(host)

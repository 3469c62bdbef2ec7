"""Who is who, and what a site allows: certificates, enrolment, signatures, policy. Needs no torch.

Read `pki` first (an authority and a party are folders), then `certificates` (how a certificate names a
party), `enrolment` (how a site gets its first one), `signing`, `policy` and `packages` (code that travels).
Sockets do not live here, nor the process that runs a site's work; the ledger is `storage.ledger`.
"""

from coterie.errors import ConfigError

try:
    import cryptography  # noqa: F401
except ModuleNotFoundError as error:
    raise ConfigError("cryptography is not installed", "pip install 'coterie[deploy]'") from error

from coterie.security.certificates import (
    Identity,
    Role,
    Untrusted,
    expiry,
    hosts_of,
    identity_of,
    read_request,
    renew_at,
    verified,
)
from coterie.security.enrolment import Record, Token, make, redeem
from coterie.security.packages import Unsafe, members, pack, package, unpack, wheel_name
from coterie.security.pki import (
    Authority,
    Credentials,
    Issued,
    credentials,
    install,
    load_signing_key,
    new_key,
    renewal,
    request_of,
)
from coterie.security.policy import Job, Limits, Policy, Privacy, allowed_metrics, redacted, refusal
from coterie.security.register import Both, Files
from coterie.security.signing import canonical, of_config, public_of, sign, verify

__all__ = [
    "Authority", "Both", "Credentials", "Files", "Identity", "Issued", "Job", "Limits", "Policy",
    "Privacy", "Record", "Role", "Token", "Unsafe", "Untrusted", "allowed_metrics", "canonical",
    "credentials", "expiry", "hosts_of", "identity_of", "install", "load_signing_key", "make", "members",
    "new_key", "of_config", "pack", "package", "public_of", "read_request", "redacted", "redeem",
    "refusal", "renew_at", "renewal", "request_of", "sign", "unpack", "verified", "verify", "wheel_name",
]  # fmt: skip

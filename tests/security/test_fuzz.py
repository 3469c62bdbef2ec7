"""A thousand damaged inputs for each parser: only the errors that it names, and nothing passes."""

import base64
import random
import re
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from coterie.core import ConfigError
from coterie.security import (
    Authority,
    Policy,
    Token,
    Untrusted,
    credentials,
    new_key,
    public_of,
    read_request,
    sign,
    verified,
)
from coterie.storage import Ledger, Tampered, verify

CASES = 1000
POLICY = b"""
signers = ["alice"]
code = ["%s"]
metrics = ["loss", "acc*"]
[privacy]
clipping_norm = 1.0
[limits]
hours = ["22:00-06:00"]
""" % (b"ab" * 32)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One to four edits: a bit, a byte, a cut, a piece repeated, moved or of the other end."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at, more = draw.randrange(len(out) + 1), draw.randrange(1, 30)
        match draw.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(out):
                out[at] = draw.randrange(256)
            case 2:
                del out[at : at + more]
            case 3:
                out[at:at] = out[at : at + more] * draw.randrange(1, 4)
            case 4:
                out[at:at] = draw.randbytes(more)
            case 5:
                del out[max(at, 1) :]
    return bytes(out)


def said(call: Callable[[], object], *errors: type[Exception]) -> str:
    """The error of a call; "" when there was none."""
    try:
        call()
    except errors as error:
        return str(error)
    return ""


def fresh(path: Path, data: bytes) -> Path:
    """A new file: file systems flush one that is cut to nothing and written again, which is slow."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def der_of_any(pem: bytes) -> bytes:
    """What is between the lines of a PEM, however they are broken."""
    found = re.search(rb"-----BEGIN [A-Z ]+-----(.*?)-----END", pem, re.DOTALL)
    return base64.b64decode(re.sub(rb"[^A-Za-z0-9+/=]", b"", found[1])) if found else b""


def der_of(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(pem.splitlines()[1:-1]))


def pem_of(der: bytes, what: str) -> bytes:
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN {what}-----\n{body}\n-----END {what}-----\n".encode()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    base = tmp_path_factory.mktemp("made")
    ca = Authority.create(base / "ca")
    ca.equip(base / "site", "site", "a")
    csr = new_key(base / "b", "b", "site")
    own = credentials(base / "site")
    with Ledger(
        base / "ledger", lambda data: sign(own.signing_key, data), public_of(own.signing_key)
    ) as book:
        for i in range(3):
            book.append("reply", run="r", n=i)
    return base, ca, own, csr


@pytest.mark.parametrize("form", ["pem", "der"])
def test_certificates_and_requests(made, form):
    _, ca, own, csr = made
    draw = random.Random(1)
    good = certificate, request = own.certificate, csr
    if form == "der":
        certificate, request = map(der_of, good)
    for _ in range(CASES):
        bad, worse = damaged(certificate, draw), damaged(request, draw)
        if form == "der":
            bad, worse = pem_of(bad, "CERTIFICATE"), pem_of(worse, "CERTIFICATE REQUEST")
        for error, given, right in (
            (said(lambda pem=bad: verified(pem, ca.certificate), Untrusted), bad, good[0]),
            (said(lambda pem=worse: read_request(pem), Untrusted), worse, good[1]),
        ):
            assert error or der_of(right) in der_of_any(given)  # else the damage is outside the data
            assert len(error) < 1000


def test_keys(made):
    base, _, own, _ = made
    draw = random.Random(2)
    for name in ("tls.key", "signing.key"):
        path = base / "site" / name
        right = path.read_bytes()
        for _ in range(CASES // 2):
            fresh(path, damaged(right, draw))
            error = said(lambda: credentials(base / "site"), ConfigError, Untrusted)
            assert right.splitlines()[1].decode() not in error
            assert error or credentials(base / "site").key == own.key
        fresh(path, right)


def test_tokens_and_policies(made, tmp_path):
    _, ca, _, _ = made
    token = ca.token("x", ["h:1"])
    draw, right = random.Random(3), token.model_dump_json().encode()
    for _ in range(CASES):
        path = fresh(tmp_path / "token", damaged(right, draw))
        assert token.secret[:20] not in said(lambda path=path: Token.load(path), ConfigError)
        path = fresh(tmp_path / "policy.toml", damaged(POLICY, draw))
        assert len(said(lambda path=path: Policy.load(path), ConfigError)) < 1500


def test_ledgers_and_heads(made, tmp_path):
    base, _, own, _ = made
    public, draw = own.identity.signing_key, random.Random(4)
    files = {name: (base / name).read_bytes() for name in ("ledger", "ledger.head")}
    assert len(verify(base / "ledger", public)) == 3
    for case in range(CASES):
        name = draw.choice(list(files))
        bad = damaged(files[name], draw)
        if bad == files[name]:
            continue
        for each, data in (files | {name: bad}).items():
            fresh(tmp_path / each, data)
        with pytest.raises(Tampered):
            verify(tmp_path / "ledger", public)
        if case % 4:
            continue
        with suppress(Tampered):  # opening looks at the end only, and flushes to the disk
            Ledger(tmp_path / "ledger", lambda data: sign(own.signing_key, data), public).close()

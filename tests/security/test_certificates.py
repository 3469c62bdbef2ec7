"""Certificates and folders, checked by OpenSSL's command line, and every way in which one is not to be trusted."""

import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from coterie.cli import app
from coterie.core import ConfigError
from coterie.security import (
    Authority,
    Untrusted,
    certificates,
    credentials,
    hosts_of,
    identity_of,
    install,
    new_key,
    pki,
    public_of,
    read_request,
    renew_at,
    renewal,
    request_of,
    verified,
)

openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs OpenSSL's command line")


def said_by_openssl(*words, okay=True):
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == okay, done.stdout + done.stderr
    return done.stdout + done.stderr


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def ca(tmp_path):
    return Authority.create(tmp_path / "ca", "Test authority")


@pytest.fixture
def site(ca, tmp_path):
    ca.equip(tmp_path / "a", "site", "hospital-a")
    return tmp_path / "a"


@openssl
def test_openssl_accepts_the_certificates_for_their_purpose_only(ca, site, tmp_path):
    ca.equip(tmp_path / "s", "server", "main", hosts=["fl.example.org", "127.0.0.1", "::1"])
    root = ["verify", "-x509_strict", "-CAfile", tmp_path / "ca" / "ca.crt", "-purpose"]
    said_by_openssl(*root, "sslclient", site / "tls.crt")
    said_by_openssl(*root, "sslserver", tmp_path / "s" / "tls.crt")
    said_by_openssl(*root, "sslserver", site / "tls.crt", okay=False)
    said_by_openssl(*root, "sslclient", tmp_path / "s" / "tls.crt", okay=False)
    said_by_openssl(*root, "sslserver", "-verify_hostname", "fl.example.org", tmp_path / "s" / "tls.crt")
    said_by_openssl(*root, "sslserver", "-verify_ip", "127.0.0.1", tmp_path / "s" / "tls.crt")
    said_by_openssl(
        *root, "sslserver", "-verify_hostname", "evil.org", tmp_path / "s" / "tls.crt", okay=False
    )
    text = said_by_openssl("x509", "-in", site / "tls.crt", "-noout", "-text")
    for line in ("prime256v1", "ecdsa-with-SHA256", "CA:FALSE", "URI:coterie://site/hospital-a"):
        assert line in text
    assert certificates.SIGNING_KEY.dotted_string in text
    text = said_by_openssl("x509", "-in", tmp_path / "ca" / "ca.crt", "-noout", "-text")
    for line in ("CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign", "CN = Test authority"):
        assert line in text


@openssl
def test_openssl_reads_the_keys_and_the_request(tmp_path):
    csr = tmp_path / "r.csr"
    csr.write_bytes(new_key(tmp_path / "a", "hospital-a", "site"))
    assert "verify OK" in said_by_openssl("req", "-in", csr, "-noout", "-verify", "-text")
    raw = said_by_openssl("pkey", "-in", tmp_path / "a" / "signing.key", "-noout", "-text")
    shown = bytes.fromhex("".join(raw.split("pub:")[1].split()).replace(":", ""))
    assert shown == read_request(csr.read_bytes())[2] == public_of(pki.load_signing_key(tmp_path / "a"))


def test_a_folder_holds_what_belongs_together_and_only_its_owner_reads_it(ca, site):
    found = credentials(site)
    assert (found.identity.name, found.identity.role) == ("hospital-a", "site")
    assert found.identity.signing_key == public_of(found.signing_key)
    assert found.identity == identity_of(found.certificate) == verified(found.certificate, found.ca)
    assert mode(site) == mode(ca.folder) == mode(ca.folder / "issued" / "site") == 0o700
    assert mode(site / "tls.key") == mode(site / "signing.key") == mode(ca.folder / "ca.key") == 0o600
    secret = found.signing_key.hex(), found.key.decode().splitlines()[1], repr(found.signing_key)
    for text in (repr(found), repr(ca), str(found)):
        assert not any(part in text for part in secret)


def test_lifetimes(ca, site):
    now = datetime.now(UTC)
    certificate = x509.load_pem_x509_certificate((site / "tls.crt").read_bytes())
    authority = x509.load_pem_x509_certificate(ca.certificate)
    minutes = (now - certificate.not_valid_before_utc) / timedelta(minutes=1)
    assert 9 < minutes < 12  # a peer whose clock is late by minutes accepts it
    assert round((certificate.not_valid_after_utc - now) / timedelta(days=1)) == 90
    assert round((authority.not_valid_after_utc - now) / timedelta(days=1)) == 3650
    assert round((renew_at(ca.certificate) - now) / timedelta(days=1)) == round(3650 * 2 / 3)
    late = now + timedelta(days=3600)
    csr = new_key(site.parent / "late", "late", "site")
    pem = ca.issue(csr, "site", "late", now=late)  # never longer than its authority
    assert x509.load_pem_x509_certificate(pem).not_valid_after_utc == authority.not_valid_after_utc
    with pytest.raises(ConfigError, match="expired"):
        ca.issue(csr, "site", "late", now=now + timedelta(days=3651))


def self_signed(site):
    key = serialization.load_pem_private_key((site / "tls.key").read_bytes(), None)
    mine = x509.load_pem_x509_certificate((site / "tls.crt").read_bytes())
    builder = (
        x509.CertificateBuilder(mine.subject, mine.subject, key.public_key(), 7)
        .not_valid_before(mine.not_valid_before_utc)
        .not_valid_after(mine.not_valid_after_utc)
    )
    for each in mine.extensions:
        builder = builder.add_extension(each.value, each.critical)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_each_reason_not_to_trust_has_its_own_error(ca, site, tmp_path):
    pem = (site / "tls.crt").read_bytes()
    serial = identity_of(pem).serial
    now = datetime.now(UTC)
    other = Authority.create(tmp_path / "other", "Test authority")  # the same name, another key
    csr = request_of(site, "hospital-a", "site")
    lasting = Authority.create(tmp_path / "lasting", now=now + timedelta(days=10))
    long = lasting.issue(csr, "site", "hospital-a", days=3650, now=now + timedelta(days=11))
    operator = ca.issue(new_key(tmp_path / "o", "alice", "operator"), "operator", "alice")
    cases = [
        ("self-signed", self_signed(site), {}),
        ("expired on", pem, {"now": now + timedelta(days=91)}),
        ("authority that is trusted here has expired", long, {"now": now + timedelta(days=3651)}),
        ("valid only from", pem, {"now": now - timedelta(hours=1)}),
        (f"revoked .serial {serial:x}", pem, {"revoked": {serial}}),
        ("not signed by an authority trusted here", other.issue(csr, "site", "hospital-a"), {}),
        ("operator alice is a operator; a site", operator, {"role": "site"}),
        ("that of site hospital-a, not of 'hospital-b'", pem, {"name": "hospital-b"}),
        ("names no party", ca.certificate, {}),
        ("no certificate in PEM", b"", {}),
        ("no certificate in PEM", csr, {}),
        ("no certificate in PEM", pem * 200, {}),
        ("no certificate in PEM", pem[:200] + b"\n-----END CERTIFICATE-----\n", {}),
    ]
    for message, certificate, options in cases:
        with pytest.raises(Untrusted, match=message):
            verified(certificate, ca.certificate, **options)
    assert verified(pem, ca.certificate, role="site", name="hospital-a", revoked={1}).serial == serial


def test_a_party_cannot_sign_others(ca, site, tmp_path):
    """A site's own key is no authority, though the chain is otherwise right."""
    key = serialization.load_pem_private_key((site / "tls.key").read_bytes(), None)
    csr = new_key(tmp_path / "x", "evil", "operator")
    pem = certificates.signed(
        csr, "operator", "evil", key, (site / "tls.crt").read_bytes(), now=datetime.now(UTC)
    )
    with pytest.raises(Untrusted, match="not signed by an authority"):
        verified(pem + (site / "tls.crt").read_bytes(), ca.certificate)


def test_what_a_request_must_prove(ca, tmp_path):
    tls, mine, stolen = ec.generate_private_key(ec.SECP256R1()), *(Ed25519PrivateKey.generate() for _ in "ab")
    good = certificates.request(tls, mine.private_bytes_raw(), "site", "a")

    def forged(key=tls, signer=mine, claimed=mine, bound=tls, names=("coterie://site/a",)):
        proof = signer.sign(certificates._bound(bound.public_key()))
        value = b"\x04\x60" + claimed.public_key().public_bytes_raw() + proof
        uris = [x509.UniformResourceIdentifier(name) for name in names]
        builder = x509.CertificateSigningRequestBuilder(certificates._subject("a", "site"))
        builder = builder.add_extension(x509.UnrecognizedExtension(certificates.SIGNING_KEY, value), False)
        if uris:
            builder = builder.add_extension(x509.SubjectAlternativeName(uris), False)
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    other = ec.generate_private_key(ec.SECP256R1())
    bare = x509.CertificateSigningRequestBuilder(certificates._subject("a", "site")).sign(
        tls, hashes.SHA256()
    )
    for message, csr in [
        ("did not sign the TLS key", forged(claimed=stolen)),
        ("did not sign the TLS key", forged(bound=other)),
        ("not ECDSA P-256", forged(key=(p384 := ec.generate_private_key(ec.SECP384R1())), bound=p384)),
        ("no signing key", bare.public_bytes(serialization.Encoding.PEM)),
        ("must name one party", forged(names=["coterie://site/a", "coterie://operator/a"])),
        ("must name one party", forged(names=["coterie://king/a"])),
        ("is for 'operator a', not for 'site a'", forged(names=["coterie://operator/a"])),
        ("no certificate signing request", good[:100]),
        ("no certificate signing request", b"x" * 70_000),
    ]:
        with pytest.raises(Untrusted, match=message):
            ca.issue(csr, "site", "a")
    broken = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    broken[-1] ^= 1  # of the request's own signature
    pem = x509.load_der_x509_csr(bytes(broken)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(Untrusted, match="not signed by the key that it is for"):
        ca.issue(pem, "site", "a")
    assert list(ca.issued()) == []
    assert identity_of(ca.issue(forged(names=[]), "site", "a")).name == "a"  # it need not say who asks


@pytest.mark.parametrize("name", ["", "../x", "a b", "ä", "-a", "a/b", "x" * 65, "a\n"])
def test_names_that_cannot_be(ca, tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be a party's name"):
        ca.equip(tmp_path / "x", "site", name)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("role", "options", "message"),
    [
        ("king", {}, "'king' is no role"),
        ("server", {}, "no --host"),
        ("site", {"hosts": ["a.org"]}, "for servers only"),
        ("server", {"hosts": ["a b"]}, "no DNS name"),
        ("server", {"hosts": ["-a.org"]}, "no DNS name"),
        ("site", {"days": 0}, "--days 0"),
        ("site", {"days": 9999}, "--days 9999"),
        ("site", {"days": float("nan")}, "--days nan"),
    ],
)
def test_a_refused_certificate_leaves_no_keys(ca, tmp_path, role, options, message):
    with pytest.raises(ConfigError, match=message):
        ca.equip(tmp_path / "x", role, "x", **options)
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten(ca, site, tmp_path):
    before = {path: path.read_bytes() for path in [*site.iterdir(), ca.folder / "ca.key"]}
    for again in (
        lambda: Authority.create(ca.folder),
        lambda: Authority.adopt(ca.folder, ca.certificate),
        lambda: ca.equip(site, "site", "hospital-a"),
        lambda: new_key(site, "hospital-a", "site"),
    ):
        with pytest.raises(ConfigError, match="exist"):
            again()
    assert before == {path: path.read_bytes() for path in before}


def test_a_name_has_one_signing_key_until_it_is_revoked(ca, site, tmp_path):
    with pytest.raises(Untrusted, match="another signing key"):
        ca.equip(tmp_path / "b", "site", "hospital-a")
    for serial in ca.find("hospital-a"):
        ca.revoke(serial)
    ca.equip(tmp_path / "b", "site", "hospital-a")
    assert sorted(each.revoked for each in ca.issued()) == [False, True]
    ca.equip(tmp_path / "c", "operator", "hospital-a")
    with pytest.raises(ConfigError, match="several parties"):
        ca.find("hospital-a")
    assert len(ca.find("operator/hospital-a")) == 1


def test_revocation_is_seen_by_another_process_at_once(ca, site):
    server = Authority.open(ca.folder)
    serial = identity_of((site / "tls.crt").read_bytes()).serial
    assert server.revoked() == frozenset()
    ca.revoke(serial)
    assert server.revoked() == {serial}
    ca.revoke(serial)
    assert server.revoked() == {serial}


def test_rotation_keeps_who_one_is_and_the_old_certificate(ca, tmp_path):
    folder = tmp_path / "s"
    ca.equip(folder, "server", "main", hosts=["localhost", "::1"])
    old = credentials(folder)
    pem = ca.renew(renewal(folder), old.certificate)
    assert credentials(folder) == old  # still in use
    install(folder, pem)
    new = credentials(folder)
    assert (new.identity.name, new.signing_key) == ("main", old.signing_key)
    assert new.key != old.key
    assert new.identity.serial != old.identity.serial
    assert hosts_of(new.certificate) == hosts_of(old.certificate) == ("localhost", "::1")
    assert verified(old.certificate, ca.certificate, revoked=ca.revoked()) == old.identity
    assert sorted(path.name for path in folder.iterdir()) == ["ca.crt", "signing.key", "tls.crt", "tls.key"]


@pytest.mark.parametrize("step", range(4))
def test_a_kill_while_rotating_leaves_a_pair_that_fits(ca, site, monkeypatch, step):
    """Killed at each write or rename of `renewal` and `install` in turn."""
    old, done = credentials(site).identity, 0

    def killed(path, data=b"", **options):
        nonlocal done
        if done == step:
            raise KeyboardInterrupt
        done += 1
        real(path, data, **options)

    def no_rename(folder):  # it is called by `renewal`, and again at the end of `install`
        monkeypatch.setattr(pki, "credentials", killed)
        return credentials(folder)

    real = pki.write_over
    monkeypatch.setattr(pki, "write_over", killed)
    if step == 3:
        monkeypatch.setattr(pki, "credentials", no_rename)
    with pytest.raises(KeyboardInterrupt):
        install(site, ca.renew(renewal(site), (site / "tls.crt").read_bytes()))
    monkeypatch.undo()
    next_one = renewal(site)  # must not lose the key of the certificate that is there
    found = credentials(site)
    assert (found.identity.serial != old.serial) == (step == 3)
    assert found.identity.name == old.name
    install(site, ca.renew(next_one, found.certificate))
    assert credentials(site).identity.serial != old.serial


def test_who_may_not_renew(ca, site, tmp_path):
    pem, csr = (site / "tls.crt").read_bytes(), renewal(site)
    with pytest.raises(Untrusted, match="another signing key"):
        ca.renew(new_key(tmp_path / "x", "hospital-a", "site"), pem)
    other = Authority.create(tmp_path / "other")
    with pytest.raises(Untrusted, match="not signed by this authority"):
        other.renew(csr, pem)
    with pytest.raises(Untrusted, match="not signed by this authority"):
        ca.renew(csr, self_signed(site))
    ca.revoke(identity_of(pem).serial)
    with pytest.raises(Untrusted, match="revoked"):
        ca.renew(csr, pem)


def test_what_does_not_belong_into_a_folder_is_refused(ca, site, tmp_path):
    ca.equip(tmp_path / "b", "site", "hospital-b")
    other = Authority.create(tmp_path / "other")
    csr = request_of(site, "hospital-a", "site")
    before = {path: path.read_bytes() for path in site.iterdir()}
    for message, pem in [
        ("not for a key in", (tmp_path / "b" / "tls.crt").read_bytes()),
        ("not signed by an authority", other.issue(csr, "site", "hospital-a")),
        ("belongs to site hospital-a", ca.issue(request_of(site, "x", "site"), "site", "x")),
    ]:
        with pytest.raises(Untrusted, match=message):
            install(site, pem)
    assert before == {path: path.read_bytes() for path in site.iterdir()}
    (site / "tls.key").write_bytes((tmp_path / "b" / "tls.key").read_bytes())
    with pytest.raises(Untrusted, match=r"not the key of tls.crt"):
        credentials(site)
    (site / "tls.key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    with pytest.raises(ConfigError, match="no private key") as error:
        credentials(site)
    assert "c2VjcmV0" not in str(error.value)


@openssl
def test_an_external_authority(tmp_path, ca):
    """Root and intermediate are OpenSSL's; it copies our names and our extension from the request."""
    external, party = tmp_path / "ext", tmp_path / "p"
    external.mkdir()
    new_key_words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"]
    said_by_openssl(
        "req", "-x509", *new_key_words, "-keyout", external / "root.key", "-out", external / "root.crt",
        "-subj", "/O=Bank/CN=Root", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip
    said_by_openssl(
        "req",
        *new_key_words,
        "-keyout",
        external / "mid.key",
        "-out",
        external / "mid.csr",
        "-subj",
        "/CN=Mid",
    )
    (external / "ca.ext").write_text(
        "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    said_by_openssl(
        "x509", "-req", "-in", external / "mid.csr", "-CA", external / "root.crt", "-CAkey",
        external / "root.key", "-out", external / "mid.crt", "-extfile", external / "ca.ext",
    )  # fmt: skip
    (external / "r.csr").write_bytes(new_key(party, "hospital-a", "site"))

    def signed(extensions, copy):
        (external / "leaf.ext").write_text(f"authorityKeyIdentifier=keyid\n{extensions}\n")
        said_by_openssl(
            "x509", "-req", "-in", external / "r.csr", "-CA", external / "mid.crt", "-CAkey",
            external / "mid.key", "-out", external / "leaf.crt", "-extfile", external / "leaf.ext",
            "-copy_extensions", copy,
        )  # fmt: skip
        return (external / "leaf.crt").read_bytes() + (external / "mid.crt").read_bytes()

    root = (external / "root.crt").read_bytes()
    usage = "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=clientAuth"
    with pytest.raises(Untrusted, match="names no party"):
        install(party, signed(usage, "none"), root)
    named = f"{usage}\nsubjectAltName=URI:coterie://site/hospital-a"
    with pytest.raises(Untrusted, match="wrong key usage"):
        install(party, signed(named.replace("clientAuth", "serverAuth"), "none"), root)
    with pytest.raises(Untrusted, match="not signed by an authority"):
        install(party, signed(named, "none"), ca.certificate)
    who = install(party, signed(named, "none"), root)
    assert (who.name, who.role, who.signing_key) == ("hospital-a", "site", b"")
    copied = install(party, signed(usage, "copyall"), root)
    assert copied.signing_key == public_of(pki.load_signing_key(party))

    adopted = Authority.adopt(tmp_path / "adopted", root)
    with pytest.raises(ConfigError, match="key of this authority is elsewhere"):
        adopted.equip(tmp_path / "x", "site", "x")
    with pytest.raises(ConfigError, match="elsewhere"):
        adopted.token("x", ["a:1"])
    assert adopted.find(f"{copied.serial:X}") == [copied.serial]
    adopted.revoke(copied.serial)
    with pytest.raises(Untrusted, match="revoked"):
        verified((party / "tls.crt").read_bytes(), root, revoked=Authority.open(adopted.folder).revoked())


def test_pki_needs_no_torch_and_names_the_extra_that_it_needs(tmp_path):
    def run(script):
        script = f"import sys; from coterie.cli import app; {script}"
        return subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    commands = ["pki init", "pki issue site a", "pki rotate a", "pki token b --server h:1", "pki list"]
    found = run(
        f"codes = [app(each.split(), standalone_mode=False) for each in {commands}]; "
        "assert not any(codes); assert 'torch' not in sys.modules"
    )
    assert found.returncode == 0, found.stderr
    missing = run(
        "sys.modules['cryptography'] = None; app(['pki', 'init', 'other'], standalone_mode=False); "
        "import coterie.storage"
    )
    assert missing.returncode == 0, missing.stderr  # the error was told; storage needs no cryptography
    assert "coterie[deploy]" in missing.stderr
    assert not (tmp_path / "other").exists()


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def coterie(*words, code=0):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == code, done.output
        assert "Traceback" not in done.output
        return done.output

    assert "no certificate authority here" in coterie("pki", "issue", "site", "a", code=2)
    coterie("pki", "init")
    assert "exist already" in coterie("pki", "init", code=2)
    coterie("pki", "issue", "server", "main", "--host", "localhost", "--out", "server")
    coterie("pki", "request", "site", "hospital-a")
    coterie("pki", "sign", "hospital-a/request.csr", "operator", "hospital-a", code=1)  # it asks for a site
    coterie("pki", "sign", "hospital-a/request.csr", "site", "hospital-a")
    coterie("pki", "install", "hospital-a", "hospital-a/request.crt", "pki/ca.crt")
    first = credentials(tmp_path / "hospital-a").identity.serial
    coterie("pki", "rotate", "hospital-a")
    assert credentials(tmp_path / "hospital-a").identity.serial != first
    assert "revoked" in coterie("pki", "revoke", f"{first:x}")
    assert coterie("pki", "list").count("valid") == 2
    assert coterie("pki", "list", "--json").count('"status": "revoked"') == 1
    assert "no certificate in use" in coterie("pki", "revoke", "nobody", code=2)
    said = coterie("pki", "token", "hospital-b", "--server", "localhost:8444")
    assert mode(tmp_path / "hospital-b.token") == 0o600
    token = (tmp_path / "hospital-b.token").read_text().split('"secret": "')[1].split('"')[0]
    assert token not in said
    assert not any(token in path.read_text() for path in (tmp_path / "pki" / "tokens").iterdir())

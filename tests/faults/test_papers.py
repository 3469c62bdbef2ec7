"""Certificates that do not fit, before a real server, and servers whose files are damaged."""

import os
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from coterie import security
from coterie.backends.network import operators
from coterie.backends.network.server import SERVICE
from coterie.core import RunError
from coterie.security.files import write_over
from deployment import LONG, SMALL, Deployment, undisturbed


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    home = tmp_path_factory.mktemp("papers")
    made = Deployment(home, server=("--ca", str(home / "ca")))
    made.start("server", "site-1")
    yield made
    made.close()
    assert made.orphans() == []


def party(federation, folder, name, authority=None, days=30.0, now=None):
    """Keys of a site; its certificate is the federation's authority's or another's."""
    ours = security.Authority.open(federation.home / "ca")
    at = federation.home / folder
    request = security.new_key(at, name, "site")
    write_over(
        at / "tls.crt", (authority or ours).issue(request, "site", name, days=days, now=now), mode=0o644
    )
    write_over(at / "ca.crt", ours.certificate, mode=0o644)


def signed_by_itself(folder):
    """The certificate that an authority would have issued, but signed with its own key."""
    issued = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
    key = serialization.load_pem_private_key((folder / "tls.key").read_bytes(), None)
    made = x509.CertificateBuilder(
        issued.subject,
        issued.subject,
        issued.public_key(),
        issued.serial_number,
        issued.not_valid_before_utc,
        issued.not_valid_after_utc,
        [each for each in issued.extensions if not isinstance(each.value, x509.AuthorityKeyIdentifier)],
    ).sign(key, hashes.SHA256())
    write_over(folder / "tls.crt", made.public_bytes(serialization.Encoding.PEM), mode=0o644)


@pytest.mark.parametrize(
    ("who", "why"), [("expired", "expired on"), ("stranger", "not signed by"), ("itself", "self-signed")]
)
def test_a_certificate_that_is_not_good_opens_nothing_and_its_owner_says_why(federation, tmp_path, who, why):
    """The handshake fails before the server could say anything, so the site looks at its own certificate."""
    if who == "expired":
        party(federation, who, who, days=1.0, now=datetime.now(UTC) - timedelta(days=3))
    elif who == "stranger":
        party(federation, who, who, authority=security.Authority.create(tmp_path / "ca", "another"))
    else:
        party(federation, who, who)
        signed_by_itself(federation.home / who)
    assert why in said(federation, who)
    mine = security.credentials(federation.home / who)
    with grpc.secure_channel(federation.address, operators.credentials(mine)) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/{SERVICE}/Renew")(b"", timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    with federation.channel() as channel:
        assert [each["site"] for each in operators.ask(channel, "Sites")] == ["site-1"]


def said(federation, folder, fault=None):
    """What a site says that is not let in, and ends."""
    federation.start(folder, ready=False, fault=fault)
    process = federation.processes.pop(folder)
    assert process.process.wait(60) == 1
    process.end()
    assert process.lines.get() is None  # it never was connected
    return process.log.read_text()


def test_another_sites_certificate_is_good_for_that_site_only(federation):
    party(federation, "site-4", "site-4")
    lie = {"at": None, "do": ["lie", "site-1"]}
    assert "the certificate is of site-4, not of site-1" in said(federation, "site-4", lie)


def test_a_revoked_certificate_ends_what_it_opened_at_once(federation):
    party(federation, "site-3", "site-3")
    federation.start("site-3")
    serial = security.identity_of((federation.home / "site-3" / "tls.crt").read_bytes()).serial
    security.Authority.open(federation.home / "ca").revoke(serial)
    with federation.channel() as channel:
        operators.ask(channel, "Revoke", operators.Revoked(serials=[f"{serial:x}"]))
    process = federation.processes.pop("site-3")
    assert process.process.wait(20) == 1
    process.end()
    assert "revoked" in process.log.read_text()
    assert "revoked" in said(federation, "site-3")


@pytest.mark.parametrize("how", ["cut", "garbage"])
def test_a_damaged_database_is_named_and_left_as_it_is(federation, tmp_path, how):
    home = federation.home
    federation.kill("server")
    kept = tmp_path / "kept"
    shutil.copytree(home / "server", kept)
    path = home / "server" / "state.sqlite3"
    for more in ("-wal", "-shm"):
        path.with_name(path.name + more).unlink(missing_ok=True)
    whole = path.read_bytes()
    bad = whole[: len(whole) // 2] if how == "cut" else b"no database at all" * 500
    path.write_bytes(bad)
    try:
        federation.start("server", ready=False)
        process = federation.processes.pop("server")
        with pytest.raises(RunError, match="damaged"):
            process.hear("listening on")
        assert process.process.wait(20) == 1
        process.end()
        assert "Traceback" not in process.log.read_text()
        assert path.read_bytes() == bad
    finally:
        shutil.rmtree(home / "server")
        shutil.copytree(kept, home / "server")
        federation.start("server")
        federation.joined()


def test_a_state_that_is_cut_short_is_named_and_the_run_goes_on_from_the_one_before(federation):
    config, cut, home = (
        {**SMALL, "schedule": {**LONG["schedule"], "rounds": 8}},
        [],
        federation.home / "server",
    )

    def damage(round):
        if round < 4 or cut:
            return
        federation.kill("server")
        with closing(sqlite3.connect(home / "state.sqlite3")) as database:
            query = "select digest from commits where run = ? order by version desc"
            cut.append(database.execute(query, (run,)).fetchone()[0])
        os.truncate(home / "blobs" / run / cut[0], 1000)
        federation.start("server")

    run = federation.submit(config)
    assert federation.watch(run, damage) == {"status": "finished", "error": ""}
    assert f"{cut[0]} is" in federation.processes["server"].log.read_text()
    assert federation.result(run)["model_digest"] == undisturbed(config)

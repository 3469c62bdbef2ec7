"""Certificates are replaced while a run goes on: nobody is lost, and the bits are those of one process."""

import json
import shutil
import socket
import ssl

from typer.testing import CliRunner

from coterie import security
from coterie.cli import app
from deployment import LONG, Deployment, undisturbed


def shown(port, folder):
    """The serial number of the certificate that a server shows now."""
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        der = tls.getpeercert(binary_form=True)
    return serial(ssl.DER_cert_to_PEM_cert(der).encode())


def serial(pem):
    return security.identity_of(pem).serial


def said(process):
    lines = process.log.read_text().splitlines()
    return [json.loads(line)["event"] for line in lines if line.startswith("{")]


def rotate(folder, ca):
    """As an operator does it by hand."""
    done = CliRunner().invoke(app, ["pki", "rotate", str(folder), "--ca", str(ca)])
    assert done.exit_code == 0, done.output
    return serial((folder / "tls.crt").read_bytes())


def rows(home, run):
    return map(json.loads, (home / "server" / "runs" / run / "metrics.jsonl").read_text().splitlines())


def test_certificates_and_the_authority_are_replaced_within_a_run(tmp_path):
    here = undisturbed(LONG)
    home = tmp_path / "there"
    federation = Deployment(home, sites=1, server=("--ca", str(home / "ca")))
    ca, new = security.Authority.open(home / "ca"), home / "new"
    folders = [home / name for name in ("server", "operator", *federation.names)]
    due = {}

    def site_is_due(round):
        """The site comes back with a certificate that is two thirds through its life."""
        federation.kill("site-1")
        request = security.renewal(home / "site-1")
        pem = ca.issue(request, "site", "site-1", days=60 / 86400)
        due["site-1"] = security.install(home / "site-1", pem).serial
        federation.start("site-1", ready=False)

    def server_rotates(round):
        due["server"] = rotate(home / "server", home / "ca")
        assert shown(federation.port, home / "operator") == due["server"]

    def both_are_trusted(round):
        made = security.Authority.create(new, "the next one")
        for name in ("issued", "revoked"):
            if (home / "ca" / name).exists():
                shutil.copytree(home / "ca" / name, new / name)
        for folder in folders:
            (folder / "ca.crt").write_bytes(ca.certificate + made.certificate)

    def all_are_signed_anew(round):
        for folder in folders:
            due[folder.name] = rotate(folder, new)
        assert shown(federation.port, home / "operator") == due["server"]

    steps = {3: site_is_due, 6: server_rotates, 9: both_are_trusted, 12: all_are_signed_anew}

    def meddle(round):
        for at in [at for at in steps if at <= round][:1]:
            steps.pop(at)(round)

    try:
        federation.start()
        run = federation.submit(LONG)
        assert federation.watch(run, meddle) == {"status": "finished", "error": ""}
        assert steps == {}
        assert federation.result(run)["model_digest"] == here
        site = said(federation.processes["site-1"])
        taken, renewed = (
            next(n for n, line in enumerate(site) if what in line)
            for what in (f"run {run}: taking part", "the certificate is renewed")
        )
        assert taken < renewed
        assert sum("connected {" in line for line in site[renewed:]) >= 2  # it left, and came again
        assert sum(row["clients"]["lost"] for row in rows(home, run)) == 0
        # the old authority is trusted no more
        for folder in folders:
            (folder / "ca.crt").write_bytes((new / "ca.crt").read_bytes())
        for name in federation.names:
            federation.kill(name)
        federation.start(*federation.names)
    finally:
        federation.close()
    assert federation.orphans() == []


def test_a_server_with_the_authority_renews_its_own_certificate(tmp_path):
    federation = Deployment(tmp_path, sites=0, server=("--ca", str(tmp_path / "ca")))
    folder = tmp_path / "server"
    ca = security.Authority.open(tmp_path / "ca")
    hosts = ["127.0.0.1", "localhost"]
    pem = ca.issue(security.renewal(folder), "server", "server", hosts=hosts, days=60 / 86400)
    short = security.install(folder, pem).serial
    try:
        federation.start("server")
        assert shown(federation.port, tmp_path / "operator") != short
    finally:
        federation.close()

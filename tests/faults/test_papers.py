"""Certificates that do not fit, before a real server; and a server whose files are damaged."""

import shutil
import sqlite3

import pytest

from coterie import security
from coterie.core import RunError
from deployment import LONG, Deployment, undisturbed
from faults.test_wires import FINISHED, RUN


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    home = tmp_path_factory.mktemp("papers")
    made = Deployment(home, server=("--ca", str(home / "ca")))
    made.start()
    yield made
    made.close()


def party(federation, folder, name, authority=None, **options):
    """Keys and a certificate of the federation's authority, or another's, for a site beside the others."""
    shutil.copytree(federation.home / "site-1", federation.home / folder, ignore=shutil.ignore_patterns("*.json*", "answers", "blobs", "runs", "*.log", "*.key", "*.crt"))
    at = federation.home / folder
    ca = security.Authority.open(federation.home / "ca")
    pem = (authority or ca).issue(security.new_key(at, name, "site"), "site", name, **options)
    security.install(at, pem, ca.certificate)


def refused(federation, folder):
    """What the log says when the site tries to connect."""
    federation.start(folder, ready=False)
    process = federation.processes.pop(folder)
    try:
        with pytest.raises(RunError, match="ended before"):
            process.hear("is connected")
    finally:
        process.end()
    return process.process.wait(), process.log.read_text()


def test_another_sites_certificate_opens_nothing(federation):
    party(federation, "thief", "site-3")
    federation.start("thief")
    federation.kill("thief")

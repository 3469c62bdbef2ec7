"""Two servers on one PostgreSQL: when the one that works dies, the other goes on with its runs."""

import shutil

import psycopg
from typer.testing import CliRunner

from coterie.cli import app
from coterie.experiment.quickstart import Process
from deployment import LONG, Deployment, Party, free_port, undisturbed


def test_a_standby_takes_over_to_the_same_bits(tmp_path, postgres):
    here = undisturbed(LONG)
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute("create database standby")
    shared = ("--database", f"{postgres}/standby", "--blobs", f"file://{tmp_path}/shared")
    second = free_port()
    federation = Deployment(tmp_path / "there", server=shared)
    federation.address += f",127.0.0.1:{second}"
    other = federation.home / "standby"
    shutil.copytree(federation.home / "server", other)
    try:
        federation.start("server")
        standby = Party("server", other, ("--listen", f"127.0.0.1:{second}", *shared))
        federation.processes["standby"] = standby
        federation.sessions.add(standby.process.pid)
        federation.start(*federation.names)
        run = federation.submit(LONG)

        def kill(round):
            if round >= 3 and "server" in federation.processes:
                federation.kill("server")

        assert federation.watch(run, kill) == {"status": "finished", "error": ""}
        assert "server" not in federation.processes
        assert standby.hear("listening on").endswith(f":{second}")
        assert federation.result(run)["model_digest"] == here
    finally:
        federation.close()
    assert federation.orphans() == []


def test_a_standby_needs_its_certificate_and_the_database_to_know_who_is_revoked(tmp_path, postgres):
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute("create database trust")
    shared, second = ("--database", f"{postgres}/trust"), free_port()
    federation = Deployment(tmp_path / "there", sites=1, server=(*shared, "--ca", str(tmp_path / "there/ca")))
    federation.address += f",127.0.0.1:{second}"
    home = federation.home
    shutil.copytree(home / "server", home / "standby")
    try:
        federation.start()
        standby = Process("server", home / "standby", "--listen", f"127.0.0.1:{second}", *shared)
        federation.processes["standby"] = standby
        database = ["--ca", str(home / "nowhere"), "--database", shared[1]]
        done = CliRunner().invoke(app, ["pki", "revoke", "site-1", *database])
        assert done.exit_code == 0, done.output
        assert federation.processes["site-1"].process.wait(30) == 1  # closed by who is active, within 5 s
        federation.kill("server")
        standby.hear("listening on")
        again = Process("site", home / "site-1", "--server", federation.address)
        federation.processes["again"] = again
        assert again.process.wait(60) == 1
        assert "is revoked" in again.log.read_text()
    finally:
        federation.close()

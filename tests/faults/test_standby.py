"""Two servers on one PostgreSQL: when the one that works dies, the other goes on with its runs."""

import shutil

import psycopg

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

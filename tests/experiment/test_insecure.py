"""Without certificates everything works, and says what it lacks; the two kinds refuse each other."""

import json
from contextlib import ExitStack

import pytest
from typer.testing import CliRunner

from coterie import experiment
from coterie.backends.network.mismatch import mismatch
from coterie.cli import app
from coterie.experiment.config import load, to_toml
from coterie.experiment.quickstart import Process
from deployment import SMALL, Deployment


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A server with certificates and one without; their ports, and a function that starts a process."""
    home = tmp_path_factory.mktemp("insecure")
    with ExitStack() as stack:
        federation = Deployment(home, sites=1)
        stack.callback(federation.close)

        def start(command, folder, *options):
            (home / folder).mkdir(exist_ok=True)
            process = Process(command, home / folder, *options)
            stack.callback(process.end)
            return process

        server = start("server", "open", "--listen", "127.0.0.1:0", "--insecure")
        federation.start("server")
        port = int(server.hear("listening on").rpartition(":")[2])
        yield home, federation.port, port, start


def warnings(process):
    lines = map(json.loads, process.log.read_text().splitlines())
    return [line["event"] for line in lines if line["level"] == "warning"]


def test_an_insecure_federation_ends_with_the_same_bits_and_says_what_it_lacks(both, tmp_path):
    home, _, port, start = both
    short = {**SMALL, "schedule": {**SMALL["schedule"], "rounds": 2}}
    here = experiment.run(short, out=tmp_path / "here").model_digest
    address = f"127.0.0.1:{port}"
    site = start("site", "north", "--server", address, "--insecure", "--name", "north")
    site.hear("is connected")
    (told,) = [line for line in warnings(site) if "--insecure" in line]
    for weaker in ("encrypted", "believed", "signed", "ledger"):
        assert weaker in told
    config = tmp_path / "config.toml"
    config.write_text(to_toml(load(short)))
    done = CliRunner().invoke(
        app, ["submit", str(config), "--server", address, "--insecure", "--wait", "--json"]
    )
    assert done.exit_code == 0, done.output
    (run,) = (home / "open" / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["model_digest"] == here
    (server,) = [
        line for line in (home / "open" / "server.log").read_text().splitlines() if "--insecure" in line
    ]
    assert json.loads(server)["level"] == "warning"
    for weaker in ("encrypted", "certificate", "signed", "ledger"):
        assert weaker in server
    assert "--insecure" not in (home / "server.log").read_text()  # never unasked


def test_each_kind_refuses_the_other_and_says_why(both):
    home, safe, port, start = both
    proud = start("site", "site-1", "--server", f"127.0.0.1:{port}")
    careless = start("site", "west", "--server", f"127.0.0.1:{safe}", "--insecure", "--name", "west")
    assert [proud.process.wait(30), careless.process.wait(30)] == [1, 1]
    assert "does not encrypt" in proud.log.read_text()
    assert "asks for certificates" in careless.log.read_text()
    assert not (home / "site-1" / "runs").exists()
    operator = ["--identity", str(home / "operator")]
    for at, options, why in (
        (port, operator, "does not encrypt"),
        (safe, ["--insecure"], "asks for certificates"),
    ):
        said = CliRunner().invoke(app, ["runs", "list", "--server", f"127.0.0.1:{at}", *options])
        assert said.exit_code == 1
        assert why in str(said.exception or "") + said.output


def test_what_is_no_mismatch_is_not_called_one(both):
    _, safe, port, _ = both
    assert (
        mismatch(f"127.0.0.1:{safe}", encrypted=True) == mismatch(f"127.0.0.1:{port}", encrypted=False) == ""
    )
    assert mismatch("127.0.0.1:1", encrypted=True) == ""

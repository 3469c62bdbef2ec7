"""What sites do with data of their own, and with a training loop of their own; what operators see."""

import json
import os
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from coterie import experiment, security
from coterie.backends.network import operators
from coterie.cli import app
from coterie.core import ConfigError, RunError
from coterie.data import Dataset, Examples, digits, from_npz
from coterie.experiment.quickstart import Process
from coterie.storage import verify
from deployment import SMALL, Deployment, free_port

SITES = ("site-1", "site-2")
CONFIG = {
    **SMALL,
    "name": "scans",
    "data": {
        "dataset": "sites",
        "name": "scans",
        "sites": list(SITES),
        "input_shape": [1, 8, 8],
        "classes": list("0123456789"),
        "partition": {"kind": "natural", "column": "site"},
        "holdout": 0.1,
    },
    "schedule": {"kind": "synchronous", "rounds": 3, "cohort": 2},
    "run": {"evaluate_clients": True},
}
LOOP = """
import os
import torch
from torch import nn
import coterie

if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
x, y = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
with coterie.client() as federation:
    for task in federation:
        model.load_state_dict(dict(zip(model.state_dict(), task.params.values())))
        optimizer = torch.optim.SGD(model.parameters(), lr=task.config["lr"])
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        task.reply(dict(zip(task.params, model.state_dict().values())), weight=len(y), metrics={"loss": 1.0})
        total = sum(float(value.sum()) for value in task.params.values())
        print("round", task.round, total, flush=True)
"""


def halves():
    """Each site's part of the digits, as stored."""
    train = digits().train
    images = train.x.numpy() * 15  # bytes up to 240
    return [(images[n::2], train.y.numpy()[n::2]) for n in range(2)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    home = tmp_path_factory.mktemp("deployed")
    enrol = f"127.0.0.1:{free_port()}"
    options = ("--metrics", "127.0.0.1:0", "--enrol", enrol, "--ca", str(home / "ca"))
    made = Deployment(home, server=options)
    made.enrol = enrol
    for name, (x, y) in zip(SITES, halves(), strict=True):
        np.savez(home / name / "scans.npz", x=x, y=y, x_test=x[:1], y_test=y[:1])
        loader = f'[data.scans]\ndataset = "npz"\npath = "{home / name / "scans.npz"}"\n'
        loader += 'x_test = "x_test"\ny_test = "y_test"\n'
        (home / name / "site.toml").write_text(loader)
    made.start(ready=False)
    made.metrics = made.processes["server"].hear("metrics on port").split()[-1]
    for name in ("server", *SITES):
        made.processes[name].hear("listening on" if name == "server" else "is connected")
    yield made
    made.close()


def test_sites_train_on_their_own_rows_to_the_bits_of_one_process(federation, tmp_path):
    run = federation.submit(CONFIG)
    assert federation.watch(run) == {"status": "finished", "error": ""}
    result = federation.result(run)
    parts = halves()
    loaded = from_npz(
        federation.home / "site-1" / "scans.npz", x_test="x_test", y_test="y_test", name="scans"
    )
    pooled = Dataset(
        "scans",
        Examples(
            torch.from_numpy(np.concatenate([x for x, _ in parts])),
            torch.from_numpy(np.concatenate([y for _, y in parts])),
            {"site": np.repeat(SITES, [len(y) for _, y in parts])},
        ),
        None,
        tuple("0123456789"),
        loaded.prepare,
    )
    data = {"dataset": "own", "partition": CONFIG["data"]["partition"], "holdout": 0.1}
    here = experiment.run({**CONFIG, "data": data}, out=tmp_path / "run", dataset=pooled)
    assert result["model_digest"] == here.model_digest
    assert result["clients"]["accuracy_mean"] == pytest.approx(here.clients["accuracy_mean"])


def test_ledgers_of_both_sides_tell_the_same_and_hold(federation):
    run = federation.submit(CONFIG)
    assert federation.watch(run)["status"] == "finished"
    said = {}
    for name in ("server", *SITES):
        key = security.public_of(security.load_signing_key(federation.home / name))
        entries = verify(federation.home / name / "ledger.jsonl", key)
        kind = "received" if name == "server" else "reply"
        said[name] = {
            each.facts["digest"] for each in entries if each.kind == kind and each.facts["run"] == run
        }
    assert said["server"] == said["site-1"] | said["site-2"]
    assert len(said["server"]) >= 6


def test_a_private_run_ends_with_the_same_bits_and_the_ledgers_say_how_it_was_protected(federation, tmp_path):
    """The noise of research, which repeats: integers from the operating system would not."""
    clip = {"kind": "clip", "norm": 0.5}
    noise = {"kind": "noise", "at": "client", "multiplier": 0.25, "delta": 1e-3, "protected": False}
    algorithm = {**SMALL["algorithm"], "weighting": "uniform"}
    private = {**SMALL, "name": "private", "algorithm": algorithm, "transforms": [clip, noise]}
    here = experiment.run(private, out=tmp_path / "run")
    bare = experiment.run({**private, "transforms": []}, out=tmp_path / "bare")
    run = federation.submit(private)
    assert federation.watch(run) == {"status": "finished", "error": ""}
    result = federation.result(run)
    assert result["model_digest"] == here.model_digest != bare.model_digest
    assert result["privacy"]["claims"] == here.privacy["claims"]
    for name in SITES:
        key = security.public_of(security.load_signing_key(federation.home / name))
        entries = verify(federation.home / name / "ledger.jsonl", key)
        replies = [each.facts for each in entries if each.kind == "reply" and each.facts["run"] == run]
        assert replies
        for facts in replies:
            assert (facts["clipping"], facts["noise"]) == (0.5, 0.25)
            assert (facts["metrics"], facts["samples"], facts["weight"]) == ({}, 0, 1.0)


def test_a_policy_refuses_by_its_rule(federation):
    policy = federation.home / "site-2" / "policy.toml"
    before = policy.read_text()
    policy.write_text('datasets = ["other"]\n')
    try:
        run = federation.submit({**CONFIG, "schedule": {**CONFIG["schedule"], "quorum": 2}})
        ended = federation.watch(run)
    finally:
        policy.write_text(before)
    assert ended["status"] == "failed"
    assert "policy datasets: 'scans' is not open to runs" in ended["error"]


def test_metrics_health_and_the_operators_view(federation):
    def got(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{federation.metrics}{path}", timeout=10) as answer:
            return answer.read().decode()

    assert got("/readyz") == "ok\n"
    assert "coterie_sites_connected 2.0" in got("/metrics")
    with federation.channel() as channel:
        assert [each["site"] for each in operators.ask(channel, "Sites")] == list(SITES)
        with pytest.raises(ConfigError, match="no such run"):
            operators.ask(channel, "Stop", operators.Which(run="nothing-1"))
    with federation.channel("site-1") as channel, pytest.raises(RunError, match="operator is asked for"):
        operators.ask(channel, "Runs")
    with pytest.raises(ConfigError, match="did you mean 'fedavg'"):
        federation.submit({**CONFIG, "algorithm": {"kind": "fedavgg"}})


def test_a_site_enrols_with_its_token_once_and_connects(federation, tmp_path):
    token, folder = tmp_path / "site-3.token", tmp_path / "site-3"
    made = security.Authority.open(federation.home / "ca").token("site-3", [federation.enrol])
    token.write_text(made.model_dump_json())
    assert CliRunner().invoke(app, ["enrol", str(token), str(folder)]).exit_code == 0
    assert (folder / "tls.key").stat().st_mode & 0o777 == 0o600
    assert made.secret not in federation.processes["server"].log.read_text()
    again = CliRunner().invoke(app, ["enrol", str(token), str(tmp_path / "thief")])
    assert again.exit_code == 1
    site = Process("site", folder, "--server", federation.address)
    try:
        assert "site site-3 is connected" in site.hear("is connected")
    finally:
        site.end()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_script_takes_part(federation, tmp_path, ranks):
    if "site-2" in federation.processes:
        federation.processes.pop("site-2").end()
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    env = {"COTERIE_SERVER": federation.address, "COTERIE_SITE": str(federation.home / "site-2")}
    with subprocess.Popen(
        [sys.executable, *(torchrun if ranks > 1 else []), str(script)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            run = federation.submit({**CONFIG, "run": {"evaluate_clients": False}})
            assert federation.watch(run)["status"] == "finished"
            assert process.wait(30) == 0
            lines = sorted(process.stdout.read().splitlines())
            assert [line.split()[1] for line in lines] == sorted("012" * ranks)
            assert len(set(lines)) == 3  # every rank has the same parameters
        finally:
            process.kill()
    rows = (federation.home / "server" / "runs" / run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["clients"]["answered"] for row in rows] == [2, 2, 2]


def test_a_revoked_site_is_put_out_at_once(federation):
    federation.start("site-2")
    serial = security.identity_of((federation.home / "site-2" / "tls.crt").read_bytes()).serial
    security.Authority.open(federation.home / "ca").revoke(serial)
    with federation.channel() as channel:
        operators.ask(channel, "Revoke", operators.Revoked(serials=[f"{serial:x}"]))
    assert federation.processes["site-2"].process.wait(20) == 1
    assert "is revoked" in federation.processes["site-2"].log.read_text()

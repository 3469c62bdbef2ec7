"""Audits of whole runs; the attacks' own oracles are in tests/privacy."""

import json
import tomllib

import pytest
import tomli_w
import typer
from typer.testing import CliRunner

import coterie as ct
from coterie.cli.audits import audit
from coterie.core.errors import ConfigError
from coterie.experiment.audits import audit_canaries, audit_run, promise
from coterie.privacy.audits import Audit

CONFIG = {
    "name": "digits",
    "data": {"dataset": "digits", "partition": {"kind": "dirichlet", "clients": 4, "alpha": 0.3}},
    "model": {"kind": "mlp", "hidden": 64},
    "algorithm": {"kind": "fedavg", "client": {"lr": 0.2, "epochs": 3, "batch_size": 16}},
    "schedule": {"kind": "synchronous", "rounds": 4, "cohort": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    ct.run(CONFIG, out=out)
    return out


def command(*args):
    app = typer.Typer()
    app.command()(audit)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_a_finished_run_gives_rows_and_labels_and_a_digit_away(folder):
    (members, labels, inverted), pictures = audit_run(folder)
    assert [each.kind for each in (members, labels, inverted)] == ["membership", "labels", "inversion"]
    assert 0.45 < members.measures["AUC"] < 0.7
    assert labels.measures["labels right"] > 0.9 > labels.measures["right by guessing"]
    assert inverted.measures["PSNR in dB"] > 20
    assert [tuple(picture.shape) for picture in pictures.values()] == [(1, 8, 8)] * 2


def test_the_command_prints_json_and_writes_a_page(folder, tmp_path):
    told = [
        json.loads(line)
        for line in command(folder, "--json", "--html", tmp_path / "a.html").stdout.splitlines()
    ]
    assert [each["kind"] for each in told] == ["membership", "labels", "inversion"]
    assert all(each["promised"] is None for each in told)
    assert (tmp_path / "a.html").read_text().count("data:image/png;base64,") == 2


def test_canaries_are_found_in_a_run_without_noise(folder, tmp_path):
    config = {**tomllib.loads((folder / "config.toml").read_text()), "compare": []}
    config["algorithm"]["client"]["epochs"] = 20
    config["data"]["partition"] = {"kind": "iid", "clients": 4}
    (tmp_path / "again.toml").write_text(tomli_w.dumps(config))
    told = audit_canaries(tmp_path / "again.toml", 400, out=tmp_path / "run")
    assert (told.kind, told.promised) == ("canaries", None)
    assert told.lower_bound > 1


def test_a_broken_promise_ends_with_1(folder, monkeypatch):
    broken = Audit(kind="canaries", promised=1.0, lower_bound=2.0)
    monkeypatch.setattr("coterie.experiment.audits.audit_run", lambda *a, **k: ([broken], {}))
    shown = command(folder)
    assert shown.exit_code == 1
    assert "the promise is broken" in shown.output


def test_bad_input_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="canaries = 3"):
        audit_canaries(folder, 3)
    with pytest.raises(ConfigError, match="not a run folder"):
        audit_run(tmp_path)
    (tmp_path / "config.toml").write_text((folder / "config.toml").read_text())
    with pytest.raises(ConfigError, match="not finished"):
        audit_run(tmp_path)


def test_promises_are_turned_to_the_neighbours_of_the_attack():
    example = {"unit": "example", "epsilon": 1.0, "delta": 1e-6}
    assert promise(None, replaced=False)[:2] == (None, 1e-5)
    assert promise({"claims": [example]}, replaced=False)[:2] == (1.0, 1e-6)
    twice = (2.0, pytest.approx((1 + 2.718281828) * 1e-6))
    assert promise({"claims": [example]}, replaced=True)[:2] == twice
    assert promise({"claims": [{**example, "unit": "client"}]}, replaced=False)[:2] == twice
    assert promise({"claims": [{**example, "epsilon": 30.0}]}, replaced=True)[:2] == (
        None,
        1e-5,
    )  # delta would pass 1
    assert promise({"claims": [{"unit": "client", "epsilon": None}]}, replaced=False)[0] is None

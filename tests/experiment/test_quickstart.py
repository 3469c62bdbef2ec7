"""A whole federation by one command: from a starter project, with its own model, to a report."""

import json
import subprocess
import sys

import pytest

from coterie import experiment
from coterie.core import ConfigError
from coterie.experiment.quickstart import quickstart

SETTINGS = ["schedule.rounds=2", "compare=[]", "system={}", "backend.trainer=loop"]


def coterie(*words, folder):
    done = subprocess.run(
        [sys.executable, "-m", "coterie", *map(str, words)],
        cwd=folder, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_starter_project_runs_on_sites_to_the_bits_of_one_process(tmp_path):
    coterie("init", "study", folder=tmp_path)
    settings = [word for each in SETTINGS for word in ("--set", each)]
    shown = coterie(
        "quickstart", "study/experiment.toml", "--sites", 2, "--out", "trial", *settings, folder=tmp_path
    )
    assert "finished: accuracy" in shown
    config = experiment.load(tmp_path / "study" / "experiment.toml", SETTINGS)
    here = experiment.run(config, out=tmp_path / "here")
    result = json.loads((tmp_path / "trial" / "result.json").read_text())
    assert result["model_digest"] == here.model_digest
    assert result["clients"] == pytest.approx(here.clients)
    assert (tmp_path / "trial" / "report.html").exists()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "trial" / "deployment").glob("*/*.key")}
    assert modes == {0o600}


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine").write_text("")
    config = experiment.load({"name": "x", "data": {"dataset": "digits", "partition": {"kind": "iid", "clients": 2}},
                              "model": {"kind": "mlp"}, "algorithm": {"kind": "fedavg"},
                              "schedule": {"kind": "synchronous", "rounds": 1, "cohort": 2}})  # fmt: skip
    with pytest.raises(ConfigError, match="not an empty folder"):
        quickstart(config, sites=2, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

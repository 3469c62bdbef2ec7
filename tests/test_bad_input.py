"""The typical mistakes: one clear error, the right exit code, nothing half-written."""

import gzip
import io
import json
import resource
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from typer.testing import CliRunner

from coterie.cli import app

GOOD = """
name = "good"
seed = 1
[data]
dataset = "digits"
partition = { kind = "dirichlet", clients = 6, alpha = 0.5 }
[model]
kind = "softmax"
[algorithm]
kind = "fedavg"
client = { optimizer = "sgd", lr = 0.1, epochs = 1, batch_size = 50 }
[schedule]
kind = "synchronous"
rounds = 2
cohort = 3
"""


@pytest.fixture
def coterie(tmp_path, monkeypatch):
    """Run `coterie run` on the good config with overrides; return (exit code, stderr, run folder)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COTERIE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "good.toml").write_text(GOOD)

    def call(*sets, config="good.toml", more=()):
        words = ["run", config, "--out", "out", *more]
        for each in sets:
            words += ["--set", each]
        result = CliRunner().invoke(app, words)
        return result.exit_code, result.stderr, tmp_path / "out"

    return call


def test_the_good_config_is_good(coterie):
    code, said, out = coterie()
    assert code == 0, said
    assert json.loads((out / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("sets", "error", "hint"),
    [
        (["schedul.rounds=3"], "schedul", "did you mean 'schedule'?"),
        (["schedule.round=3"], "schedule.round: unknown key", "did you mean 'rounds'?"),
        (["algorithm.kind=fedavgg"], "algorithm.kind = 'fedavgg'", "did you mean 'fedavg'?"),
        (["algorithm.client.optimizer=sdg"], "algorithm.client.optimizer = 'sdg'", "'sgd'"),
        (["algorithm.client.lrr=3"], "algorithm.client.lrr: unknown key", "'lr'"),
        (["data.dataset=digit"], "data.dataset = 'digit'", "did you mean 'digits'?"),
        (["data.partition.kind=dirichle"], "data.partition.kind", "'dirichlet'"),
        (["model.kind=cn"], "model.kind = 'cn'", "did you mean 'cnn'?"),
        (["backend.trainer=lop"], "backend.trainer = 'lop'", "did you mean 'loop'?"),
        (["backend.kind=inproces"], "backend.kind = 'inproces'", "inprocess"),
        (["system.dropout=0.1"], "system.dropout: unknown key", "drop_out"),
        (["compare=['central']"], "compare", "centralised"),
        (["schedule.rounds='many'"], "schedule.rounds = 'many'", "expected a whole number"),
        (["algorithm.client.lr='fast'"], "algorithm.client.lr = 'fast'", "expected a number"),
        (["algorithm.client.lr=-0.1"], "lr", ""),
        (["algorithm.client.batch_size=0"], "batch_size", ""),
        (["seed=1.5"], "seed", "expected a whole number"),
        (["data.partition.alpha=0"], "alpha", "even"),
        (["data.partition.alpha=-1"], "alpha must be > 0", "even"),
        (["data.partition.clients=5000"], "5000", ""),
        (["data.partition={kind='pathological', clients=6, labels=11}"], "labels", ""),
        (["data.holdout=1.0"], "data.holdout = 1.0", ""),
        (["schedule.cohort=7"], "schedule.cohort = 7: there are only 6 clients", "use at most 6"),
        (["schedule.cohort=0"], "schedule.cohort = 0", ""),
        (["schedule.quorum=4"], "schedule.quorum = 4: there are only 3", "use at most 3"),
        (["schedule.rounds=0"], "schedule.rounds = 0", ""),
        (["schedule={kind='hierarchical', rounds=2, cohort='ten'}"], "schedule.cohort = 'ten'", "a number"),
        (["schedule={kind='hierarchical', rounds=2, cohort=3, groups=7}"], "schedule.groups = 7", ""),
        (["system.drop_out=1.0"], "system.drop_out = 1.0", ""),
        (["algorithm.kind=fedasync"], "fedasync", "asynchronous"),
        (["algorithm.kind=fedprox", "algorithm.mu=-1"], "mu must be >= 0", ""),
        (["algorithm.kind=dpsgd"], "dpsgd has no server", "gossip"),
        (["algorithm.weighting=client"], "this data names no weights", "data.weight"),
        (["algorithm.aggregator={kind='krum', byzantine=1}"], "krum(byzantine=1) needs 5", "cohort"),
        (["transforms=[{kind='clp', norm=1.0}]"], "transforms", "clip"),
        (["model={kind='nothere:Net'}"], "there is no module 'nothere'", "file.py:Name"),
        (["model={kind='model.py:Net'}"], "there is no file", ""),
        (["data={dataset='mnist', partition={kind='iid', clients=3}}"], "mnist", "download"),
        (
            ["data={dataset='csv', path='no.csv', target='y', partition={kind='iid', clients=3}}"],
            "no.csv",
            "",
        ),
        (["data={dataset='csv', target='y', partition={kind='iid', clients=3}}"], "data.path: missing", ""),
    ],
)
def test_mistakes_in_the_config(coterie, sets, error, hint):
    code, said, out = coterie(*sets)
    said = " ".join(said.split())
    assert code == 2, said
    assert said.startswith("error: ")
    assert error in said
    assert hint in said
    assert "Traceback" not in said
    assert len(said) < 1500
    assert not out.exists()


def test_a_missing_config(coterie):
    code, said, out = coterie(config="god.toml")
    assert (code, out.exists()) == (2, False)
    assert "there is no such file" in said
    assert "good.toml" in said


def test_a_folder_in_use_is_left_alone(coterie, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    code, said, out = coterie()
    assert (code, [path.name for path in out.iterdir()]) == (2, ["thesis.txt"])
    assert "--resume or another folder" in said


def test_what_is_no_run_is_not_resumed(coterie, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    code, said, _ = coterie(more=["--resume"])
    assert (code, "not a run folder" in said) == (2, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("left", [[], ["lock", "run.log", ".config.toml.1a2b.tmp"]])
def test_resuming_a_run_that_was_killed_before_it_began_starts_it(coterie, tmp_path, left):
    if left:
        (tmp_path / "out").mkdir()
        for name in left:
            (tmp_path / "out" / name).touch()
    code, said, out = coterie(more=["--resume"])
    assert code == 0, said
    assert json.loads((out / "result.json").read_text())["status"] == "finished"
    assert not list(out.glob(".*.tmp"))


def test_a_model_whose_output_does_not_fit(coterie, tmp_path):
    (tmp_path / "model.py").write_text(
        "from torch import nn\n"
        "class Seven(nn.Sequential):\n    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 7))\n"
        "class Broken(nn.Sequential):\n    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(3, 10))\n"
    )
    code, said, out = coterie("model={kind='model.py:Seven'}")
    assert (code, out.exists()) == (2, False)
    assert "the data has 10 labels" in said
    code, said, out = coterie("model={kind='model.py:Broken'}")
    assert (code, out.exists()) == (2, False)
    assert "the model does not run on this data" in said
    code, said, out = coterie("model={kind='model.py:Sevn'}")
    assert (code, "Seven" in said) == (2, True)


@pytest.mark.parametrize("name", ["idx", "csv", "npz", "jpeg", "parquet"])
def test_corrupt_data_is_located(coterie, tmp_path, name):
    config, where = {
        "idx": corrupt_idx, "csv": corrupt_csv, "npz": corrupt_npz, "jpeg": corrupt_jpeg, "parquet": corrupt_parquet,
    }[name](tmp_path)  # fmt: skip
    code, said, out = coterie(f"data={config}", more=["--data-dir", str(tmp_path)])
    said = " ".join(said.split()).replace(" ", "")
    assert (code, out.exists()) == (2, False), said
    for part in where:
        assert part.replace(" ", "") in said


PARTITION = "partition={kind='iid', clients=2}"


def corrupt_idx(folder):
    (folder / "mnist").mkdir()
    for _, magic, count, more in (("images", 0x803, 4, (28, 28)), ("labels", 0x801, 4, ())):
        head = b"".join(n.to_bytes(4, "big") for n in (magic, count, *more))
        body = bytes(count * 28 * 28 if more else count)
        for part in ("train", "t10k"):
            kind = "images-idx3" if more else "labels-idx1"
            cut = body[:-100] if more and part == "train" else body
            (folder / "mnist" / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + cut))
    return f"{{dataset='mnist', {PARTITION}}}", ["train-images-idx3-ubyte.gz", "byte"]


def corrupt_csv(folder):
    rows = ["a,b,y"] + [f"{i},{i % 3},{'no' if i % 2 else 'yes'}" for i in range(20)]
    rows[7] = "6,0,yes,extra"
    (folder / "t.csv").write_text("\n".join(rows) + "\n")
    return f"{{dataset='csv', path='{folder}/t.csv', target='y', {PARTITION}}}", ["t.csv", "8"]


def corrupt_npz(folder):
    np.savez(folder / "t.npz", x=np.array([{"a": 1}, None], dtype=object), y=np.zeros(2))
    return f"{{dataset='npz', path='{folder}/t.npz', {PARTITION}}}", ["t.npz", "x"]


def corrupt_parquet(folder):
    (folder / "t.parquet").write_bytes(b"PAR1" + bytes(40))
    return f"{{dataset='parquet', path='{folder}/t.parquet', target='y', {PARTITION}}}", ["t.parquet"]


def corrupt_jpeg(folder):
    home = folder / "cifar10-jpg"
    home.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for archive, prefix in [(f"train_{n}", f"{n}/") for n in names] + [("test", "test/airplane/")]:
        with tarfile.open(home / f"{archive}.tar.xz", "w:xz") as tar:
            member = tarfile.TarInfo(f"{prefix}0001.jpg")
            member.size = 9
            tar.addfile(member, io.BytesIO(b"not a jpg"))
    return f"{{dataset='cifar10', {PARTITION}}}", ["tar.xz", "0001.jpg"]


EXPLODE = ["algorithm.client.lr=1e30"]


def test_nan_stops_at_its_round_and_the_last_good_checkpoint_stays(coterie):
    code, said, out = coterie(*EXPLODE, "schedule.rounds=5", "model.kind=mlp")
    assert code == 1
    assert "is nan" in said or "NaN" in said
    told = json.loads((out / "result.json").read_text())
    assert (told["status"], told["rounds"] < 5) == ("failed", True)
    assert (out / "report.html").exists()


def test_nan_can_drop_the_client(coterie, tmp_path):
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "def fit(model, data, context):\n"
        "    if context.client == 'client-001':\n"
        "        for p in model.parameters(): p.data.fill_(torch.nan)\n"
    )
    trainer = "backend.trainer={kind='custom', fit='train.py:fit'}"
    code, said, out = coterie(trainer, "schedule.cohort=6")
    assert code == 1
    assert "client-001" in said
    shutil.rmtree(out)
    code, said, out = coterie(trainer, "schedule.cohort=6", "run.on_nan=drop")
    assert code == 0, said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["clients"] for row in rows] == [{"asked": 6, "answered": 5, "lost": 1}] * 2


def test_a_client_that_raises_is_lost_and_its_traceback_is_in_the_log(coterie, tmp_path):
    (tmp_path / "train.py").write_text(
        "def fit(model, data, context):\n    if context.client == 'client-002': raise OSError('scanner is off')\n"
    )
    trainer = "backend.trainer={kind='custom', fit='train.py:fit'}"
    code, said, out = coterie(trainer, "schedule.cohort=6")
    assert code == 0, said
    log = (out / "run.log").read_text()
    assert "OSError: scanner is off" in log
    assert "line 2, in fit" in log
    shutil.rmtree(out)
    code, said, out = coterie(trainer, "schedule.cohort=6", "schedule.quorum=1.0")
    assert code == 1
    assert "5 of 6 clients replied, the quorum is 6" in said
    assert "scanner is off" in said


def test_a_full_disk_ends_the_run_with_an_error(coterie, tmp_path):
    limit = 50_000  # bytes; the metrics fit, a checkpoint of the mlp (200 kB) does not

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "coterie", "run", "good.toml", "--out", "out", "--set", "model.kind=mlp"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=small_files,
    )
    assert done.returncode == 1
    assert "disk full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("*.tmp"))

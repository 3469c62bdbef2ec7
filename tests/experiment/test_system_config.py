"""`[system]` in a config: what it may say, what it comes to, and what a run makes of it."""

import json
import math

import pytest
import torch

import coterie as ct
from coterie.backends.system import Arrival
from coterie.core import ConfigError, Task, derive
from coterie.experiment.system import device

KEY = derive(8, "system")
SIZES = {"a": 10, "b": 25, "c": 40}
DOWN = {"model": {"params": {"w": torch.zeros(100)}, "buffers": {}}}  # 400 bytes


def made(folder=None, /, **section):
    return device(section, key=KEY, samples=SIZES.__getitem__, folder=folder)


def task(client="a", round=0):
    config = {"epochs": 2, "batch_size": 10, "steps": None}
    return Task(0, client, round, round, DOWN, config=config)


def test_without_a_section_every_task_takes_a_second():
    assert made()(task(), 0.0) == Arrival(1.0)


def test_duration_and_drop_out_as_ever():
    devices = made(duration={"kind": "constant", "seconds": 4.0}, drop_out=0.5)
    arrivals = [devices(task(client, round), 0.0) for client in SIZES for round in range(30)]
    assert set(arrivals) == {Arrival(4.0), Arrival(4.0, "dropped out")}


def test_time_follows_from_speed_and_bandwidth():
    devices = made(
        compute={"kind": "constant", "samples_per_second": 5},
        network={"kind": "constant", "down": 200, "up": 50, "latency": 0.5},
    )
    for client, count in SIZES.items():
        assert devices(task(client), 0.0).after == pytest.approx(2 * count / 5 + 1 + 400 / 200 + 400 / 50)


def test_who_is_offline_is_known_after_the_latency():
    network = {"kind": "constant", "down": 1e9, "up": 1e9, "latency": 0.25}
    devices = made(network=network, availability={"kind": "daily", "online": 0.5, "spread": 0.0})
    assert devices(task(), 0.0).lost == ""
    assert devices(task(), 50_000.0) == Arrival(0.25, "offline")
    after, lost = devices(task(), 43_199.9)
    assert (after, lost) == (pytest.approx(0.1), "went offline")


def test_traces_lie_beside_the_config_or_in_the_current_folder(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, speed in ((here, 5), (there, 10)):
        folder.mkdir()
        (folder / "devices.csv").write_text(f"client,samples_per_second\na,{speed}\n")
    monkeypatch.chdir(here)
    section = {"compute": {"kind": "trace", "file": "devices.csv"}}
    assert made(there, **section)(task(), 0.0).after == pytest.approx(2.0)
    assert made(tmp_path, **section)(task(), 0.0).after == pytest.approx(4.0)
    absolute = {"compute": {"kind": "trace", "file": str(there / "devices.csv")}}
    assert made(here, **absolute)(task(), 0.0).after == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("section", "said", "hint"),
    [
        ({"dropout": 0.1}, "system.dropout: unknown key", "did you mean 'drop_out'?"),
        ({"drop_out": 1.0}, "system.drop_out = 1.0: must be in [0, 1)", ""),
        ({"drop_out": "often"}, "system.drop_out = 'often': expected a number", ""),
        ({"compute": "fast"}, "system.compute = 'fast': expected a table", ""),
        (
            {"compute": {"kind": "lognormal"}},
            "system.compute.kind = 'lognormal'",
            "did you mean 'log_normal'?",
        ),
        ({"compute": {}}, "system.compute.kind: missing", "constant, log_normal, trace"),
        ({"compute": {"kind": "constant"}}, "system.compute.samples_per_second: missing", "a number"),
        (
            {"compute": {"kind": "constant", "samples_per_seconds": 1}},
            "system.compute.samples_per_seconds: unknown key",
            "did you mean 'samples_per_second'?",
        ),
        (
            {"compute": {"kind": "constant", "samples_per_second": -1}},
            "system.compute.samples_per_second = -1",
            "",
        ),
        ({"network": {"kind": "constant", "down": 1, "up": "x"}}, "system.network.up = 'x': expected", ""),
        ({"availability": {"kind": "dayly"}}, "system.availability.kind = 'dayly'", "did you mean 'daily'?"),
        ({"availability": {"kind": "daily", "key": 1}}, "system.availability.key: unknown key", "spread"),
        ({"duration": {"kind": "constant"}, "compute": {"kind": "constant"}}, "system.duration: ", "leave"),
        (
            {"compute": {"kind": "trace", "file": "none.csv"}},
            "system.compute: ",
            "the path starts at the folder of the config",
        ),
    ],
)
def test_mistakes(tmp_path, section, said, hint):
    with pytest.raises(ConfigError) as error:
        made(tmp_path, **section)
    assert error.value.args[0].startswith(said)
    assert hint in error.value.hint


def test_a_bad_line_of_a_trace_is_named(tmp_path):
    (tmp_path / "devices.csv").write_text("client,down,up\na,1,2\nb,1,-2\n")
    with pytest.raises(ConfigError) as error:
        made(tmp_path, network={"kind": "trace", "file": "devices.csv"})
    said = f"system.network: {tmp_path / 'devices.csv'}, line 3: up = -2: must be > 0"
    assert error.value.args[0] == said


def experiment(**system):
    return {
        "name": "system",
        "seed": 3,
        "data": {
            "dataset": "digits",
            "partition": {"kind": "dirichlet", "clients": 6, "alpha": 1.0, "min_samples": 4},
        },
        "model": {"kind": "softmax"},
        "algorithm": {"kind": "fedavg", "client": {"lr": 0.1, "epochs": 1, "batch_size": 50}},
        "schedule": {"kind": "synchronous", "rounds": 3, "cohort": 1.0},
        "run": {"evaluate_clients": False},
        "system": system,
    }


def test_a_run_takes_as_long_as_its_slowest_client(tmp_path):
    config = experiment(
        compute={"kind": "constant", "samples_per_second": 100},
        network={"kind": "constant", "down": 1e4, "up": 1e3, "latency": 0.05},
    )
    ct.run(config, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())["clients"]
    size = 4 * (64 * 10 + 10)  # bytes of the model
    slowest = max(client["train"] for client in clients) / 100 + 0.1 + size / 1e4 + size / 1e3
    assert [row["time"] for row in rows] == pytest.approx([slowest, 2 * slowest, 3 * slowest])
    assert rows[0]["bytes"] == {"up": 6 * size, "down": 6 * size}


def test_a_deadline_leaves_out_the_slow(tmp_path):
    (tmp_path / "devices.csv").write_text(
        "client,samples_per_second\n" + "".join(f"{i},{1e6 if i % 2 else 1e-6}\n" for i in range(6))
    )
    config = experiment(compute={"kind": "trace", "file": str(tmp_path / "devices.csv")})
    config["schedule"] |= {"deadline": 2.0}
    ct.run(config, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["time"] for row in rows] == [2.0, 4.0, 6.0]
    assert all(0 < row["clients"]["lost"] < 6 for row in rows)
    assert all(math.isfinite(row["train_loss"]) for row in rows)

"""A whole run: its folder, its result, its baselines, and the Python API's objects."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import coterie as ct
from coterie.core import trees
from coterie.data import batches
from coterie.experiment import assemble, baselines
from coterie.experiment.assemble import resolved

TOY = {
    "name": "toy",
    "seed": 2,
    "data": {"dataset": "digits", "partition": {"kind": "iid", "clients": 5}, "holdout": 0.2},
    "model": {"kind": "softmax"},
    "algorithm": {"kind": "fedavg", "client": {"optimizer": "sgd", "lr": 0.1, "epochs": 2, "batch_size": 30}},
    "schedule": {"kind": "synchronous", "rounds": 3, "cohort": 0.5},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run with both baselines and TensorBoard: (result, folder)."""
    out = tmp_path_factory.mktemp("run") / "r"
    more = {"compare": ["centralised", "local_only"], "run": {"tensorboard": True, "evaluate_every": 2}}
    return ct.run({**TOY, **more}, out=out), out


def test_the_run_folder_keeps_its_contract(finished):
    result, out = finished
    names = {path.name for path in out.iterdir()}
    assert {"config.toml", "metrics.jsonl", "checkpoints", "report.html", "result.json"} <= names
    told = json.loads((out / "result.json").read_text())
    assert set(told) >= {
        "name", "seed", "rounds", "status", "final", "clients", "baselines", "bytes", "seconds", "privacy", "model_digest",
    }  # fmt: skip
    assert (told["name"], told["seed"], told["rounds"], told["status"]) == ("toy", 2, 3, "finished")
    assert set(told["final"]) == {"loss", "accuracy"}
    assert {"accuracy_mean", "accuracy_worst_decile"} <= set(told["clients"])
    assert set(told["baselines"]) == {"centralised", "local_only"}
    assert told["privacy"] is None
    assert told == json.loads(json.dumps(result.to_json()))
    assert 0 < told["seconds"]["train"] < told["seconds"]["total"]


def test_metrics_have_one_row_a_round(finished):
    result, out = finished
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert ["accuracy" in row for row in rows] == [False, True, True]  # every second round, and the last
    assert all(row["clients"] == {"asked": 3, "answered": 3, "lost": 0} for row in rows)
    size = 4 * (64 * 10 + 10)
    assert all(row["bytes"] == {"up": 3 * size, "down": 3 * size} for row in rows)
    assert result.bytes == {"up": 9 * size, "down": 9 * size}
    assert [row["time"] for row in rows] == [1.0, 2.0, 3.0]


def test_the_model_is_what_the_digest_and_the_final_accuracy_say(finished):
    result, out = finished
    weights = load_file(out / "model.safetensors")
    assert trees.digest({"params": weights, "buffers": {}}) == result.model_digest
    parts = assemble(ct.load({**TOY}))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.load_state_dict(dict(zip(net.state_dict(), [weights["1.weight"], weights["1.bias"]], strict=True)))
    inputs, targets = parts.test
    accuracy = float((net(inputs).argmax(1) == targets).double().mean())
    assert accuracy == pytest.approx(result.final["accuracy"], abs=1e-12)
    assert accuracy > 0.7


def test_baselines_see_as_many_samples_as_the_clients_did(finished):
    result, out = finished
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    parts = assemble(ct.load({**TOY}))
    sizes = [parts.population.sizes(client)[0] for client in parts.population.clients]
    assert all(2 * 3 * min(sizes) <= row["samples"] <= 2 * 3 * max(sizes) for row in rows)
    total = sum(row["samples"] for row in rows)
    central, alone = result.baselines["centralised"], result.baselines["local_only"]
    assert central["samples"] == alone["samples"] == total
    assert [point["round"] for point in central["curve"]] == [1.0, 2.0, 3.0]
    assert len(alone["accuracies"]) == 5
    assert alone["accuracy"] == pytest.approx(sum(alone["accuracies"]) / 5)
    assert central["accuracy"] > alone["accuracy"]


def test_the_centralised_baseline_is_plain_sgd(finished):
    """The same steps by torch.optim on a module, on the batches that the baseline draws."""
    parts = assemble(ct.load({**TOY}))
    data, samples = parts.population.pooled().train, 200
    *_, (model, seen) = baselines._train(parts, data, samples, "centralised")
    assert samples <= seen < samples + 30
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.load_state_dict(dict(zip(net.state_dict(), parts.initial["params"].values(), strict=True)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    key = ct.derive(2, "baseline", "centralised")
    for rows in list(batches(len(data[1]), epochs=1, batch_size=30, key=ct.derive(key, "batches")))[:7]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
    for ours, theirs in zip(model["params"].values(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_tensorboard_reads_the_events(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, out = finished
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [e.step for e in events.Scalars("train_loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("accuracy")] == pytest.approx([r["accuracy"] for r in rows[1:]])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {
            "algorithm": {
                "kind": "fedadam",
                "client": {"lr": 0.1, "batch_size": "none"},
                "server": {"lr": 0.1},
            }
        },
        {"algorithm": {"kind": "fedsgd", "server": {"lr": 0.2, "momentum": 0.9}}},
        {
            "schedule": {
                "kind": "buffered",
                "rounds": 2,
                "concurrency": 2,
                "buffer": 2,
                "staleness": {"kind": "hinge"},
            }
        },
    ],
)
def test_the_resolved_config_is_the_same_experiment(change, tmp_path):
    config = ct.load({**TOY, **change})
    full = resolved(config)
    assert full != {**TOY, **change}
    again = ct.load(full)
    assert resolved(again) == full
    assert ct.run(again, out=tmp_path / "b").model_digest == ct.run(config, out=tmp_path / "a").model_digest


def test_objects_instead_of_kinds(tmp_path):
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    data = ct.from_torch(torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long()), name="sums")
    config = {**TOY, "data": {"partition": {"kind": "iid", "clients": 3}, "holdout": 0.2}}
    del config["model"]
    torch.manual_seed(0)
    result = ct.run(config, model=nn.Linear(4, 2), dataset=data, out=tmp_path / "r")
    assert result.final["accuracy"] > 0.8
    assert 'kind = "python:Linear"' in (tmp_path / "r" / "config.toml").read_text()


def test_a_regression_run(tmp_path):
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    data = ct.from_torch(
        torch.utils.data.TensorDataset(x, x @ torch.tensor([1.0, -2.0, 0.5, 3.0])), name="line"
    )
    config = {**TOY, "data": {"partition": {"kind": "iid", "clients": 3}, "holdout": 0.2}}
    result = ct.run(config, model=nn.Linear(4, 1), dataset=data, out=tmp_path / "r")
    assert set(result.final) == {"loss"}
    assert result.final["loss"] < 0.1
    assert (tmp_path / "r" / "report.html").exists()

"""Small real experiments on which the laws are checked."""

import pytest

from coterie.experiment import load, report

SMALL = {
    "name": "law",
    "seed": 3,
    "data": {
        "dataset": "digits",
        "partition": {"kind": "dirichlet", "clients": 9, "alpha": 0.5},
        "holdout": 0.1,
    },
    "model": {"kind": "softmax"},
    "algorithm": {"kind": "fedavg", "client": {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 40}},
    "schedule": {"kind": "synchronous", "rounds": 4, "cohort": 5},
    "system": {"drop_out": 0.15, "duration": {"kind": "log_normal"}},
    "run": {"evaluate_clients": False},
    "backend": {"trainer": "loop"},
}

KINDS = {
    "synchronous": {},
    "adam": {
        "algorithm": {"kind": "fedadam", "client": SMALL["algorithm"]["client"], "server": {"lr": 0.05}}
    },
    "scaffold": {"algorithm": {**SMALL["algorithm"], "kind": "scaffold"}},
    "stragglers": {"schedule": {**SMALL["schedule"], "deadline": 1.2, "over_selection": 1.4}},
    "hierarchical": {"schedule": {**SMALL["schedule"], "kind": "hierarchical", "groups": 3, "deadline": 2.0}},
    "krum": {"algorithm": {**SMALL["algorithm"], "aggregator": {"kind": "krum", "byzantine": 0}}},
    "buffered": {
        "algorithm": {**SMALL["algorithm"], "kind": "fedbuff"},
        "schedule": {"kind": "buffered", "rounds": 5, "concurrency": 4, "buffer": 3},
    },
    "asynchronous": {
        "algorithm": {**SMALL["algorithm"], "kind": "fedasync"},
        "schedule": {"kind": "asynchronous", "rounds": 12, "concurrency": 4},
    },
    "gossip": {
        "algorithm": {**SMALL["algorithm"], "kind": "dpsgd"},
        "schedule": {"kind": "gossip", "rounds": 3},
    },
    "batchnorm": {
        "model": {"kind": "cnn", "channels": [4], "hidden": 8, "norm": "batch"},
        "schedule": {"kind": "synchronous", "rounds": 2, "cohort": 4},
    },
}


@pytest.fixture
def experiment():
    """kind -> Config of a small experiment."""
    return lambda kind, **more: load({**SMALL, **KINDS[kind], **more})


@pytest.fixture
def unreported(monkeypatch):
    """Leave the report out where it only costs time."""
    monkeypatch.setattr(report, "write", lambda folder: folder)

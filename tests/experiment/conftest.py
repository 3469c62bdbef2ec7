"""Synthetic run folders for the tests of the report, as a fixture: test modules cannot import each other."""

import json
from pathlib import Path

import numpy as np
import pytest

CONFIG = """name = "{name}"
seed = 7

[data]
dataset = "mnist"
partition = {{ kind = "dirichlet", clients = {clients}, alpha = 0.3 }}

[model]
kind = "cnn"

[algorithm]
kind = "fedavg"
client = {{ optimizer = "sgd", lr = 0.1, epochs = 1, batch_size = 10 }}

[schedule]
kind = "synchronous"
rounds = {rounds}
cohort = 10
"""


def _make_run(
    folder: Path, *, name="mnist-dirichlet", rounds=50, clients=100, top=0.97, task="classification"
):
    """A finished run that learns like MNIST on a Dirichlet(0.3) partition. Returns the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(clients)
    accurate = task == "classification"
    rows = []
    for r in range(1, rounds + 1):
        accuracy = top - (top - 0.1) * np.exp(-r / 8) + rng.normal(0, 0.006)
        lost = int(rng.random() < 0.2)
        row = {
            "round": r,
            "version": r,
            "time": 2.5 * r,
            "seconds": 1.4 * r,
            "train_loss": 2.1 * np.exp(-r / 7) + 0.05,
            "clients": {"asked": 10, "answered": 10 - lost, "lost": lost},
            "bytes": {"up": 3_300_000 - 330_000 * lost, "down": 3_300_000},
        }
        if r % 2 == 0 or r == rounds:
            row |= {"loss": 2.3 * np.exp(-r / 8) + 0.1}
            row |= {"accuracy": accuracy} if accurate else {}
        rows.append(row)
    final = {k: rows[-1][k] for k in ("loss", "accuracy") if k in rows[-1]}

    shares = rng.dirichlet(np.full(10, 0.3), clients)
    sizes = rng.integers(80, 900, clients)
    entries = []
    for i, (share, size) in enumerate(zip(shares, sizes, strict=True)):
        own = float(np.clip(final.get("accuracy", top) - rng.gamma(2, 0.018), 0, 1))
        entries.append(
            {
                "client": f"client-{i:03}",
                "train": int(size),
                "test": int(size // 9),
                "labels": rng.multinomial(size, share).tolist() if accurate else None,
                "accuracy": own if accurate else None,
                "loss": 0.1 + (1 - own),
                "local_accuracy": float(np.clip(own - rng.gamma(2, 0.05), 0, 1)) if accurate else None,
            }
        )
    alone = np.clip(rng.normal(0.62, 0.09, clients), 0.1, 1)
    central = [
        {"round": r, "accuracy": 0.985 - 0.8 * np.exp(-r / 3), "loss": 0.05 + 2 * np.exp(-r / 3)}
        for r in range(1, rounds + 1)
    ]
    baselines = {"centralised": {"loss": central[-1]["loss"], "curve": central}, "local_only": {"loss": 1.4}}
    if accurate:
        baselines["centralised"]["accuracy"] = central[-1]["accuracy"]
        baselines["local_only"] |= {
            "accuracy": float(alone.mean()),
            "accuracies": alone.tolist(),
            "own_accuracy": 0.84,
        }
    else:
        baselines["centralised"]["curve"] = [{"round": c["round"], "loss": c["loss"]} for c in central]
    result = {
        "name": name,
        "seed": 7,
        "rounds": rounds,
        "status": "finished",
        "task": task,
        "final": final,
        "clients": {},
        "baselines": baselines,
        "bytes": {w: sum(r["bytes"][w] for r in rows) for w in ("up", "down")},
        "seconds": {"total": 71.3, "train": 60.2},
        "privacy": None,
        "model_digest": "sha256:" + "3fa9c04e" * 8,
    }
    labels = [str(i) for i in range(10)] if accurate else []
    described = {
        "labels": labels,
        "clients": entries,
        "distance": {"jensen_shannon": 0.41, "earth_mover": 0.8} if accurate else {},
        "sizes": {"min": int(sizes.min()), "median": int(np.median(sizes)), "max": int(sizes.max())},
    }
    (folder / "config.toml").write_text(CONFIG.format(name=name, clients=clients, rounds=rounds))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "clients.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="session")
def make_run():
    """make_run(folder, name=, rounds=, clients=, top=, task=) makes a run folder and returns it."""
    return _make_run

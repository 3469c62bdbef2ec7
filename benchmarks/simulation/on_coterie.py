"""Coterie through its public API, run folder and all.

    python on_coterie.py WORK '{"set": ["backend.trainer=loop"]}'

`set` is what the command line's --set takes. A key that this version does not know skips the variant.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import work
from gate import Gate

import coterie as ct


def config(given: work.Work) -> dict[str, Any]:
    """The experiment, without a variant's settings."""
    rounds = sum(given.allotments)
    return {
        "name": "bench",
        "seed": given.meta["seed"],
        "data": {
            "dataset": f"python:{given.meta['model']}",
            "partition": {"kind": "natural", "column": "client"},
            "holdout": 0.0,
        },
        "model": {"kind": f"python:{given.meta['model']}"},
        "algorithm": {
            "kind": "fedavg",
            "client": {"optimizer": "sgd", "lr": given.lr, "epochs": 1, "batch_size": work.BATCH},
        },
        "schedule": {"kind": "synchronous", "rounds": rounds, "cohort": work.COHORT},
        "run": {"evaluate_every": 10**9, "checkpoint_every": 10**9, "evaluate_clients": False},
    }


def dataset(
    x: torch.Tensor, y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor, classes: int
) -> ct.Dataset:
    """x [clients, samples, ...] as a data set whose key column is the client."""
    owner = np.repeat(np.arange(len(x)), x.shape[1])
    return ct.Dataset(
        "bench",
        ct.Examples(x.flatten(0, 1), y.flatten(0, 1), {"client": owner}),
        ct.Examples(test_x, test_y, {"client": np.zeros(len(test_y), dtype=np.int64)}),
        tuple(map(str, range(classes))),
        as_stored,
    )


def as_stored(rows: torch.Tensor) -> torch.Tensor:
    """Inputs are stored as the model takes them."""
    return rows


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    given = work.read(folder)
    gate = Gate(given.allotments)
    module = given.module()
    data = dataset(given.x, given.y, given.test_x, given.test_y, given.meta["classes"])
    done, notes = -1, []

    def watch(progress: ct.Progress) -> None:
        nonlocal done
        if progress.note:
            notes.append(progress.note)
        if done < 0:
            done = 0
            gate.open()
        elif progress.round > done:
            done = progress.round
            gate.tick()

    with tempfile.TemporaryDirectory(dir=folder) as out:
        try:
            settings = ct.load(config(given), options["set"])
            result = ct.run(settings, out=Path(out) / "run", watch=watch, model=module, dataset=data)
        except ct.ConfigError as error:
            gate.tell(skip=str(error).replace("\n", " "))
            return
    module.load_state_dict({**result.model["params"], **result.model["buffers"]})
    gate.tell(loss=given.test_loss(module), note="; ".join(dict.fromkeys(notes)))


if __name__ == "__main__":
    main()

"""Write a work folder: what every system is given, drawn as Coterie draws it.

    python prepare.py MODEL FOLDER '{"allotments": [2, 5, 5, 1], "data_dir": "...", "seed": 0}'

Coterie deals cohorts and shuffles each client's examples from a seed; the rivals are handed the same draws,
so that all take the same steps and end with the same loss. Prints the work's facts as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import work
from on_coterie import config, dataset
from torch.utils.flop_counter import FlopCounterMode

import coterie as ct
from coterie.core import derive
from coterie.core.types import Task
from coterie.experiment.assemble import assemble
from coterie.trainers.loop import rows_of, task_key


def flops(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """Matrix products and convolutions of one client's epoch, forward and backward, as really computed.

    No input gradient of the first layer; element-wise work, pooling and the SGD step do not count.
    """
    with FlopCounterMode(display=False) as counter:
        work.loss(module(x[: work.BATCH]), y[: work.BATCH]).backward()
    return counter.get_total_flops() * -(-len(y) // work.BATCH)


def main() -> None:
    name, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    kind, data_dir = work.MODELS[name], options["data_dir"]
    data = {"images": work.images, "text": work.text}[kind.data](Path(data_dir) if data_dir else None)
    torch.manual_seed(options["seed"])
    module = work.build(name, data.classes, fused=False)  # the counter knows no fused kernel of a CPU
    meta = {"model": name, "classes": data.classes, "origin": data.origin, **options}
    initial = {key: value.clone() for key, value in module.state_dict().items()}
    given = work.Work(data.x, data.y, data.test_x, data.test_y, torch.empty(0), torch.empty(0), initial, meta)
    settings = ct.load(config(given), ["backend.trainer=loop"])
    made = assemble(
        settings, model=module, dataset=dataset(data.x, data.y, data.test_x, data.test_y, data.classes)
    )
    clients = made.population.clients
    rows = [made.population.split(client)[0] - index * work.SAMPLES for index, client in enumerate(clients)]
    cohorts, orders = [], []
    for round in range(made.schedule.rounds):
        cohort = made.schedule.draw(clients, work.COHORT, round)
        cohorts.append([clients.index(client) for client in cohort])
        local = made.local.config("samples")(round)
        tasks = [Task(0, client, round, round, None, config=local) for client in cohort]
        keys = [derive(task_key(made.trainer.seed, task), "batches") for task in tasks]
        drawn = [np.concatenate(list(rows_of(work.SAMPLES, local, key))) for key in keys]
        orders.append(
            [rows[clients.index(client)][order] for client, order in zip(cohort, drawn, strict=True)]
        )
    tensors = {
        "x": data.x,
        "y": data.y,
        "test_x": data.test_x,
        "test_y": data.test_y,
        "cohorts": torch.tensor(cohorts),
        "orders": torch.from_numpy(np.array(orders)),
    }
    meta |= {
        "parameters": sum(each.numel() for each in module.parameters()),
        "flops": flops(module, data.x[0], data.y[0]),
        "initial_loss": given.test_loss(given.module()),
        "torch": torch.__version__,
        "coterie": ct.__version__,
    }
    work.write(folder, tensors, initial, meta)
    print(json.dumps(meta))


if __name__ == "__main__":
    main()

"""Flower: its Ray simulation engine, one actor a core, alive across rounds; its own FedAvg strategy.

    python on_flower.py WORK '{"actors": 2}'

There are as many virtual nodes as clients a round; the message says whose data a node trains on. That is the
least work for the engine, which polls every node there is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

OPTIONS = json.loads(sys.argv[2])
os.environ |= {
    "BENCH_WORK": sys.argv[1],
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's default, 15, would let anything else go first
}

import work  # noqa: E402
from flower_client import app as client  # noqa: E402
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from gate import Gate  # noqa: E402

GIVEN = work.read(Path(sys.argv[1]))
GATE = Gate(GIVEN.allotments)
server = ServerApp()


class Dealt(FedAvg):
    """FedAvg that asks every node, and names the place in the cohort whose data it trains on."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        del config
        return [
            Message(
                content=RecordDict(
                    {"arrays": arrays, "config": ConfigRecord({"round": server_round - 1, "place": place})}
                ),
                message_type="train",
                dst_node_id=node,
            )
            for place, node in enumerate(grid.get_node_ids())
        ]


@server.main()
def main(grid: Grid, context: Context) -> None:  # noqa: ARG001  Flower's signature
    module = GIVEN.module()

    def after_round(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        del arrays
        if round == 0:
            while len(list(grid.get_node_ids())) < work.COHORT:
                time.sleep(0.05)
            GATE.open()
        else:
            GATE.tick()
        return None

    result = Dealt(fraction_evaluate=0.0, min_train_nodes=work.COHORT).start(
        grid=grid,
        initial_arrays=ArrayRecord(module.state_dict()),
        num_rounds=sum(GIVEN.allotments),
        evaluate_fn=after_round,
    )
    module.load_state_dict(result.arrays.to_torch_state_dict())
    GATE.tell(loss=GIVEN.test_loss(module))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=work.COHORT,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": OPTIONS["actors"], "include_dashboard": False},
        },
    )

"""Flower's half of the benchmark: rounds in which clients add one to a small model, timed by the server."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:  # noqa: ARG001  Flower's signature
    (array,) = message.content["arrays"].to_numpy_ndarrays()
    content = {"arrays": ArrayRecord([array + 1]), "metrics": MetricRecord({"num-examples": 1, "loss": 0.0})}
    return Message(RecordDict(content), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config, ends = context.run_config, []

    def after_round(round: int, arrays: ArrayRecord) -> MetricRecord:  # noqa: ARG001
        ends.append(time.time())
        return MetricRecord({"round": round})

    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=config["sites"], min_available_nodes=config["sites"]
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(config["numbers"], dtype=np.float32)]),
        num_rounds=config["rounds"],
        evaluate_fn=after_round,
    )
    Path(config["out"]).write_text(json.dumps(ends))

"""Flower's client: importable by name, so Ray sends a reference to it. The actor keeps data and model."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
import work
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp


@cache
def kept() -> tuple[work.Work, torch.nn.Module]:
    """The work and one module, once an actor."""
    torch.set_num_threads(1)
    given = work.read(Path(os.environ["BENCH_WORK"]))
    return given, given.module()


def train(message: Message, context: Context) -> Message:  # noqa: ARG001  Flower's signature
    """One local epoch from the weights in the message."""
    given, module = kept()
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    config = message.content["config"]
    x, y = given.examples(config["round"], config["place"])
    mean = work.epoch(module, torch.optim.SGD(module.parameters(), lr=given.lr), x, y)
    metrics = MetricRecord({"num-examples": len(y), "loss": mean})
    return Message(
        RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics}), reply_to=message
    )


app = ClientApp()
app.train()(train)

"""The training of experiment.toml: what a client does with the model that the server sent."""

import torch
from torch import nn


def fit(model, data, context):
    """SGD with a cosine schedule, which the built-in trainer does not have."""
    x, y = data.train
    config = context.config
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    steps = config["epochs"] * -(-len(y) // config["batch_size"])
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros(())
    for _ in range(config["epochs"]):
        for rows in torch.randperm(len(y)).split(config["batch_size"]):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            decay.step()
    return {"loss": float(loss)}

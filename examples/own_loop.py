"""A site inside your own training script; alone, or under torchrun with several ranks.

    COTERIE_SERVER=fl.example.org:7443 COTERIE_SITE=./hospital-a python examples/own_loop.py

The run's config names data at sites (docs/guide/deployment.md): inputs [1, 8, 8], ten classes, this site
among `sites`, and model = { kind = "mlp", hidden = 32 }.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import coterie

digits = load_digits()
x = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
y = torch.tensor(digits.target)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
names = list(model.state_dict())

with coterie.client() as federation:
    for task in federation:
        model.load_state_dict(dict(zip(names, task.params.values(), strict=True)))
        optimizer = torch.optim.SGD(model.parameters(), lr=task.config["lr"])
        for batch in torch.randperm(len(y)).split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
        state = dict(zip(task.params, model.state_dict().values(), strict=True))
        task.reply(state, weight=len(y), metrics={"loss": loss.item()})
        print(f"round {task.round + 1}: loss {loss.item():.3f}", flush=True)

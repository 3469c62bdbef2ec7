"""The starter project that `coterie init` writes: a commented config and a small model."""

from __future__ import annotations

from pathlib import Path

from coterie.core.errors import ConfigError

EXPERIMENT = """\
# A federated experiment on one machine.      Run it:  coterie run experiment.toml
# Any key can be set from the command line:   coterie run experiment.toml --set schedule.rounds=5

name = "starter"                    # the results go to runs/starter-1, then runs/starter-2, ...
seed = 7                            # same seed, same bits: every random draw derives from it
compare = ["centralised", "local_only"]  # baselines: all data in one place; each client alone

[data]
dataset = "digits"                  # 1,797 digits of 8 x 8 pixels; `coterie data list` shows the others
partition = { kind = "dirichlet", clients = 20, alpha = 0.3 }  # alpha: 0.1 is very uneven, 100 almost even
holdout = 0.1                       # the part of its examples that each client keeps for its own test

[model]
kind = "model.py:Net"               # your own nn.Module, in model.py beside this file; or "mlp", "cnn", ...
hidden = 64                         # every other key is an argument of Net

[algorithm]
kind = "fedavg"                     # or "fedprox", "scaffold", "fedadam", ...
weighting = "samples"               # a client counts by its number of examples; or "uniform"
client = { optimizer = "sgd", lr = 0.1, epochs = 2, batch_size = 16 }  # what each client does in a round
server = { optimizer = "sgd", lr = 1.0 }  # how the server applies the averaged update

[schedule]
kind = "synchronous"                # wait for the whole cohort; or "buffered", "asynchronous", ...
rounds = 20                         # how often the server hands out the model
cohort = 10                         # how many of the clients train in a round

[backend]
kind = "inprocess"                  # simulate every client in this process
trainer = "auto"                    # "loop": one client after the other; "custom": your own fit

[run]
evaluate_every = 1                  # rounds between evaluations of the global model
checkpoint_every = 5                # rounds between checkpoints; `coterie run ... --resume` goes on from one
threads = 1                         # of the processor; another number may give other last bits
"""

MODEL = '''\
"""The model of experiment.toml: any nn.Module will do."""

import math

from torch import Tensor, nn


class Net(nn.Module):
    """One hidden layer: [b, ...] inputs to [b, outputs] scores.

    input_shape (of one example) and outputs come from the data set; the rest from [model].
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, hidden: int = 32) -> None:
        super().__init__()
        inputs = math.prod(input_shape)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
'''


def write(folder: Path) -> list[Path]:
    """Write the project's files into `folder`, which may exist; return their paths.

    Raises ConfigError, and writes nothing, when one of them is there already.
    """
    files = {folder / "experiment.toml": EXPERIMENT, folder / "model.py": MODEL}
    for path in files:
        if path.exists():
            raise ConfigError(f"{path}: is there already", "name another folder: coterie init DIR")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, "utf-8")
    return list(files)

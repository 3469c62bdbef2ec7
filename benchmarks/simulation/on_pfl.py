"""Apple's pfl: its simulated backend, federated averaging, PyTorch models.

    python on_pfl.py WORK '{"threads": 1, "processes": 1, "compile": false, "amp": false}'

Several processes are pfl's own: torch.distributed with gloo, set up as torchrun would. Users' data are
tensors in memory. pfl evaluates every user in the very first round (a warm-up round), and not again here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

OPTIONS = {"threads": 1, "processes": 1, "compile": False, "amp": False} | json.loads(sys.argv[2])


def launch() -> None:
    """Set the variables that pfl reads when it is imported, and start the other processes."""
    if OPTIONS["processes"] == 1 or "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"TORCHELASTIC_RUN_ID": "bench", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(OPTIONS["processes"]), "LOCAL_WORLD_SIZE": str(OPTIONS["processes"])}
    common |= {"GLOO_SOCKET_IFNAME": "lo"}
    for rank in range(OPTIONS["processes"] - 1, -1, -1):
        env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        if rank:
            subprocess.Popen(
                [sys.executable, *sys.argv], env=env, stdin=subprocess.DEVNULL, stdout=sys.stderr
            )
        else:
            os.environ.update(env)


launch()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import work  # noqa: E402
from gate import Gate  # noqa: E402
from pfl.aggregate.simulate import SimulatedBackend  # noqa: E402
from pfl.aggregate.weighting import WeightByDatapoints  # noqa: E402
from pfl.algorithm.base import NNAlgorithmParams  # noqa: E402
from pfl.algorithm.federated_averaging import FederatedAveraging  # noqa: E402
from pfl.callback.base import TrainingProcessCallback  # noqa: E402
from pfl.data.dataset import Dataset  # noqa: E402
from pfl.data.federated_dataset import FederatedDataset  # noqa: E402
from pfl.hyperparam import NNTrainHyperParams  # noqa: E402
from pfl.internal.ops import pytorch_ops  # noqa: E402
from pfl.metrics import Metrics, Weighted  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402


class Loss(torch.nn.Module):
    """The shared module with the two methods that pfl asks for."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return work.loss(self.module(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


class Tick(TrainingProcessCallback):
    """Tell the gate of each round; the other processes wait with the first between allotments."""

    def __init__(self, gate: Gate | None, allotments: list[int]) -> None:
        self.gate = gate
        self.ends = set(np.cumsum(allotments).tolist())

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:  # noqa: ARG002  pfl's signature
        self._wait(opening=True)
        return Metrics()

    def after_central_iteration(
        self,
        aggregate_metrics: Metrics,  # noqa: ARG002
        model: PyTorchModel,  # noqa: ARG002
        *,
        central_iteration: int,
    ) -> tuple[bool, Metrics]:
        if central_iteration + 1 in self.ends:
            self._wait(opening=False)
        elif self.gate:
            self.gate.tick()
        return False, Metrics()

    def _wait(self, *, opening: bool) -> None:
        if self.gate:
            (self.gate.open if opening else self.gate.tick)()
        if pytorch_ops.distributed.world_size > 1:
            torch.distributed.barrier()


def main() -> None:
    torch.set_num_threads(OPTIONS["threads"])
    np.random.seed(0)  # noqa: NPY002  pfl draws from it
    given = work.read(Path(sys.argv[1]))
    allotments = given.allotments
    first = pytorch_ops.distributed.global_rank == 0
    gate = Gate(allotments) if first else None
    module = given.module()
    model = PyTorchModel(
        Loss(module),
        torch.optim.SGD,
        torch.optim.SGD(module.parameters(), lr=1.0),
        amp_dtype=torch.bfloat16 if OPTIONS["amp"] else None,
    )
    if OPTIONS["compile"]:
        model._model.module = torch.compile(module)
    turns = iter([(round, place) for round in range(sum(allotments)) for place in range(work.COHORT)])
    users = FederatedDataset(lambda turn: Dataset(given.examples(*turn)), lambda: next(turns))
    backend = SimulatedBackend(users, users, postprocessors=[WeightByDatapoints()])
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=sum(allotments),
            evaluation_frequency=10**9,
            train_cohort_size=work.COHORT,
            val_cohort_size=None,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=given.lr, local_batch_size=work.BATCH
        ),
        model_eval_params=None,
        callbacks=[Tick(gate, allotments)],
        send_metrics_to_platform=False,
    )
    if gate:
        gate.tell(loss=given.test_loss(module))


if __name__ == "__main__":
    main()
